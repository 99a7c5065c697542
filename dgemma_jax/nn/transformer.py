"""DiffusionGemma's text model: one tree of parameters, two entry points.

`prefill` is causal and fills the cache (the encoder of the papers); `denoise` is bidirectional on the canvas,
reads the cache and leaves it as it is (the decoder). Both run the same layers; only the layer scalar and the
self-conditioning differ. Facts: `transformers` 5.23, models/diffusion_gemma.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import masks, meshes
from dgemma_jax.nn.attention import Attention
from dgemma_jax.nn.embedder import Embedder, SoftEmbed
from dgemma_jax.nn.layers import GatedMLP, RMSNorm
from dgemma_jax.nn.moe import Experts, Router
from dgemma_jax.nn.self_conditioning import SelfConditioning
from dgemma_jax.nn.sites import Site, is_open

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig


class Layer(nnx.Module):
    """Attention, then the dense MLP beside the experts, each with a norm before and after; then the scalar."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        def norm(site: str) -> RMSNorm:
            return RMSNorm(config.embed_dim, eps=config.rms_norm_eps, dtype=dtype, site=f"{site}_scale")

        self.resid_pre, self.resid_mid, self.resid_post = Site("resid_pre"), Site("resid_mid"), Site("resid_post")
        self.input_norm, self.post_attn_norm = norm("input_norm"), norm("post_attn_norm")
        self.attention = Attention(config, layer, rngs=rngs, dtype=dtype)
        self.pre_mlp_norm, self.post_mlp_norm = norm("pre_mlp_norm"), norm("post_mlp_norm")
        self.mlp = GatedMLP(config.embed_dim, config.hidden_dim, rngs=rngs, dtype=dtype)
        self.mlp_out, self.moe_out = Site("mlp_out"), Site("moe_out")
        self.pre_moe_norm, self.post_moe_norm = norm("pre_moe_norm"), norm("post_moe_norm")
        self.router = Router(config, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, rngs=rngs, dtype=dtype)
        self.post_ffw_norm = norm("post_ffw_norm")
        self.prefill_scalar = nnx.Param(jnp.ones((1,), dtype))
        self.denoise_scalar = nnx.Param(jnp.ones((1,), dtype))

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: kv.LayerCache, sight: masks.Sight,
        scalar: jax.Array, moe: str,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """The residual stream after the layer, and this call's keys and values [B, T, K, H]."""
        x_BTD = self.resid_pre(x_BTD)
        attended, k_BTKH, v_BTKH = self.attention(self.input_norm(x_BTD), positions_BT, cache, sight)
        x_BTD = self.resid_mid(x_BTD + self.post_attn_norm(attended))
        dense_BTD = self.post_mlp_norm(self.mlp_out(self.mlp(self.pre_mlp_norm(x_BTD))))
        weights_BTE = self.router(x_BTD)  # the router reads the raw residual
        form = "dense" if is_open(self.router.weights) else moe  # an edit may weight any number of experts
        mixed = self.moe_out(self.experts(self.pre_moe_norm(x_BTD), weights_BTE, form))
        x_BTD = x_BTD + self.post_ffw_norm(dense_BTD + self.post_moe_norm(mixed))
        return self.resid_post(x_BTD * scalar), k_BTKH, v_BTKH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """What the causal pass gives.

    Attributes:
        cache: the cache with the tokens of this call in it.
        hidden: [B, T, D] after the final norm; rows of padding are meaningless.
        sites: what captured sites left, by full name; empty in an unedited model.
    """

    cache: kv.KVCache
    hidden: jax.Array
    sites: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Transformer(nnx.Module):
    """The model as a plain pytree; `model.layers[17]` is layer 17.

    Attributes:
        config: sizes; static.
        moe: how experts run, one of `moe.FORMS`; static. `placement.with_experts` changes it.
        mesh: the mesh that the weights lie on, or None; static. `weights.sharding.on_mesh` sets it.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32, moe: str = "auto"
    ) -> None:
        self.config, self.moe, self.mesh = config, moe, None
        self.embedder = Embedder(
            config.vocab_size, config.embed_dim, softcap=config.final_logit_softcap, rngs=rngs, dtype=dtype
        )
        self.self_conditioning = SelfConditioning(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.data([Layer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, eps=config.rms_norm_eps, dtype=dtype, site="final_norm_scale")
        self.soft_embedding = SoftEmbed()
        self.token_embed, self.canvas_embed = Site("token_embed"), Site("canvas_embed")
        self.canvas, self.soft_probs, self.soft_embed_site = Site("canvas"), Site("soft_probs"), Site("soft_embed")
        self.logits, self.shaped_logits = Site("logits"), Site("shaped_logits")

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights, which is the dtype of the residual stream."""
        return self.embedder.table.dtype

    def prefill(self, tokens_BT: jax.Array, valid_BT: jax.Array, cache: kv.KVCache) -> Prefill:
        """Causal pass over the next tokens of each row; those not valid are neither seen nor kept."""
        tokens_BT, valid_BT, cache = meshes.rows((tokens_BT, valid_BT, cache), self.mesh)
        count_BT = jnp.cumsum(valid_BT.astype(jnp.int32), 1)
        positions_BT = cache.length[:, None] + count_BT - 1
        keys_BT = jnp.where(valid_BT, positions_BT, -1)
        x_BTD = self.token_embed(self.embedder.lookup(tokens_BT))
        entries = []
        for layer, entry, kind in zip(self.layers, cache.layers, self.config.layer_types, strict=True):
            window = self.config.sliding_window if kind == "sliding_attention" else None
            slots_BS = kv.slot_positions(cache.length, entry.k.shape[2])
            sight = masks.causal(positions_BT, slots_BS, keys_BT, window)
            x_BTD, k_BTKH, v_BTKH = layer(x_BTD, positions_BT, entry, sight, layer.prefill_scalar[...], self.moe)
            entries.append(kv.append(entry, k_BTKH, v_BTKH, positions_BT, valid_BT))
        cache = kv.KVCache(entries, cache.length + count_BT[:, -1])
        return Prefill(cache, self.final_norm(x_BTD))

    def denoise(self, canvas_BC: jax.Array, cache: kv.KVCache, soft_BCD: jax.Array) -> jax.Array:
        """Bidirectional pass over the canvas: hidden [B, C, D] after the final norm. The cache is only read."""
        canvas_BC, cache, soft_BCD = meshes.rows((canvas_BC, cache, soft_BCD), self.mesh)
        positions_BC = cache.length[:, None] + jnp.arange(canvas_BC.shape[1])
        embedded_BCD = self.canvas_embed(self.embedder.lookup(canvas_BC))
        x_BCD = self.self_conditioning(embedded_BCD, soft_BCD)
        for layer, entry in zip(self.layers, cache.layers, strict=True):
            sight = masks.canvas(kv.slot_positions(cache.length, entry.k.shape[2]), positions_BC)
            x_BCD, _, _ = layer(x_BCD, positions_BC, entry, sight, layer.denoise_scalar[...], self.moe)
        return self.final_norm(x_BCD)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Soft-capped logits [B, T, V] float32, before temperature."""
        return self.logits(self.embedder.logits(hidden_BTD))

    def soft_embed(self, probs_BCV: jax.Array) -> jax.Array:
        """S [B, C, D]: what one step hands to the next, from the shaped distribution."""
        return self.soft_embed_site(self.soft_embedding(self.soft_probs(probs_BCV), self.embedder))


def initialize(config: ModelConfig, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Transformer:
    """A model with random weights."""
    return Transformer(config, rngs=nnx.Rngs(seed), dtype=dtype)


def abstract(config: ModelConfig, dtype: jnp.dtype = jnp.bfloat16) -> Transformer:
    """The model without weights: leaves are `jax.ShapeDtypeStruct`; allocates nothing, works at any size."""
    return jax.tree.map(lambda leaf: leaf, _abstract(config, jnp.dtype(dtype)))


@functools.lru_cache(maxsize=8)  # the release takes seconds
def _abstract(config: ModelConfig, dtype: jnp.dtype) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype))
