"""Mixture of experts: one router, several ways to run the same experts.

| form | cost | good for |
|---|---|---|
| dense | every expert on every token | one canvas on any GPU, few experts, forward-mode derivatives |
| scan | the same, one expert at a time | gradients in the weights with many experts |
| blocks | chosen experts only: tokens gathered by expert, padded to blocks | long prompts, experts of any load |
| capacity | the same, with room for an even load everywhere; `blocks` where it is too little | many experts on CPU |
| ragged | chosen experts only: tokens sorted by expert, `lax.ragged_dot` | TPU, with the layout "edf" |
| mosaic | the same with the Mosaic kernels that come with JAX | H100, H200 and their kin, in 16 bits |

All pass `vmap` and `grad`; the first four are plain JAX and pass `jvp` too. Beware of "ragged" on NVIDIA GPUs: XLA
expands it to a masked product of all tokens with all experts. "mosaic" means the kernel on CUDA where it can run (see
`grouped.fits_hopper`) and "auto" otherwise. Nothing here asks which device is there: a CUDA program does not know
which GPU it is for, so whoever places the weights chooses (`nn.placement`).

Why "mosaic" at every number of tokens (calculated for an H200, not measured): a canvas of 256 tokens reaches all 128
experts, whose weights take 0.35 ms a layer to read; "dense" is bound by arithmetic, 0.50 ms, while the kernel computes
159 tiles of 64 rows, 0.15 ms, behind the reading. With more tokens the gap widens, with fewer there is less to read.
What the kernel spends on looking up the group of a tile is not known: a measurement may favour "dense" at one canvas.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn import grouped, meshes
from dgemma_jax.nn.layers import RMSNorm, gelu, normal
from dgemma_jax.nn.packed import Packed, contract
from dgemma_jax.nn.sites import Site, is_open

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig

FORMS = ("auto", "dense", "scan", "blocks", "capacity", "ragged", "mosaic")
LAYOUTS = ("efd", "edf")  # letters of `gate_up`, as in the products with it; f is 2F there
_PLATFORMS = ("cpu", "cuda", "tpu")


class Router(nnx.Module):
    """softmax(W (rms(x) * scale / sqrt(D))) in float32; the top experts renormalised, times their own scale."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width, experts = config.embed_dim, config.num_experts
        self.top, self.mesh = config.experts_per_token, None
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
        # By rows, since XLA would gather those of all devices for `top_k`.
        top_BTX, index_BTX = meshes.by_rows(lambda p: jax.lax.top_k(p, self.top), self.mesh)(probs_BTE)
        top_BTX = top_BTX / top_BTX.sum(-1, keepdims=True)
        top_BTX = top_BTX * self.per_expert_scale[...].astype(jnp.float32)[index_BTX]
        chosen_BTXE = jax.nn.one_hot(index_BTX, logits_BTE.shape[-1], dtype=jnp.float32)
        return self.weights(jnp.einsum("btx,btxe->bte", top_BTX, chosen_BTXE))


