"""Attention sinks over steps: keys that draw far more attention than the others, and where they move.

A_j = mean over queries of the weight on key j; j is a sink if A_j > mean over other keys + epsilon (arXiv 2510.15731).
The source prints epsilon = 3 and leaves open of what; here it is a share of attention, 0.03 by default.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn.functional import of
from interp.activations import Activations
from interp.captures import capture
from interp.flow.saved import Saved


@dataclasses.dataclass(frozen=True, eq=False)
class Sinks(Saved):
    """By full name of the layer's pattern; key slots: cached ones first, the canvas last.

    Attributes:
        received: [R, B, N, S] mean weight that each key gets.
        is_sink: [R, B, N, S] bool.
        canvas: how many of the last slots are the canvas.
        valid: [R, B] bool, the row took the step.
    """

    received: dict[str, np.ndarray]
    is_sink: dict[str, np.ndarray]
    canvas: int
    valid: np.ndarray

    def share(self) -> np.ndarray:
        """[R, L] attention that goes to sinks, mean over heads and rows that took the step."""
        return np.stack([self._mean((a * self.is_sink[n]).sum(-1).mean(-1)) for n, a in self.received.items()], 1)

    def on_canvas(self) -> np.ndarray:
        """[R, L] share of the sinks that lie on the canvas; NaN without any."""
        found = []
        for flags in self.is_sink.values():
            flags = flags & self.valid[..., None, None]
            every, own = flags.sum((1, 2, 3)), flags[..., -self.canvas :].sum((1, 2, 3))
            found.append(np.where(every > 0, own / np.maximum(every, 1), np.nan))
        return np.stack(found, 1)

    def moved(self) -> np.ndarray:
        """[R - 1, L] 1 - Jaccard overlap of the sinks of a head at consecutive steps: 0 they stay, 1 all are new.

        Heads without a sink at both steps do not count.
        """
        found = []
        for flags in self.is_sink.values():
            old, new = flags[:-1], flags[1:]
            union = (old | new).sum(-1)
            use = (union > 0) & (self.valid[:-1] & self.valid[1:])[..., None]
            overlap = (old & new).sum(-1) / np.maximum(union, 1)
            count = use.sum((1, 2))
            found.append(np.where(count > 0, ((1 - overlap) * use).sum((1, 2)) / np.maximum(count, 1), np.nan))
        return np.stack(found, 1)

    def _mean(self, values_RB: np.ndarray) -> np.ndarray:
        count = self.valid.sum(1)
        return np.where(count > 0, (values_RB * self.valid).sum(1) / np.maximum(count, 1), np.nan)

    def __repr__(self) -> str:
        where = f"{len(self.received)} layer(s), {len(self.valid)} step(s)"
        return f"sinks in {where}: {np.nanmean(self.share()):.1%} of attention"


def attention_sinks(
    bundle: Any, prompts: Any, layers: str = "*", steps: Any = None, *, epsilon: float = 0.03, **options: Any
) -> Sinks:
    """Sinks of every head at every step of one block.

    Args:
        layers: which, "*" or a number as text; their attention takes the slower path that shows its pattern.
        steps: as for `interp.capture`.
        epsilon: how far above the mean of the other keys, as a share of all attention.
        **options: of `interp.capture` (seed, sampler, memory_limit, ...).
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be a positive share of attention, got {epsilon}")
    acts = capture(bundle, prompts, f"layers.{layers}.attn_pattern", steps, reduce=received_by_key, **options)
    return sinks_of(acts, of(bundle).config.canvas_length, epsilon)


def received_by_key(pattern_BNTS: jax.Array) -> jax.Array:
    """[B, N, S] mean over queries."""
    return jnp.mean(pattern_BNTS, 2)


def sinks_of(acts: Activations, canvas: int, epsilon: float = 0.03) -> Sinks:
    """Sinks of captured `received_by_key`; keys that nobody may see do not count."""
    flags = {}
    for name, weight in acts.items():
        there = weight > 0
        others = (weight.sum(-1, keepdims=True) - weight) / np.maximum(there.sum(-1, keepdims=True) - 1, 1)
        flags[name] = there & (weight > others + epsilon)
    return Sinks(dict(acts.items()), flags, canvas, acts.valid)
