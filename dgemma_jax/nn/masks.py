"""Who may see whom. Masks are bool [B, T, S], True where a query may attend to a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visible(query_BT: jax.Array, key_BS: jax.Array, window: int | None) -> jax.Array:
    """Causal rule by position: a key is seen iff 0 <= query - key < window. Empty keys have position -1."""
    distance = query_BT[:, :, None] - key_BS[:, None, :]
    mask = (key_BS[:, None, :] >= 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def canvas(slot_BS: jax.Array, canvas_length: int) -> jax.Array:
    """Bidirectional rule [B, C, S + C]: all filled slots and the whole canvas (no window inside it)."""
    mask_BS = jnp.pad(slot_BS >= 0, ((0, 0), (0, canvas_length)), constant_values=True)
    return jnp.broadcast_to(mask_BS[:, None, :], (mask_BS.shape[0], canvas_length, mask_BS.shape[1]))
