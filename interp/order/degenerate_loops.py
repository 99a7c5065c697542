"""Degenerate loops: of the text (repeated 8-grams) and of the run (the same canvas of likely tokens again)."""

from __future__ import annotations

import dataclasses

import numpy as np

import dgemma_jax as dg
from interp.bottleneck_results import LOOP_FROM, dup8
from interp.flow.recorded import Specials, content, joined, kept
from interp.flow.saved import Saved


@dataclasses.dataclass(frozen=True, eq=False)
class Loops(Saved):
    """Attributes:
    dup8: [B] 1 - distinct / all 8-grams of content, 0 below 16 tokens; a loop of the text from 0.5 on.
    null: [B] the same of the content in random order: what its words alone repeat.
    period: [J, B] steps after which the run's argmax came back to where it had been and left; 0 if it never did.
    """

    dup8: np.ndarray
    null: np.ndarray
    period: np.ndarray

    @property
    def is_loop(self) -> np.ndarray:
        """[B] bool: the text is one."""
        return self.dup8 >= LOOP_FROM

    def __repr__(self) -> str:
        return (
            f"{len(self.dup8)} row(s): {self.is_loop.sum()} looping texts, {(self.period > 0).any(0).sum()} runs that "
            "came back to an earlier canvas"
        )


def find_loops(trajectory: dg.Trajectory, specials: Specials, seed: int = 0) -> Loops:
    """Loops of every row; blocks are joined for the text and apart for the run."""
    (argmax_JRBC,) = kept(trajectory, "argmax")
    answer, own = joined(trajectory.committed), joined(content(trajectory, specials))
    rng = np.random.default_rng(seed)
    texts = [row[where] for row, where in zip(answer, own, strict=True)]
    period = np.zeros(trajectory.num_steps.shape, int)
    for block, row in np.ndindex(period.shape):
        count = trajectory.num_steps[block, row]
        period[block, row] = _period(argmax_JRBC[block, :, row][trajectory.valid[block, :, row]][:count])
    return Loops(
        np.array([dup8(text.tolist()) for text in texts]),
        np.array([dup8(rng.permutation(text).tolist()) for text in texts]), period,
    )  # fmt: skip


def _period(states: np.ndarray) -> int:
    """The shortest time after which a state came back, having left; 0 without any."""
    seen: dict[bytes, int] = {}
    best = 0
    for step, state in enumerate(states):
        key = np.ascontiguousarray(state).tobytes()
        gap = step - seen.get(key, step)
        if gap > 1 and (best == 0 or gap < best):
            best = gap
        seen[key] = step
    return best
