"""The model's entry points as functions of (model, arrays): the public face of `dgemma_jax.nn`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import meshes, sites
from dgemma_jax.nn.transformer import Prefill, Transformer


def of(model: Any) -> Transformer:
    """The model of a bundle, or the model itself."""
    return model if isinstance(model, Transformer) else model.model


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(model: Transformer, tokens: jax.Array, valid: jax.Array, cache: kv.KVCache) -> Prefill:
    captured: dict[str, jax.Array] = {}
    positions = jnp.where(valid, cache.length[:, None] + jnp.cumsum(valid.astype(jnp.int32), 1) - 1, -1)
    model = sites.bind(
        model, phase="prefill", positions=positions, length=cache.length, embedder=model.embedder, captured=captured
    )  # fmt: skip
    out = model.prefill(tokens, valid, cache)
    return dataclasses.replace(out, sites=captured)


@jax.jit
def _denoise(model: Transformer, canvas: jax.Array, cache: kv.KVCache, soft: jax.Array) -> jax.Array:
    model = _at_first_step(model, canvas.shape[0], length=cache.length, canvas=canvas, soft=soft)
    return model.unembed(model.denoise(canvas, cache, soft))


def _at_first_step(model: Transformer, batch: int, **context: Any) -> Transformer:
    """Outside a run an edited model behaves as at step 0 of block 0."""
    zero = jnp.zeros(batch, jnp.int32)
    return sites.bind(model, phase="denoise", step=zero, block=zero, embedder=model.embedder, **context)


@jax.jit
def _unembed(model: Transformer, hidden: jax.Array) -> jax.Array:
    return _at_first_step(model, hidden.shape[0]).unembed(hidden)


@jax.jit
def _soft_embed(model: Transformer, shaped: jax.Array) -> jax.Array:
    probs = jax.nn.softmax(shaped.astype(jnp.float32), -1)
    return _at_first_step(model, shaped.shape[0]).soft_embed(probs)


def _as_given(x: Any) -> Any:
    """An array on the device as it is, and others on the host, where to look at them compiles nothing."""
    return x if isinstance(x, jax.Array) else np.asarray(x)


@jax.jit
def _copy(cache: kv.KVCache) -> kv.KVCache:
    return jax.tree.map(jnp.copy, cache)


@jax.jit
def _tokens_held(length_B: jax.Array, valid_BT: jax.Array) -> jax.Array:
    return length_B + valid_BT.sum(1)


def check_tokens(tokens: jax.Array, vocab_size: int, name: str = "tokens") -> None:
    """Raise a ValueError unless `tokens` is a rank-2 integer array inside the vocabulary."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape [B, T], got {tokens.dtype} {tokens.shape}")
    if tokens.size == 0:
        raise ValueError(f"{name} is empty: shape {tokens.shape}; give at least one token for each row")
    if isinstance(tokens, jax.core.Tracer):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} holds id {low if low < 0 else high}; ids must be in 0..{vocab_size - 1}")


