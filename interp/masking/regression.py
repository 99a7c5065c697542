"""Shapley values by regression on random masks: KernelSHAP (Lundberg and Lee 2017), paired (Covert and Lee 2021).

Masks are drawn by the Shapley kernel, sizes s with weight (U - 1) / (s (U - s)), each with its complement under the
same baseline. Least squares under sum(scores) = f(all on) - f(all off). Standard errors: the sandwich estimate,
clustered by pairs of masks.
"""

from __future__ import annotations

import numpy as np

from interp.masking.game import Found, Game, ends_of_draws, standard_error


def regression(game: Game, *, budget: int = 2048, tolerance: float | None = None, seed: int = 0) -> Found:
    """Scores of the best additive model under the Shapley kernel.

    Args:
        budget: evaluations at most.
        tolerance: stop as soon as every standard error is at most this; looked at whenever the masks have doubled.

    Raises:
        ValueError: fewer than two masks a unit, or fewer than two units.
    """
    count = len(game.names)
    if count < 2:
        raise ValueError("a regression needs two units or more; method='path' takes one")
    if budget < 2 * count + 1 + game.draws:
        raise ValueError(f"budget={budget}: {count} units need {2 * count + 1 + game.draws} evaluations or more")
    rng = np.random.default_rng(seed)
    on, offs = ends_of_draws(game, np.arange(game.draws))
    pairs = (budget - (game.draws if game.on_varies else 1) - game.draws) // 2
    masks, draws, values = np.zeros((0, count)), np.zeros(0, np.int64), np.zeros(0)
    target = pairs if tolerance is None else min(pairs, 4 * count)
    while True:
        fresh = _masks(rng, target - len(masks) // 2, count)
        own = np.repeat(np.arange(len(masks) // 2, target) % game.draws, 2)
        values = np.concatenate([values, game.values(fresh, own)])
        masks, draws = np.concatenate([masks, fresh]), np.concatenate([draws, own])
        scores, stderr = _fit(masks, values, on, offs, draws)
        if target == pairs or stderr.max() <= tolerance:
            return Found(scores, stderr, float(on.mean()), float(offs.mean()))
        target = min(pairs, 2 * target)


def _masks(rng: np.random.Generator, pairs: int, count: int) -> np.ndarray:
    """[2 * pairs, U] masks, each followed by its complement."""
    sizes = np.arange(1, count)
    weights = 1 / (sizes * (count - sizes))
    chosen = rng.choice(sizes, pairs, p=weights / weights.sum())
    masks = rng.random((pairs, count)).argsort(1).argsort(1) < chosen[:, None]
    return np.stack([masks, ~masks], 1).reshape(-1, count).astype(np.float32)


def _fit(masks, values, on, offs, draws) -> tuple[np.ndarray, np.ndarray]:
    """Scores [U] and standard errors. A score is the mean share of the difference plus what sums to zero."""
    count = masks.shape[1]
    share = (on - offs) / count
    basis = np.linalg.svd(np.ones((1, count)))[2][1:].T  # [U, U - 1] orthonormal, columns sum to zero
    inputs = masks @ basis
    wanted = values - offs[draws] - masks.sum(1) * share[draws]
    inverse = np.linalg.pinv(inputs.T @ inputs)
    slopes = inverse @ (inputs.T @ wanted)
    rest = wanted - inputs @ slopes
    per_pair = (inputs * rest[:, None]).reshape(-1, 2, count - 1).sum(1)
    enough = max(len(per_pair) / max(len(per_pair) - count + 1, 1), 1)
    cover = basis @ inverse @ (per_pair.T @ per_pair) @ inverse @ basis.T * enough
    of_share = 0.0 if len(offs) < 2 else float(standard_error(share)) ** 2
    return share.mean() + basis @ slopes, np.sqrt(np.maximum(np.diag(cover), 0) + of_share)
