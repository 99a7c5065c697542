"""Gradients along the straight line from the baseline: integrated and expected gradients, of any game.

    score_i = (x_i - b_i) . int_0^1 df/dx_i (b + s (x - b)) ds = int_0^1 df/dm_i (s, ..., s) ds

since a relaxed mask m mixes each unit's values x with its baseline b.
"""

from __future__ import annotations

import numpy as np

from interp.masking.game import Found, Game, ends, standard_error

LEVELS, SAMPLES, AT_ONCE = 32, 128, 32


def integrated_gradients(
    game: Game, *, budget: int = LEVELS + 2, tolerance: float | None = None, seed: int = 0
) -> Found:
    """Integrated gradients (Sundararajan et al. 2017) from the first baseline, by the midpoint rule.

    Args:
        budget: evaluations: two for the ends, else one a point of the line.
        tolerance, seed: not used; nothing is drawn.
    """
    levels = budget - 2
    if levels < 1:
        raise ValueError(f"budget={budget}: the ends and one point of the line take 3 evaluations")
    count = len(game.names)
    masks = np.repeat((np.arange(levels) + 0.5)[:, None] / levels, count, 1)
    grads = game.gradients(masks.astype(np.float32), np.zeros(levels, np.int64))[1]
    on, off = ends(game, [0])
    return Found(grads.mean(0), np.full(count, np.nan), on, float(off.mean()))


def expected_gradients(
    game: Game, *, budget: int = 2 * SAMPLES, tolerance: float | None = None, seed: int = 0
) -> Found:
    """Expected gradients (Erion et al. 2021): baselines in turn, a random point of the line for each sample.

    Args:
        budget: evaluations at most.
        tolerance: stop as soon as every standard error is at most this.
    """
    count, samples = len(game.names), budget - 1 - game.draws
    if samples < 2:
        raise ValueError(f"budget={budget}: two samples and the ends take {3 + game.draws} evaluations")
    rng = np.random.default_rng(seed)
    grads = np.zeros((0, count))
    while len(grads) < samples:
        number = np.arange(len(grads), min(samples, len(grads) + AT_ONCE))
        masks = np.repeat(rng.random((len(number), 1)), count, 1).astype(np.float32)
        grads = np.concatenate([grads, game.gradients(masks, number % game.draws)[1]])
        if tolerance is not None and standard_error(grads).max() <= tolerance:
            break
    on, offs = ends(game, np.arange(min(len(grads), game.draws)))
    return Found(grads.mean(0), standard_error(grads), on, float(np.mean(offs)))
