"""Who may see whom, by positions. Masks are bool [B, T, S], True where a query may attend to a key."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


def visible(query_BT: jax.Array, key_BS: jax.Array, window: int | None) -> jax.Array:
    """Causal rule by position: a key is seen iff 0 <= query - key < window. Empty keys have position -1."""
    distance = query_BT[:, :, None] - key_BS[:, None, :]
    mask = (key_BS[:, None, :] >= 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """A mask not yet made, so that long ones can be made a few keys at a time.

    Attributes:
        query_BT: where the queries look from; [B, 1] if all from the same position.
        key_BS: where the keys are, those of the cache first, then those of the call; -1 where there is none.
        window: how far back a query sees; static.
    """

    query_BT: jax.Array
    key_BS: jax.Array
    window: int | None = dataclasses.field(metadata={"static": True})

    def mask(self) -> jax.Array:
        """[B, T, S], or [B, 1, S] if all queries see the same."""
        return visible(self.query_BT, self.key_BS, self.window)

    def of(self, start: jax.Array | int, size: int) -> Sight:
        """The same for the `size` keys from `start` on."""
        return dataclasses.replace(self, key_BS=jax.lax.dynamic_slice_in_dim(self.key_BS, start, size, 1))


def causal(query_BT: jax.Array, slot_BS: jax.Array, own_BT: jax.Array, window: int | None) -> Sight:
    """Each token sees those before it and itself, cached or of the call."""
    return Sight(query_BT, jnp.concatenate([slot_BS, own_BT], 1), window)


def canvas(slot_BS: jax.Array, own_BC: jax.Array) -> Sight:
    """Every canvas token sees all filled slots and the whole canvas: what its last one sees causally."""
    return Sight(own_BC[:, -1:], jnp.concatenate([slot_BS, own_BC], 1), None)
