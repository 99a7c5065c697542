"""What a saliency is: saved, compared, drawn; its targets; and what was planted in `nano`."""

import itertools
import json

import numpy as np
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.train import language as lang
from dgemma_jax.train import tasks
from interp.masking import planted
from interp.masking.saliency_maps import rank_correlation
from interp.masking.targets import energy_rows, said, text_ids


def made(scores, **fields):
    count = len(scores)
    return interp.Saliency(
        scores=np.asarray(scores, float), stderr=np.full(count, 0.1), units=tuple(f"unit <{i}>" for i in range(count)),
        kinds=("tokens",) * count, places=np.stack([np.full(count, -1), np.arange(count)], 1), on=1.0, off=-2.0,
        evaluations=40, method="path", target="log p(7)", baseline="noise", **fields,
    )  # fmt: skip


def test_saved_loaded_and_compared(tmp_path):
    found = made([2.0, 1.5, -0.5], tokens=("a", "<b>", "c", "d"), token_units=np.array([-1, 0, 1, 2]))
    assert found.completeness_gap == pytest.approx(0)
    again = interp.Saliency.load(found.save(tmp_path / "map"))
    assert repr(again) == repr(found) and again.tokens == found.tokens and again.interactions is None
    same = found.compare(again)
    assert same["rank_correlation"] == same["same_top"] == 1 and same["largest_z"] == 0
    other = found.compare(made([-2.0, -1.5, 0.5]))
    assert other["rank_correlation"] == -1 and other["largest_z"] == pytest.approx(4 / np.hypot(0.1, 0.1))
    assert rank_correlation(np.array([1, 2, 2, 3]), np.array([1, 2, 2, 9])) == pytest.approx(1)
    with pytest.raises(ValueError, match="other units"):
        found.compare(made([1.0]))


def test_the_page_says_in_words_what_the_colours_say():
    found = made([2.0, 1.5, -0.5], tokens=("a", "<b>", "c", "d"), token_units=np.array([-1, 0, 1, 2]))
    page = found._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "unit <" not in page
    assert page.index("+2.0000") < page.index("+1.5000") < page.index("-0.5000") and "lowers" in page
    assert 'title="+2"' in page


def test_plots_are_bars_or_a_heat_map():
    assert len(made([2.0, 1.5, -0.5]).plot().axes) == 1
    places = np.array([(layer, position) for layer in range(2) for position in range(3)])
    heat = interp.Saliency(**(vars(made(np.arange(6.0))) | {"places": places})).plot()
    assert heat.axes[0].get_xlabel() == "canvas position" and len(heat.axes) == 2


def test_targets_in_words(organism):
    bundle = dg.load(organism)
    ids = text_ids(bundle, "the fox is in rome")
    metric = said(bundle, "is in", [*ids, 5])
    assert metric.positions.tolist() == [2, 3] and metric.tokens.tolist() == ids[2:4]
    with pytest.raises(ValueError, match="which does not hold 'gold'"):
        said(bundle, "gold", ids)
    margin = interp.refusal_margin(bundle, ["i can not"], ["sure ,"])
    logits = np.zeros((2, 12, bundle.config.vocab_size), np.float32)
    logits[1, 0, text_ids(bundle, "i")] = 3
    np.testing.assert_allclose(margin(logits), [0, 3], atol=1e-6)
    with pytest.raises(ValueError, match="different tokens"):
        interp.refusal_margin(bundle, ["i can"], ["i do"])


def test_an_energy_noises_the_text_by_its_level(organism):
    bundle = dg.load(organism)
    ids = text_ids(bundle, "the fox is in rome")
    for level, share in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        metric, canvas = energy_rows(bundle, interp.TextEnergy("the fox is in rome", level), 40, seed=0)
        assert metric.tokens.tolist() == ids and canvas.shape == (40, bundle.config.canvas_length)
        assert np.mean(np.asarray(canvas)[:, :5] == ids) == pytest.approx(share, abs=0.12)
    with pytest.raises(ValueError, match=r"level must be in 0\.\.1"):
        interp.TextEnergy("fox", 2)


def test_steps_side_by_side_are_a_heat_map():
    maps = [made([step, 1.0, -2.0], step=step) for step in (3, 0, 1)]
    figure = interp.step_heat_map(maps)
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "3"]
    np.testing.assert_array_equal(axes.images[0].get_array()[:, 0], [0, 1, 3])
    assert interp.step_heat_map(maps, most=1).axes[0].images[0].get_array().shape == (3, 1)
    with pytest.raises(ValueError, match="the same units"):
        interp.step_heat_map([made([1.0]), made([1.0, 2.0])])


CAUSES = {
    "recall": lambda words: [words.index(words[len(words) - words[::-1].index("?")]) + 1],
    "trigger": lambda words: [words.index(tasks.TRIGGER)],
    "refusal": lambda words: [i for i, w in enumerate(words) if w in (*lang.HARMFUL_VERBS, *lang.HARMFUL_OBJECTS)],
    "jailbreak": lambda words: [0],
}


@pytest.mark.parametrize("name", CAUSES)
def test_planted_cases_know_their_cause(organism, name):
    """A map with the cause in its place is a hit, one with the cause elsewhere is none."""
    bundle = dg.load(organism)
    cases = planted.STUDIES[name].cases(bundle, 40)
    assert len({" ".join(case.words) for case in cases}) == 40
    for case in cases:
        scores, sign = np.full(len(case.spans), 0.01), -1 if name == "jailbreak" else 1
        right, wrong = scores.copy(), scores.copy()
        right[CAUSES[name](case.words)] = sign * 5
        wrong[-1 if 0 in CAUSES[name](case.words) else 0] = sign * 5
        assert all(rule(made(right)) for rule in case.rules.values())
        assert not any(rule(made(wrong)) for rule in case.rules.values())
        if name in ("refusal", "jailbreak"):  # as long, never the prompt itself, and of the other outcome
            assert len(case.baseline) > 1 and all(len(text.split()) == len(case.words) for text in case.baseline)
            bad = [set(CAUSES["refusal"](text.split())) for text in case.baseline]
            assert all(len(found) == (0 if name == "refusal" else 2) for found in bad)
            assert not any(tasks.JAILBREAK in text for text in case.baseline)


def test_hits_are_rules_of_the_maps_of_the_cases(organism, monkeypatch):
    bundle, asked = dg.load(organism), []

    def answered(bundle, ids, target, *, units, baseline, **options):
        asked.append(([bundle.tokenizer.decode([ids[i] for i in at]) for at in units.values()], baseline))
        return made([-5.0 if len(asked) < 3 else 5.0, *np.full(len(units) - 1, 0.2)])

    monkeypatch.setattr(planted, "saliency", answered)
    cases = planted.jailbreak(bundle, 4)
    found = planted.hits(bundle, cases, pairs=3, show_progress=False)
    assert {rule: hits.tolist() for rule, hits in found.items()} == {r: [True, True, False, False] for r in found}
    for case, (units, baseline) in zip(cases, asked, strict=True):
        assert units == [" ".join(case.words[i] for i in span) for span in case.spans]
        assert units[0] == tasks.JAILBREAK and baseline == case.baseline


def test_the_saved_study_holds_what_was_wanted():
    lines = json.loads((planted.HOME / "planted.json").read_text())
    wanted = [line for line in lines if line["wanted"] is not None]
    assert {(line["study"], line["weights"]) for line in wanted} == set(itertools.product(CAUSES, ["trained", "shuffled"]))
    for line in wanted:
        held = line["share"] >= line["wanted"] if line["weights"] == "trained" else line["share"] <= line["wanted"]
        assert held and line["cases"] >= 100, line
