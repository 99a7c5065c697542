"""How positions are accepted and given up again, and how much of the canvas has settled.

Acceptance is computed anew at every step, so a position may be un-accepted: the four transitions are counted apart
(diagnostics of the Annotated DiffusionGemma, `methods.md` section 8).
"""

from __future__ import annotations

import numpy as np

import dgemma_jax as dg
from interp.flow.recorded import at_last, kept
from interp.flow.step_curves import StepCurves, of_rows

TRANSITIONS = ("kept", "given up", "newly accepted", "still open")


def transitions(trajectory: dg.Trajectory) -> StepCurves:
    """Positions by what became of them since the step before: the four counts of a step sum to C.

    Before the first step the distribution is uniform, for which the sampler accepts exactly one position, the first.
    """
    (now_JRBC,) = kept(trajectory, "accepted")
    before_JRBC = np.zeros_like(now_JRBC)
    before_JRBC[:, 1:] = now_JRBC[:, :-1]
    before_JRBC[:, 0, :, 0] = True
    pairs = ((before_JRBC, now_JRBC), (before_JRBC, ~now_JRBC), (~before_JRBC, now_JRBC), (~before_JRBC, ~now_JRBC))
    counts = {
        name: of_rows((old & new).sum(-1), trajectory.valid)
        for name, (old, new) in zip(TRANSITIONS, pairs, strict=True)
    }
    return StepCurves(counts, "positions", "acceptance since the step before")


def settled_fraction(trajectory: dg.Trajectory, where: np.ndarray | None = None) -> StepCurves:
    """Share of positions whose argmax is that of the last step of the block.

    Args:
        where: [J, B, C] bool, positions that count (`content`); None for all. A row with none gives NaN.
    """
    (argmax_JRBC,) = kept(trajectory, "argmax")
    same_JRBC = argmax_JRBC == at_last(trajectory, argmax_JRBC)[:, None]
    where_JRBC = np.broadcast_to(True if where is None else where[:, None], same_JRBC.shape)
    count = where_JRBC.sum(-1)
    share = np.where(count > 0, (same_JRBC & where_JRBC).sum(-1) / np.maximum(count, 1), np.nan)
    return StepCurves({"settled": of_rows(share, trajectory.valid)}, "share of positions", "argmax as at the end")