class Experts(nnx.Module):
    """Gated feed-forwards, one per expert: gate_up [E, 2F, D] (gate first), down [E, F, D].

    Attributes:
        layout: "efd" as said, or "edf": gate_up lies as [E, D, 2F]. Static; `nn.placement` changes it.
        mesh: of the model; static.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width, hidden, experts = config.embed_dim, config.expert_dim, config.num_experts
        self.top, self.layout, self.mesh = config.experts_per_token, "efd", None
        self.gate_up = normal(rngs, (experts, 2 * hidden, width), width, dtype)
        self.down = normal(rngs, (experts, hidden, width), hidden, dtype)
        self.hidden, self.out = Site("expert_hidden"), Site("expert_out")

    def __call__(self, x_BTD: jax.Array, weights_BTE: jax.Array, form: str = "auto") -> jax.Array:
        """sum_e weights[e] * expert_e(x), [B, T, D]."""
        if is_open(self.hidden) or is_open(self.out):
            return self._open(x_BTD, weights_BTE)

        def whole(x_BTD, weights_BTE, gate_up, down):
            x_TD, weights_TE = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, weights_BTE))
            return run(form, self.top, x_TD, weights_TE, gate_up, down, layout=self.layout).reshape(x_BTD.shape)

        if form == "dense":  # row by row anyway, whichever way experts are split
            return whole(x_BTD, weights_BTE, self.gate_up, self.down)
        # The other forms sort the tokens they are given: each device its own.
        return meshes.by_rows(whole, self.mesh, (self.gate_up, self.down))(x_BTD, weights_BTE)

    def _open(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """The dense form with every intermediate at its site."""
        both = contract(f"btd,{self.layout}->btef", x_BTD, self.gate_up)
        gate, up = jnp.split(both, 2, -1)
        h_BTEF = self.hidden(gelu(gate) * up)
        out_BTED = self.out(contract("btef,efd->bted", h_BTEF, self.down))
        return jnp.einsum("bted,bte->btd", out_BTED, weights_BTE.astype(out_BTED.dtype))


def choose(platform: str, tokens: int, experts: int, top: int, layout: str = "efd") -> str:
    """The form of "auto" for a backend ("cpu", "cuda", "tpu") and a number of tokens; measured or compiled, see bench.

    On a TPU "ragged" wants the layout "edf": from "efd" XLA makes a transposed copy of all of `gate_up`.
    """
    if platform == "cpu":
        return "dense" if experts <= 16 or tokens * top < experts else "capacity"
    if experts <= 2 * top:
        return "dense"
    if platform == "tpu" and layout == "edf":
        return "ragged"
    return "dense" if tokens <= 512 else "blocks"


def run(form: str, top: int, x_TD, weights_TE, gate_up, down_EFD, layout: str = "efd") -> jax.Array:
    """sum_e weights[e] * expert_e(x), [T, D], in one of `FORMS`; packed weights run in any plain form."""
    if form not in FORMS:
        raise ValueError(f"unknown expert form {form!r}; known are {FORMS}")
    args, (tokens, experts) = (x_TD, weights_TE, gate_up, down_EFD), weights_TE.shape
    is_plain = not isinstance(gate_up, Packed) and not isinstance(down_EFD, Packed)
    if form in ("dense", "scan", "blocks", "capacity") or (form == "ragged" and is_plain):
        return _apply(form, top, *args, layout=layout)
    chosen = {p: choose(p, tokens, experts, top, layout if is_plain else "efd") for p in _PLATFORMS}
    if form == "mosaic" and is_plain and grouped.fits_hopper(x_TD, gate_up, down_EFD):
        chosen["cuda"] = "mosaic"
    if len(set(chosen.values())) == 1:
        return _apply(chosen["cpu"], top, *args, layout=layout)
    # Decided while lowering, by the platform compiled for, never by asking the live device.
    branch = {p: functools.partial(_apply, f, top, layout=layout) for p, f in chosen.items()}
    return jax.lax.platform_dependent(*args, **branch, default=functools.partial(_apply, "dense", top, layout=layout))


def _apply(form: str, top: int, *args: jax.Array, layout: str = "efd") -> jax.Array:
    match form:
        case "dense" | "scan":
            return {"dense": dense, "scan": scan}[form](*args, layout)
        case "blocks" | "capacity":
            return {"blocks": blocks, "capacity": capacity}[form](top, *args, layout)
    return by_group(grouped.HOPPER if form == "mosaic" else grouped.XLA, top, *args, layout)


def dense(x_TD, weights_TE, gate_up, down_EFD, layout: str = "efd") -> jax.Array:
    """All experts on all tokens: two products, the weights applied between them."""
    gate_TEF, up_TEF = jnp.split(contract(f"td,{layout}->tef", x_TD, gate_up), 2, -1)
    h_TEF = gelu(gate_TEF) * up_TEF * weights_TE[..., None].astype(x_TD.dtype)
    return contract("tef,efd->td", h_TEF, down_EFD)


def scan(x_TD, weights_TE, gate_up, down_EFD, layout: str = "efd") -> jax.Array:
    """The dense form one expert at a time: little memory, cheap weight gradients."""

    def one(total_TD, expert):
        weight_T, gate_up, down_FD = expert
        gate_TF, up_TF = jnp.split(contract(f"td,{layout[1:]}->tf", x_TD, gate_up), 2, -1)
        h_TF = gelu(gate_TF) * up_TF * weight_T[:, None].astype(x_TD.dtype)
        return total_TD + contract("tf,fd->td", h_TF, down_FD), None

    return jax.lax.scan(one, jnp.zeros_like(x_TD), (weights_TE.T, gate_up, down_EFD))[0]


def by_group(kernel: grouped.Kernel, top: int, x_TD, weights_TE, gate_up, down_EFD, layout: str = "efd") -> jax.Array:
    """Chosen experts only: assignments sorted by expert, two grouped products, sorted back.

    Nonzero weights beyond the `top` largest of a token are not seen, as in `blocks`.
    """
    (tokens, experts), width = weights_TE.shape, x_TD.shape[1]
    dtype = jnp.result_type(x_TD, gate_up[...], down_EFD[...])
    x_TD, gate_up, down_EFD = (a[...].astype(dtype) for a in (x_TD, gate_up, down_EFD))
    weight_TX, expert_TX = jax.lax.top_k(weights_TE, top)
    expert_A = expert_TX.reshape(-1)  # of every assignment, token by token
    order_A = jnp.argsort(expert_A)
    sizes_E = jax.nn.one_hot(expert_A, experts, dtype=jnp.int32).sum(0)
    copies_AD = jnp.broadcast_to(x_TD[:, None], (tokens, top, width)).reshape(-1, width)
    sorted_AD = grouped.gather(copies_AD, order_A)
    both_AF = grouped.rows(kernel, layout == "efd")(sorted_AD, gate_up, sizes_E)
    gate_AF, up_AF = jnp.split(both_AF, 2, -1)
    out_AD = grouped.rows(kernel, False)(gelu(gate_AF) * up_AF, down_EFD, sizes_E)
    out_TXD = grouped.scatter(out_AD, order_A).reshape(tokens, top, width)
    return jnp.einsum("txd,tx->td", out_TXD, weight_TX.astype(x_TD.dtype))


def block_size(assignments: int, experts: int) -> int:
    """Rows of one block: about the mean load of an expert, a power of two between 8 and 128."""
    size = 8
    while size < 128 and size * experts < assignments:
        size *= 2
    return size


def room_of(assignments: int, experts: int) -> int:
    """Rows of an expert in the form `capacity`: the mean load and five deviations of an even draw, a multiple of 8."""
    mean = assignments / experts
    return -(-math.ceil(mean + 5 * math.sqrt(mean)) // 8) * 8


def _assigned(top: int, weights_TE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights [T, X] of the chosen experts; of every assignment, token by token, the expert [A] and the rank [A] among
    those of this expert; how many there are of each expert, [E]."""
    weight_TX, expert_TX = jax.lax.top_k(weights_TE, top)
    expert_A = expert_TX.reshape(-1)
    so_far_AE = jnp.cumsum(jax.nn.one_hot(expert_A, weights_TE.shape[1], dtype=jnp.int32), 0)
    rank_A = jnp.take_along_axis(so_far_AE, expert_A[:, None], 1)[:, 0] - 1
    return weight_TX, expert_A, rank_A, so_far_AE[-1]


