"""One token spread over several positions: it is sure to come, and not yet where (arXiv 2606.20560, section 5)."""

from __future__ import annotations

import numpy as np

import dgemma_jax as dg
from interp.flow.recorded import kept
from interp.flow.step_curves import StepCurves, of_rows
from interp.flow.token_watch import watched


def token_smear(
    trajectory: dg.Trajectory, name: str, ids: int | list[int], window: slice | None = None, floor: float = 0.05
) -> StepCurves:
    """How many more positions a token spreads over than it ends up at: exp(H(w)) - final count.

    w_i is the share of the token's mass in the window that lies at position i. A token that is nowhere yet is spread
    over everything by rounding alone: steps with less than `floor` of mass in all are NaN.

    Args:
        trajectory: of `record=dg.Record(fn=interp.TokenWatch.of(name=ids))`.
        name: of the watched token.
        ids: its id or ids.
        window: canvas positions; None for all.

    Returns:
        Curves "smear" (0 or below: none) and "least": what the same mass would give on as few positions as can
        hold it, which is the null.
    """
    window = slice(None) if window is None else window
    mass_JRBC = watched(trajectory, name)[..., window].astype(float)
    count_JB = np.isin(trajectory.committed[..., window], np.atleast_1d(ids)).sum(-1)
    total = mass_JRBC.sum(-1)
    share = mass_JRBC / np.maximum(total, 1e-30)[..., None]
    entropy = -np.sum(np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0), -1)
    smear = np.where(total >= floor, np.exp(entropy) - count_JB[:, None], np.nan)
    least = np.maximum(np.ceil(total - 1e-6), 1) - count_JB[:, None]
    valid = trajectory.valid
    return StepCurves(
        {"smear": of_rows(smear, valid), "least": of_rows(np.where(total >= floor, least, np.nan), valid)},
        "positions", f"{name}: positions it spreads over, beyond its final count",
    )  # fmt: skip


def smeared_tokens(
    trajectory: dg.Trajectory, reach: int = 2, floor: float = 0.2
) -> list[tuple[int, int, int, int, int]]:
    """Tokens that stand at two neighbouring positions at once, and at fewer in the end.

    A token is smeared at a step if it has probability `floor` or more at two positions at most `reach` apart, at least
    one of which is not its own in the end. What the default record's candidates show; a floor of 0.2 is always among
    the five most likely.

    Returns:
        (block, step, row, position, token), of the position that is not its own.
    """
    ids, probs = kept(trajectory, "top_ids", "top_probs")
    final = trajectory.committed
    likely = (probs >= floor) & trajectory.valid[..., None, None] & (ids != final[:, None, ..., None])
    found = set()
    for block, step, row, place, rank in np.argwhere(likely):
        token = ids[block, step, row, place, rank]
        near = slice(max(0, place - reach), place + reach + 1)
        beside = (ids[block, step, row, near] == token) & (probs[block, step, row, near] >= floor)
        here = place - near.start
        own = final[block, row, near] == token
        if beside.any(-1)[np.arange(len(own)) != here].any() and own.any():
            found.add(tuple(int(x) for x in (block, step, row, place, token)))
    return sorted(found)
