"""The one embedding table: token lookup, output logits and the soft embedding all read it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn.layers import soft_cap
from dgemma_jax.nn.packed import contract
from dgemma_jax.nn.sites import Contextual


class Embedder(nnx.Module):
    """Table [V, D]. Lookups and soft embeddings are scaled by sqrt(D), rounded to the table's dtype."""

    def __init__(self, vocab_size: int, width: int, *, softcap: float, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.softcap = softcap
        self.table = nnx.Param((jax.random.normal(rngs.params(), (vocab_size, width)) * width**-0.5).astype(dtype))

    @property
    def scale(self) -> jax.Array:
        """sqrt(D) in the table's dtype (53.0 for the release in bfloat16)."""
        return jnp.asarray(self.table.shape[1] ** 0.5, self.table.dtype)

    def lookup(self, tokens_BT: jax.Array) -> jax.Array:
        """sqrt(D) * table[tokens], [B, T, D]."""
        return self.table[tokens_BT] * self.scale

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """cap * tanh(hidden . table / cap), [B, T, V] float32."""
        scores = contract("btd,vd->btv", hidden_BTD, self.table, jnp.float32)
        return soft_cap(scores, self.softcap)


class SoftEmbed(Contextual):
    """S = sqrt(D) * p . table. A separate module so that surgery can put a bottleneck in its place."""

    def __call__(self, probs_BCV: jax.Array, embedder: Embedder) -> jax.Array:
        """S [B, C, D] of the distributions `probs` [B, C, V] float32, in the table's dtype."""
        probs_BCV = probs_BCV.astype(embedder.table.dtype)
        return contract("bcv,vd->bcd", probs_BCV, embedder.table) * embedder.scale
