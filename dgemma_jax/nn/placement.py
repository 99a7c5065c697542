"""How a model's experts run and how their weights lie: fitted to the device that holds them.

| device | form | layout of `gate_up` |
|---|---|---|
| one NVIDIA GPU of compute capability 9.0 (H100, H200, GH200) | mosaic | [E, 2F, D] |
| one TPU | auto: ragged | [E, D, 2F] |
| anything else, and several devices | auto | [E, 2F, D] |

Several devices keep "auto", since XLA splits neither `lax.ragged_dot` nor a Mosaic kernel over experts: each device
would gather all weights. A compiled program cannot tell one GPU from another, which is why this is settled beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax

from dgemma_jax.nn.moe import FORMS, LAYOUTS, Experts
from dgemma_jax.nn.packed import Packed
from dgemma_jax.nn.transformer import Transformer

Model = TypeVar("Model", bound=Transformer)


def best_for(devices: Iterable[Any]) -> tuple[str | None, str]:
    """(form, layout) of the table for the devices that weights are put on; a form of None is the model's own."""
    devices = list(devices)
    if len(devices) == 1 and devices[0].platform == "tpu":
        return None, "edf"
    is_hopper = len(devices) == 1 and getattr(devices[0], "compute_capability", None) == "9.0"
    return "mosaic" if is_hopper else None, "efd"


def check_form(form: str | None) -> None:
    """Raise a `ValueError` if there is no such form of the experts."""
    if form is not None and form not in FORMS:
        raise ValueError(f"experts must be one of {', '.join(FORMS)} or None, got {form!r}")


def with_experts(model: Model, form: str | None = None, layout: str | None = None) -> Model:
    """The model, with or without weights, whose experts run in another form or lie in another layout.

    Args:
        model: left as it is.
        form: one of `moe.FORMS`; None keeps it.
        layout: one of `moe.LAYOUTS`; None keeps it. The values are the same, so are the results.

    Raises:
        ValueError: no such form or layout, or packed weights in another layout than "efd".
    """
    copy = jax.tree.map(lambda leaf: leaf, model)
    place(copy, form, layout)
    return copy


def place(model: Transformer, form: str | None = None, layout: str | None = None) -> None:
    """`with_experts` on the model itself, one layer after the other: for a loader, which owns the tree."""
    check_form(form)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or None, got {layout!r}")
    model.moe = form or model.moe
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Experts))
    for experts in (node for node in nodes if isinstance(node, Experts)):
        if layout is None or experts.layout == layout:
            continue
        if isinstance(experts.gate_up, Packed):
            raise ValueError(f"packed weights lie as 'efd' only, got layout {layout!r}; load without `quantize`")
        experts.gate_up = jax.tree.map(_turned, experts.gate_up)
        experts.layout = layout


def _turned(gate_up: Any) -> Any:
    """The last two axes exchanged, split over devices as before."""
    if isinstance(gate_up, jax.ShapeDtypeStruct):
        return jax.eval_shape(_swap, gate_up)
    sharding = None if isinstance(gate_up, jax.core.Tracer) else gate_up.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return _swap(gate_up)
    e, f, d = (*sharding.spec, None, None, None)[:3]
    spec = jax.sharding.PartitionSpec(e, d, f)
    return jax.jit(_swap, out_shardings=jax.sharding.NamedSharding(sharding.mesh, spec))(gate_up)


@jax.jit
def _swap(array: jax.Array) -> jax.Array:
    return array.swapaxes(1, 2)
