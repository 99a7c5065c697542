"""The masked game against the interventions that it stands for, on an untrained model."""

import jax
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion.generate import prefill_prompts
from dgemma_jax.diffusion.sampler import denoise_step
from interp.masking import masked_game as games
from interp.masking.masked_diffusion import masked_game
from interp.masking.targets import energy_rows
from interp.masking.units import content, groups_of, units_of

PROMPT = "recall a 4 , b 7 ? b"
METRIC = interp.LogProb([1, 2], [20, 30])
ALL = ("tokens", "cache", "soft", "canvas", "heads", "residuals", "experts", "mlps", "norms")


@pytest.fixture(scope="module")
def deep(tokenizer):
    """Two layers, for places within them and their caches."""
    return oracles.worded(tokenizer, "sliding_attention", "full_attention")


@pytest.fixture(scope="module")
def bundle(tokenizer):
    """One layer, for all else."""
    return oracles.worded(tokenizer, "full_attention")


@pytest.fixture(scope="module")
def tokens(bundle):
    """The game of prompt tokens under noise."""
    return masked_game(bundle, PROMPT, METRIC, rows_at_once=16, draws=3)


@pytest.fixture(scope="module")
def everything(deep):
    """The product of many kinds."""
    return masked_game(deep, PROMPT, METRIC, units=ALL, layers=[1], rows_at_once=4, draws=2)


def prompt_ids(bundle, words):
    return bundle.tokenizer.chat([{"role": "user", "content": words}])


def one_step(bundle, ids, moment, soft=None, canvas=None, model=None, metric=METRIC):
    """The metric of the step that follows a moment, with another prompt, canvas or S."""
    model = bundle.model if model is None else model
    cache = prefill_prompts(bundle.model, [ids], 1)
    state = moment.state
    state = state if soft is None else state.replace(soft=soft)
    state = state if canvas is None else state.replace(canvas=canvas)
    return float(metric(_logits(model, state, cache, moment.sampler))[0])


@jax.jit
def _logits(model, state, cache, sampler):
    return denoise_step(model, state, cache, sampler)[1].logits


def moment_of(game):
    run = game.given.run
    return type("Moment", (), {"state": run.state, "sampler": game.given.sampler})


def test_all_on_is_the_run_itself(tokens, everything):
    ids = prompt_ids(tokens.bundle, PROMPT)
    for game in (tokens, everything):
        plain = one_step(game.bundle, ids, moment_of(game))
        found = game.values(np.ones((3, len(game.names))), np.arange(3))
        np.testing.assert_allclose(found, plain, atol=1e-6)


def test_a_token_that_is_off_is_the_prompt_with_the_noise_token(bundle, tokens):
    ids = prompt_ids(bundle, PROMPT)
    masks, wanted = np.ones((3, len(tokens.names))), []
    for row, (draw, units) in enumerate([(0, [2]), (1, [0, 5]), (2, range(len(tokens.names)))]):
        masks[row, list(units)] = 0
        at = np.flatnonzero(np.isin(np.asarray(tokens.given.cells["token_embed"]), list(units)))
        changed = np.array(ids)
        changed[at] = np.asarray(tokens.given.pool["token_embed"])[draw, at]
        wanted.append(one_step(bundle, changed.tolist(), moment_of(tokens)))
    np.testing.assert_allclose(tokens.values(masks, np.arange(3)), wanted, atol=1e-6)
    assert np.ptp(wanted) > 1e-3


def test_units_of_each_kind_do_what_they_say(deep, everything):
    """Canvas rows, S rows and heads off, against the same thing done by hand."""
    game, names, kinds = everything, list(everything.names), np.array(everything.units.kinds)
    given, ids = game.given, prompt_ids(deep, PROMPT)
    state, pool = given.run.state, given.pool
    canvas = state.canvas.at[0, 3].set(np.asarray(pool["canvas"])[1, 3])
    soft = state.soft.at[0, 3].set(pool["soft"][1, 3])
    head = interp.edit(
        deep, "layers.1.attn_z", interp.Patch(pool["layers.1.attn_z"][1:2]), heads=[1], sampler=given.sampler
    ).model
    wanted = [
        one_step(deep, ids, moment_of(game), canvas=canvas),
        one_step(deep, ids, moment_of(game), soft=soft),
        one_step(deep, ids, moment_of(game), model=head),
    ]
    masks = np.ones((3, len(names)))
    for row, name in enumerate(("canvas row 3", "S row 3", "layer 1 head 1")):
        masks[row, names.index(name)] = 0
    found = game.values(masks, np.ones(3))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    # Every kind acts: all units of it off changes the target.
    masks = np.stack([kinds != kind for kind in ALL]).astype(float)
    plain = game.values(np.ones((1, len(names))), [0])
    assert (np.abs(game.values(masks, np.zeros(len(ALL))) - plain) > 1e-7).all()


