"""The usual methods of saliency, on functions with known answers and against derivatives of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dgemma_jax as dg
import interp
from interp.masking.game import Counted, FunctionGame
from interp.masking.input_values import by_unit, gradients_at, own_values
from interp.masking.masked_diffusion import BASELINES, METHODS, masked_game
from interp.masking.single_masks import occlusion, rise
from interp.masking.straight_paths import expected_gradients, integrated_gradients

PROMPT = "recall a 4 , b 7 ? b"
METRIC = interp.LogProb([1, 2], [20, 30])
NAMES = tuple("abcde")
WEIGHTS = np.array([1.0, -2.0, 3.0, 0.5, 0.0], np.float32)
ADDITIVE = FunctionGame(lambda m: m @ WEIGHTS, NAMES)


@pytest.mark.parametrize("estimator", [occlusion, integrated_gradients, expected_gradients])
def test_an_additive_function_is_read_exactly(estimator):
    found = estimator(Counted(ADDITIVE))
    np.testing.assert_allclose(found.scores, WEIGHTS, atol=1e-5)
    assert found.on == pytest.approx(2.5) and found.off == 0


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


@pytest.fixture(scope="module")
def bundle(organism):
    return dg.load(organism)


@pytest.fixture(scope="module")
def game(bundle):
    return masked_game(bundle, PROMPT, METRIC, units=("tokens", "canvas"), rows_at_once=4, draws=2)


def test_own_values_make_the_run_itself_and_their_gradient_is_the_models(bundle, game):
    own = own_values(game)
    values, grads = gradients_at(game, own, 1)
    plain = game.values(np.ones((1, len(game.names))), [0])
    np.testing.assert_allclose(values, plain, atol=1e-6)
    # Move one number of one embedding: the target moves by the derivative.
    place, at, channel = "token_embed", 4, 3
    moved = {name: np.repeat(x, 2, 0) for name, x in own.items()}
    moved[place][:, at, channel] += [1e-2, -1e-2]
    up, down = gradients_at(game, moved, 2)[0]
    assert grads[place][0, at, channel] == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=1e-6)
    total = by_unit(game, jax.tree.map(np.ones_like, grads))
    assert (total == bundle.config.embed_dim).all() and total.shape == (1, len(game.names))


def test_gradient_x_input_is_the_slope_of_the_mask_from_zero(bundle, game):
    """Where zero stands in, x . df/dx is the derivative of the mask: two ways to the same number."""
    zero = masked_game(bundle, PROMPT, METRIC, units=("tokens", "canvas"), baseline="zero", rows_at_once=4)
    slopes = zero.gradients(np.ones((1, len(zero.names))), [0])[1][0]
    found = METHODS["gradient_x_input"](game)
    np.testing.assert_allclose(found.scores, slopes, atol=1e-5)
    assert np.abs(slopes).max() > 1e-3


def test_rollout_is_a_share_and_sees_no_value(bundle, game):
    """Rows sum to one over prompt and canvas; what leaves attention as it is leaves the rollout as it is."""
    found = METHODS["attention_rollout"](game)
    outside = 1 - found.scores.sum()  # the chat template
    assert (found.scores >= 0).all() and 0 < outside < 0.6
    louder = interp.edit(bundle, "logits", interp.Scale(3.0))
    other = masked_game(louder, PROMPT, METRIC, units=("tokens", "canvas"), rows_at_once=4, draws=2)
    np.testing.assert_allclose(METHODS["attention_rollout"](other).scores, found.scores, atol=1e-6)
    with pytest.raises(ValueError, match="knows positions of prompt and canvas"):
        METHODS["attention_rollout"](masked_game(bundle, PROMPT, METRIC, units="heads", rows_at_once=4, draws=2))


def test_bits_are_paid_for(game):
    """At a higher price fewer bits pass; a target that reads nothing of the prompt gets none."""
    cheap, dear = (METHODS["information_bottleneck"](game, beta=beta, budget=42) for beta in (0.1, 100.0))
    assert (cheap.scores >= 0).all() and dear.scores.sum() < cheap.scores.sum()


def test_every_baseline_has_the_interface_and_shares_programs(bundle, game):
    from interp.masking import input_values

    assert len(BASELINES) == 9
    for name in BASELINES:
        METHODS[name](game)
    before = input_values._differentiated._cache_size()
    for name in BASELINES:
        found = interp.saliency(bundle, "sort : q d x", interp.LogProb([0, 3], [5, 9]), name, units=("tokens", "canvas"),
                                budget=44, rows_at_once=4, draws=2)  # fmt: skip
        assert found.method == name and np.isfinite(found.scores).all() and found.evaluations > 0, name
    assert input_values._differentiated._cache_size() == before


def test_a_moment_stands_for_its_step(bundle):
    run = dg.generate(bundle, PROMPT, max_new_tokens=1, record=dg.Record(argmax=True))
    of_step, of_moment = (
        masked_game(bundle, PROMPT, METRIC, step=step, rows_at_once=4, draws=2)
        for step in (2, run.trajectory.moment(0, 2))
    )
    masks = np.eye(len(of_step.names))
    draws = np.zeros(len(masks), int)
    np.testing.assert_allclose(of_step.values(masks, draws), of_moment.values(masks, draws), atol=1e-6)
    with pytest.raises(ValueError, match="must be of a run of this prompt"):
        masked_game(bundle, "copy : red", METRIC, step=run.trajectory.moment(0, 1))
    with pytest.raises(ValueError, match="give a metric"):
        masked_game(bundle, PROMPT, "red", step=run.trajectory.moment(0, 1))
