"""Which generations run together: rows of like length, in batches of one size, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dgemma_jax.nn import meshes
from dgemma_jax.nn.functional import of

LOGIT_BYTES = 4 << 30  # of some four arrays [B, C, V] that a step holds
MOST_ROWS = 256


def planned(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Row numbers of each batch, all rows once, the shortest prompts first. The last batch may be smaller."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[at : at + size] for at in range(0, len(order), size)]


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """The rows with the last one repeated, for one shape throughout; what the copies give is thrown away."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])


def that_fit(bundle: Any, count: int) -> int:
    """How many of these rows run together by default: as many on each part of the axis `data` of the model's mesh."""
    config, ways = of(bundle).config, meshes.ways(meshes.of(of(bundle)))
    most = max(1, min(MOST_ROWS, LOGIT_BYTES // (16 * config.canvas_length * config.vocab_size)))
    return ways * min(most, -(-count // ways))
