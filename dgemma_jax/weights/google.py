"""Names and layouts of Google's own Orbax tree: one table. Arrays are read in `orbax.py`.

Beware: there `mlp` are the experts and `mlp2` the dense branch, and the numbers of the norms differ too.
Letters as in `axes.py`; `c` is an axis of two: key and value, or gate and up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dgemma_jax.weights.tree import Path


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf made of one array: where it goes, which half of `c` it is, and the order of its axes."""

    path: Path
    axes: str
    half: int | None = None

    @property
    def leaf_axes(self) -> str:
        """One letter for each axis of the leaf: `c` is merged into the axis after it."""
        return self.axes.replace("c", "")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Axes of an array of Google's tree and the leaves made of it."""

    axes: str
    parts: tuple[Part, ...]

    def shape(self, leaves: Mapping[Path, Any]) -> tuple[int, ...]:
        """The shape that the array must have for leaves of these shapes."""
        sizes = {"c": 2}
        for part in self.parts:
            sizes |= dict(zip(part.leaf_axes, leaves[part.path].shape, strict=True))
            if "c" in part.axes:
                sizes[part.axes[part.axes.index("c") + 1]] //= 2
        return tuple(sizes[axis] for axis in self.axes)

    def sharding(self, shardings: Mapping[Path, Sharding]) -> Sharding | None:
        """The array split as its first leaf is."""
        part = self.parts[0]
        sharding = shardings.get(part.path)
        if not isinstance(sharding, NamedSharding):
            return sharding
        padded = (*sharding.spec, *(None for _ in part.leaf_axes))
        split = dict(zip(part.leaf_axes, padded, strict=False))
        return NamedSharding(sharding.mesh, PartitionSpec(*(split.get(axis) for axis in self.axes)))


def take(array: jax.Array, *, axes: str, order: str, half: int | None, shape: tuple[int, ...]) -> jax.Array:
    """The leaf of this shape out of an array with these axes: one half of `c` if asked, the rest in `order`."""
    if half is not None:
        array = jax.lax.index_in_dim(array, half, axes.index("c"), keepdims=False)
        axes = axes.replace("c", "")
    return array.transpose([axes.index(axis) for axis in order]).reshape(shape)


_GATED = "{0}.gate FD 0, {0}.up FD 1"
_TABLE = {
    # array (without the trailing /w) and its axes -> leaves, their axes and half
    "embedder/input_embedding VD": "embedder.table VD",
    "final_norm/scale D": "final_norm.weight D",
    "self_conditioner/pre_norm/scale D": "self_conditioning.pre_norm.weight D",
    "self_conditioner/ffw/gating_einsum cFD": _GATED.format("self_conditioning"),
    "self_conditioner/ffw/linear FD": "self_conditioning.down DF",
    "layer_{L}/attn/q_einsum NDH": "layers.{L}.attention.q NHD",
    "layer_{L}/attn/kv_einsum cKDH": "layers.{L}.attention.k KHD 0, layers.{L}.attention.v KHD 1",
    "layer_{L}/attn/k_einsum KDH": "layers.{L}.attention.k KHD",
    "layer_{L}/attn/attn_vec_einsum NHD": "layers.{L}.attention.o DNH",
    "layer_{L}/attn/query_norm/scale H": "layers.{L}.attention.q_norm.weight H",
    "layer_{L}/attn/key_norm/scale H": "layers.{L}.attention.k_norm.weight H",
    "layer_{L}/mlp/gating_einsum EcFD": "layers.{L}.experts.gate_up EcFD",
    "layer_{L}/mlp/linear EFD": "layers.{L}.experts.down EFD",
    "layer_{L}/mlp/router_logits DE": "layers.{L}.router.proj ED",
    "layer_{L}/mlp/router_scale D": "layers.{L}.router.scale D",
    "layer_{L}/mlp/per_expert_scale E": "layers.{L}.router.per_expert_scale E",
    "layer_{L}/mlp2/gating_einsum cFD": _GATED.format("layers.{L}.mlp"),
    "layer_{L}/mlp2/linear FD": "layers.{L}.mlp.down DF",
    "layer_{L}/pre_attention_norm/scale D": "layers.{L}.input_norm.weight D",
    "layer_{L}/post_attention_norm/scale D": "layers.{L}.post_attn_norm.weight D",
    "layer_{L}/pre_ffw_norm/scale D": "layers.{L}.pre_moe_norm.weight D",
    "layer_{L}/post_ffw1_norm/scale D": "layers.{L}.post_moe_norm.weight D",
    "layer_{L}/pre_ffw2_norm/scale D": "layers.{L}.pre_mlp_norm.weight D",
    "layer_{L}/post_ffw2_norm/scale D": "layers.{L}.post_mlp_norm.weight D",
    "layer_{L}/post_ffw_norm/scale D": "layers.{L}.post_ffw_norm.weight D",
    "layer_{L}/skip_scale 1": "layers.{L}.denoise_scalar 1, layers.{L}.prefill_scalar 1",
}
_RULES = {entry.split()[0]: (entry.split()[1], leaves) for entry, leaves in _TABLE.items()}
_NOT_USED_YET = ("vision_encoder/", "embedder/mm_")
TABLE = "embedder/input_embedding"


def name_of(path: Path) -> str:
    """`layer_3/attn/q_einsum` for an array's path: without an outer scope and without the trailing `w`.

    Modules that share a scope store `gating_einsum` where others store `gating_einsum/w`.
    """
    parts = [part for key in path for part in str(key).split("/")]
    while parts[0] in ("params", "transformer"):
        parts = parts[1:]
    return "/".join(parts[:-1] if parts[-1] == "w" else parts)


def recognised(paths: list[Path]) -> bool:
    """Whether arrays of these paths are Google's tree."""
    return TABLE in map(name_of, paths)


def not_used_yet(name: str) -> bool:
    """True for arrays of the image tower: known, and left where they are."""
    return name.startswith(_NOT_USED_YET)


def rule_of(name: str) -> Rule | None:
    """What becomes of an array, or None if the tree has no place for it."""
    found = re.match(r"layer_(0|[1-9]\d*)/", name)
    layer = found.group(1) if found else ""
    axes, leaves = _RULES.get(f"layer_{{L}}/{name[found.end() :]}" if found else name, (None, ""))
    return axes and Rule(axes, tuple(_part(text, layer) for text in leaves.split(", ")))


def _part(text: str, layer: str) -> Part:
    place, axes, *half = text.split()
    path = tuple(int(layer) if part == "{L}" else part for part in place.split("."))
    return Part(path, axes, int(half[0]) if half else None)