def test_any_masks_prompts_and_targets_share_one_program(bundle, tokens):
    tokens.values(np.ones((1, len(tokens.names))), [0])
    before = games._stepped._cache_size()
    for prompt, metric in (("copy : red fox", METRIC), ("sort : q d x", interp.LogProb([0, 3], [5, 9]))):
        other = masked_game(bundle, prompt, metric, rows_at_once=16, draws=3, seed=4)
        rng = np.random.default_rng(0)
        other.values(rng.random((40, len(other.names))) < 0.5, rng.integers(0, 3, 40))
    assert games._stepped._cache_size() == before


def test_path_completeness_on_the_model(bundle, tokens):
    found = interp.saliency(bundle, PROMPT, METRIC, rows_at_once=16, draws=3, budget=80)
    assert found.completeness_gap < 1e-4
    assert found.units == tokens.names and found.evaluations <= 80
    assert found.tokens[3] == "recall" and found.token_units[3] == 0 and found.token_units[0] == -1


def test_generation_and_window_follow_the_run(bundle):
    """All on, the draft is the run's own: at the end, and after three steps."""
    record = dg.Record(tokens=False, argmax=True, accepted=False, entropy=False, top_k=0)
    run = dg.generate(bundle, PROMPT, max_new_tokens=1, record=record).trajectory
    for drafts, options in ((run.committed[0], dict(scope="generation")),
                            (run.argmax[0, 2], dict(scope="window", window=3))):  # fmt: skip
        said = interp.Says([0, 1, 2, 3], drafts[0, :4])
        game = masked_game(bundle, PROMPT, said, rows_at_once=4, draws=2, **options)
        masks = np.ones((2, len(game.names)))
        masks[1] = 0
        found = game.values(masks, [0, 0])
        assert found[0] == 1.0 and found[1] < 1.0
    with pytest.raises(ValueError, match="no derivative"):
        game.gradients(masks, [0, 0])


def test_settled_is_the_first_step_whose_draft_holds_the_text(bundle, tokens):
    record = dg.Record(tokens=False, argmax=True, accepted=False, entropy=False, top_k=0)
    for seed in range(20):
        run = dg.generate(bundle, PROMPT, seed, max_new_tokens=1, record=record)
        answer, drafts = run.tokens[0], run.trajectory.argmax[0, : int(run.trajectory.num_steps[0, 0]), 0]
        text = bundle.tokenizer.decode(answer[:2])
        held = [(draft[:2] == answer[:2]).all() for draft in drafts]
        if len(text.split()) == 2 and not held[0]:
            break
    before = games._stepped._cache_size()
    game = masked_game(bundle, PROMPT, text, step="settled", seed=seed, rows_at_once=16, draws=3)
    value = game.values(np.ones((1, len(game.names))), [0])[0]
    assert games._stepped._cache_size() == before, "the step and the target are data"
    at = int(np.argmax(np.asarray(game.given.first)))
    assert at == held.index(True) > 0
    moment = run.trajectory.moment(0, at)
    wanted = one_step(bundle, prompt_ids(bundle, PROMPT), moment, metric=interp.LogProb([0, 1], answer[:2]))
    assert value == pytest.approx(wanted, abs=1e-5)

    maps = interp.saliency_by_step(bundle, PROMPT, text, [0, at], seed=seed, rows_at_once=16, draws=3, budget=50)
    assert [found.step for found in maps] == [0, at] and maps[1].on == pytest.approx(wanted, abs=1e-5)
    assert games._stepped._cache_size() == before
    with pytest.raises(ValueError, match="steps"):
        interp.saliency_by_step(bundle, PROMPT, text, [99])


