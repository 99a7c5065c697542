"""Statistics of an order: commit step against position, ties and all (`methods.md` section 7).

A sampler that accepts many positions in one step makes many ties. tau-b counts them apart:
tau_b = (concordant - discordant) / sqrt((pairs - ties in one) (pairs - ties in the other)).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

BINS = (4, 8, 16, 32, 64)
CONTROL_BLOCK = 16


def tau(commit: Sequence[int], position: Sequence[int] | None = None, *, ties: bool = True) -> float:
    """Kendall's tau-b of commit steps and positions; NaN with fewer than two positions or one step for all.

    Args:
        position: by default 0, 1, 2, ...
        ties: False takes tau-a, which calls a tie a disagreement with any order; it warns.
    """
    commit = np.asarray(commit)
    position = np.arange(len(commit)) if position is None else np.asarray(position)
    if len(commit) != len(position):
        raise ValueError(f"{len(commit)} commit steps and {len(position)} positions: needed is one for each")
    if len(commit) < 2 or (commit == commit[0]).all() or (position == position[0]).all():
        return float("nan")
    in_time, in_space = _signs(commit), _signs(position)
    concord = int((in_time * in_space).sum(dtype=int))  # less discord; every pair counts twice, here and below
    if ties:
        return concord / math.sqrt(np.count_nonzero(in_time) * np.count_nonzero(in_space))
    warnings.warn("tau-a takes ties for disorder: two samplers that accept more or fewer at once then seem to differ "
                  "in order; ties=True gives tau-b", stacklevel=2)  # fmt: skip
    return concord / (len(commit) * (len(commit) - 1))


def _signs(values: np.ndarray) -> np.ndarray:
    """[n, n] -1, 0 or 1 of all differences, int8. SciPy's `kendalltau` takes 2 to 20 times as long, for a p-value."""
    return (values[:, None] > values).astype(np.int8) - (values[:, None] < values).astype(np.int8)


def block_tau(commit: Sequence[int], position: Sequence[int], bins: Sequence[int] = BINS) -> dict[int, float]:
    """tau-b over contiguous bins of B positions, a bin committing with its first: {B: tau}.

    Warns where one bin size stands alone: without its neighbours it cannot be told from the general rise of tau with
    the size of the bin.
    """
    if len(set(bins)) < 2:
        warnings.warn(f"one bin size ({list(bins)}) shows no block structure: compare several", stacklevel=2)
    order = np.argsort(position, kind="stable")
    commit, position = np.asarray(commit)[order], np.asarray(position)[order]
    found = {}
    for size in bins:
        number = position // size
        starts = np.flatnonzero(np.diff(number, prepend=number[:1] - 1))
        found[size] = tau(np.minimum.reduceat(commit, starts), number[starts]) if len(starts) > 1 else float("nan")
    return found


def control_tau(position: Sequence[int], block: int = CONTROL_BLOCK) -> float:
    """tau-b that blocks written one after the other would have: commit := position // block.

    It depends on the length: 0.58 for 20 positions, 0.97 for 256; 0 for one block.
    """
    position = np.asarray(position)
    found = tau(position // block, position)
    return 0.0 if np.isnan(found) and len(position) > 1 else found


def pair_shares(commit: Sequence[int], position: Sequence[int]) -> tuple[float, float]:
    """(share of pairs in one step, share of pairs the later of which came first); NaN with fewer than two."""
    commit, position = np.asarray(commit), np.asarray(position)
    if len(commit) < 2:
        return float("nan"), float("nan")
    pairs, in_time, in_space = len(commit) * (len(commit) - 1), _signs(commit), _signs(position)
    return 1 - np.count_nonzero(in_time) / pairs, np.count_nonzero(in_time * in_space < 0) / pairs
