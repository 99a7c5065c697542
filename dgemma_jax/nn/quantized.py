"""A model with its large weights in few bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dgemma_jax.nn.packed import FORMATS, Packed, pack
from dgemma_jax.nn.transformer import Transformer

# End of the path of a weight -> the axes that share a scale: those a product sums over, so that the scale leaves the
# sum. Experts' `down` is summed over experts too, so its scale belongs to the input.
_SHARED: dict[tuple[str, ...], tuple[int, ...]] = {
    ("embedder", "table"): (1,),
    ("attention", "q"): (2,),
    ("attention", "k"): (2,),
    ("attention", "v"): (2,),
    ("attention", "o"): (1, 2),
    ("mlp", "gate"): (1,),
    ("mlp", "up"): (1,),
    ("mlp", "down"): (1,),
    ("self_conditioning", "gate"): (1,),
    ("self_conditioning", "up"): (1,),
    ("self_conditioning", "down"): (1,),
    ("experts", "gate_up"): (2,),
    ("experts", "down"): (2,),
}
Path = tuple[str | int, ...]
Model = TypeVar("Model", bound=Transformer)


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs the weights of a model one by one while they are loaded, so that no plain copy of all is ever held.

    Attributes:
        form: one of `packed.FORMATS`.
    """

    form: str

    def wants(self, path: Path) -> bool:
        """Whether the weight at this path is one that is packed."""
        return path[-2:] in _SHARED

    def pack(self, path: Path, weight: jax.Array) -> Packed:
        """The weight of this path, packed."""
        return pack_at(path, weight, self.form)

    def install(self, model: Model, packed: Mapping[Path, Packed]) -> Model:
        """The model with the packed weights in it."""
        return installed(model, packed)


def check_form(form: str | None) -> None:
    """Raise a `ValueError` if there is no such format."""
    if form is not None and form not in FORMATS:
        raise ValueError(f"quantize must be one of {', '.join(FORMATS)} or None, got {form!r}")


def pack_at(path: Path, weight: jax.Array, form: str) -> Packed:
    """The weight of this path in a format. The embedding table stays at 8 bits in "int4": it is read and written."""
    table = path[-2:] == ("embedder", "table")
    return _packed(weight, "int8" if form == "int4" and table else form, _SHARED[path[-2:]])


_packed = jax.jit(pack, static_argnums=(1, 2))


def quantized(model: Model, form: str) -> Model:
    """The model with embedding, attention, feed-forwards and experts in "int8", "int4" (groups of 128) or "fp8".

    Works on a model without weights too. Norms, scalars, routers and the cache keep their dtype, and so does what is
    computed: only the weights in memory get smaller.

    Raises:
        ValueError: no such format, or the model is packed already.
    """
    check_form(form)
    if packed_form(model) is not None:
        raise ValueError(f"the model is in {packed_form(model)} already; quantize the model it was made from")

    def build(model: Model) -> Model:
        weights = {path: _at(model, path)[...] for path in paths(model)}
        return installed(model, {path: pack_at(path, weight, form) for path, weight in weights.items()})

    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        return jax.eval_shape(build, model)
    return build(model)


def installed(model: Model, packed: Mapping[Path, Packed]) -> Model:
    """The model with packed weights in the places of its parameters; the given one is left as it is."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for path, weight in packed.items():
        setattr(_at(copy, path[:-1]), path[-1], weight)
    return copy


def paths(model: Any) -> list[Path]:
    """Where the weights are that can be packed."""
    owners: list[Path] = [("embedder",), ("self_conditioning",)]
    owners += [("layers", i, part) for i in range(len(model.layers)) for part in ("attention", "mlp", "experts")]
    found = [(*owner, name) for owner in owners for kind, name in _SHARED if owner[-1] == kind]
    return [path for path in found if _at(model, path) is not None]  # full layers have no `v`


def packed_form(model: Any) -> str | None:
    """The format that a model is in; None if its weights are plain."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Packed))
    dtypes = {node.values.dtype for node in nodes if isinstance(node, Packed)}
    # The table of an "int4" model is in "int8".
    return next((form for form in ("int4", "fp8", "int8") if jnp.dtype(FORMATS[form][0]) in dtypes), None)



def _at(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key] if isinstance(key, int) else getattr(node, key)
    return node
