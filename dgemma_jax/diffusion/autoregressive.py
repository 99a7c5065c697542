"""Autoregressive decoding with the same weights: the causal pass and its cache, a token at a time.

The head on the causal pass predicts the next token, which training keeps up beside the denoising. This is the
baseline that block diffusion is measured against: one pass of the weights a token instead of a few a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.diffusion import generate, noise
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.nn import functional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregression:
    """What `autoregress` gives.

    Attributes:
        texts: answers, without special tokens; None for a row if the model has no tokenizer.
        tokens: [B, N] ids, padding after the end token.
        num_tokens: [B] ids that are not padding, the end token among them.
        prompt_tokens: ids of each prompt.
        stop_reason: per row "eos" or "max_new_tokens".
        seeds: [B].
    """

    texts: list[str | None]
    tokens: np.ndarray
    num_tokens: np.ndarray
    prompt_tokens: list[list[int]]
    stop_reason: list[str]
    seeds: list[int]


def autoregress(
    bundle: Any, prompts: Any, max_new_tokens: int = 256, temperature: float = 0.0, seed: int | Sequence[int] = 0,
    *, thinking: bool = False,
) -> Autoregression:  # fmt: skip
    """Continue each prompt token by token with the causal pass, in one compiled loop.

    A row's tokens depend on its prompt and its seed alone; it stops at an end token of the bundle's sampler.

    Args:
        bundle: a bundle, or a model (then prompts must be ids).
        prompts: as of `generate`.
        max_new_tokens: at most this many a row; exactly, not in blocks.
        temperature: of the softmax over the capped logits; 0 takes the likeliest token.
        seed: one for all rows, or one a row; without meaning at temperature 0.
        thinking: let the chat template open the thinking channel.

    Raises:
        ValueError: before any work, for what `generate` refuses too, and for a temperature below 0.
    """
    model, tokenizer, settings = inputs.parts(bundle)
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size, thinking)
    seeds = inputs.to_seeds(seed, len(ids))
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    if not isinstance(temperature, int | float) or not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
    longest, context = max(map(len, ids)), model.config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {context}: shorten "
            "the prompt or lower max_new_tokens"
        )
    if hasattr(bundle, "check_finite"):
        bundle.check_finite()

    prompt = generate.prefill_padded(model, ids, longest + max_new_tokens)
    model = _chosen_experts_only(model, len(ids))
    last_BD = prompt.hidden[np.arange(len(ids)), [len(row) - 1 for row in ids]]
    tokens = _decode(
        model, last_BD, prompt.cache, noise.row_keys(np.array(seeds)), jnp.float32(temperature), total=max_new_tokens,
        greedy=temperature == 0, ends=tuple(settings.eos_token_ids), pad=settings.pad_token_id,
    )  # fmt: skip
    tokens = np.asarray(tokens)
    is_end = np.isin(tokens, settings.eos_token_ids)
    ended = is_end.any(1)
    count = np.where(ended, is_end.argmax(1) + 1, max_new_tokens)
    shown = [row[: n - e].tolist() for row, n, e in zip(tokens, count, ended, strict=True)]
    return Autoregression(
        texts=[None if tokenizer is None else tokenizer.decode(row) for row in shown],
        tokens=tokens,
        num_tokens=count,
        prompt_tokens=ids,
        stop_reason=["eos" if e else "max_new_tokens" for e in ended],
        seeds=seeds,
    )


def _chosen_experts_only(model: Any, rows: int) -> Any:
    """The model for passes of one token a row: a canvas reaches all experts, so few tokens a few of them."""
    config = model.config
    if model.moe != "auto" or rows * config.experts_per_token >= config.num_experts:
        return model
    copy = jax.tree.map(lambda leaf: leaf, model)
    copy.moe = "blocks"
    return copy


@functools.partial(jax.jit, static_argnames=("total", "greedy", "ends", "pad"))
def _decode(model, hidden_BD, cache, keys, temperature, *, total, greedy, ends, pad) -> jax.Array:
    """Tokens [B, total]; the first comes from the prompt's last hidden state, each other one from its own pass."""

    def pick(hidden_BD: jax.Array, index: jax.Array) -> jax.Array:
        logits_BV = functional.unembed(model, hidden_BD)
        if greedy:
            return sampling.argmax(logits_BV)
        uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index)))(keys)
        return sampling.categorical(uniform_B, jax.nn.softmax(logits_BV / temperature, -1))

    def put(carry, token_B):
        """The token of this index: kept, or padding in rows that have ended."""
        index, done_B, tokens_BN = carry
        token_B = jnp.where(done_B, pad, token_B)
        done_B = done_B | jnp.isin(token_B, jnp.array(ends, jnp.int32))
        return index + 1, done_B, tokens_BN.at[:, index].set(token_B)

    def going(carry):
        (index, done_B, _), _ = carry
        return (index < total) & ~done_B.all()

    def body(carry):
        written, cache = carry
        index, done_B, tokens_BN = written
        newest_B1 = jax.lax.dynamic_slice_in_dim(tokens_BN, index - 1, 1, 1)
        out = functional.prefill(model, newest_B1, ~done_B[:, None], cache)
        return put(written, pick(out.hidden[:, 0], index)), out.cache

    rows = hidden_BD.shape[0]
    empty = (jnp.int32(0), jnp.zeros(rows, bool), jnp.full((rows, total), pad, jnp.int32))
    (_, _, tokens_BN), _ = jax.lax.while_loop(going, body, (put(empty, pick(hidden_BD, jnp.int32(0))), cache))
    return tokens_BN
