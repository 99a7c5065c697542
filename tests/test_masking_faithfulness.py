"""The usual methods of saliency, on functions with known answers and against derivatives of the model; tests of maps:
curves by hand, what shuffled weights and other targets do, the table; and the panel of the page. One file, so that all
of it shares programs: whatever is asked of the model is asked of prompt tokens, 64 rows at a time."""

import dataclasses
import json

import jax
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from interp.masking import faithfulness_suite, input_values
from interp.masking.faithfulness_cases import as_cases, resampled
from interp.masking.game import Counted, FunctionGame
from interp.masking.input_values import by_unit, gradients_at, own_values
from interp.masking.masked_diffusion import BASELINES, METHODS, _record, masked_game
from interp.masking.ranking_curves import curves, order_of
from interp.masking.rollout import _steps
from interp.masking.sanity_checks import other_target, randomized
from interp.masking.single_masks import occlusion, rise
from interp.masking.straight_paths import expected_gradients, integrated_gradients
from interp.panels import PANELS
from interp.saliency_panel import saliency_data, saliency_panel

PROMPT = "recall a 4 , b 7 ? b"
METRIC = interp.LogProb([1, 2], [20, 30])
EVERY = ("tokens", "cache", "heads", "mlps")
NAMES = tuple("abcde")
WEIGHTS = np.array([4.0, 3.0, 2.0, 1.0, -1.0])
POSITIVE = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
ADDITIVE = FunctionGame(lambda m: m @ WEIGHTS.astype(np.float32), NAMES)


# ---- functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [occlusion, integrated_gradients, expected_gradients])
def test_an_additive_function_is_read_exactly(estimator):
    found = estimator(Counted(ADDITIVE))
    np.testing.assert_allclose(found.scores, WEIGHTS, atol=1e-5)
    assert found.on == pytest.approx(9) and found.off == 0


def test_integrated_gradients_share_a_product_and_occlusion_does_not():
    game = FunctionGame(lambda m: m[:, 0] * m[:, 1] ** 2, NAMES[:2])
    np.testing.assert_allclose(integrated_gradients(game).scores, [1 / 3, 2 / 3], atol=1e-3)
    found = expected_gradients(game, budget=2000)
    assert (np.abs(found.scores - [1 / 3, 2 / 3]) < 4 * found.stderr).all()
    np.testing.assert_allclose(occlusion(game).scores, [1, 1])


def test_rise_is_the_mean_target_given_the_unit():
    found = rise(Counted(ADDITIVE), budget=4000, seed=1)
    wanted = WEIGHTS.sum() / 2 + WEIGHTS / 2  # others are on half of the time
    assert (np.abs(found.scores - wanted) < 4 * found.stderr).all()


