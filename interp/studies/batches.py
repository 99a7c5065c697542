"""Which generations run together: rows of like length, in batches of one size, so that few programs are compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dgemma_jax.nn import meshes
from dgemma_jax.nn.functional import of

LOGIT_BYTES = 4 << 30  # of some four arrays [B, C, V] that a step holds
MOST_ROWS = 64  # with more of them more stand idle behind the last of a study: measured on `nano`, two cores


def planned(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Row numbers of each batch, all rows once, the longest prompts first. The last batch may be smaller.

    Long prompts tend to take more steps, and a row that takes many at the end of a study runs beside idle ones (a
    fifth of the steps of 2,000 prompts of `nano`). What does not fit into memory shows at once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[at : at + size] for at in range(0, len(order), size)]


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """At least `size` rows, the last one repeated, for one shape throughout; what the copies give is thrown away."""
    return np.concatenate([rows, np.repeat(rows[-1:], max(0, size - len(rows)))])


def shared(room: Sequence[int]) -> list[int]:
    """The room that parts one after the other are given: all that of the largest, up to twice that of the smallest.

    For each room programs are compiled.
    """
    together: list[list[int]] = []
    for own in room:
        if together and max(*together[-1], own) <= 2 * min(*together[-1], own):
            together[-1].append(own)
        else:
            together.append([own])
    return [max(run) for run in together for _ in run]


def runs(parts: Sequence[int], room: Sequence[int]) -> Iterator[list[int]]:
    """Parts one after the other that need room for as many tokens."""
    for _, some in itertools.groupby(zip(parts, room, strict=True), key=lambda part: part[1]):
        yield [part for part, _ in some]


def together(made: Iterable[tuple[int, Any]], size: int, count: int) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Results that come in any order, in batches of `size` in the order of their numbers, each when it is whole.

    Args:
        made: (number, result); numbers from `count` on are left out.
    """
    waiting: dict[int, Any] = {}
    for number, result in made:
        waiting[number] = result
        first = number // size * size
        own = np.arange(first, min(first + size, count))
        if len(own) and all(n in waiting for n in own):
            yield own, [waiting.pop(n) for n in own]


def that_fit(bundle: Any, count: int) -> int:
    """How many of these rows run together by default: as many on each part of the axis `data` of the model's mesh."""
    config, ways = of(bundle).config, meshes.ways(meshes.of(of(bundle)))
    most = max(1, min(MOST_ROWS, LOGIT_BYTES // (16 * config.canvas_length * config.vocab_size)))
    return ways * min(most, -(-count // ways))
