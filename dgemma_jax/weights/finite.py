"""Are there infinities or NaNs? Once for arrays on the host, once for arrays on a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def on_device(array: jax.Array) -> jax.Array:
    """Whether no number is infinite or NaN; a scalar. (`isfinite` in bfloat16 takes a CPU five times as long.)"""
    return jnp.abs(array).max(initial=0) < jnp.inf  # max gives NaN if there is one


def on_host(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN, by the bits of the exponent (13 times `np.isfinite` in bfloat16)."""
    info, words = jnp.finfo(array.dtype), bits(np.atleast_1d(array))
    mask = words.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    return all((chunk & mask).max(initial=0) != mask for chunk in _chunks(words))


def everywhere(good: list[bool], shardings: Iterable[jax.sharding.Sharding] = ()) -> list[bool]:
    """Whether each is good in all processes, where arrays lie over several: each has looked at its own part."""
    if all(sharding.is_fully_addressable for sharding in shardings):
        return good
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(good)).reshape(-1, len(good)).all(0).tolist()


def _chunks(array: np.ndarray, size: int = 1 << 18) -> Iterator[np.ndarray]:
    if not array.flags.c_contiguous:
        for row in array:
            yield from _chunks(np.atleast_1d(row), size)
        return
    flat = array.reshape(array.size)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


def bits(array: np.ndarray) -> np.ndarray:
    """The array as unsigned integers."""
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])