def test_methods_that_look_inside_refuse_a_function():
    for name in ("gradient_norm", "information_bottleneck", "attention_rollout"):
        with pytest.raises(ValueError, match="looks inside a model"):
            METHODS[name](Counted(ADDITIVE))
    for call, match in (
        (lambda: occlusion(ADDITIVE, budget=5), "5 units and the ends take 7"),
        (lambda: rise(ADDITIVE, share=1.0), "0 < share < 1"),
        (lambda: integrated_gradients(ADDITIVE, budget=2), "take 3 evaluations"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_curves_of_an_additive_function_are_its_partial_sums():
    game = Counted(FunctionGame(lambda m: 1 + m @ POSITIVE, NAMES))
    best = order_of(POSITIVE)
    found = curves(game, np.stack([best, best[::-1]]))
    np.testing.assert_allclose(found.insertion[0], [0, 0.4, 0.7, 0.9, 1, 1])
    np.testing.assert_allclose(found.deletion[0], [1, 0.6, 0.3, 0.1, 0, 0])
    np.testing.assert_allclose(found.areas[0], [0.7, 0.3, 0.3, 0.7])
    np.testing.assert_allclose(found.areas[1], [0.3, 0.7, 0.7, 0.3])  # the reverse
    np.testing.assert_allclose(found.alone, POSITIVE)
    assert (found.on, found.off) == (11, 1)
    # The top 1, 1, 1, 1 and 3 units of 5.
    np.testing.assert_allclose(found.comprehensiveness[0], np.mean([0.4] * 4 + [0.9]))
    np.testing.assert_allclose(found.sufficiency[0], np.mean([0.6] * 4 + [0.1]))
    np.testing.assert_allclose(found.on_grid(6)[0, 0], found.insertion[0])
    assert game.evaluations < 2 * 2 * 6 + 5  # shared masks are asked once


def test_signed_rankings_face_the_way_the_target_goes():
    """What makes a falling target fall is as well found as what makes its mirror image rise."""
    scores = np.array([4, -1, 3, 2, 0.5])
    rising, falling = (FunctionGame(lambda m, sign=sign: m @ (sign * scores), NAMES) for sign in (1, -1))
    orders = np.stack([order_of(scores), order_of(-scores)])
    wanted, found = curves(rising, orders[:1]), curves(falling, orders[[1, 0]]).facing([True, False])
    for name in ("insertion", "deletion", "areas", "comprehensiveness", "sufficiency"):
        np.testing.assert_allclose(getattr(found, name)[0], getattr(wanted, name)[0], atol=1e-6)
        # Magnitudes rank alike either way, and so do random orders.
        np.testing.assert_allclose(getattr(found, name)[1], getattr(wanted, name)[0], atol=1e-6)
    same = curves(rising, orders[:1])
    np.testing.assert_array_equal(same.facing([True]).insertion, same.insertion)


def test_curves_average_over_draws_and_a_target_that_does_not_change_has_none():
    class Noisy(FunctionGame):
        def values(self, masks, draws):
            return super().values(masks, draws) + np.array([-1.0, 1.0])[draws] * (1 - masks).sum(1)

    found = curves(Noisy(lambda m: m @ POSITIVE, NAMES, draws=2), [order_of(POSITIVE)])
    np.testing.assert_allclose(found.insertion[0], [0, 0.4, 0.7, 0.9, 1, 1])
    assert np.isnan(curves(FunctionGame(lambda m: 0 * m[:, 0], tuple("abc")), [[0, 1, 2]]).areas).all()


# ---- on a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tokenizer):
    """Two layers, for what depends on their order and kind."""
    return oracles.worded(tokenizer, "sliding_attention", "full_attention")


@pytest.fixture(scope="module")
def deep_game(deep):
    return masked_game(deep, PROMPT, METRIC)


@pytest.fixture(scope="module")
def bundle(tokenizer):
    """One layer, for all else."""
    return oracles.worded(tokenizer, "full_attention")


@pytest.fixture(scope="module")
def game(bundle):
    return masked_game(bundle, PROMPT, METRIC)


@pytest.fixture(scope="module")
def run(bundle):
    return dg.generate(bundle, [PROMPT], max_new_tokens=1, record=_record())


@pytest.mark.slow
def test_own_values_make_the_run_itself_and_their_gradient_is_the_models(deep, deep_game):
    """At every kind of place."""
    every = masked_game(deep, PROMPT, METRIC, units=EVERY, rows_at_once=2)
    own = own_values(every)
    values, grads = gradients_at(every, own, 1)
    plain = deep_game.values(np.ones((1, len(deep_game.names))), [0])
    np.testing.assert_allclose(values, plain, atol=1e-6)
    # Move one number of one embedding, and one of what the MLP writes: the target moves by the derivative.
    steepest = np.unravel_index(np.abs(grads["layers.0.mlp_out"][0]).argmax(), own["layers.0.mlp_out"].shape[1:])
    for place, at in (("token_embed", (4, 3)), ("layers.0.mlp_out", steepest)):
        moved = jax.tree.map(lambda x: np.repeat(x[:1], 2, 0), own)
        moved[place][(slice(None), *at)] += [1e-2, -1e-2]
        up, down = gradients_at(every, moved, 2)[0]
        assert grads[place][(0, *at)] == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=1e-6), place
    assert np.abs(grads["layers.0.mlp_out"]).max() > 1e-3
    counts, kinds = by_unit(every, jax.tree.map(np.ones_like, grads))[0], np.array(every.units.kinds)
    config = deep.config
    assert (counts[kinds == "tokens"] == config.embed_dim).all()
    assert (counts[kinds == "mlps"] == config.embed_dim * config.canvas_length).all()
    assert (counts[kinds == "heads"] % config.canvas_length == 0).all() and (counts > 0).all()


@pytest.mark.slow
def test_gradient_x_input_is_the_slope_of_the_mask_from_zero(deep, deep_game):
    """Where zero stands in, x . df/dx is the derivative of the mask: two ways to the same number.

    In one layer it is 0: all that reads the embedding norms it first.
    """
    zero = masked_game(deep, PROMPT, METRIC, baseline="zero")
    shift, count = 1e-2, len(deep_game.names)
    up, down = (zero.values(1 + side * shift * np.eye(count), np.zeros(count)) for side in (1, -1))
    found = METHODS["gradient_x_input"](deep_game)
    np.testing.assert_allclose(found.scores, (up - down) / (2 * shift), rtol=2e-2, atol=1e-4)
    assert np.abs(found.scores).max() > 1e-3


@pytest.mark.slow
def test_rollout_rolls_attention_back(deep, deep_game):
    prompt, length = int(np.asarray(deep_game.given.valid).sum()), deep.config.canvas_length
    rolled = np.eye(prompt + length)
    for pattern in _steps(deep_game, prompt, length):
        np.testing.assert_allclose(pattern.sum(1), 1, atol=1e-5)
        assert not pattern[:prompt, prompt:].any() and not np.triu(pattern[:prompt, :prompt], 1).any()  # causal
        assert (pattern[prompt:, prompt:] > 0).all()
        rolled = (pattern + np.eye(len(pattern))) / 2 @ rolled
    read = rolled[prompt + np.array([1, 2])].mean(0)  # the rows of the metric
    found = METHODS["attention_rollout"](deep_game)
    np.testing.assert_allclose(found.scores, read[3 : 3 + len(found.scores)], atol=1e-9)
    given = dataclasses.replace(deep_game.given, cells={"soft": np.zeros(length, int)})
    with pytest.raises(ValueError, match="knows positions of prompt and canvas"):
        METHODS["attention_rollout"](dataclasses.replace(deep_game, given=given))


@pytest.mark.slow
def test_bits_are_paid_for(game):
    """At a higher price fewer bits pass."""
    cheap, dear = (METHODS["information_bottleneck"](game, beta=beta, budget=42) for beta in (0.1, 100.0))
    assert (cheap.scores >= 0).all() and dear.scores.sum() < cheap.scores.sum()


@pytest.mark.heavy
def test_every_baseline_has_the_interface_and_shares_programs(bundle, game):
    assert len(BASELINES) == 9
    gradients_at(game, own_values(game), 1)
    before = input_values._differentiated._cache_size()
    for name in BASELINES:
        found = interp.saliency(bundle, "sort : q d x", interp.LogProb([0, 3], [5, 9]), name, budget=44)
        assert found.method == name and np.isfinite(found.scores).all() and found.evaluations > 0, name
    assert input_values._differentiated._cache_size() == before


@pytest.mark.heavy
def test_a_moment_stands_for_its_step(bundle, run):
    of_step, of_moment = (masked_game(bundle, PROMPT, METRIC, step=step) for step in (2, run.trajectory.moment(0, 2)))
    masks = np.eye(len(of_step.names))
    draws = np.zeros(len(masks), int)
    np.testing.assert_allclose(of_step.values(masks, draws), of_moment.values(masks, draws), atol=1e-6)
    with pytest.raises(ValueError, match="must be of a run of this prompt"):
        masked_game(bundle, "copy : red", METRIC, step=run.trajectory.moment(0, 1))
    with pytest.raises(ValueError, match="give a metric"):
        masked_game(bundle, PROMPT, "red", step=run.trajectory.moment(0, 1))


# ---- tests of maps ---------------------------------------------------------------------------------


CASES = [
    (PROMPT, METRIC),
    interp.FaithfulnessCase("sort : q d x", METRIC, baseline=["sort : a b c", "sort : q q q"] * 2, task="sort",
                            planted=lambda found: found.scores[0] > -np.inf),
]  # fmt: skip
TESTS = dict(methods=["path", "occlusion"], rankings=3, budget=60, sanity_cases=1, layers=[0, 2])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def tested(deep, kept):
    """Two cases; the planted cause of the second is its first unit, by decree."""
    return interp.faithfulness(deep, CASES, **TESTS, keep=kept)


def test_finished_cases_are_not_made_again(tested, deep, kept, monkeypatch):
    made = []
    real = faithfulness_suite.maps_of
    monkeypatch.setattr(faithfulness_suite, "maps_of", lambda *args: made.append(args) or real(*args))
    again = interp.faithfulness(deep, CASES, **TESTS, keep=kept)
    assert not made and repr(again) == repr(tested)
    with pytest.raises(ValueError, match="another sweep"):
        interp.faithfulness(deep, CASES, **TESTS | {"budget": 61}, keep=kept)
    (kept / "1-case.npz").unlink()  # cut off before it was written
    again = interp.faithfulness(deep, CASES, **TESTS, keep=kept)
    assert len(made) == 1
    np.testing.assert_array_equal(again.areas, tested.areas)


def test_cases_that_tell_nothing_are_left_out(tested):
    assert tested.tells[:, :3].all() and not tested.tells[0, 3]  # the first has no contrast
    change = np.where(np.isnan(tested.change), np.nan, [[1.0, -1.0, 1e-3, 1.0], [1.0, 0.5, 1.0, 1.0]])
    wild = np.where(np.arange(4)[:, None, None] == 2, 1e9 * tested.areas[:1], tested.areas[:1])
    found = dataclasses.replace(
        tested, change=change, areas=np.concatenate([wild, tested.areas[1:]]), tasks=("sort", "sort")
    )  # fmt: skip
    assert found.tells.tolist() == [[True, True, False, False], [True] * 4]
    for name in ("noise", "mean", "resample"):
        rows = [0, 1] if name != "resample" else [1]
        at = found.replacements.index(name)
        np.testing.assert_allclose(
            [row["insertion"] for row in found.rows(name)], tested.areas[rows, at, :, 0].mean(0), atol=1e-6
        )
    assert "resample, without 1 case(s)" in repr(found) and "contrast, without" not in repr(found)
    assert np.isnan(found.wins("path", "resample")[0]["low"])  # of one case


def test_the_table_holds_what_was_measured(tested, tmp_path):
    assert tested.areas.shape == (2, 4, 2, 4) and tested.random.shape == (2, 4, 3, 2)
    assert np.isnan(tested.areas[0, 3]).all() and np.isfinite(tested.areas[1]).all()  # only the second has a contrast
    assert np.isnan(tested.planted[0]).all() and (tested.planted[1] == 1).all()
    np.testing.assert_allclose(tested.areas[..., 2:], tested.areas[..., 1::-1])
    path, occlusion = tested.rows("noise")
    assert path["gap"] < 1e-4 < occlusion["gap"] and path["evaluations"] <= 60
    np.testing.assert_allclose(path["insertion"], tested.areas[:, 0, 0, 0].mean())
    assert all(words in str(tested) for words in ("replaced by noise", "replaced by contrast", "path is ahead of"))
    again = interp.Faithfulness.load(tested.save(tmp_path / "tested"))
    assert repr(again) == repr(tested) and again.tasks == ("", "sort")
    assert len(tested.plot().axes) == 8
    with pytest.raises(ValueError, match="was not tested"):
        tested.table("blur")


def test_wins_count_cases_and_ties_are_half():
    areas = np.zeros((4, 1, 2, 4))
    areas[:, 0, 0, 0] = [1, 1, 0, 0]  # insertion: ahead, ahead, tie, tie
    areas[:, 0, 1, 1] = [1, 0, 0, -1]  # deletion of the other: worse, tie, tie, better
    empty = {f.name: np.zeros((4, 1, 2)) for f in dataclasses.fields(interp.Faithfulness)}
    words = dict(methods=("path", "b"), replacements=("noise",), tasks=("",) * 4, about={})
    found = interp.Faithfulness(**empty | words | dict(areas=areas, change=np.ones((4, 1))))
    line = found.wins("path")[0]
    assert (line["over"], line["insertion"], line["deletion"]) == ("b", 0.75, 0.5)
    assert line["low"] <= 0.625 <= line["high"]


def numpy_leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_no_shuffled_layer_is_the_same_map_and_all_of_them_another(tested, deep):
    np.testing.assert_allclose(tested.weights[0, 0], 1)  # layers=0
    assert (tested.weights[0, 1] < 0.999).all() and (tested.target[0] < 0.999).all()
    before, top, whole = numpy_leaves(deep.model), *(numpy_leaves(randomized(deep, n).model) for n in (1, 2))
    same = [[bool((a == b).all()) for a, b in zip(before, other, strict=True)] for other in (top, whole)]
    assert sum(same[0]) > sum(same[1]) and all(
        (np.sort(a, None) == np.sort(b, None)).all() for a, b in zip(before, whole, strict=True)
    )
    with pytest.raises(ValueError, match=r"0\.\.2"):
        randomized(deep, 3)


def test_another_target_is_the_vocabulary_permuted(bundle, game):
    other = other_target(game, seed=3)
    words = np.random.default_rng(3).permutation(bundle.config.vocab_size)
    assert other.metric.tokens.tolist() == words[[20, 30]].tolist()
    with pytest.raises(ValueError, match="token ids"):
        other_target(dataclasses.replace(game, metric=len))


def test_resampled_prompts_keep_the_template_and_take_the_others_words(bundle):
    cases = as_cases(bundle, [(PROMPT, METRIC), ("copy : red fox", METRIC)])
    drawn = np.array(resampled(bundle, cases, 0, 5, seed=1))
    own = np.array(cases[0].prompt)
    inside = np.flatnonzero((drawn != own).any(0))
    assert (drawn[:, :3] == own[:3]).all() and set(drawn[:, inside].ravel()) <= set(cases[1].prompt)


def test_bad_input_is_refused(bundle):
    def ask(match, cases=((PROMPT, METRIC),), **options):
        with pytest.raises(ValueError, match=match):
            interp.faithfulness(bundle, cases, **options)

    ask("no cases", cases=[])
    ask("a pair", cases=["copy : red"])
    ask("got \\['lime'\\]", methods=["lime"])
    ask("got \\['blur'\\]", replacements=["blur"])
    ask("at least 2", rankings=1)
    ask("have planted cases", cases=3)


# ---- the page -------------------------------------------------------------------------------------


def test_the_panel_is_the_saliency_of_its_steps(bundle, run):
    data = saliency_data(bundle, run, target=METRIC)
    assert data["steps"][0] == 1 and len(data["scores"]) == len(data["steps"]) <= 4
    assert len(data["units"]) == len(data["scores"][0]) == max(data["token_units"]) + 1
    for scores, on, off in zip(data["scores"], data["on"], data["off"], strict=True):
        assert sum(scores) == pytest.approx(on - off, abs=0.01)  # rounded to 4 places
    json.dumps(data, allow_nan=False)
    assert PANELS["saliency"].data is saliency_data and saliency_panel("gold").data.keywords == {"target": "gold"}
    with pytest.raises(ValueError, match="does not hold"):
        saliency_panel("gold gold gold gold").data(bundle, run)


def test_what_cannot_be_made_is_left_out(bundle, run):
    loaded = dataclasses.replace(run, trajectory=dataclasses.replace(run.trajectory, replay=None))
    assert saliency_data(bundle, loaded) is None
