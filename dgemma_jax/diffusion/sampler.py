"""One denoising step: logits to entropy, acceptance, the next canvas and the next S. Pure functions.

    canvas, S --denoise--> logits --/temperature--> shaped distribution p
    p -> argmax, sample (inverse CDF), entropy, next S;  entropy -> accepted;  accepted ? sample : uniform -> canvas

Entropy-bound acceptance: arXiv 2505.24857; the loop: `transformers` 5.23, generation_diffusion_gemma.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion.trajectory import StepView, StopReason
from dgemma_jax.nn import meshes, sites
from dgemma_jax.nn.cache import KVCache

PINNED = -1e9  # shaped logit of every other token at a pinned position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What evolves while a block is denoised.

    Attributes:
        canvas: [B, C] tokens fed into the next step.
        soft: [B, C, D] S fed into the next step; zeros before the first.
        argmax: [B, C] of the last step; -1 before the first.
        unchanged: [B] int32, number of last steps in a row with the same argmax.
        step: [B] int32, steps taken in this block.
        block: [B] int32.
        done: [B] bool, the row is frozen.
        stop: [B] int32, `StopReason`.
        keys: [B] random keys of the rows.
    """

    canvas: jax.Array
    soft: jax.Array
    argmax: jax.Array
    unchanged: jax.Array
    step: jax.Array
    block: jax.Array
    done: jax.Array
    stop: jax.Array
    keys: jax.Array

    def replace(self, **changes: Any) -> State:
        return dataclasses.replace(self, **changes)


def start(keys: jax.Array, block: jax.Array, ended: jax.Array, canvas_length: int, model: Any) -> State:
    """The state before the first step of a block: a uniform canvas and S = 0. `ended` rows take no part."""
    sizes = model.config.vocab_size, model.config.embed_dim
    return _start(keys, block, ended, canvas_length, *sizes, model.dtype)


@functools.partial(jax.jit, static_argnums=range(3, 7), inline=True)
def _start(keys, block, ended, canvas_length, vocab_size, width, dtype) -> State:
    batch = keys.shape[0]
    zero = jnp.zeros((batch,), jnp.int32)
    canvas = noise.uniform_canvas(noise.moment_keys(keys, block, zero), canvas_length, vocab_size)
    soft = jnp.zeros((batch, canvas_length, width), dtype)
    return State(canvas, soft, jnp.full_like(canvas, -1), zero, zero, block, ended, zero, keys)


def token_entropy(shaped_logits: jax.Array) -> jax.Array:
    """Entropy in nats of softmax(shaped_logits) over the last axis, float32."""
    logp = jax.nn.log_softmax(shaped_logits.astype(jnp.float32), -1)
    logp = jnp.maximum(logp, jnp.finfo(jnp.float32).min)  # an edit may rule tokens out by -inf: 0 * -inf is no number
    return -jnp.einsum("...v,...v->...", jnp.exp(logp), logp)  # XLA on CPU takes five times as long for the plain sum


def argmax(scores: jax.Array) -> jax.Array:
    """Index of the first largest entry of the last axis, int32, [..].

    Group by group, then within the group: XLA on CPU takes seven times as long for one `argmax`.
    """
    grid = _grouped(scores, -jnp.inf)
    best = jnp.argmax(jnp.max(grid, -1), -1)
    within = jnp.argmax(jnp.take_along_axis(grid, best[..., None, None], -2)[..., 0, :], -1)
    return (best * grid.shape[-1] + within).astype(jnp.int32)


