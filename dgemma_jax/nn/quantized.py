"""A model with its large weights in few bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dgemma_jax.nn.packed import FORMS, Packed, pack
from dgemma_jax.nn.placement import with_experts
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


def check_form(form: str | None) -> None:
    """Raise a `ValueError` if there is no such format."""
    if form is not None and form not in FORMS:
        raise ValueError(f"quantize must be one of {', '.join(FORMS)} or None, got {form!r}")


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs weights one by one, so that a loader never holds a plain copy of them all.

    Attributes:
        form: one of `packed.FORMS`.
    """

    form: str

    def wants(self, path: Path) -> bool:
        """Whether the weight at this path is one that is packed."""
        return path[-2:] in _SHARED

    def pack(self, path: Path, weight: jax.Array) -> Packed:
        """The weight of this path, packed. The embedding table stays at 8 bits in "int4": it is read and written."""
        form = "int8" if self.form == "int4" and path[-2:] == ("embedder", "table") else self.form
        return _packed(weight, form, _SHARED[path[-2:]])

    def install(self, model: Model, packed: Mapping[Path, Packed]) -> Model:
        """The model with packed weights in the places of its parameters; the given one is left as it is."""
        copy = jax.tree.map(lambda leaf: leaf, model)
        for path, weight in packed.items():
            setattr(_at(copy, path[:-1]), path[-1], weight)
        return copy


_packed = jax.jit(pack, static_argnums=(1, 2))


def quantized(model: Model, form: str) -> Model:
    """The model with embedding, attention, feed-forwards and experts in "int8", "int4" (groups of 128) or "fp8".

    Works on a model without weights too. Norms, scalars, routers and the cache keep their dtype, and so does what is
    computed: only the weights in memory get smaller.

    Raises:
        ValueError: no such format, or the model is packed already.
    """
    check_form(form)
    check_plain(model, "packed again")
    model, packer = with_experts(model, layout="efd"), Packer(form)

    def build(model: Model) -> Model:
        return packer.install(model, {path: packer.pack(path, _at(model, path)[...]) for path in paths(model)})

    is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
    return jax.eval_shape(build, model) if is_abstract else build(model)


def check_plain(model: Any, what: str) -> None:
    """Raise a `ValueError` if the weights are packed; `what` ends the sentence "the weights cannot be ..."."""
    if form := packed_form(model):
        raise ValueError(f"the model's weights are in {form} already and cannot be {what}; load it without `quantize`")


def nbytes(model: Any) -> int:
    """Bytes of all leaves, two values of int4 to a byte; of a model without weights too."""
    return sum(math.prod(x.shape) * _bits(x.dtype) // 8 for x in jax.tree.leaves(model))


def _bits(dtype: Any) -> int:
    return 4 if dtype == jnp.int4 else 8 * dtype.itemsize


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
    return next((form for form in ("int4", "fp8", "int8") if jnp.dtype(FORMS[form][0]) in dtypes), None)



def _at(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key] if isinstance(key, int) else getattr(node, key)
    return node
