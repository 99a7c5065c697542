"""What a saliency is: saved, compared, drawn; its targets; and what was planted in `nano`."""

import numpy as np
import pytest

import dgemma_jax as dg
import interp
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


def test_nano_recall_is_found_and_shuffled_weights_lose_it():
    bundle = dg.load("nano")
    cases = planted.recall(bundle, 3)
    assert planted.hits(bundle, cases, pairs=2, show_progress=False).sum() >= 2
    assert planted.hits(planted.shuffled(bundle), cases, pairs=2, show_progress=False).sum() <= 1
