"""Sums of weights that tell two models apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def weight_sums(tree: Any) -> list[tuple[str, int]]:
    """(path, sum) of every leaf, by the bits of its numbers, in integers: exact on every device, in any order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return [(jax.tree_util.keystr(path), int(total)) for (path, _), total in zip(leaves, sums, strict=True)]


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
