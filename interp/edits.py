"""What can be put at a site: edits, one class each. `interp.edit` puts them there.

An edit computes a new value from the value at its site; its gate says where the new value is taken. To write one,
subclass `Edit` as an `nnx.dataclass` with `nnx.data()` fields and define `apply`. An edit never draws from the
random numbers of the sampler: a run and its edited twin share all draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn.sites import Site
from interp.gates import Gate, lead


@nnx.dataclass(eq=False)
class Edit(Site):
    """Something in place of a site. Alone it changes nothing.

    Attributes:
        name: of the site, without the layer. This and what follows is filled in by `interp.edit`.
        axes: letters of the site's shape, with T for canvas positions too.
        phase: the pass in which it acts, "denoise", "prefill" or "both"; static.
        stepped: whether values have a leading axis of steps; static.
        gate: where it acts; None acts everywhere.
        context: what `sites.bind` told it.
    """

    # Fields whose arrays broadcast against the site, so that they may carry axes of layers and of steps. The
    # number is the rank of the field without these; None stands for the rank of the site.
    VALUES: ClassVar[dict[str, int | None]] = {}
    # Names of the sites it makes sense at; None for any.
    ONLY_AT: ClassVar[tuple[str, ...] | None] = None

    name: str = dataclasses.field(default="", kw_only=True)
    axes: str = dataclasses.field(default="", kw_only=True)
    phase: str = dataclasses.field(default="both", kw_only=True)
    stepped: bool = dataclasses.field(default=False, kw_only=True)
    gate: Gate | None = nnx.data(default=None, kw_only=True)
    context: Any = nnx.data(default=None, kw_only=True)

    def apply(self, x: jax.Array) -> jax.Array:
        """The new value."""
        return x

    def bind(self, **context: Any) -> Site:
        """The edit at one moment; the plain site in a pass in which it does not act."""
        if context.get("phase", self.phase) != self.phase and self.phase != "both":
            return Site(self.name)
        kept = {k: v for k, v in context.items() if k not in ("phase", "captured")}
        return dataclasses.replace(self, context=(self.context or {}) | kept)

    def __call__(self, x: jax.Array) -> jax.Array:
        new = self.apply(x)
        if self.gate is None:
            return new.astype(x.dtype)
        strength = self.gate.strength(x.shape, self.axes, self.told(x.shape[0]))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.where(strength > 0.5, new, x).astype(x.dtype)
        # Exact at 0 and at 1, and smooth between.
        return ((1 - strength) * x + strength * new).astype(x.dtype)

    def told(self, batch: int) -> dict[str, Any]:
        """The context; outside a run that of step 0."""
        context = self.context or {}
        if "step" not in context and "positions" not in context:
            zero = jnp.zeros(batch, jnp.int32)
            context = context | {"step": zero, "block": zero}
        return context

    def here(self, value: jax.Array, x: jax.Array) -> jax.Array:
        """A value as it is at this step and at these positions, broadcastable to x."""
        context, batch = self.told(x.shape[0]), x.shape[0]
        if self.stepped:
            step_B = jnp.clip(context.get("step", jnp.zeros(batch, jnp.int32)), 0, value.shape[0] - 1)
            if value.ndim > x.ndim:  # [R, B or 1, ...]
                if value.shape[1] not in (1, batch):
                    raise ValueError(f"{self.name}: values for {value.shape[1]} rows, the batch has {batch}")
                row_B = jnp.arange(batch) if value.shape[1] == batch else jnp.zeros(batch, jnp.int32)
                value = value[step_B, row_B]
            else:
                value = value[step_B]
                value = value.reshape(batch, *[1] * (x.ndim - value.ndim), *value.shape[1:])
        value = lead(value, x.ndim)
        if self.axes.endswith("S") and value.shape[-1] not in (1, x.shape[-1]):  # not known before: a cache's room
            raise ValueError(
                f"{self.name} has {x.shape[-1]} keys here, the value {value.shape[-1]}: take one from a run with as "
                "much room in its cache"
            )
        axis = self.axes.find("T")
        if "positions" in context and axis > 0 and value.shape[axis] > 1 and not context.get("aligned"):
            # In prefill a value speaks of positions in the prompt; the pass may see any part of it, padded.
            index_BT = jnp.clip(context["positions"], 0, value.shape[axis] - 1)
            value = jnp.broadcast_to(value, (batch, *value.shape[1:]))
            value = jax.vmap(lambda v, i: jnp.take(v, i, axis - 1))(value, index_BT)
        return value

    def row_keys(self, batch: int, seed: jax.Array, *, each_step: bool) -> jax.Array:
        """Random keys [B] of the edit's own: they depend on the row's seed, the edit's and the block (and step)."""
        context = self.told(batch)
        keys = context.get("keys")
        if keys is None:  # outside a run: the row's number
            keys = jax.vmap(jax.random.key)(jnp.arange(batch, dtype=jnp.uint32))
        zero = jnp.zeros(batch, jnp.int32)
        moment_B = context.get("step", zero) + 1 if each_step else zero

        def one(key: jax.Array, block: jax.Array, moment: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, _APART), seed)
            return jax.random.fold_in(jax.random.fold_in(key, block), moment)

        return jax.vmap(one)(keys, context.get("block", zero), moment_B)


