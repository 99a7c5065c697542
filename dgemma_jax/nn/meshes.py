"""Models on a mesh of devices: rows of a batch lie along the axis `data`, weights along `expert` and `tensor`.

A model knows the mesh it lies on (`Transformer.mesh`), so nothing else has to be told: wherever rows enter the model
they are laid over `data`. XLA decides where the rest lies, by the weights (`weights.sharding` has their table).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgemma_jax.nn import cache as kv

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig

Tree = TypeVar("Tree")


def of(model: Any) -> Mesh | None:
    """The mesh that a model lies on."""
    return getattr(model, "mesh", None)


def ways(mesh: Mesh | None, axis: str = "data") -> int:
    """How many parts an axis makes; 1 without a mesh or such an axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def rows(tree: Tree, mesh: Mesh | None, axis: int = 0) -> Tree:
    """The arrays [B, ...] with their rows, along `axis`, laid over `data`; to be traced.

    Rows that do not divide are padded by XLA, which nothing outside of the compiled program sees.
    """
    if ways(mesh) == 1:
        return tree

    def lay(x: jax.Array) -> jax.Array:
        spec = ["data" if i == axis else PartitionSpec.UNCONSTRAINED for i in range(x.ndim)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(lay, tree)


def by_rows(fn: Callable[..., Any], mesh: Mesh | None, whole: Any = ()) -> Callable[..., Any]:
    """The function of (arrays [B, ...], *whole), run on each device for its own rows; as it is if rows do not divide.

    Args:
        whole: further arguments, which every device has all of.
    """

    def run(*arrays: jax.Array) -> Any:
        if ways(mesh) == 1 or any(x.shape[0] % ways(mesh) for x in arrays):
            return fn(*arrays, *whole)
        row, every = PartitionSpec("data"), PartitionSpec()
        specs = (*[row] * len(arrays), *[every] * len(whole))
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=row, axis_names={"data"}, check_vma=False)
        return mapped(*arrays, *whole)

    return run


@functools.partial(jax.jit, static_argnums=range(5), inline=True)
def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any, mesh: Mesh | None) -> kv.KVCache:
    """`nn.cache.empty`, made where it will lie."""
    cache = kv.empty(config, batch, capacity, dtype)
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_shardings(cache, mesh))


def cache_shardings(cache: kv.KVCache, mesh: Mesh) -> kv.KVCache:
    """Where keys and values lie: rows along `data`, key heads along `tensor`, where these divide them."""

    def lies(x: Any) -> NamedSharding:
        sizes = zip(("data", "tensor"), x.shape, strict=False)
        spec = [axis if axis in mesh.shape and n % mesh.shape[axis] == 0 else None for axis, n in sizes]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(lies, cache)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether devices of the mesh belong to another process."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def to_host(tree: Tree) -> Tree:
    """The arrays as NumPy arrays, also those of which other processes hold a part; all of these have to ask."""
    far = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not x.is_fully_addressable]
    far = [x for x in far if not x.is_fully_replicated]
    if far:
        whole = NamedSharding(far[0].sharding.mesh, PartitionSpec())
        near = iter(_everywhere(far, whole))
        ids = {id(x) for x in far}
        tree = jax.tree.map(lambda x: next(near) if id(x) in ids else x, tree)
    return jax.device_get(tree)


@functools.partial(jax.jit, static_argnums=1)
def _everywhere(arrays: list[jax.Array], whole: NamedSharding) -> list[jax.Array]:
    return [jax.lax.with_sharding_constraint(x, whole) for x in arrays]


def agree(flags: Any) -> Any:
    """Booleans [n], true where any process says so."""
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return jnp.any(multihost_utils.process_allgather(jnp.asarray(flags)), 0)
