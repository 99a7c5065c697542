"""Whether the confidence of a commit tells right answers from wrong ones, within each regime."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

RESAMPLES = 1999


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Of one regime.

    Attributes:
        auroc, low, high: P(score of a right answer > of a wrong one), ties counting one half, with the 95 % interval
            of a bootstrap over prompts; NaN where all are right or all wrong.
        tertiles: accuracy of the most, middle and least confident third.
        accuracy, count: share of right answers; how many answers.
    """

    auroc: float
    low: float
    high: float
    tertiles: tuple[float, float, float]
    accuracy: float
    count: int


def confidence(
    score: Sequence[float], is_right: Sequence[bool], groups: Sequence[str] | None = None,
    prompts: Sequence[object] | None = None, *, pooled: bool = False, seed: int = 0,
) -> dict[str, Confidence]:  # fmt: skip
    """AUROC of a score for correctness, regime by regime.

    Args:
        score: of each answer, the higher the more confident: `-order["entropy at commit"]`, for instance.
        is_right: of each answer.
        groups: regime of each; needed unless `pooled`, which warns: pooling has turned such a relation round.
        prompts: of each; answers to one prompt are one cluster.
        seed: of the bootstrap.
    """
    score, right = np.asarray(score, float), np.asarray(is_right, bool)
    if groups is None and not pooled:
        raise ValueError("give groups, the regime of each answer, or pooled=True")
    if pooled:
        warnings.warn("pooled over regimes: easy regimes are both confident and right, which is no relation within "
                      "any of them (Simpson's paradox)", stacklevel=2)  # fmt: skip
    groups = np.array(["all"] * len(score) if pooled else list(groups), object)
    prompts = np.arange(len(score)) if prompts is None else np.unique([str(p) for p in prompts], return_inverse=True)[1]
    if not len(score) == len(right) == len(groups) == len(prompts):
        sizes = [len(score), len(right), len(groups), len(prompts)]
        raise ValueError(f"needed is one score, grade, group and prompt for each answer; there are {sizes}")
    own = {group: np.isfinite(score) & (groups == group) for group in dict.fromkeys(groups)}
    return {str(group): _one(score[at], right[at], prompts[at], seed) for group, at in own.items()}


def _one(score: np.ndarray, right: np.ndarray, prompts: np.ndarray, seed: int) -> Confidence:
    value, low, high = _auroc(score, right, prompts, seed)
    thirds = np.array_split(right[np.argsort(-score, kind="stable")], 3)
    return Confidence(
        value, low, high, tuple(float(t.mean()) if len(t) else float("nan") for t in thirds),
        float(right.mean()) if len(right) else float("nan"), len(right),
    )  # fmt: skip


def _auroc(score: np.ndarray, right: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Share of (right, wrong) pairs that are won, and its interval over drawn sets of prompts."""
    if right.all() or not right.any():
        return (float("nan"),) * 3
    won = np.sign(score[right][:, None] - score[~right]) / 2 + 0.5
    clusters, own = np.unique(prompts, return_inverse=True)
    count = len(clusters)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, own]
    of_right, of_wrong = drawn[:, right], drawn[:, ~right]
    pairs = of_right.sum(1) * of_wrong.sum(1)
    shares = ((of_right @ won) * of_wrong).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(shares, (0.025, 0.975)) if len(shares) else (np.nan, np.nan)
    return float(won.mean()), float(low), float(high)
