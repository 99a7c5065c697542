"""What the rows of a cache read, each at its own time: prompts and committed blocks.

They go through the model in pieces of few sizes and 1, 4, 16, ... rows at once, so that few programs are compiled,
whatever the prompts are.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.diffusion.generate import PREFILL_CHUNK
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import functional


def piece_sizes(canvas_length: int) -> list[int]:
    """Tokens of one piece: a canvas and its multiples by 4, and a quarter of a large one."""
    sizes = [canvas_length // 4] if canvas_length >= 64 else []
    size = canvas_length
    while size <= max(canvas_length, PREFILL_CHUNK):
        sizes.append(size)
        size *= 4
    return sizes


def group_sizes(rows: int) -> list[int]:
    """Rows that are read at once."""
    return [4**n for n in range(rows.bit_length()) if 3 * 4**n <= 4 * rows]


def cut(things: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """The things in pieces, each for the largest of the sizes that it fills by three quarters, or for the smallest."""
    pieces = []
    while len(things):
        size = max([s for s in sizes if 4 * len(things) >= 3 * s], default=sizes[0])
        pieces.append(things[:size])
        things = things[size:]
    return pieces


def _holding(count: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds so many."""
    return next(size for size in sizes if size >= count)


def read(
    model: Any, cache: kv.KVCache, pieces: dict[int, list[Sequence[int]]], fresh: Sequence[int], sizes: Sequence[int]
) -> kv.KVCache:
    """Run the pieces through the model, rows whose next pieces are of a size together; `fresh` rows begin empty.

    Args:
        model: as it is or `Flattened`.
        sizes: of pieces, `piece_sizes`.
    """
    groups, clean = group_sizes(len(cache.length)), set(fresh)
    left = {place: collections.deque(own) for place, own in pieces.items()}
    while left:
        by_size = collections.defaultdict(list)
        for place, own in left.items():
            by_size[_holding(len(own[0]), sizes)].append(place)
        for size, places in sorted(by_size.items()):
            for group in cut(places, groups):
                tokens, valid = np.zeros((len(group), size), np.int32), np.zeros((len(group), size), bool)
                for at, place in enumerate(group):
                    piece = left[place].popleft()
                    tokens[at, : len(piece)], valid[at, : len(piece)] = piece, True
                rows = (np.array(group), tokens, valid, np.array([place in clean for place in group]))
                # The last row again and again: it is written several times alike.
                filled = np.minimum(np.arange(_holding(len(group), groups)), len(group) - 1)
                cache = _read_piece(model, cache, *(a[filled] for a in rows))
                clean -= set(group)
        left = {place: own for place, own in left.items() if own}
    return cache


@functools.partial(jax.jit, donate_argnames="cache")
def _read_piece(model, cache, places, tokens, valid, is_clean) -> kv.KVCache:
    """The cache with the next tokens [n, T] of the rows at `places` [n]; clean ones are emptied before."""
    own = jax.tree.map(lambda a: a[places], cache)
    own = own.replace(length=jnp.where(is_clean, 0, own.length))
    new = functional.prefill(functional.of(model), tokens, valid, own).cache
    return jax.tree.map(lambda a, b: a.at[places].set(b), cache, new)
