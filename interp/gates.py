"""Where and when an edit acts: tables of numbers, so that a sweep over places is a sweep over data.

A gate is a product of tables, one for each thing that can be chosen: steps, blocks, rows, positions, heads, experts.
An entry of 1 lets the edit act, 0 leaves the value as it was, a number between mixes the two. What is chosen may be
written as

| written | means |
|---|---|
| None | all |
| 3, [0, 3], range(2, 5), an integer array | these; a negative number counts from the end where the end is known |
| slice(2, 5), slice(2, None) | a window |
| a list or array of bool | a mask |
| a list or array of float | a strength for each |

Arrays may be traced values of an enclosing `jit`, `vmap` or `lax.map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn.cache import slot_positions

# Entries of a table whose end is not known when it is made; one more stands for all that follow. A larger index
# makes a larger table, which is another program.
OPEN_SIZES = {"blocks": 64, "rows": 64, "prompt positions": 512}


def table(spec: Any, size: int | None, what: str, *, more: bool = False) -> jax.Array:
    """The choice `spec` as a table, float32 [size]; with `more`, [size + 1]: the last entry is all that follow.

    Args:
        size: number of things to choose from; None where it is not known, which implies `more`.
        what: their name in messages, in the plural.

    Raises:
        ValueError: an index out of range, a mask of another length.
    """
    if spec is None or isinstance(spec, bool | np.bool_):
        length = _open_size(what) if size is None else size
        return jnp.full(length + (more or size is None), 0.0 if spec is not None and not spec else 1.0, jnp.float32)
    if isinstance(spec, slice):
        return _window(spec, size, what, more)
    if isinstance(spec, range):
        spec = list(spec)
    if not isinstance(spec, jax.Array):
        spec = np.asarray(spec)
        if spec.dtype == object or spec.dtype.kind not in "biuf":
            raise ValueError(f"{what} must be an integer, a slice, a list, a mask or strengths, got {spec!r}")
        if spec.size == 0:
            spec = spec.astype(int)
    if jnp.issubdtype(spec.dtype, jnp.integer):
        return _indices(spec, size, what, more)
    return _strengths(spec, size, what, more)


def lookup(entries: jax.Array, index: jax.Array) -> jax.Array:
    """Entries at an index of any shape: the last one beyond the end, 0 for a negative index."""
    found = entries[jnp.minimum(index, entries.shape[0] - 1)]
    return jnp.where(index < 0, 0.0, found)


def _open_size(what: str, needed: int = 0) -> int:
    size = OPEN_SIZES[what]
    while size < needed:
        size *= 2
    return size


def _window(spec: slice, size: int | None, what: str, more: bool) -> jax.Array:
    if size is None:
        if (spec.start or 0) < 0 or (spec.stop or 0) < 0:
            raise ValueError(f"{what}={spec}: the end is not known here, so count from the start")
        size, more = _open_size(what, max(spec.start or 0, spec.stop or 0)), True
    for bound in (spec.start, spec.stop):
        if bound is not None and not -size <= bound <= size:
            raise ValueError(f"{what}={spec} is out of range; there are {size}: 0..{size - 1}")
    entries = np.zeros(size + more, np.float32)
    entries[np.arange(size)[spec]] = 1.0
    if more and spec.stop is None:
        entries[-1] = 1.0
    return jnp.asarray(entries)


def _indices(spec: Any, size: int | None, what: str, more: bool) -> jax.Array:
    if isinstance(spec, jax.core.Tracer):
        length = _open_size(what) if size is None else size
        more = more or size is None
        return jnp.zeros(length + more, jnp.float32).at[spec].set(1.0)
    chosen = np.atleast_1d(np.asarray(spec)).astype(int).ravel()
    low, high = (int(chosen.min()), int(chosen.max())) if chosen.size else (0, 0)
    if size is None:
        if low < 0:
            raise ValueError(f"{what} has {low}: the end is not known here, so count from the start")
        size, more = _open_size(what, high + 1), True
    if low < -size or high >= size or (low < 0 and more):
        bad = low if low < 0 else high
        raise ValueError(f"{what} has {bad}, which is out of range; there are {size}: 0..{size - 1}")
    entries = np.zeros(size + more, np.float32)
    entries[np.where(chosen < 0, chosen + size, chosen)] = 1.0
    return jnp.asarray(entries)


def _strengths(spec: Any, size: int | None, what: str, more: bool) -> jax.Array:
    if spec.ndim == 0 and size == 1:
        spec = spec[None]
    if spec.ndim != 1:
        raise ValueError(f"{what} has shape {spec.shape}; a mask or strengths need one axis")
    if size is None:
        size, more = _open_size(what, len(spec)), True
        spec = jnp.pad(jnp.asarray(spec, jnp.float32), (0, size - len(spec)))
    if len(spec) not in (size, size + more):
        raise ValueError(f"{what} is a mask or strengths of length {len(spec)}; there are {size}")
    if not isinstance(spec, jax.core.Tracer) and not np.isfinite(np.asarray(spec, np.float32)).all():
        raise ValueError(f"{what} has strengths that are not finite")
    spec = jnp.asarray(spec, jnp.float32)
    return jnp.pad(spec, (0, size + more - len(spec)))


def where_on(entries: Any, *, more: bool = False) -> str:
    """The table in words: "all", "none", "2-4,7", "5 on" with `more`, or "3 of 12 in part"."""
    if isinstance(entries, jax.core.Tracer):
        return "traced"
    entries = np.asarray(entries)
    if (entries == 1).all():
        return "all"
    if (entries == 0).all():
        return "none"
    if not np.isin(entries, (0, 1)).all():
        return f"{np.count_nonzero(entries)} of {entries.size} in part"
    on = np.flatnonzero(entries)
    runs = np.split(on, np.flatnonzero(np.diff(on) != 1) + 1)
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    if more and on[-1] == entries.size - 1:
        words[-1] = f"{runs[-1][0]} on"
    return ",".join(words)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gate:
    """Where one edit at one site acts; all leaves are data.

    Attributes:
        on: scalar, the entry of `layers` for this site.
        steps: [R + 1], the last entry for later steps. Not used in prefill.
        blocks, rows: the last entry stands for all that follow.
        axes: a table for each of the site's own axes, by letter: T (positions), N or K (heads), E, the last axis.
        keys: for attention scores and patterns: tables "canvas" [C] and "cached" over the key slots, or None.
        mask: broadcasts against the site, [B, T, ...], or None.
    """

    on: jax.Array
    steps: jax.Array
    blocks: jax.Array
    rows: jax.Array
    axes: dict[str, jax.Array]
    keys: dict[str, jax.Array] | None = None
    mask: jax.Array | None = None

    def strength(self, shape: tuple[int, ...], letters: str, context: Mapping[str, Any]) -> jax.Array:
        """How much the edit acts on each entry of a value of this shape, broadcastable to it; float32."""

        def along(entries: jax.Array, axis: int) -> jax.Array:
            return entries.reshape([n if i == axis else 1 for i, n in enumerate(shape)])

        batch = shape[0]
        rows_B = self.on * lookup(self.rows, jnp.arange(batch))
        if "step" in context:
            rows_B = rows_B * lookup(self.steps, context["step"]) * lookup(self.blocks, context["block"])
        total = along(rows_B, 0)
        for letter, entries in self.axes.items():
            axis = letters.index(letter)
            if letter == "T" and "positions" in context:  # prefill: positions of the rows differ
                found_BT = lookup(entries, context["positions"])
                total = total * found_BT.reshape([n if i in (0, axis) else 1 for i, n in enumerate(shape)])
            else:
                total = total * along(lookup(entries, jnp.arange(shape[axis])), axis)
        if self.keys is not None:
            total = total * self._keys(shape, letters.index("T"), context)
        if self.mask is not None:
            total = total * lead(self.mask, len(shape))
        return total

    def _keys(self, shape: tuple[int, ...], query_axis: int, context: Mapping[str, Any]) -> jax.Array:
        """The tables of keys for the slots of the last axis: cached ones, then those of the call."""
        own = shape[query_axis]
        cached_BS = lookup(self.keys["cached"], slot_positions(context["length"], shape[-1] - own))
        if "positions" in context:
            own_BS = lookup(self.keys["cached"], context["positions"])
        else:
            own_BS = jnp.broadcast_to(lookup(self.keys["canvas"], jnp.arange(own)), (shape[0], own))
        found_BS = jnp.concatenate([cached_BS, own_BS], 1)
        return found_BS.reshape([n if i in (0, len(shape) - 1) else 1 for i, n in enumerate(shape)])

    def __str__(self) -> str:
        open_ended = {"steps": self.steps, "blocks": self.blocks, "rows": self.rows}
        closed = {AXIS_WORDS.get(letter, "units"): entries for letter, entries in self.axes.items()}
        closed |= {f"{kind} keys": entries for kind, entries in (self.keys or {}).items()}
        words = [f"{name} {where_on(entries, more=True)}" for name, entries in open_ended.items()]
        words += [f"{name} {where_on(entries)}" for name, entries in closed.items()]
        words = [word for word in words if not word.endswith(" all")]
        if self.mask is not None:
            words.append(f"mask {list(self.mask.shape)}")
        text = where_on(jnp.atleast_1d(self.on))
        return "off" if text == "none" else ", ".join(words) or "everywhere"


AXIS_WORDS = {"T": "positions", "N": "heads", "K": "heads", "E": "experts"}


def lead(value: jax.Array, rank: int) -> jax.Array:
    """`value` with axes of size one in front, up to `rank`."""
    return value.reshape((1,) * (rank - value.ndim) + value.shape)
