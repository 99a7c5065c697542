"""Named places in the computation, and the closed list of their names.

A `Site` owns nothing and returns its input; XLA removes it. Interpretability tools put another module in
its place. The list below is all that they know of the model's inside.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig


class Contextual(nnx.Module):
    """A module that can be told where in a run it stands."""

    def bind(self, **context: Any) -> Contextual:
        """The module at one moment of a run; an edit gated by step uses this. `sites.bind` says what it is told."""
        return self


@nnx.dataclass
class Site(Contextual):
    """A named place. Returns its input."""

    name: str

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def is_open(site: Site) -> bool:
    """True if something replaced the plain site, so that a fused path must give way to the open one."""
    return type(site) is not Site


def bind(model: Any, **context: Any) -> Any:
    """The model with everything that surgery put into it told where it stands; an unedited model as it is.

    Args:
        phase: "prefill" or "denoise".
        step, block: [B] int32, of the denoising step.
        keys: [B] random keys of the rows.
        length: [B] int32, tokens in the cache.
        positions: [B, T] int32 in prefill: the position of each token, -1 for padding.
        canvas, soft: what is fed into the step. `next_canvas`, told later in the step: what it hands on.
        embedder: the one table.
        captured: a dictionary of this trace; a site may leave an array in it, under its full name. It becomes
            `StepView.sites` or `Prefill.sites`.
    """

    def contextual(node: Any) -> bool:
        return isinstance(node, Contextual)

    found = filter(contextual, jax.tree.leaves(model, is_leaf=contextual))
    if all(type(node).bind is Contextual.bind for node in found):
        return model
    return jax.tree.map(lambda n: n.bind(**context) if contextual(n) else n, model, is_leaf=contextual)


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """What is known of a site without running the model.

    Attributes:
        name: full name, "layers.17.resid_post" or "logits".
        axes: letters of `axes.py`. T is the prompt chunk in prefill and the canvas in denoising.
        shape: sizes for the letters that the configuration fixes; the letter itself for the others.
        dtype: "float32", "int32", or "compute" for the dtype of the weights.
        meaning: one line.
    """

    name: str
    axes: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str


_NORM = "denominator of {}: sqrt(mean(x^2) + eps)"
LAYER_SITES: dict[str, tuple[str, str, str]] = {
    "resid_pre": ("BTD", "compute", "residual stream entering the layer"),
    "attn_q": ("BTNH", "compute", "queries after norm and rotation"),
    "attn_k": ("BTKH", "compute", "keys after norm and rotation, before they join the cache"),
    "attn_v": ("BTKH", "compute", "values after their norm, before they join the cache"),
    "attn_scores": ("BNTS", "float32", "attention scores, masked places at the lowest float"),
    "attn_pattern": ("BNTS", "float32", "attention weights, rows sum to one"),
    "attn_z": ("BTNH", "compute", "output of each head before the output projection"),
    "attn_out": ("BTD", "compute", "attention output before its post-norm"),
    "resid_mid": ("BTD", "compute", "residual stream after attention"),
    "mlp_pre": ("BTF", "compute", "gate of the dense MLP before the activation"),
    "mlp_post": ("BTF", "compute", "hidden units of the dense MLP: activation(gate) * up"),
    "mlp_out": ("BTD", "compute", "dense MLP output before its post-norm"),
    "router_logits": ("BTE", "float32", "router scores"),
    "router_probs": ("BTE", "float32", "softmax of the router scores over all experts"),
    "router_weights": ("BTE", "float32", "weights really used: top experts renormalised and scaled, zero elsewhere"),
    "expert_hidden": ("BTEF", "compute", "hidden units of every expert (touching it opens the dense form)"),
    "expert_out": ("BTED", "compute", "output of every expert, unweighted (touching it opens the dense form)"),
    "moe_out": ("BTD", "compute", "weighted sum of the experts before its post-norm"),
    "resid_post": ("BTD", "compute", "residual stream leaving the layer, layer scalar applied"),
    "input_norm_scale": ("BT1", "float32", _NORM.format("the norm before attention")),
    "q_norm_scale": ("BTN1", "float32", _NORM.format("the query norm")),
    "k_norm_scale": ("BTK1", "float32", _NORM.format("the key norm")),
    "v_norm_scale": ("BTK1", "float32", _NORM.format("the value norm")),
    "post_attn_norm_scale": ("BT1", "float32", _NORM.format("the norm after attention")),
    "pre_mlp_norm_scale": ("BT1", "float32", _NORM.format("the norm before the dense MLP")),
    "post_mlp_norm_scale": ("BT1", "float32", _NORM.format("the norm after the dense MLP")),
    "router_norm_scale": ("BT1", "float32", _NORM.format("the router's norm")),
    "pre_moe_norm_scale": ("BT1", "float32", _NORM.format("the norm before the experts")),
    "post_moe_norm_scale": ("BT1", "float32", _NORM.format("the norm after the experts")),
    "post_ffw_norm_scale": ("BT1", "float32", _NORM.format("the norm after the sum of MLP and experts")),
}
MODEL_SITES: dict[str, tuple[str, str, str]] = {
    "token_embed": ("BTD", "compute", "scaled token embeddings of the causal pass"),
    "canvas_embed": ("BCD", "compute", "scaled embeddings of the canvas tokens"),
    "canvas": ("BC", "int32", "canvas tokens that one step hands to the next"),
    "soft_probs": ("BCV", "float32", "the shaped distribution, on its way into the soft embedding only"),
    "soft_embed": ("BCD", "compute", "S: the soft embedding that one step hands to the next"),
    "self_conditioning": ("BCD", "compute", "signal computed from S and added to the canvas embeddings"),
    "self_conditioning_norm_scale": ("BC1", "float32", _NORM.format("the norm of S")),
    "input_embed_norm_scale": ("BC1", "float32", _NORM.format("the norm of canvas embedding plus signal")),
    "final_norm_scale": ("BT1", "float32", _NORM.format("the final norm")),
    "logits": ("BCV", "float32", "soft-capped logits, before temperature"),
    "shaped_logits": ("BCV", "float32", "logits divided by the temperature of the step"),
}


def describe(config: ModelConfig) -> list[SiteInfo]:
    """Every site of a model of this configuration: those of the model, then the layers in order."""
    sizes: dict[str, int | str] = {
        "D": config.embed_dim, "N": config.num_heads, "F": config.hidden_dim, "E": config.num_experts,
        "V": config.vocab_size, "C": config.canvas_length, "1": 1,
    }  # fmt: skip

    def info(name: str, spec: tuple[str, str, str], sizes: dict[str, int | str]) -> SiteInfo:
        axes, dtype, meaning = spec
        return SiteInfo(name, axes, tuple(sizes.get(a, a) for a in axes), dtype, meaning)

    found = [info(name, spec, sizes) for name, spec in MODEL_SITES.items()]
    for layer in range(config.num_layers):
        own = sizes | {"K": config.kv_heads(layer), "H": config.head_size(layer)}
        for name, spec in LAYER_SITES.items():
            local = own | {"F": config.expert_dim} if name == "expert_hidden" else own
            found.append(info(f"layers.{layer}.{name}", spec, local))
    return found
