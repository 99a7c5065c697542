"""Grouped-query attention over the cache and the tokens of this call; sliding or full by configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn import rope
from dgemma_jax.nn.attend import at_once, attend
from dgemma_jax.nn.cache import LayerCache
from dgemma_jax.nn.layers import RMSNorm, normal
from dgemma_jax.nn.masks import Sight
from dgemma_jax.nn.packed import contract
from dgemma_jax.nn.sites import Site, is_open

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig


class Attention(nnx.Module):
    """Queries, keys and values are normed per head; the score scale is one.

    Full layers have no value projection: values are the raw keys, normed without weight.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width, heads = config.embed_dim, config.num_heads
        kv_heads, size, sliding = config.kv_heads(layer), config.head_size(layer), config.is_sliding(layer)
        self.q = normal(rngs, (heads, size, width), width, dtype)
        self.k = normal(rngs, (kv_heads, size, width), width, dtype)
        self.v = normal(rngs, (kv_heads, size, width), width, dtype) if sliding else None
        self.o = normal(rngs, (width, heads, size), heads * size, dtype)
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps, dtype=dtype, site="q_norm_scale")
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps, dtype=dtype, site="k_norm_scale")
        self.v_norm = RMSNorm(None, eps=config.rms_norm_eps, dtype=dtype, site="v_norm_scale")
        self.rope = (
            (config.rope_theta, config.rope_fraction, False)
            if sliding
            else (config.global_rope_theta, config.global_rope_fraction, config.global_rope_proportional)
        )
        self.site_q, self.site_k, self.site_v = Site("attn_q"), Site("attn_k"), Site("attn_v")
        self.site_scores, self.site_pattern = Site("attn_scores"), Site("attn_pattern")
        self.site_z, self.site_out = Site("attn_z"), Site("attn_out")

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: LayerCache, sight: Sight
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attend to the cached keys, then to this call's own, in that order of slots.

        Returns:
            Output [B, T, D], and the keys and values [B, T, K, H] of this call.
        """
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, positions_BT)
        q_BNTH = q_BTNH.swapaxes(1, 2)
        own = LayerCache(k_BTKH.swapaxes(1, 2).astype(cache.k.dtype), v_BTKH.swapaxes(1, 2).astype(cache.v.dtype))
        if is_open(self.site_scores) or is_open(self.site_pattern):
            show = {"on_scores": self.site_scores, "on_pattern": self.site_pattern}
            z_BNTH = at_once(q_BNTH, cache, own, sight, **show)
        else:
            z_BNTH = attend(q_BNTH, cache, own, sight)
        z_BTNH = z_BNTH.swapaxes(1, 2)
        # Summed letters (g are the heads) in alphabetical order: einsum takes them so, and would turn the weight else.
        out_BTD = contract("btgh,dgh->btd", self.site_z(z_BTNH), self.o)
        return self.site_out(out_BTD), k_BTKH, v_BTKH

    def project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H] of normed input [B, T, D]; queries and keys rotated."""
        frequencies = rope.inverse_frequencies(self.q.shape[1], *self.rope)
        q_BTNH = contract("btd,nhd->btnh", x_BTD, self.q)
        raw_BTKH = contract("btd,khd->btkh", x_BTD, self.k)
        v_BTKH = raw_BTKH if self.v is None else contract("btd,khd->btkh", x_BTD, self.v)
        q_BTNH = rope.rotate(self.q_norm(q_BTNH), positions_BT, frequencies)
        k_BTKH = rope.rotate(self.k_norm(raw_BTKH), positions_BT, frequencies)
        return self.site_q(q_BTNH), self.site_k(k_BTKH), self.site_v(self.v_norm(v_BTKH))
