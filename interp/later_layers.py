"""A step of which only the later layers run: those before hand on what they handed on without the change.

A change in layer l leaves the layers before it as they were, so a sweep over layers need not run them for every place:
half of the work of a model of many layers. Which layers run is data: one program for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from interp import surgery


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beginning:
    """Where a step begins.

    Attributes:
        layer: [] int32, the first layer that runs.
        handed: of every layer [P, C, D], what it handed on; unused from `layer` on.
    """

    layer: jax.Array
    handed: Sequence[jax.Array]

    @classmethod
    def anew(cls, model: Any, pairs: int) -> Beginning:
        """All layers run."""
        nothing = jnp.zeros((pairs, model.config.canvas_length, model.config.embed_dim), model.dtype)
        return cls(jnp.int32(0), [nothing] * model.config.num_layers)


@nnx.dataclass(eq=False)
class _Later(nnx.Module):
    """A layer of a denoising step that runs, or hands on what is given. The last three: see `begun`; static."""

    layer: Any = nnx.data()
    number: int
    beginning: Beginning = nnx.data()
    changed: Callable[[int, jax.Array], jax.Array]
    leave: Callable[[int, jax.Array], None]
    inside: dict[str, jax.Array]

    @property
    def denoise_scalar(self) -> Any:
        return self.layer.denoise_scalar

    def __call__(self, x_BCD: jax.Array, *more: Any) -> tuple[jax.Array, None, None]:
        handed_PCD = self.beginning.handed[self.number]
        count = len(handed_PCD)

        def run(x_BCD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            x_BCD = self.layer(x_BCD, *more)[0]
            found = dict(self.inside)
            self.inside.clear()  # they are of this branch, and leave it as its results
            return x_BCD, found

        def given(x_BCD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            x_BCD = self.changed(self.number, jnp.tile(handed_PCD, (len(x_BCD) // count, 1, 1)))
            return x_BCD, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)

        before = dict(self.inside)
        self.inside.clear()
        nothing = jax.eval_shape(run, x_BCD)[1]
        x_BCD, found = jax.lax.cond(self.number < self.beginning.layer, given, run, x_BCD)
        self.inside.update(before | found)
        self.leave(self.number, x_BCD[:count])
        return x_BCD, None, None


def begun(
    model: Any, beginning: Beginning, changed: Callable[[int, jax.Array], jax.Array],
    inside: dict[str, jax.Array] | None = None,
) -> tuple[Any, dict[int, jax.Array]]:  # fmt: skip
    """The model whose denoising step begins at a layer. Within one trace.

    Args:
        changed: gives, for a layer's number and what it handed on [B, C, D], what takes its place.
        inside: where sites within layers leave arrays in this trace; zeros of a layer that does not run.

    Returns:
        The model; and by layer, once a step is traced, [P, C, D] what it handed on for the first P rows.
    """
    left: dict[int, jax.Array] = {}
    inside = {} if inside is None else inside
    found = surgery.layers(model)
    later = {
        path: _Later(layer, path[1].idx, beginning, changed, left.__setitem__, inside)
        for path, layer in found.get_by_path().items()
    }
    return found.set_by_path(later), left