def test_the_energy_of_a_text_is_read_from_its_noised_canvases(bundle):
    energy, ids = interp.TextEnergy("red fox", 0.5), prompt_ids(bundle, PROMPT)
    game = masked_game(bundle, PROMPT, energy, rows_at_once=16, draws=4, seed=2)
    metric, canvases = energy_rows(bundle, energy, 4, seed=2)
    wanted = [one_step(bundle, ids, moment_of(game), canvas=canvas[None], metric=metric) for canvas in canvases]
    found = game.values(np.ones((4, len(game.names))), np.arange(4))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(found) > 1e-3
    whole = interp.saliency(bundle, PROMPT, energy, rows_at_once=16, draws=4, seed=2, budget=60)
    assert whole.target == "TextEnergy at level 0.5" and whole.off != pytest.approx(whole.on)


def test_finished_calls_are_kept_and_a_second_run_asks_nothing(bundle, tmp_path, monkeypatch):
    options = dict(rows_at_once=16, draws=3, budget=60, keep=tmp_path)
    first = interp.saliency(bundle, PROMPT, METRIC, **options)
    monkeypatch.setattr(games, "_stepped", None)
    again = interp.saliency(bundle, PROMPT, METRIC, **options)
    np.testing.assert_array_equal(first.scores, again.scores)
    with pytest.raises(ValueError, match="another sweep"):
        interp.saliency(bundle, PROMPT, interp.LogProb([1], [7]), **options)


def test_units_of_text(deep):
    ids = prompt_ids(deep, "copy : red fox . say tom now")
    assert [name for name, _ in groups_of(deep, ids, "words")] == ["copy", ":", "red", "fox", ".", "say", "tom", "now"]
    assert len(groups_of(deep, ids, "sentences")) == 2
    assert groups_of(deep, ids, "turns") == [("copy : red fox . say tom now", list(range(3, 11)))]
    assert content(deep, ids) == list(range(3, 11))
    spans = units_of(deep, ids, {"head": [3, 4], "rest": range(5, 9)})
    assert spans.names == ("head", "rest") and (spans.cells["token_embed"] >= 0).sum() == 6
    both = units_of(deep, ids, ("cache", "canvas", "heads"), layers=[1])
    assert len(both) == 8 + 12 + deep.config.num_heads and both.cells["layers.1.attn_z"].max() == len(both) - 1


def test_a_cached_position_that_is_off_has_the_keys_and_values_of_noise(deep, everything):
    game, ids = everything, prompt_ids(deep, PROMPT)
    cache = prefill_prompts(deep.model, [ids], 1)
    noise = cache.replace(layers=jax.tree.map(lambda x: x[1:2], game.given.pool["cache"]))
    patched = jax.jit(lambda own, donor: interp.edit_cache(own, interp.Patch(donor), positions=[5]))(cache, noise)
    wanted = METRIC(_logits(deep.model, game.given.run.state, patched, game.given.sampler))[0]
    masks = np.ones((1, len(game.names)))
    masks[0, game.names.index("cached 4 @5")] = 0
    np.testing.assert_allclose(game.values(masks, [1]), float(wanted), atol=2e-6)


def test_constant_baselines_have_one_draw(deep):
    for baseline in ("mean", "zero"):
        game = masked_game(deep, PROMPT, METRIC, units="cache", baseline=baseline)
        keys = np.asarray(game.given.pool["cache"][0].k)
        assert game.draws == 1 and keys.shape[0] == 1
        assert (keys == 0).all() if baseline == "zero" else np.ptp(keys, 2).max() == 0 and np.abs(keys).max() > 0


def test_bad_input_is_refused(bundle):
    def ask(match, target=METRIC, **options):
        with pytest.raises(ValueError, match=match):
            interp.saliency(bundle, PROMPT, target, **options)

    ask("makes no units", units={})
    ask("no units 'letters'", units="letters")
    ask("share cells", units=("tokens", "words"))
    ask("out|positions in 0", units={"a": [99]})
    ask("cannot be written", target="zebra-crossing")
    ask("which does not hold", target="gold gold gold gold gold")
    ask("one canvas holds", target=" ".join(["fox"] * 40))
    ask("target is empty", target=" ")
    ask("no setting", margin=2)
    ask("method must be", method="lime")
    ask("scope must be", scope="all")
    ask("baseline must be", baseline="blur")
    ask("positions correspond", baseline=["copy : red"])
    ask("divided by zero", units="norms", baseline="zero")
    ask("'settled' needs a text", step="settled")