_APART = 0x5EED  # apart from the keys of blocks, which are folded in at the same place


@nnx.dataclass(eq=False)
class Chain(Site):
    """Several edits at one site, in the order in which they act."""

    edits: list[Any] = nnx.data()

    def bind(self, **context: Any) -> Site:
        bound = [edit.bind(**context) for edit in self.edits]
        acting = [edit for edit in bound if type(edit) is not Site]
        return Chain(self.name, acting) if acting else Site(self.name)

    def __call__(self, x: jax.Array) -> jax.Array:
        for edit in self.edits:
            x = edit(x)
        return x


def seed_array(seed: Any) -> jax.Array:
    """A seed as data."""
    return jnp.asarray(seed, jnp.uint32)


@nnx.dataclass(eq=False)
class Patch(Edit):
    """Takes `value` in place of what is there: activation patching, clamping, knock-out by a constant.

    Attributes:
        value: an array that broadcasts against the site, or captured activations (a mapping by site name).
    """

    VALUES: ClassVar = {"value": None}
    value: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.here(self.value, x), x.shape)


@nnx.dataclass(eq=False)
class Add(Edit):
    """Adds `value`: steering, or a perturbation to differentiate."""

    VALUES: ClassVar = {"value": None}
    value: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        return x + self.here(self.value, x).astype(x.dtype)


@nnx.dataclass(eq=False)
class Scale(Edit):
    """Multiplies by `factor`."""

    VALUES: ClassVar = {"factor": None}
    factor: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        return x * self.here(self.factor, x).astype(x.dtype)


@nnx.dataclass(eq=False)
class ProjectOut(Edit):
    """Removes the span of `directions` [D] or [n, D] from the last axis: directional ablation.

    The directions need not be orthogonal, nor of unit length; a direction of zeros removes nothing.
    """

    VALUES: ClassVar = {"directions": 2}
    directions: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        for unit_D in orthonormal(self.directions.astype(jnp.float32)):
            unit = lead(unit_D, x.ndim)
            wide = wide - jnp.sum(wide * unit, -1, keepdims=True) * unit
        return wide.astype(x.dtype)


def orthonormal(directions: jax.Array) -> list[jax.Array]:
    """Unit vectors [D] with the span of the rows of [n, D]; zeros for a row that adds nothing to it."""
    units: list[jax.Array] = []
    for row_D in directions.reshape(-1, directions.shape[-1]):
        rest_D = row_D
        for _ in range(2):  # twice is enough for orthogonality to rounding
            for unit_D in units:
                rest_D = rest_D - jnp.sum(rest_D * unit_D) * unit_D
        square, floor = jnp.sum(rest_D**2), 1e-10 * jnp.sum(row_D**2)
        is_new = square > floor
        units.append(jnp.where(is_new, rest_D * jax.lax.rsqrt(jnp.where(is_new, square, 1.0)), 0.0))
    return units


