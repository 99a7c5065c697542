"""Detectors that know ordinary answers only: how unusual is a run at each step, and how early does that show?

    score_s = (x_s - mean)^T (Sigma + a I)^-1 (x_s - mean)      x_s: residuals of step s averaged over the canvas

mean and Sigma come from half of the benign prompts; the other half are what odd runs are told from. No odd run is seen
in fitting. The early score of a step is the mean of the scores up to it. A null has the same detector tell one half
of the held-out benign prompts from the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.intervals import of_means

FEWEST = 6  # prompts on either side
_SHARE = 0.1  # of the mean variance, added to each
_WIDTH = 32  # principal components of the benign runs that are read, at most


def step_detectors(
    means: np.ndarray, steps: np.ndarray, benign: np.ndarray, odd: np.ndarray, *, seed: int = 0
) -> dict[str, Any] | None:
    """AUROC by step of odd against benign runs, none of which the detector has seen.

    Args:
        means: [N, R, L, D], zeros after the last step of a run.
        steps: [N] taken by each run: one that has ended keeps its last state.
        benign, odd: [N] bool.

    Returns:
        {"auroc", "early", "null": [R], "low", "high": [R] of "auroc", "first": the first step with an interval above
        0.5, "benign", "odd": numbers}; None if there are too few.
    """
    rng = np.random.default_rng(seed)
    good = rng.permutation(np.flatnonzero(benign & (steps > 0)))
    bad = np.flatnonzero(odd & (steps > 0))
    fit, held = good[: len(good) // 2], good[len(good) // 2 :]
    if len(fit) < FEWEST or len(bad) < FEWEST:
        return None
    total = int(np.quantile(steps[np.concatenate([held, bad])], 0.9))
    at = np.minimum(np.arange(total), steps[:, None] - 1)  # [N, R]
    x_NRF = means.reshape(*means.shape[:2], -1).astype(np.float64)[np.arange(len(means))[:, None], np.maximum(at, 0)]
    scores_NR = np.stack([_distance(x_NRF[:, step], fit) for step in range(total)], 1)
    early_NR = np.cumsum(scores_NR, 1) / np.arange(1, total + 1)
    half = len(held) // 2
    bounds = [_interval(scores_NR[bad, s], scores_NR[held, s]) for s in range(total)]
    above = [s for s, (low, _) in enumerate(bounds) if low > 0.5]
    return {
        "auroc": [auroc(scores_NR[bad, s], scores_NR[held, s]) for s in range(total)],
        "early": [auroc(early_NR[bad, s], early_NR[held, s]) for s in range(total)],
        "null": [auroc(scores_NR[held[:half], s], scores_NR[held[half:], s]) for s in range(total)],
        "low": [low for low, _ in bounds], "high": [high for _, high in bounds],
        "first": above[0] if above else None, "benign": len(held), "odd": len(bad),
    }  # fmt: skip


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(a positive scores higher than a negative), ties counted half."""
    return float(np.mean(_beats(positive, negative)))


def _beats(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[positives] share of negatives that each one beats."""
    above = positive[:, None] > negative
    return (above + 0.5 * (positive[:, None] == negative)).mean(1)


def _interval(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """95 %: the wider of the two bootstraps, over positives and over negatives, around the AUROC."""
    middle = auroc(positive, negative)
    sides = [of_means(_beats(positive, negative)), of_means(1 - _beats(negative, positive))]
    reach = [np.hypot(*(abs(float(side[i]) - middle) for side in sides)) for i in (0, 1)]
    return max(0.0, middle - reach[0]), min(1.0, middle + reach[1])


def _distance(x_NF: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """[N] squared distances in the span of the fitted rows, and what is left outside it."""
    own = x_NF[fit]
    centre = own.mean(0)
    _, length, axes = np.linalg.svd(own - centre, full_matrices=False)
    kept = min(_WIDTH, max(1, len(fit) // 2))
    variance = length[:kept] ** 2 / len(fit)
    floor = _SHARE * max(variance.mean(), 1e-12)
    within = (x_NF - centre) @ axes[:kept].T
    outside = ((x_NF - centre) ** 2).sum(1) - (within**2).sum(1)
    return (within**2 / (variance + floor)).sum(1) + outside / floor
