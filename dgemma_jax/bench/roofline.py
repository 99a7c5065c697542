"""What a computation must read, write and multiply at the least, from the configuration; and how long that takes.

Parts are summed, each the larger of bytes over bandwidth and FLOPs over peak. Counted are weights, the cache, and
arrays as large as the logits; of experts only those that random routing is expected to reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dgemma_jax.config import ModelConfig


class Part(NamedTuple):
    """Bytes moved and FLOPs done by one part of a computation."""

    bytes: float
    flops: float

    def __mul__(self, times: float) -> Part:
        return Part(self.bytes * times, self.flops * times)

    __rmul__ = __mul__


def seconds(parts: Sequence[Part], bandwidth: float, peak: float) -> float:
    """Least time at these ceilings, bytes and FLOPs a second."""
    return sum(max(part.bytes / bandwidth, part.flops / peak) for part in parts)


def step(config: ModelConfig, batch: int, context: int, width: int) -> list[Part]:
    """One denoising step, sampler and soft embedding included; `width` bytes a weight."""
    tokens = batch * config.canvas_length
    signal = 3 * config.embed_dim * config.hidden_dim  # self-conditioning
    return [
        *layers(config, batch, config.canvas_length, context, width),
        Part(signal * width, 2 * signal * tokens),
        head(config, tokens, width),
        sampler(config, tokens, width),
        soft_embedding(config, tokens, width),
    ]


def layers(config: ModelConfig, batch: int, length: int, context: int, width: int) -> list[Part]:
    """All layers over `length` new tokens in each of `batch` rows, after `context` cached ones."""
    tokens, parts = batch * length, []
    for layer in range(config.num_layers):
        dense = 3 * config.embed_dim * config.hidden_dim + config.num_experts * config.embed_dim
        parts += [
            attention(config, layer, batch, length, context, width),
            Part(dense * width, 2 * dense * tokens),
            experts(config, tokens, width),
        ]
    return parts


def attention(config: ModelConfig, layer: int, batch: int, length: int, context: int, width: int) -> Part:
    """Projections, and every new token against the cache and, as in a canvas, all new tokens of its row.

    In a causal pass half of the latter is masked; there the number of pairs is this at most.
    """
    size, kv, sliding = config.head_size(layer), config.kv_heads(layer), config.is_sliding(layer)
    weights = config.embed_dim * size * (2 * config.num_heads + (2 if sliding else 1) * kv)
    kept = min(config.sliding_window - 1, context) if sliding else context
    keys = kept + (min(length, config.sliding_window) if sliding else length)
    moved = (weights + 2 * batch * (kept + length) * kv * size) * width
    return Part(moved, 2 * weights * batch * length + 4 * batch * length * keys * config.num_heads * size)


def experts(config: ModelConfig, tokens: int, width: int) -> Part:
    """The experts of one layer: those reached are read, the chosen ones are computed."""
    share = config.experts_per_token / config.num_experts
    reached = config.num_experts * (1 - (1 - share) ** tokens)
    one = 3 * config.embed_dim * config.expert_dim
    return Part(reached * one * width, 2 * one * config.experts_per_token * tokens)


def head(config: ModelConfig, tokens: int, width: int) -> Part:
    """The table read, float32 logits written."""
    table = config.vocab_size * config.embed_dim
    return Part(table * width + 4 * tokens * config.vocab_size, 2 * table * tokens)


def soft_embedding(config: ModelConfig, tokens: int, width: int) -> Part:
    """The table and the probabilities read."""
    table = config.vocab_size * config.embed_dim
    return Part((table + tokens * config.vocab_size) * width, 2 * table * tokens)


def sampler(config: ModelConfig, tokens: int, width: int) -> Part:
    """Logits read four times, probabilities written."""
    return Part(tokens * config.vocab_size * (4 * 4 + width), 0)


def prefill(config: ModelConfig, batch: int, length: int, context: int, width: int) -> list[Part]:
    """The causal pass over `length` tokens a row after `context`; without a head."""
    return layers(config, batch, length, context, width)


def autoregression(config: ModelConfig, batch: int, tokens: int, context: int, width: int) -> list[Part]:
    """`tokens` passes of one token a row, each with the head, after `context` at first."""
    once = [*layers(config, batch, 1, context + tokens // 2, width), head(config, batch, width)]
    return [part * tokens for part in once]
