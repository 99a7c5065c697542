"""Softmax attention: over all keys at once, or over chunks of keys where nobody looks at scores and pattern.

Of a set of keys, (max, sum, weights . values) with weights = exp(scores - max) is enough: those of two sets merge into
those of their union, and z = weights . values / sum. This is the online softmax of arXiv 1805.02867, here in plain JAX,
for any head size, differentiable in both modes.

Two other ways, left out. cuDNN's fused kernel takes heads up to 256 wide, so no full layer; it asks for the live device
while tracing, so its programs cannot be compiled elsewhere, and it has no forward mode. Canvas keys written into spare
slots of a cache that the loop carries would save the joining below, under 1 % of a step's traffic at a context of 4k,
for a second copy of the cache; beyond `AT_ONCE` nothing is joined at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgemma_jax.nn.cache import LayerCache
from dgemma_jax.nn.masks import Sight

AT_ONCE = 8192 + 2048  # keys; with more of them scores of [queries, keys] would be the largest thing in memory
CHUNK = 2048  # keys
ALIGNED = 8  # keys: matrix units take rows of whole 16 bytes

Look = Callable[[jax.Array], jax.Array]  # gives back what it is shown, or something in its place


class _Part(NamedTuple):
    """Attention over some of the keys, not yet divided: largest score, sum and product [B, K, R, 1 | 1 | H] float32."""

    peak: jax.Array
    total: jax.Array
    product: jax.Array


def attend(q_BNTH: jax.Array, cached: LayerCache, own: LayerCache, sight: Sight) -> jax.Array:
    """What each head reads, [B, N, T, H] in the dtype of the values.

    Args:
        q_BNTH: queries; those that share a key head are neighbours.
        cached, own: keys and values [B, K, S, H] of the cache, and of this call.
        sight: over the keys of both, in this order.
    """
    slots, more = cached.k.shape[2], own.k.shape[2]
    if slots + more <= AT_ONCE:
        aligned = 1 if cached.k.dtype == jnp.float32 else ALIGNED
        return at_once(q_BNTH, cached, own, sight, spare=-(slots + more) % aligned)
    q_BKRH = _by_key_head(q_BNTH, cached)
    part = _over_chunks(_nothing(q_BKRH), q_BKRH, cached, sight.of(0, slots))
    part = _over_chunks(part, q_BKRH, own, sight.of(slots, more))
    return (part.product / part.total).astype(cached.v.dtype).reshape(q_BNTH.shape)


def at_once(
    q_BNTH: jax.Array, cached: LayerCache, own: LayerCache, sight: Sight, *, spare: int = 0,
    on_scores: Look = lambda x: x, on_pattern: Look = lambda x: x,
) -> jax.Array:  # fmt: skip
    """`attend` over all keys together, which shows scores and pattern [B, N, T, S + spare] float32 to two functions.

    Args:
        spare: this many keys more, which nobody sees.
    """

    def join(left_BKSH: jax.Array, right_BKSH: jax.Array) -> jax.Array:
        zeros = jnp.zeros((*left_BKSH.shape[:2], spare, left_BKSH.shape[3]), left_BKSH.dtype)
        return jnp.concatenate([left_BKSH, right_BKSH, zeros], 2)

    k_BKSH, v_BKSH = join(cached.k, own.k), join(cached.v, own.v)
    sight = dataclasses.replace(sight, key_BS=jnp.pad(sight.key_BS, ((0, 0), (0, spare)), constant_values=-1))
    scores_BKRS = _scores(_by_key_head(q_BNTH, cached), k_BKSH, sight)
    scores_BNTS = on_scores(scores_BKRS.reshape(*q_BNTH.shape[:3], -1))
    pattern_BNTS = on_pattern(_softmax(scores_BNTS, v_BKSH.dtype))
    pattern_BKRS = pattern_BNTS.astype(v_BKSH.dtype).reshape(scores_BKRS.shape)
    return jnp.einsum("bkrs,bksh->bkrh", pattern_BKRS, v_BKSH).reshape(q_BNTH.shape)


def _softmax(scores: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`jax.nn.softmax` of [..., S] float32 over the last axis, about to be rounded to `dtype`."""
    if dtype == jnp.float32:  # the other form rounds as XLA fuses it: programs of few and of many rows would differ
        return jax.nn.softmax(scores, -1)
    # For each of the two readers of the exponentials their own, or XLA would write them in float32.
    peak = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    total = jnp.sum(jnp.exp(scores - peak), -1, keepdims=True)
    return jnp.exp(scores - jax.lax.optimization_barrier(peak)) / total


def _by_key_head(q_BNTH: jax.Array, keys: LayerCache) -> jax.Array:
    """The G queries that share a key head and the T tokens as one axis: one plain matrix product a key head."""
    batch, _, _, size = q_BNTH.shape
    return q_BNTH.reshape(batch, keys.k.shape[1], -1, size)


def _scores(q_BKRH: jax.Array, k_BKSH: jax.Array, sight: Sight) -> jax.Array:
    """[B, K, R, S] float32, the lowest float where a query may not look."""
    scores_BKRS = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    mask_BTS = sight.mask()
    by_token = scores_BKRS.reshape(*scores_BKRS.shape[:2], -1, *mask_BTS.shape[1:])
    return jnp.where(mask_BTS[:, None, None], by_token, jnp.finfo(jnp.float32).min).reshape(scores_BKRS.shape)


def _part(q_BKRH: jax.Array, keys: LayerCache, sight: Sight) -> _Part:
    scores_BKRS = _scores(q_BKRH, keys.k, sight)
    peak_BKR1 = jnp.max(scores_BKRS, -1, keepdims=True)
    weights_BKRS = jnp.exp(scores_BKRS - peak_BKR1).astype(keys.v.dtype)
    total_BKR1 = jnp.sum(weights_BKRS, -1, keepdims=True, dtype=jnp.float32)  # of what is multiplied, rounding included
    product = jnp.einsum("bkrs,bksh->bkrh", weights_BKRS, keys.v, preferred_element_type=jnp.float32)
    return _Part(peak_BKR1, total_BKR1, product)


def _nothing(q_BKRH: jax.Array) -> _Part:
    """Attention over no keys, which changes nothing it is merged with."""
    low = jnp.full((*q_BKRH.shape[:3], 1), jnp.finfo(jnp.float32).min)
    return _Part(low, jnp.zeros_like(low), jnp.zeros(q_BKRH.shape, jnp.float32))


def _merged(a: _Part, b: _Part) -> _Part:
    peak = jnp.maximum(a.peak, b.peak)
    left, right = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return _Part(peak, a.total * left + b.total * right, a.product * left + b.product * right)


def _over_chunks(part: _Part, q_BKRH: jax.Array, keys: LayerCache, sight: Sight) -> _Part:
    """`part` and these keys, `CHUNK` at a time; what is left over comes last."""
    slots = keys.k.shape[2]

    def chunk(start: jax.Array | int, size: int) -> _Part:
        some = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, 2), keys)
        return _part(q_BKRH, some, sight.of(start, size))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the gradient keeps the scores of all chunks
    def step(part: _Part, index: jax.Array) -> tuple[_Part, None]:
        return _merged(part, chunk(index * CHUNK, CHUNK)), None

    whole = slots // CHUNK
    if whole:
        part, _ = jax.lax.scan(step, part, jnp.arange(whole))
    return _merged(part, chunk(whole * CHUNK, slots % CHUNK)) if slots % CHUNK else part
