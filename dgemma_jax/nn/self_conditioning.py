"""How the soft embedding of the previous step enters the canvas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn.layers import RMSNorm, gelu, normal
from dgemma_jax.nn.packed import contract
from dgemma_jax.nn.sites import Site

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig


class SelfConditioning(nnx.Module):
    """rms(embedding + MLP(rms(S) * weight)), the outer norm without weight, on the first step (S = 0) too."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width, hidden, eps = config.embed_dim, config.hidden_dim, config.rms_norm_eps
        self.pre_norm = RMSNorm(width, eps=eps, dtype=dtype, site="self_conditioning_norm_scale")
        self.gate = normal(rngs, (hidden, width), width, dtype)
        self.up = normal(rngs, (hidden, width), width, dtype)
        self.down = normal(rngs, (width, hidden), hidden, dtype)
        self.post_norm = RMSNorm(None, eps=eps, dtype=dtype, site="input_embed_norm_scale")
        self.signal = Site("self_conditioning")

    def __call__(self, embedded_BCD: jax.Array, soft_BCD: jax.Array) -> jax.Array:
        """First residual of the denoising pass, [B, C, D]."""
        normed = self.pre_norm(soft_BCD.astype(embedded_BCD.dtype))
        gate_BCF = contract("bcd,fd->bcf", normed, self.gate)
        up_BCF = contract("bcd,fd->bcf", normed, self.up)
        signal_BCD = contract("bcf,df->bcd", gelu(gate_BCF) * up_BCF, self.down)
        return self.post_norm(embedded_BCD + self.signal(signal_BCD))
