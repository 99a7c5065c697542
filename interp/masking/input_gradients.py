"""Derivatives at the run itself: gradient norm, gradient x input, SmoothGrad.

They read one point. Where the target is flat there, as a softmax that is sure of itself is, they see little.
"""

from __future__ import annotations

import jax
import numpy as np

from interp.masking.game import Found, Game, ends, standard_error
from interp.masking.input_values import by_unit, gradients_at, of_model, own_values

SAMPLES, SPREAD = 16, 0.1


def gradient_norm(game: Game, *, budget: int = 3, tolerance: float | None = None, seed: int = 0) -> Found:
    """|df/dx| of each unit's values x, 2-norm (Simonyan et al. 2013). Not signed; sums to nothing.

    Args:
        budget, tolerance, seed: not used; one gradient, and the ends.
    """
    grads = gradients_at(game, own_values(game), _starts(game))[1]
    norms = np.sqrt(by_unit(game, jax.tree.map(np.square, grads)))
    return _found(game, norms)


def gradient_x_input(game: Game, *, budget: int = 3, tolerance: float | None = None, seed: int = 0) -> Found:
    """x . df/dx of each unit's values x (Shrikumar et al. 2016): first-order change of the target were x zero.

    Args:
        budget, tolerance, seed: not used; one gradient, and the ends.
    """
    own = own_values(game)
    grads = gradients_at(game, own, _starts(game))[1]
    return _found(game, by_unit(game, jax.tree.map(np.multiply, own, grads)))


def smooth_grad(
    game: Game, *, budget: int = SAMPLES + 2, tolerance: float | None = None, seed: int = 0, spread: float = SPREAD
) -> Found:
    """x . mean of df/dx under Gaussian noise on x (Smilkov et al. 2017).

    Args:
        budget: evaluations: two for the ends, else one a sample.
        tolerance: not used.
        spread: standard deviation of the noise, as a share of max(x) - min(x).
    """
    count = budget - 2
    if count < 2 or not spread > 0:
        raise ValueError(f"smooth_grad needs a budget of 4 or more and a spread above 0, got {budget} and {spread}")
    own, rng = own_values(game), np.random.default_rng(seed)

    def noised(x: np.ndarray) -> np.ndarray:
        wide = x[np.arange(count) % len(x)]
        return wide + (spread * np.ptp(x) * rng.standard_normal(wide.shape)).astype(np.float32)

    grads = gradients_at(game, jax.tree.map(noised, own), count)[1]
    scores = by_unit(game, jax.tree.map(lambda x, g: x[np.arange(count) % len(x)] * g, own, grads))
    return _found(game, scores, standard_error(scores))


def _starts(game: Game) -> int:
    return len(of_model(game).given.starts)


def _found(game: Game, rows: np.ndarray, stderr: np.ndarray | None = None) -> Found:
    """The mean over rows."""
    on, off = ends(game, [0])
    nothing = np.full(rows.shape[1], np.nan)
    return Found(rows.mean(0), nothing if stderr is None else stderr, on, float(off.mean()))
