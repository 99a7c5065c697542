"""Where each weight lies on a mesh: one table.

A mesh has any of the axes `data`, `expert` and `tensor`. Weights are whole along `data`, which rows of a batch are laid
over. Along the others each weight is split as the table says, if the size divides; what is not in the table, or does
not divide (two key heads over eight devices), is whole on each device. `check` refuses a mesh that helps nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgemma_jax.config import ModelConfig
from dgemma_jax.weights import tree as trees

AXES = ("data", "expert", "tensor")
# End of the path -> what each dimension is split over: vocabulary, heads, hidden units, experts.
_SPLIT: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedder", "table"): ("tensor", None),
    ("attention", "q"): ("tensor", None, None),
    ("attention", "k"): ("tensor", None, None),
    ("attention", "v"): ("tensor", None, None),
    ("attention", "o"): (None, "tensor", None),
    ("mlp", "gate"): ("tensor", None),
    ("mlp", "up"): ("tensor", None),
    ("mlp", "down"): (None, "tensor"),
    ("self_conditioning", "gate"): ("tensor", None),
    ("self_conditioning", "up"): ("tensor", None),
    ("self_conditioning", "down"): (None, "tensor"),
    ("experts", "gate_up"): ("expert", None, None),
    ("experts", "down"): ("expert", None, None),
}
_PACKED = ("values", "scale")  # of a weight in few bits
Model = TypeVar("Model")


def check(mesh: Mesh, config: ModelConfig | None = None) -> Mesh:
    """The mesh with axes that XLA partitions by itself (`jax.make_mesh` makes others unless told).

    Raises:
        ValueError: an axis other than `data`, `expert` and `tensor`; or `check_sizes`.
    """
    unknown = sorted(set(mesh.axis_names) - set(AXES))
    if unknown:
        raise ValueError(f"the mesh has the axes {unknown}; name each axis one of {list(AXES)}")
    if config is not None:
        check_sizes(mesh.shape, config)
    return Mesh(mesh.devices, mesh.axis_names)


def check_sizes(axes: Mapping[str, int], config: ModelConfig) -> None:
    """Raise a `ValueError` if `expert` does not divide the experts, or `tensor` divides nothing of the model."""
    experts, count = axes.get("expert", 1), config.num_experts
    if count % experts:
        fit = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(f"the axis expert has {experts} devices, which does not divide {count} experts; give it one "
                         f"of {fit}, or lay the devices along tensor or data")  # fmt: skip
    tensor = axes.get("tensor", 1)
    sizes = {"vocabulary": config.vocab_size, "heads": config.num_heads, "hidden units": config.hidden_dim,
             "experts": config.num_experts}  # fmt: skip
    if all(size % tensor for size in sizes.values()):
        fit = [n for n in range(2, 65) if math.gcd(*sizes.values()) % n == 0]
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"the axis tensor has {tensor} devices, which divides nothing ({told}): every weight would be "
                         f"whole on each device; what divides all of them: {fit or 'no number'}")  # fmt: skip


def shardings(tree: Any, mesh: Mesh) -> dict[trees.Path, NamedSharding]:
    """The sharding of every leaf by its path.

    Experts lie along `expert` and `tensor` together if both divide them, else along one of the two.
    """
    mesh = check(mesh)
    leaves = trees.leaves(tree)
    return {path: NamedSharding(mesh, PartitionSpec(*_spec(path, x.shape, mesh.shape))) for path, x in leaves.items()}


def shapes(tree: Any, axes: Mapping[str, int]) -> dict[trees.Path, tuple[int, ...]]:
    """The shape of what one device holds of every leaf, by its path; of a mesh only the sizes of its axes are asked."""
    found = {}
    for path, leaf in trees.leaves(tree).items():
        parts = [math.prod(axes[name] for name in names) for names in _spec(path, leaf.shape, axes)]
        found[path] = tuple(n // k for n, k in itertools.zip_longest(leaf.shape, parts, fillvalue=1))
    return found


def _spec(path: trees.Path, shape: tuple[int, ...], axes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The axes of the mesh that each dimension is split over: as many devices as divide it."""
    owner = path[:-1] if path[-1] in _PACKED else path  # a scale of size one along an axis is not split there
    return [_along(axis, size, axes) for axis, size in zip(_SPLIT.get(owner[-2:], ()), shape, strict=False)]


def _along(axis: str | None, size: int, axes: Mapping[str, int]) -> tuple[str, ...]:
    choices = [("expert", "tensor"), ("expert",), ("tensor",)] if axis == "expert" else [(axis,)]
    for names in choices:
        if all(name in axes for name in names) and size % math.prod(axes[name] for name in names) == 0:
            return names
    return ()


def on_mesh(model: Model, mesh: Mesh | None) -> Model:
    """A copy that knows the mesh; its arrays stay where they are.

    Experts on several devices run in the dense form, each device its own: the others would gather the weights.
    """
    known = jax.tree.map(lambda leaf: leaf, model)
    for owner in (known, *(part for layer in known.layers for part in (layer.router, layer.experts))):
        owner.mesh = mesh
    split = mesh is not None and any(mesh.shape.get(axis, 1) > 1 for axis in ("expert", "tensor"))
    if split and known.moe == "auto":
        known.moe = "dense"
    return known


def placed(model: Model, mesh: Mesh) -> Model:
    """The model laid over a mesh."""
    where: Mapping[trees.Path, NamedSharding] = shardings(model, mesh)
    mesh = next(iter(where.values())).mesh
    lying = {path: jax.device_put(leaf, where[path]) for path, leaf in trees.leaves(model).items()}
    return on_mesh(trees.replace(model, lying), mesh)
