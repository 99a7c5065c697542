"""Masks and no gradient: occlusion and RISE, of any game."""

from __future__ import annotations

import numpy as np

from interp.masking.game import Found, Game, ends, standard_error


def occlusion(game: Game, *, budget: int = 1024, tolerance: float | None = None, seed: int = 0) -> Found:
    """f(all on) - f(all on but one unit), averaged over baselines (Zeiler and Fergus 2014).

    Args:
        budget: evaluations at most; each baseline takes one a unit, and as many are used as fit.
        tolerance, seed: not used; nothing is drawn.
    """
    count = len(game.names)
    draws = min(game.draws, (budget - 1) // (count + 1))
    if draws < 1:
        raise ValueError(f"budget={budget}: {count} units and the ends take {count + 2} evaluations")
    on, offs = ends(game, np.arange(draws))
    masks = np.tile(1 - np.eye(count, dtype=np.float32), (draws, 1))
    found = on - game.values(masks, np.repeat(np.arange(draws), count)).reshape(draws, count)
    return Found(found.mean(0), standard_error(found), on, float(offs.mean()))


def rise(
    game: Game, *, budget: int = 1024, tolerance: float | None = None, seed: int = 0, share: float = 0.5
) -> Found:
    """Mean target over random masks with the unit on: sum_n f(M_n) M_ni / (N share) (Petsiuk et al. 2018).

    Scores are levels of the target, not changes: only their order speaks of units, and they sum to nothing.

    Args:
        budget: evaluations at most.
        tolerance: not used.
        share: of units that are on.
    """
    samples = budget - 1 - game.draws
    if samples < 2 or not 0 < share < 1:
        raise ValueError(f"rise needs a budget of {3 + game.draws} or more and 0 < share < 1, got {budget} and {share}")
    rng = np.random.default_rng(seed)
    masks = (rng.random((samples, len(game.names))) < share).astype(np.float32)
    terms = game.values(masks, np.arange(samples) % game.draws)[:, None] * masks / share
    on, offs = ends(game, np.arange(game.draws))
    return Found(terms.mean(0), standard_error(terms), on, float(offs.mean()))
