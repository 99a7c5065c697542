"""Two texts held at once on one canvas: shifted copies of one (spacing), or different ones (meaning).

Only the first kind was seen by the paper (arXiv 2606.20560, section 5); the second is looked for beside it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

import dgemma_jax as dg
from interp.flow.recorded import Specials, content, kept
from interp.flow.saved import Saved


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceSmear(Saved):
    """Of one block.

    Attributes:
        spacing: [R, B, 2 * reach + 1] mean probability, over the content, that the final text stands there shifted by
            -reach..reach positions (a positive shift: later).
        null: [R, B] the same of the final text of another position at random, shifted by nothing: chance agreement.
        meaning: [R, B] positions in runs of at least `run` neighbours at which a rival that is nowhere near in the
            final text stands beside the final token, both above the floor.
        floor: probability above which a text is held.
    """

    spacing: np.ndarray
    null: np.ndarray
    meaning: np.ndarray
    floor: float

    @property
    def is_smeared(self) -> np.ndarray:
        """[R, B] bool: two alignments of the final text are held."""
        return (self.spacing > self.floor).sum(-1) > 1

    @property
    def is_split(self) -> np.ndarray:
        """[R, B] bool: another text is held beside the final one."""
        return self.meaning > 0

    def __repr__(self) -> str:
        count = self.spacing.shape[1]
        spacing, meaning = (flags.any(0).sum() for flags in (self.is_smeared, self.is_split))
        return f"two texts at once, of {count} row(s): by spacing in {spacing}, by meaning in {meaning}"


def sequence_smear(
    trajectory: dg.Trajectory, specials: Specials, block: int = 0, *, floor: float = 0.2, reach: int = 3, run: int = 2,
    window: int = 10, positions: np.ndarray | None = None, seed: int = 0,
) -> SequenceSmear:  # fmt: skip
    """Find texts that are held beside the final one.

    Args:
        trajectory: with candidates (`top_k`; 8 are enough for a floor of 0.2). A token below the last of them counts
            as 0.
        floor: of the mean probability of an alignment, and of each rival.
        reach: largest shift.
        run: neighbouring positions that make a text.
        window: a rival within so many positions of its own place in the final text is spacing, not meaning.
        positions: [B, C] bool, what is looked at; by default the content.
        seed: of the null.
    """
    valid_RB = trajectory.valid[block]
    step, row = np.nonzero(valid_RB)  # N pairs: many steps are taken by few rows
    ids_NCU, probs_NCU = (a[block][step, row] for a in kept(trajectory, "top_ids", "top_probs"))
    final_BC = trajectory.committed[block]
    own_BC = content(trajectory, specials)[block] if positions is None else np.asarray(positions, bool)
    rng = np.random.default_rng(seed)

    def held(text_BC: np.ndarray, where_BC: np.ndarray) -> np.ndarray:
        """[N] mean probability of a text over positions."""
        where_NC, count_N = where_BC[row], where_BC.sum(-1)[row]
        p_NC = ((ids_NCU == text_BC[row, :, None]) * probs_NCU).sum(-1)
        return np.where(count_N > 0, (p_NC * where_NC).sum(-1) / np.maximum(count_N, 1), 0.0)

    def everywhere(values_N: np.ndarray) -> np.ndarray:
        """[R, B, ...], zeros where no step was taken."""
        values_RB = np.zeros((*valid_RB.shape, *values_N.shape[1:]), values_N.dtype)
        values_RB[step, row] = values_N
        return values_RB

    shifts = []
    for shift in range(-reach, reach + 1):
        source, inside = _shifted(final_BC.shape[1], shift)
        shifts.append(held(final_BC[:, source], own_BC[:, source] & inside))
    other_BC = np.stack([_elsewhere(rng, *both) for both in zip(final_BC, own_BC, strict=True)])
    strong_NCU = probs_NCU > floor
    near_NCU = np.zeros(ids_NCU.shape, bool)
    for shift in range(-window, window + 1):
        source, inside = _shifted(final_BC.shape[1], shift)
        near_NCU |= (ids_NCU == final_BC[:, source][row, :, None]) & inside[:, None]
    is_own_NCU = ids_NCU == final_BC[row, :, None]
    both_NC = (strong_NCU & ~near_NCU).any(-1) & (strong_NCU & is_own_NCU).any(-1) & own_BC[row]
    found = np.stack(shifts, -1), held(other_BC, own_BC), _in_runs(both_NC, run).sum(-1)
    return SequenceSmear(*map(everywhere, found), floor)


def _shifted(length: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """[C] the positions that stand there after a shift, and whether they do; others are clipped."""
    source = np.arange(length) - shift
    return source.clip(0, length - 1), (source >= 0) & (source < length)


def _elsewhere(rng: np.random.Generator, text: np.ndarray, own: np.ndarray) -> np.ndarray:
    out, at = text.copy(), np.flatnonzero(own)
    out[at] = text[rng.permutation(at)]
    return out


def _in_runs(flags: np.ndarray, length: int) -> np.ndarray:
    """Flags that stand in runs of at least `length` along the last axis."""
    size, kept_flags = flags.shape[-1], np.zeros_like(flags)
    for start in range(size - length + 1):
        whole = flags[..., start : start + length].all(-1)
        kept_flags[..., start : start + length] |= whole[..., None]
    return kept_flags
