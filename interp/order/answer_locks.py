"""Answers that are put right after the reasoning, and answers locked before it (arXiv 2606.20560, section 5).

| what | definition |
|---|---|
| corrected | the argmax at an answer position changes after the median lock step of the reasoning |
| locked in | every answer position has its last argmax before that median step, and the answer is wrong |
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import dgemma_jax as dg
from interp.flow.saved import Saved
from interp.order.commit_steps import commits


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerLock(Saved):
    """Of one block, arrays over rows.

    Attributes:
        answer: [B] lock step of the answer, the median of its positions.
        reasoning: [B] median lock step of the reasoning.
        corrected: [B] bool.
        before: [B] bool, the whole answer was locked before the reasoning.
        null: share of corrected rows that chance gives: with as many positions drawn from the reasoning as an answer.
    """

    answer: np.ndarray
    reasoning: np.ndarray
    corrected: np.ndarray
    before: np.ndarray
    null: float

    def locked_in(self, is_right: Any) -> np.ndarray:
        """[B] bool: wrong answers that were locked before the reasoning."""
        is_right = np.asarray(is_right, bool)
        if is_right.shape != self.before.shape:
            raise ValueError(f"is_right has shape {is_right.shape}; there are {len(self.before)} rows")
        return self.before & ~is_right

    def __repr__(self) -> str:
        return (
            f"{len(self.before)} row(s): answer locks at step {self.answer.mean():.1f}, reasoning at "
            f"{self.reasoning.mean():.1f}; corrected after it {self.corrected.mean():.0%} (chance {self.null:.0%}), "
            f"locked before it {self.before.mean():.0%}"
        )


def answer_lock(
    trajectory: dg.Trajectory, answer: np.ndarray, reasoning: np.ndarray, block: int = 0, seed: int = 0
) -> AnswerLock:
    """When the answer is locked, against the reasoning.

    Args:
        answer, reasoning: [B, C] or [C] bool, the positions of each; they do not overlap.
        seed: of the positions drawn for the null.

    Raises:
        ValueError: masks that overlap, or a row without either.
    """
    lock_BC = commits(trajectory).lock[block]
    answer, reasoning = (np.broadcast_to(np.asarray(m, bool), lock_BC.shape) for m in (answer, reasoning))
    if (answer & reasoning).any():
        raise ValueError("a position is both answer and reasoning; give masks that do not overlap")
    if not (answer.any(1) & reasoning.any(1)).all():
        rows = np.flatnonzero(~(answer.any(1) & reasoning.any(1))).tolist()
        raise ValueError(f"rows {rows} have no answer or no reasoning position")
    middle = _median(lock_BC, reasoning)
    rng, by_chance = np.random.default_rng(seed), []
    for row, size in enumerate(answer.sum(1)):
        drawn = rng.choice(np.flatnonzero(reasoning[row]), (100, size))
        by_chance.append((lock_BC[row, drawn] > middle[row]).any(1).mean())
    return AnswerLock(
        answer=_median(lock_BC, answer), reasoning=middle,
        corrected=(answer & (lock_BC > middle[:, None])).any(1),
        before=(~answer | (lock_BC < middle[:, None])).all(1),
        null=float(np.mean(by_chance)),
    )  # fmt: skip


def _median(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.array([np.median(row[own]) for row, own in zip(values, where, strict=True)])
