"""The key-value cache: one fixed-shape entry a layer, written and read by pure functions.

Full layers hold `capacity` slots, slot = position. Sliding layers hold a ring of `window - 1` slots,
slot = position mod (window - 1): a canvas row sees exactly these, as in `transformers`. Rows of a batch
have their own lengths; what lies beyond a row's length is never visible.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [B, K, S, H]; keys are normed and rotated, values normed."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What crosses from one block to the next.

    Attributes:
        layers: one entry a layer.
        length: [B] int32, number of tokens each row holds.
    """

    layers: list[LayerCache]
    length: jax.Array

    def replace(self, **changes) -> KVCache:
        return dataclasses.replace(self, **changes)


def num_slots(config: ModelConfig, layer: int, capacity: int) -> int:
    """Slots of a layer: the ring on sliding layers, never more than `capacity`."""
    return min(config.sliding_window - 1, capacity) if config.is_sliding(layer) else capacity


@functools.partial(jax.jit, static_argnums=range(4), inline=True)  # one small program instead of one an array
def empty(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache for `capacity` tokens a row, nothing in it."""
    layers = []
    for layer in range(config.num_layers):
        shape = (batch, config.kv_heads(layer), num_slots(config, layer, capacity), config.head_size(layer))
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return KVCache(layers, jnp.zeros((batch,), jnp.int32))


def slot_positions(length_B: jax.Array, slots: int) -> jax.Array:
    """Position held by each slot, [B, S] int32; -1 where the slot is empty.

    For a ring the newest position congruent to the slot; for a layer longer than the row's length it is the
    slot itself, so one formula serves both.
    """
    slot = jnp.arange(slots)
    newest = length_B[:, None] - 1
    position = newest - (newest - slot) % slots
    return jnp.where((newest >= 0) & (position >= 0), position, -1)


def append(
    entry: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array
) -> LayerCache:
    """The entry with the valid tokens written to their slots; of a long chunk a ring keeps the last ones."""
    slots = entry.k.shape[2]
    last = jnp.max(jnp.where(valid_BT, positions_BT, -1), axis=1, keepdims=True)
    kept = valid_BT & (positions_BT > last - slots)
    slot_BT = jnp.where(kept, positions_BT % slots, slots)  # out of range: dropped

    def write(old_KSH: jax.Array, new_TKH: jax.Array, slot_T: jax.Array) -> jax.Array:
        return old_KSH.at[:, slot_T].set(new_TKH.swapaxes(0, 1).astype(old_KSH.dtype), mode="drop")

    return LayerCache(jax.vmap(write)(entry.k, k_BTKH, slot_BT), jax.vmap(write)(entry.v, v_BTKH, slot_BT))
