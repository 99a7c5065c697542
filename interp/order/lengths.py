"""How long the answer will be, as each step sees it: E[L] = sum over positions of 1 - p(end or padding).

p(end or padding at i) is read as P(length <= i). Source: arXiv 2606.20560, section 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from interp.flow.recorded import Specials
from interp.flow.saved import Saved
from interp.flow.step_curves import StepCurves, of_rows
from interp.flow.token_watch import TokenWatch, watched

SHUFFLES = 200


def watch_length(bundle: Any, **sets: Sequence[int]) -> TokenWatch:
    """The record of end and padding tokens, for `dg.Record(fn=...)`; further sets to watch by name."""
    return TokenWatch.of(end=Specials.of(bundle).closing, **sets)


def length_estimate(trajectory: dg.Trajectory) -> StepCurves:
    """E[L] of each block at each step, [J, R, B] positions.

    Raises:
        ValueError: the record did not watch the end tokens.
    """
    lengths = (1 - watched(trajectory, "end").astype(float)).sum(-1)
    return StepCurves({"length": of_rows(lengths, trajectory.valid)}, "positions", "length that the step expects")


@dataclasses.dataclass(frozen=True, eq=False)
class LengthForesight(Saved):
    """How well each step knows the length.

    Attributes:
        correlation: [R] Pearson, of the estimate with the true length over rows.
        error: [R] mean absolute error, positions.
        null: [R] the 95th percentile of |correlation| with lengths of other rows.
    """

    correlation: np.ndarray
    error: np.ndarray
    null: np.ndarray

    def __repr__(self) -> str:
        said = "; ".join(
            f"step {r}: r = {c:.3f} (null {n:.2f}), off by {e:.2f}"
            for r, (c, n, e) in enumerate(zip(self.correlation, self.null, self.error, strict=True))
            if np.isfinite(c)
        )
        return f"length foresight: {said}"


def length_foresight(
    trajectory: dg.Trajectory, lengths: Sequence[float], block: int = 0, seed: int = 0
) -> LengthForesight:
    """The estimates of each step against the lengths that were asked for, or came out; null by shuffled lengths.

    A row that has ended keeps its last estimate, so that all steps are over the same rows.

    Args:
        lengths: [B] content positions of each row in this block.

    Raises:
        ValueError: fewer than three rows, or all lengths equal.
    """
    return foresight_of(length_estimate(trajectory)["length"][block], lengths, seed)


def foresight_of(estimate: np.ndarray, lengths: Sequence[float], seed: int = 0) -> LengthForesight:
    """The same of estimates [R, B] that were kept, NaN where a row took no step."""
    lengths = np.asarray(lengths, float)
    if len(lengths) != estimate.shape[1] or len(lengths) < 3 or np.ptp(lengths) == 0:
        raise ValueError(
            f"needed are lengths of all {estimate.shape[1]} rows, at least 3 and not all equal; got {lengths.tolist()}"
        )
    last = np.maximum(np.isfinite(estimate).sum(0) - 1, 0)
    held = np.where(np.isfinite(estimate), estimate, estimate[last, np.arange(len(last))])
    held = held[: last.max() + 1]
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(lengths) for _ in range(SHUFFLES)])
    return LengthForesight(
        correlation=_pearson(held, lengths[None])[:, 0],
        error=np.abs(held - lengths).mean(1),
        null=np.quantile(np.abs(_pearson(held, shuffled)), 0.95, axis=1),
    )


def _pearson(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n, m] of rows [n, B] with others [m, B]; NaN for a constant row."""
    rows, others = (x - x.mean(1, keepdims=True) for x in (rows, others))
    scale = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(others, axis=1)
    return np.where(scale > 1e-12, rows @ others.T / np.maximum(scale, 1e-12), np.nan)
