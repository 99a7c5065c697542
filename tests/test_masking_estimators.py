"""Estimators of saliency on functions whose Shapley values are known; no model, no compile."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from interp.masking.game import Counted, FunctionGame
from interp.masking.gradients import gradient
from interp.masking.hard_gates import gates
from interp.masking.paths import leads, path
from interp.masking.regression import regression

NAMES = tuple("abcde")
WEIGHTS = np.array([1.0, -2.0, 3.0, 0.5, 0.0], np.float32)


def additive(m):
    return m @ WEIGHTS


def pairwise(m):
    return m @ WEIGHTS + 4 * m[:, 0] * m[:, 1] - 2 * m[:, 2] * m[:, 3]


def network(m):
    """(a and b) or (c and not d), e idle: a small Boolean network in its multilinear form."""
    left, right = m[:, 0] * m[:, 1], m[:, 2] * (1 - m[:, 3])
    return left + right - left * right


FUNCTIONS = {f.__name__: f for f in (additive, pairwise, network)}
TRUE = {"additive": WEIGHTS, "pairwise": WEIGHTS + np.array([2, 2, -1, -1, 0])}


def shapley(function):
    """By all orders."""
    count = len(NAMES)
    total = np.zeros(count)
    for order in itertools.permutations(range(count)):
        masks = np.zeros((count + 1, count), np.float32)
        for number, unit in enumerate(order, 1):
            masks[number:, unit] = 1
        total[list(order)] += np.diff(np.asarray(function(masks)))
    return total / math.factorial(count)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("estimator", [path, regression, gradient])
def test_known_shapley_values_within_three_standard_errors(name, estimator):
    game = FunctionGame(FUNCTIONS[name], NAMES)
    exact = shapley(FUNCTIONS[name])
    if name in TRUE:
        np.testing.assert_allclose(exact, TRUE[name], atol=1e-6)
    found = estimator(Counted(game), seed=3)
    assert (np.abs(found.scores - exact) <= 3 * found.stderr + 1e-6).all()
    assert found.stderr.max() < 0.15
    quadrature = 0.01 if estimator is gradient else 1e-4
    assert abs(found.scores.sum() - (found.on - found.off)) < quadrature


def test_path_sums_exactly_under_noisy_baselines():
    rng = np.random.default_rng(0)
    offsets = rng.normal(size=7)

    class Noisy(FunctionGame):
        def values(self, masks, draws):  # the baseline counts for as much as is off
            return super().values(masks, draws) + (1 - masks).mean(1) ** 2 * offsets[draws]

    found = path(Noisy(pairwise, NAMES, draws=7), budget=200)
    assert abs(found.scores.sum() - (found.on - found.off)) < 1e-10


@pytest.mark.parametrize("estimator", [path, regression])
def test_a_target_whose_top_depends_on_the_draw_is_shared_out_within_each_draw(estimator):
    """As that of a text noised anew for every draw: an offset of the whole game moves no score."""
    offsets = np.random.default_rng(0).normal(size=6) * 10

    class Offset(FunctionGame):
        def values(self, masks, draws):
            return super().values(masks, draws) + offsets[draws]

    game = Counted(Offset(additive, NAMES, draws=6, on_varies=True))
    found = estimator(game, budget=200)
    np.testing.assert_allclose(found.scores, WEIGHTS, atol=1e-5)
    assert abs(found.scores.sum() - (found.on - found.off)) < 1e-6 and game.evaluations <= 200


def test_interactions_are_those_of_the_pairs():
    found = path(FunctionGame(pairwise, NAMES), interactions=True)
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 0] = 4
    expected[2, 3] = expected[3, 2] = -2
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(found.interactions[off], expected[off], atol=1e-5)
    assert np.isnan(np.diag(found.interactions)).all()


def test_interaction_index_of_three_is_shared_out():
    found = path(FunctionGame(lambda m: m[:, 0] * m[:, 1] * m[:, 2], NAMES[:4]), interactions=True, budget=4000)
    assert abs(found.interactions[0, 1] - 0.5) < 4 * found.interactions_stderr[0, 1]
    assert abs(found.interactions[0, 3]) < 1e-9


def test_gates_keep_the_fewest_units_within_the_margin():
    found = gates(FunctionGame(lambda m: 5 * m[:, 1] * m[:, 3] + 0.1 * m[:, 0], NAMES), margin=0.5, budget=600)
    assert found.kept.tolist() == [False, True, False, True, False]
    assert found.scores[[1, 3]].min() > 0.9 > 0.5 > found.scores[[0, 2, 4]].max()


def test_a_tolerance_stops_early_and_the_budget_is_kept():
    counted = [Counted(FunctionGame(network, NAMES)) for _ in range(3)]
    path(counted[0], budget=900)
    found = path(counted[1], budget=4000, tolerance=0.05)
    gradient(counted[2], budget=256)
    assert counted[0].evaluations <= 900
    assert counted[1].evaluations < 4000 and found.stderr.max() <= 0.05
    assert counted[2].evaluations <= 256


def test_paths_stop_when_the_largest_scores_are_clear_of_the_others():
    noisy = np.random.default_rng(0).normal(size=50)

    def evaluations(rule, game):
        counted = Counted(game)
        path(counted, budget=451, enough=rule)
        return counted.evaluations

    flat = FunctionGame(lambda m: m @ np.ones(5, np.float32), NAMES)
    assert evaluations(leads(), FunctionGame(additive, NAMES)) == 1 + 9 * 7  # one look: what one call holds
    assert evaluations(leads(1, -1), FunctionGame(additive, NAMES)) == 64
    assert evaluations(leads(), flat) == evaluations(None, flat) == 451  # no score is ahead: all of the budget
    gains = noisy.reshape(10, 5) + np.array([9, 8, 0, 0, 0])
    assert leads(2)(gains) and not leads(1)(gains) and not leads(2)(gains[:3])
    assert leads(2, -1)(-gains) and not leads(2)(-gains)


def test_wider_smooth_paths_are_the_straight_line():
    """At a large width all units come on together: integrated gradients of a product give each an equal share."""
    found = gradient(FunctionGame(lambda m: m[:, 0] * m[:, 1] ** 2, NAMES[:2]), width=1e4, levels=32)
    np.testing.assert_allclose(found.scores, [1 / 3, 2 / 3], atol=2e-3)


def test_bad_input_is_refused():
    game = FunctionGame(lambda m: np.log(m[:, 0] - 0.5), NAMES)
    with pytest.raises(ValueError, match="the target is nan"), np.errstate(invalid="ignore"):
        path(Counted(game))
    with pytest.raises(ValueError, match="two orders of 5 units"):
        path(FunctionGame(additive, NAMES), budget=10)
    with pytest.raises(ValueError, match="two units or more"):
        regression(FunctionGame(lambda m: m[:, 0], ("a",)))
    with pytest.raises(ValueError, match="margin must be above 0"):
        gates(FunctionGame(additive, NAMES), margin=0)
    with pytest.raises(ValueError, match="gradient is not finite"):
        gradient(Counted(FunctionGame(lambda m: jnp.sqrt(m[:, 0] - 2), NAMES)))
