"""A short text that tells models apart: for the names of files that hold what a model did."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from dgemma_jax.nn.functional import of
from interp.edit_list import describe


def fingerprint(model: Any, *more: Any) -> str:
    """16 hexadecimal digits of a model's weights, its edits, and the `repr` of whatever else is given.

    Weights enter by sums of their bits, in integers: exact on every device and in any order of summation.
    """
    transformer = of(model)
    leaves = jax.tree_util.tree_leaves_with_path(transformer)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    parts = [(jax.tree_util.keystr(path), int(total)) for (path, _), total in zip(leaves, sums, strict=True)]
    return hashlib.sha256(repr((parts, repr(describe(transformer)), *more)).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(leaf: jax.Array) -> jax.Array:
    """Sum modulo 2^32 of the bits of the entries, each times an odd number that depends on its place."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    weights = jnp.ones(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        weights += place * jnp.uint32(2 * pow(40503, axis + 1, 2**31))
    return jnp.sum(leaf.astype(jnp.uint32) * weights, dtype=jnp.uint32)