@nnx.dataclass(eq=False)
class Replace(Edit):
    """Takes `fn(x, *args)`: any function that keeps shape and dtype.

    A function of a module compiles once and can be saved with the edit; a new lambda compiles anew. `args` are data.
    """

    fn: Callable[..., jax.Array]
    args: tuple[Any, ...] = nnx.data(default=())

    def apply(self, x: jax.Array) -> jax.Array:
        return self.fn(x, *self.args)


@nnx.dataclass(eq=False)
class Zero(Edit):
    """Takes zeros: zero ablation."""

    def apply(self, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)


@nnx.dataclass(eq=False)
class Mean(Edit):
    """Takes a mean: `value`, from a data set of your own, or else the mean over the positions of each row."""

    VALUES: ClassVar = {"value": None}
    value: Any = nnx.data(default=None)

    def apply(self, x: jax.Array) -> jax.Array:
        if self.value is None:
            mean = jnp.mean(x.astype(jnp.float32), self.axes.index("T"), keepdims=True).astype(x.dtype)
        else:
            mean = self.here(self.value, x)
        return jnp.broadcast_to(mean, x.shape)


@nnx.dataclass(eq=False)
class Resample(Edit):
    """Takes the activation of another input, drawn at random for each row and block: resample ablation.

    The draw is the same at every site and step, so that several sites together get one donor.

    Attributes:
        value: donors [n, T, ...] as at the site, or captured activations of n prompts; None takes another row of
            the batch.
        seed: an integer, data.
    """

    VALUES: ClassVar = {"value": None}
    value: Any = nnx.data(default=None)
    seed: Any = nnx.data(default=0)

    def __post_init__(self) -> None:
        self.seed = seed_array(self.seed)

    def apply(self, x: jax.Array) -> jax.Array:
        batch = x.shape[0]
        keys = self.row_keys(batch, self.seed, each_step=False)
        if self.value is None:
            if batch < 2:
                raise ValueError("Resample without donors takes another row of the batch; this batch has one row")
            shift_B = jax.vmap(lambda key: jax.random.randint(key, (), 1, batch))(keys)
            return x[(jnp.arange(batch) + shift_B) % batch]
        donors = self.value.shape[1 if self.stepped else 0]
        donor_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, donors))(keys)
        chosen = jnp.take(self.value, donor_B, 1 if self.stepped else 0)
        return jnp.broadcast_to(self.here(chosen, x), x.shape)


@nnx.dataclass(eq=False)
class Renoise(Edit):
    """Takes the model's own noise, tokens uniform over the vocabulary, fresh at every step.

    At "canvas" it un-commits positions; at "canvas_embed" and "token_embed" the model sees the embedding of a random
    token in their place, while the canvas and the prompt stay as they are.
    """

    ONLY_AT: ClassVar = ("canvas", "canvas_embed", "token_embed")
    seed: Any = nnx.data(default=0)

    def __post_init__(self) -> None:
        self.seed = seed_array(self.seed)

    def apply(self, x: jax.Array) -> jax.Array:
        batch, length = x.shape[:2]
        context = self.told(batch)
        embedder = context["embedder"]
        size = embedder.table.shape[0]
        keys = self.row_keys(batch, self.seed, each_step=True)
        if "positions" in context:  # the token at a position of the prompt does not depend on how it is padded

            def draw(key: jax.Array, at_T: jax.Array) -> jax.Array:
                own = jax.vmap(lambda p: jax.random.fold_in(key, p))(jnp.maximum(at_T, 0))
                return jax.vmap(lambda k: jax.random.randint(k, (), 0, size))(own)

            tokens_BT = jax.vmap(draw)(keys, context["positions"])
        else:
            tokens_BT = jax.vmap(lambda key: jax.random.randint(key, (length,), 0, size))(keys)
        return tokens_BT.astype(x.dtype) if x.ndim == 2 else embedder.lookup(tokens_BT)
