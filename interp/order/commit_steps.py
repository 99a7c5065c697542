"""When each position is committed, when its token last changed, and how often it was given up.

Commit is the first acceptance; it is not freezing, since acceptance is computed anew at every step (`methods.md`
section 7 and trap 2). Lock is the last change of the argmax (section 11).
"""

from __future__ import annotations

import dataclasses

import numpy as np

import dgemma_jax as dg
from interp.flow.recorded import at_last, kept
from interp.flow.saved import Saved


@dataclasses.dataclass(frozen=True, eq=False)
class Commits(Saved):
    """Step numbers of every position, [J, B, C]; -1 where it never came to it.

    Attributes:
        first: the first step that accepts the position.
        stays: the first step from which on it is accepted at all later ones.
        lock: the first step from which on the argmax is the final one; 0 where it always was.
        entropy: nats at the first acceptance; NaN where there is none.
        given_up: [J, B] events: accepted before, and not at a later step (each time it is given up counts).
    """

    first: np.ndarray
    stays: np.ndarray
    lock: np.ndarray
    entropy: np.ndarray
    given_up: np.ndarray

    @property
    def is_monotone(self) -> np.ndarray:
        """[J, B] bool: nothing was given up."""
        return self.given_up == 0


def commits(trajectory: dg.Trajectory) -> Commits:
    """Commit, lock and un-accept of every position of a record.

    Raises:
        ValueError: the record left accepted, entropy or argmax out.
    """
    accepted, entropy, argmax = kept(trajectory, "accepted", "entropy", "argmax")
    ran_JRB = trajectory.valid
    accepted_JRBC = accepted & ran_JRB[..., None]
    ever_JBC = accepted_JRBC.any(1)
    first_JBC = np.where(ever_JBC, accepted_JRBC.argmax(1), -1)
    at = np.take_along_axis(entropy, np.maximum(first_JBC, 0)[:, None], 1)[:, 0]
    was_JRBC = np.maximum.accumulate(accepted_JRBC, 1)
    lost_JRBC = accepted_JRBC[:, :-1] & ~accepted_JRBC[:, 1:] & ran_JRB[:, 1:, :, None]
    differs_JRBC = (argmax != at_last(trajectory, argmax)[:, None]) & ran_JRB[..., None]
    away_JRBC = ~accepted_JRBC & ran_JRB[..., None]
    stays_JBC = _after_last(away_JRBC)
    ends_JBC = trajectory.num_steps[..., None]
    return Commits(
        first=first_JBC,
        stays=np.where(was_JRBC.any(1) & (stays_JBC < ends_JBC), stays_JBC, -1),
        lock=np.where(ends_JBC > 0, _after_last(differs_JRBC), -1),
        entropy=np.where(ever_JBC, at, np.nan),
        given_up=lost_JRBC.sum((1, 3)),
    )


def _after_last(event_JRBC: np.ndarray) -> np.ndarray:
    """[J, B, C] the step after the last event; 0 where there is none."""
    steps = event_JRBC.shape[1]
    return np.where(event_JRBC.any(1), steps - event_JRBC[:, ::-1].argmax(1), 0)