def _placed(x_TD: jax.Array, slot_A: jax.Array, slots: int) -> jax.Array:
    """[slots, D] the token of every assignment at its slot, zeros elsewhere."""
    tokens, width = x_TD.shape
    token_A = jnp.arange(len(slot_A), dtype=jnp.int32) // (len(slot_A) // tokens)
    source = jnp.full((slots,), tokens, jnp.int32).at[slot_A].set(token_A)
    return jnp.concatenate([x_TD, jnp.zeros((1, width), x_TD.dtype)])[source]


def _summed(out_SD: jax.Array, slot_A: jax.Array, weight_TX: jax.Array) -> jax.Array:
    """[T, D] what the experts made of each token, from its slots."""
    out_TXD = out_SD[slot_A].reshape(*weight_TX.shape, -1)
    return jnp.einsum("txd,tx->td", out_TXD, weight_TX.astype(out_SD.dtype))


def blocks(top: int, x_TD, weights_TE, gate_up, down_EFD, layout: str = "efd") -> jax.Array:
    """Chosen experts only: each expert's tokens gathered and padded to whole blocks, then gathered back.

    The number of blocks is fixed by the sizes, so the shapes are too: ceil(T * X / size) + E - 1 at most, and never
    more than assignments.
    Nonzero weights beyond the `top` largest of a token (an edit can make them) are not seen by this form.
    """
    (tokens, experts), width = weights_TE.shape, x_TD.shape[1]
    size = block_size(tokens * top, experts)
    count = min(-(-tokens * top // size) + experts - 1, tokens * top)
    weight_TX, expert_A, rank_A, load_E = _assigned(top, weights_TE)
    blocks_E = -(-load_E // size)
    last_E = jnp.cumsum(blocks_E)
    slot_A = (last_E - blocks_E)[expert_A] * size + rank_A
    owner = jnp.clip(jnp.searchsorted(last_E, jnp.arange(count), side="right"), 0, experts - 1)

    def one(_, block):
        x_ID, e = block
        gate_FI, up_FI = jnp.split(jnp.einsum(f"{layout[1:]},id->fi", gate_up[e], x_ID), 2, 0)
        return None, jnp.einsum("fi,fd->id", gelu(gate_FI) * up_FI, down_EFD[e])

    placed = _placed(x_TD, slot_A, count * size).reshape(count, size, width)
    out = jax.lax.scan(one, None, (placed, owner))[1]
    return _summed(out.reshape(count * size, width), slot_A, weight_TX)


def capacity(top: int, x_TD, weights_TE, gate_up, down_EFD, layout: str = "efd") -> jax.Array:
    """Chosen experts only, all at once: two batched products over experts of `room_of` rows each.

    No weight is sliced out or copied. An expert with more tokens than its room sends the whole call to `blocks`, so
    nothing is dropped. Weights beyond the `top` largest of a token are not seen, as there.
    """
    (tokens, experts), width = weights_TE.shape, x_TD.shape[1]
    room = room_of(tokens * top, experts)
    weight_TX, expert_A, rank_A, load_E = _assigned(top, weights_TE)

    def at_once() -> jax.Array:
        slot_A = expert_A * room + jnp.minimum(rank_A, room - 1)
        x_ERD = _placed(x_TD, slot_A, experts * room).reshape(experts, room, width)
        if isinstance(gate_up, Packed):
            both_EFR = contract(f"erd,{layout}->efr", x_ERD, gate_up)
        else:  # the weight first: on CPU twice as fast as the other way round
            both_EFR = jnp.einsum(f"{layout},erd->efr", gate_up[...], x_ERD)
        gate_EFR, up_EFR = jnp.split(both_EFR, 2, 1)
        out_ERD = contract("efr,efd->erd", gelu(gate_EFR) * up_EFR, down_EFD)
        return _summed(out_ERD.reshape(experts * room, width), slot_A, weight_TX)

    return jax.lax.cond(
        (load_E <= room).all(), at_once, lambda: blocks(top, x_TD, weights_TE, gate_up, down_EFD, layout)
    )
