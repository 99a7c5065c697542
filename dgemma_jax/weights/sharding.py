"""Where each weight lies on a mesh: one table."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgemma_jax.weights import tree as trees

AXES = ("data", "expert", "tensor")
# End of the path -> what each dimension is split over. A dimension that does not divide is not split; weights
# that are not named here, and every weight along `data`, are whole on each device.
_SPLIT: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedder", "table"): ("tensor", None),
    ("attention", "q"): ("tensor", None, None),
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


def check(mesh: Mesh) -> None:
    """Raise a `ValueError` if the mesh has an axis other than `data`, `expert` and `tensor`."""
    unknown = sorted(set(mesh.axis_names) - set(AXES))
    if unknown:
        raise ValueError(f"the mesh has the axes {unknown}; name each axis one of {list(AXES)}")


def shardings(tree: Any, mesh: Mesh) -> dict[trees.Path, NamedSharding]:
    """The sharding of every leaf by its path. Experts use the axis `tensor` where the mesh has no `expert`."""
    check(mesh)
    return {path: NamedSharding(mesh, _spec(path, leaf.shape, mesh)) for path, leaf in trees.leaves(tree).items()}


def _spec(path: trees.Path, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec = []
    owner = path[:-1] if path[-1] in _PACKED else path  # a scale of size one along an axis is not split there
    for size, axis in zip(shape, _SPLIT.get(owner[-2:], ()), strict=False):
        if axis == "expert" and axis not in mesh.shape:
            axis = "tensor"
        spec.append(axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*spec)