def _grouped(x: jax.Array, fill: float) -> jax.Array:
    """[.., V] as [.., groups, width], padded with `fill`; width is about the root of V."""
    size = x.shape[-1]
    width = 1 << max(1, (size.bit_length() + 1) // 2)
    groups = -(-size // width)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * width - size)], constant_values=fill)
    return padded.reshape(*x.shape[:-1], groups, width)


def accept(entropy: jax.Array, entropy_bound: jax.Array | float) -> jax.Array:
    """Positions kept: the longest prefix, by rising entropy, whose sum without its largest is <= the bound.

    Args:
        entropy: [.., C] nats.

    Returns:
        [.., C] bool; the lowest entropy is always kept.
    """
    order = jnp.argsort(entropy, -1)
    ranked = jnp.take_along_axis(entropy, order, -1)
    keep = jnp.cumsum(ranked, -1) - ranked <= entropy_bound
    return jnp.take_along_axis(keep, jnp.argsort(order, -1), -1)


def categorical(uniform: jax.Array, probs: jax.Array) -> jax.Array:
    """Draw from `probs` [.., V] by inverse CDF, one uniform number [..] in [0, 1) each; int32.

    Two levels of sums instead of one over V: the same distribution up to float32 rounding, and V random
    numbers fewer than the Gumbel form. A token of probability 0 is never drawn.
    """
    grid = _grouped(probs, 0.0)
    width = grid.shape[-1]

    def find(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jnp.cumsum(weights, -1)
        last = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, -1)
        # XLA's running sums round unevenly and may rise where a weight is zero: such places are left out.
        reached = (total > target[..., None]) & (weights > 0)
        index = jnp.where(reached.any(-1), jnp.argmax(reached, -1), last)
        before = jnp.take_along_axis(total - weights, index[..., None], -1)[..., 0]
        return index, jnp.maximum(target - before, 0)

    sums = grid.sum(-1)
    group, rest = find(sums, uniform * sums.sum(-1))
    row = jnp.take_along_axis(grid, group[..., None, None], -2)[..., 0, :]
    return (group * width + find(row, rest)[0]).astype(jnp.int32)


def denoise_step(
    model: Any, state: State, cache: KVCache, sampler: SamplerConfig, pinned: jax.Array | None = None
) -> tuple[State, StepView]:
    """Take one step. Rows that are done stay as they are.

    Args:
        model: a `Transformer`, edited or not.
        pinned: [B, C] bool, positions whose token never changes: their distribution is that token alone.

    Returns:
        The next state, and everything the step computed.
    """
    captured: dict[str, jax.Array] = {}
    state, pinned = meshes.rows((state, pinned), meshes.of(model))
    model = sites.bind(
        model, phase="denoise", step=state.step, block=state.block, keys=state.keys, length=cache.length,
        canvas=state.canvas, soft=state.soft, embedder=model.embedder, captured=captured,
    )  # fmt: skip
    hidden_BCD = model.denoise(state.canvas, cache, state.soft)
    logits_BCV = model.unembed(hidden_BCD)
    shaped_BCV = logits_BCV / noise.temperature(state.step, sampler)[:, None, None]
    if pinned is not None:
        own = jnp.arange(shaped_BCV.shape[-1]) == state.canvas[..., None]
        shaped_BCV = jnp.where(pinned[..., None], jnp.where(own, 0.0, PINNED), shaped_BCV)
    # One array for all its readers: for H200, XLA would write two more [B, C, V] to gather single rows from.
    shaped_BCV = jax.lax.optimization_barrier(model.shaped_logits(shaped_BCV))
    # Not `softmax`: XLA would keep its exponentials for two readers, another [B, C, V] in float32.
    probs_BCV = jnp.exp(shaped_BCV - jax.nn.logsumexp(shaped_BCV, -1, keepdims=True))
    entropy_BC = token_entropy(shaped_BCV)
    argmax_BC = argmax(shaped_BCV)

    keys = jax.vmap(jax.random.split)(noise.moment_keys(state.keys, state.block, state.step + 1))
    length = state.canvas.shape[1]
    uniform_BC = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(keys[:, 0])
    sample_BC = categorical(uniform_BC, probs_BCV)
    accepted_BC = accept(entropy_BC, sampler.entropy_bound)
    fresh_BC = noise.uniform_canvas(keys[:, 1], length, logits_BCV.shape[-1])
    canvas_BC = model.canvas(jnp.where(accepted_BC, sample_BC, fresh_BC))
    model = sites.bind(model, next_canvas=canvas_BC)
    soft_BCD = model.soft_embed(probs_BCV)

    view = StepView(
        state.step, state.block, state.canvas, state.soft, logits_BCV, shaped_BCV, argmax_BC, sample_BC, entropy_BC,
        accepted_BC, canvas_BC, soft_BCD, captured, hidden_BCD,
    )  # fmt: skip
    return advance(state, view, sampler), view


def advance(state: State, view: StepView, sampler: SamplerConfig) -> State:
    """The state after a step: frozen rows kept, the stop test applied to the others."""
    compared = state.canvas if sampler.stability == "canvas" else state.argmax
    same_B = jnp.all(view.argmax == compared, -1)
    unchanged_B = jnp.where(same_B, state.unchanged + 1, 0)
    mean_B = jnp.mean(view.entropy, -1)
    google = sampler.stability == "canvas"
    confident_B = mean_B <= sampler.confidence_threshold if google else mean_B < sampler.confidence_threshold
    stopped_B = confident_B & (unchanged_B >= sampler.stability_threshold) & sampler.early_stop
    last_B = state.step + 1 >= sampler.max_denoising_steps
    stop_B = jnp.where(stopped_B, StopReason.CONVERGED, jnp.where(last_B, StopReason.MAX_STEPS, StopReason.NOT_RUN))

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(state.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return State(
        canvas=keep(state.canvas, view.next_canvas),
        soft=keep(state.soft, view.next_soft.astype(state.soft.dtype)),
        argmax=keep(state.argmax, view.argmax),
        unchanged=keep(state.unchanged, unchanged_B),
        step=keep(state.step, state.step + 1),
        block=state.block,
        done=state.done | stopped_B | last_B,
        stop=keep(state.stop, stop_B.astype(jnp.int32)),
        keys=state.keys,
    )
