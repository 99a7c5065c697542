"""Mixture of experts: one router, several ways to run the same experts.

| form | cost | good for |
|---|---|---|
| dense | every expert on every token | one canvas on a GPU or TPU, few experts, forward-mode derivatives |
| scan | the same, one expert at a time | gradients in the weights with many experts |
| blocks | chosen experts only: tokens gathered by expert, padded to blocks | many experts on CPU, long prompts |

All forms are plain JAX and pass `vmap`, `grad` and `jvp`. `lax.ragged_dot` is not used: it has no `vmap` rule
and on NVIDIA GPUs XLA expands it to a dense masked product.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn.layers import RMSNorm, gelu, normal
from dgemma_jax.nn.packed import contract
from dgemma_jax.nn.sites import Site, is_open

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig

FORMS = ("auto", "dense", "scan", "blocks")


class Router(nnx.Module):
    """softmax(W (rms(x) * scale / sqrt(D))) in float32; the top experts renormalised, times their own scale."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width, experts = config.embed_dim, config.num_experts
        self.top = config.experts_per_token
        self.norm = RMSNorm(None, eps=config.rms_norm_eps, dtype=dtype, site="router_norm_scale")
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.proj = normal(rngs, (experts, width), 1, dtype)  # the input is divided by sqrt(D) already
        self.per_expert_scale = nnx.Param(jnp.ones((experts,), dtype))
        self.logits, self.probs, self.weights = Site("router_logits"), Site("router_probs"), Site("router_weights")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Weight of every expert for every token, [B, T, E] float32, zero for those not chosen."""
        width = x_BTD.shape[-1]
        normed = self.norm(x_BTD.astype(jnp.float32)) * self.scale[...].astype(jnp.float32) * width**-0.5
        logits_BTE = self.logits(jnp.einsum("btd,ed->bte", normed, self.proj[...].astype(jnp.float32)))
        probs_BTE = self.probs(jax.nn.softmax(logits_BTE, -1))
        top_BTX, index_BTX = jax.lax.top_k(probs_BTE, self.top)
        top_BTX = top_BTX / top_BTX.sum(-1, keepdims=True)
        top_BTX = top_BTX * self.per_expert_scale[...].astype(jnp.float32)[index_BTX]
        chosen_BTXE = jax.nn.one_hot(index_BTX, logits_BTE.shape[-1], dtype=jnp.float32)
        return self.weights(jnp.einsum("btx,btxe->bte", top_BTX, chosen_BTXE))


class Experts(nnx.Module):
    """Gated feed-forwards, one per expert: gate_up [E, 2F, D] (gate first), down [E, F, D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width, hidden, experts = config.embed_dim, config.expert_dim, config.num_experts
        self.top = config.experts_per_token
        self.gate_up = normal(rngs, (experts, 2 * hidden, width), width, dtype)
        self.down = normal(rngs, (experts, hidden, width), hidden, dtype)
        self.hidden, self.out = Site("expert_hidden"), Site("expert_out")

    def __call__(self, x_BTD: jax.Array, weights_BTE: jax.Array, form: str = "auto") -> jax.Array:
        """sum_e weights[e] * expert_e(x), [B, T, D]."""
        if is_open(self.hidden) or is_open(self.out):
            return self._open(x_BTD, weights_BTE)
        batch, length, width = x_BTD.shape
        x_TD, weights_TE = x_BTD.reshape(batch * length, width), weights_BTE.reshape(batch * length, -1)
        args = (x_TD, weights_TE, self.gate_up, self.down)
        return _run(form, self.top, *args).reshape(x_BTD.shape)

    def _open(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """The dense form with every intermediate at its site."""
        both = contract("btd,efd->btef", x_BTD, self.gate_up)
        gate, up = jnp.split(both, 2, -1)
        h_BTEF = self.hidden(gelu(gate) * up)
        out_BTED = self.out(contract("btef,efd->bted", h_BTEF, self.down))
        return jnp.einsum("bted,bte->btd", out_BTED, weights_BTE.astype(out_BTED.dtype))


def choose(platform: str, tokens: int, experts: int, top: int) -> str:
    """The form for a backend ("cpu", "cuda", "tpu") and a number of tokens; measured or compiled, see bench."""
    if platform == "cpu":
        return "dense" if experts <= 16 or tokens * top < experts else "blocks"
    return "dense" if tokens <= 512 or experts <= 2 * top else "blocks"


def _run(form: str, top: int, x_TD, weights_TE, gate_up_EFD, down_EFD) -> jax.Array:
    if form not in FORMS:
        raise ValueError(f"unknown expert form {form!r}; known are {FORMS}")
    args = (x_TD, weights_TE, gate_up_EFD, down_EFD)
    if form != "auto":
        return _apply(form, top, *args)
    tokens, experts = weights_TE.shape
    cpu, cuda, tpu = (choose(p, tokens, experts, top) for p in ("cpu", "cuda", "tpu"))
    if cpu == cuda == tpu:
        return _apply(cpu, top, *args)
    # Decided while lowering, by the platform compiled for, never by asking the live device.
    branch = {p: functools.partial(_apply, f, top) for p, f in (("cpu", cpu), ("cuda", cuda), ("tpu", tpu))}
    return jax.lax.platform_dependent(*args, **branch, default=functools.partial(_apply, "dense", top))


def _apply(form: str, top: int, *args: jax.Array) -> jax.Array:
    return blocks(top, *args) if form == "blocks" else {"dense": dense, "scan": scan}[form](*args)


def dense(x_TD, weights_TE, gate_up_EFD, down_EFD) -> jax.Array:
    """All experts on all tokens: two products, the weights applied between them."""
    gate_TEF, up_TEF = jnp.split(contract("td,efd->tef", x_TD, gate_up_EFD), 2, -1)
    h_TEF = gelu(gate_TEF) * up_TEF * weights_TE[..., None].astype(x_TD.dtype)
    return contract("tef,efd->td", h_TEF, down_EFD)


def scan(x_TD, weights_TE, gate_up_EFD, down_EFD) -> jax.Array:
    """The dense form one expert at a time: little memory, cheap weight gradients."""

    def one(total_TD, expert):
        weight_T, gate_up_FD, down_FD = expert
        gate_TF, up_TF = jnp.split(contract("td,fd->tf", x_TD, gate_up_FD), 2, -1)
        h_TF = gelu(gate_TF) * up_TF * weight_T[:, None].astype(x_TD.dtype)
        return total_TD + contract("tf,fd->td", h_TF, down_FD), None

    return jax.lax.scan(one, jnp.zeros_like(x_TD), (weights_TE.T, gate_up_EFD, down_EFD))[0]


def block_size(assignments: int, experts: int) -> int:
    """Rows of one block: about the mean load of an expert, a power of two between 8 and 128."""
    size = 8
    while size < 128 and size * experts < assignments:
        size *= 2
    return size


def blocks(top: int, x_TD, weights_TE, gate_up_EFD, down_EFD) -> jax.Array:
    """Chosen experts only: each expert's tokens gathered and padded to whole blocks, then gathered back.

    The number of blocks is fixed by the sizes, so the shapes are too: ceil(T * X / size) + E - 1 at most, and never
    more than assignments.
    Nonzero weights beyond the `top` largest of a token (an edit can make them) are not seen by this form.
    """
    (tokens, experts), width = weights_TE.shape, x_TD.shape[1]
    weight_TX, expert_TX = jax.lax.top_k(weights_TE, top)
    size = block_size(tokens * top, experts)
    count = min(-(-tokens * top // size) + experts - 1, tokens * top)
    expert = expert_TX.reshape(-1)  # of every assignment, token by token
    so_far = jnp.cumsum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), 0)
    blocks_E = -(-so_far[-1] // size)
    last_E = jnp.cumsum(blocks_E)
    rank = jnp.take_along_axis(so_far, expert[:, None], 1)[:, 0] - 1  # among the assignments of its expert
    slot = (last_E - blocks_E)[expert] * size + rank
    source = jnp.full((count * size,), tokens, jnp.int32).at[slot].set(jnp.arange(tokens * top, dtype=jnp.int32) // top)
    owner = jnp.clip(jnp.searchsorted(last_E, jnp.arange(count), side="right"), 0, experts - 1)
    padded_TD = jnp.concatenate([x_TD, jnp.zeros((1, width), x_TD.dtype)])

    def one(_, block):
        x_ID, e = block
        gate_FI, up_FI = jnp.split(jnp.einsum("fd,id->fi", gate_up_EFD[e], x_ID), 2, 0)
        return None, jnp.einsum("fi,fd->id", gelu(gate_FI) * up_FI, down_EFD[e])

    out = jax.lax.scan(one, None, (padded_TD[source].reshape(count, size, width), owner))[1]
    out_TXD = out.reshape(count * size, width)[slot].reshape(tokens, top, width)
    return jnp.einsum("txd,tx->td", out_TXD, weight_TX.astype(x_TD.dtype))
