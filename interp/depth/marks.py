"""Names on values of a program that survive tracing: where depth may restart, and how its path is told."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site
from interp import surgery
from interp.editing import put, rewrapped

# A mark there would open the fused experts: another program.
FUSED = ("router_weights", "expert_hidden", "expert_out")


def mark(name: str, value: Any) -> Any:
    """The value, under a name that `interp.serial_depth` sees. Compiled programs do not change.

    Args:
        name: of the place; a cut can name it, or match it by a glob.
        value: an array or a pytree of arrays.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), value)


@nnx.dataclass(eq=False)
class Marked(Site):
    """A site that puts its full name on what passes by."""

    full: str

    def __call__(self, x: jax.Array) -> jax.Array:
        return mark(self.full, x)


def marked(model: Any) -> Any:
    """The model, or bundle, with every site marked but those of fused experts, which stay as they are."""
    names = [info.name for info in surgery.sites(model) if info.name.split(".")[-1] not in FUSED]
    return rewrapped(model, put(of(model), {name: Marked(name.split(".")[-1], name) for name in names}))