def prefill(
    model: Any, tokens: Any, valid: Any = None, cache: kv.KVCache | None = None, cache_length: int | None = None,
    chunk: int | None = None,
) -> Prefill:  # fmt: skip
    """Run the causal pass over `tokens` and put their keys and values into the cache.

    Args:
        model: a model or a bundle, edited or not.
        tokens: [B, T] ids.
        valid: [B, T] bool, True for real tokens; rows of unequal length are padded anywhere. All by default.
        cache: continues this cache; by default an empty one.
        cache_length: tokens a row of a new cache can hold; by default T and one canvas.
        chunk: run T in pieces of this many tokens: the same result with less memory.

    Returns:
        `Prefill`: `cache`, and `hidden` [B, T, D] after the final norm (rows of padding are meaningless).

    Raises:
        ValueError: ids outside the vocabulary, a row without valid token, a cache too small.
    """
    model = of(model)
    tokens = _as_given(tokens)
    check_tokens(tokens, model.config.vocab_size)
    batch, length = tokens.shape
    valid = np.ones(tokens.shape, bool) if valid is None else _as_given(valid).astype(bool)
    if valid.shape != tokens.shape:
        raise ValueError(f"valid has shape {valid.shape}, tokens {tokens.shape}; they must be equal")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    given = cache is not None
    if not given:
        capacity = length + model.config.canvas_length if cache_length is None else cache_length
        cache = meshes.empty_cache(model.config, batch, capacity, model.dtype, meshes.of(model))
    elif cache_length is not None:
        raise ValueError("give either cache or cache_length, not both")
    if cache.length.shape != (batch,):
        raise ValueError(f"the cache holds {cache.length.shape[0]} rows, tokens has {batch}")
    if not any(isinstance(x, jax.core.Tracer) for x in (tokens, valid, cache.length)):
        held = meshes.to_host(_tokens_held(cache.length, valid)) if given else valid.sum(1)
        if int(held.min()) == 0:
            raise ValueError(f"row {int(held.argmin())} has no valid token; give at least one for each row")
        slots = [e.k.shape[2] for e in cache.layers]
        ring = model.config.sliding_window - 1  # a whole ring never overflows
        limits = [n for i, n in enumerate(slots) if n < ring or not model.config.is_sliding(i)]
        needed = int(held.max())
        if limits and needed > min(limits):
            raise ValueError(
                f"{needed} tokens do not fit a cache of {min(limits)}; make it with cache_length={needed} or more"
            )
        if needed > model.config.max_position_embeddings:
            raise ValueError(
                f"{needed} tokens exceed the context of {model.config.max_position_embeddings}; shorten the prompt"
            )
    if given:  # each piece writes over the cache it gets; the caller's stays
        cache = _copy(cache)
    pieces = [slice(i, i + (chunk or length)) for i in range(0, length, chunk or length)]
    hidden = []
    for piece in pieces:
        out = _prefill(model, tokens[:, piece], valid[:, piece], cache)
        cache = out.cache
        hidden.append(out.hidden)
    if len(pieces) == 1:
        return out
    if out.sites:
        raise ValueError(
            f"sites are captured ({', '.join(out.sites)}): run the prompt in one piece, without chunk={chunk}"
        )
    return Prefill(cache, jnp.concatenate(hidden, 1))


def denoise(model: Any, canvas: Any, cache: kv.KVCache, self_conditioning: Any = None) -> jax.Array:
    """Logits [B, C, V] float32 of one bidirectional pass over the canvas, soft-capped, before temperature.

    Args:
        model: a model or a bundle, edited or not.
        canvas: [B, C] ids, any C.
        cache: from `prefill`; read, not changed.
        self_conditioning: S [B, C, D] from `soft_embed`; None is the first step (zeros).
    """
    model = of(model)
    canvas = jnp.asarray(canvas)
    check_tokens(canvas, model.config.vocab_size, "canvas")
    shape = (*canvas.shape, model.config.embed_dim)
    soft = jnp.zeros(shape, model.dtype) if self_conditioning is None else jnp.asarray(self_conditioning)
    if soft.shape != shape:
        raise ValueError(f"self_conditioning has shape {soft.shape}; canvas {canvas.shape} needs {shape}")
    if cache.length.shape[0] != canvas.shape[0]:
        raise ValueError(f"the cache holds {cache.length.shape[0]} rows, the canvas {canvas.shape[0]}")
    return _denoise(model, canvas, cache, soft)


def unembed(model: Any, hidden: jax.Array) -> jax.Array:
    """Logits [.., V] float32, soft-capped, of hidden states [.., D] after the final norm."""
    model, hidden = of(model), jnp.asarray(hidden)
    width = model.config.embed_dim
    if hidden.shape[-1:] != (width,):
        raise ValueError(f"hidden has shape {hidden.shape}; its last axis must be the width {width}")
    flat = hidden.reshape(1, -1, width)
    return _unembed(model, flat).reshape(*hidden.shape[:-1], model.config.vocab_size)


def soft_embed(model: Any, shaped_logits: jax.Array) -> jax.Array:
    """S [B, C, D] = sqrt(D) * softmax(shaped_logits) . table: what one step hands to the next."""
    model, shaped_logits = of(model), jnp.asarray(shaped_logits)
    if shaped_logits.ndim != 3 or shaped_logits.shape[-1] != model.config.vocab_size:
        raise ValueError(f"shaped_logits has shape {shaped_logits.shape}; needed is [B, C, {model.config.vocab_size}]")
    return _soft_embed(model, shaped_logits)
