"""Token bottlenecks: what one step may hand to the next, cut down to a few tokens.

The soft embedding S = sqrt(D) * p . table between steps is replaced by that of a distribution which keeps the k most
likely tokens (f_k), or those of at least probability p (f_p), at their own probability and spreads the rest evenly
over all others. Sampling, entropy, acceptance and the stop keep the full distribution. `methods.md` section 3.

    S / sqrt(D) = sum_kept (q_v - u) table_v + u sum_v table_v      u = (1 - sum_kept q) / (V - kept)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax.config import SamplerConfig
from dgemma_jax.nn.embedder import Embedder, SoftEmbed
from dgemma_jax.nn.functional import of
from interp import surgery
from interp.editing import num_steps, rewrapped
from interp.gates import Gate, table

MODES = ("uniform", "renormalize")


@nnx.dataclass(eq=False)
class Bottleneck(SoftEmbed):
    """The soft embedding of a few tokens; in place of `SoftEmbed`. All but `count` is data: one program for all.

    Attributes:
        k: keeps at most this many tokens; one number, or [B], one a row.
        p: keeps only tokens of at least this probability; one number, or [B].
        spread: True spreads the rest over the other tokens. False scales the kept ones up; the most likely token is
            then always kept.
        count: rows of the table that are looked at, an upper bound of what is kept; static.
        table_sum: [D] float32, the sum of all rows of the table.
        gate: where the bottleneck acts; None everywhere, which saves the full product.
        context: what `sites.bind` told it.
    """

    k: Any = nnx.data()
    p: Any = nnx.data()
    spread: Any = nnx.data()
    count: int
    table_sum: Any = nnx.data()
    gate: Gate | None = nnx.data(default=None)
    context: Any = nnx.data(default=None)

    def bind(self, **context: Any) -> Bottleneck:
        told = {name: context[name] for name in ("step", "block") if name in context}
        return dataclasses.replace(self, context=(self.context or {}) | told)

    def __call__(self, probs_BCV: jax.Array, embedder: Embedder) -> jax.Array:
        narrow_BCD = self.narrow(probs_BCV, embedder)
        if self.gate is None:
            return narrow_BCD
        batch = probs_BCV.shape[0]
        zero = jnp.zeros(batch, jnp.int32)
        context = {"step": zero, "block": zero} | (self.context or {})
        strength = self.gate.strength(narrow_BCD.shape, "BTD", context)
        full_BCD = SoftEmbed()(probs_BCV, embedder)
        return ((1 - strength) * full_BCD + strength * narrow_BCD).astype(full_BCD.dtype)

    def narrow(self, probs_BCV: jax.Array, embedder: Embedder) -> jax.Array:
        """S [B, C, D] of the kept tokens and the spread rest, in the table's dtype; the sums in float32."""
        table_VD = embedder.table[...]
        extra_BCK, ids_BCK, rest_BC1 = self.split(probs_BCV)
        if self.count * table_VD.shape[1] <= table_VD.shape[0]:  # their rows take less memory than a distribution
            rows_BCKD = table_VD[ids_BCK].astype(jnp.float32)
            kept_BCD = jnp.einsum("bck,bckd->bcd", extra_BCK, rows_BCKD)
        else:
            b, c = jnp.indices(ids_BCK.shape[:2])
            dense_BCV = jnp.zeros(probs_BCV.shape, jnp.float32)
            kept_BCD = _times(dense_BCV.at[b[..., None], c[..., None], ids_BCK].add(extra_BCK), table_VD)
        soft_BCD = kept_BCD + rest_BC1 * self.table_sum[None, None]
        return (soft_BCD * embedder.scale.astype(jnp.float32)).astype(table_VD.dtype)

    def split(self, probs_BCV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Candidates: what each has above the rest [B, C, count], their ids; and u [B, C, 1], what every token has."""
        probs_BCV = probs_BCV.astype(jnp.float32)
        top_BCK, ids_BCK = jax.lax.top_k(probs_BCV, self.count)
        mass_BC1 = jnp.sum(probs_BCV, -1, keepdims=True)
        k, p = (jnp.reshape(limit, (-1, 1, 1)) for limit in (self.k, self.p))  # one number, or one a row
        rank_K = jnp.arange(self.count)[None, None]
        is_kept = ((rank_K < k) & (top_BCK >= p)) | (~self.spread & (rank_K == 0))
        kept_BCK = jnp.where(is_kept, top_BCK, 0.0)
        sum_BC1 = jnp.sum(kept_BCK, -1, keepdims=True)
        others_BC1 = probs_BCV.shape[-1] - jnp.sum(is_kept, -1, keepdims=True)
        rest_BC1 = jnp.where(others_BC1 > 0, jnp.maximum(mass_BC1 - sum_BC1, 0.0) / jnp.maximum(others_BC1, 1), 0.0)
        scaled_BCK = kept_BCK / jnp.where(sum_BC1 > 0, sum_BC1, 1.0) * mass_BC1
        extra_BCK = jnp.where(is_kept, jnp.where(self.spread, top_BCK - rest_BC1, scaled_BCK), 0.0)
        return extra_BCK, ids_BCK, jnp.where(self.spread, rest_BC1, 0.0)


def _times(weights_BCV: jax.Array, table_VD: jax.Array) -> jax.Array:
    """weights . table [B, C, D], float32. A bfloat16 table is not copied: the weights are split in two halves."""
    if table_VD.dtype != jnp.bfloat16:
        return jnp.einsum("bcv,vd->bcd", weights_BCV, table_VD.astype(jnp.float32))
    high_BCV = jax.lax.reduce_precision(weights_BCV, 8, 7)  # XLA may drop a conversion there and back, but not this
    halves = [part.astype(jnp.bfloat16) for part in (high_BCV, weights_BCV - high_BCV)]
    return sum(jnp.einsum("bcv,vd->bcd", half, table_VD, preferred_element_type=jnp.float32) for half in halves)


def token_bottleneck(
    model: Any, k: Any = None, p: Any = None, hard: bool = False, mode: str = "uniform", *, steps: Any = None,
    positions: Any = None, blocks: Any = None, rows: Any = None, count: int | None = None,
    sampler: SamplerConfig | None = None,
) -> Any:  # fmt: skip
    """The model, or bundle, with a token bottleneck between its denoising steps.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> interp.describe(interp.token_bottleneck(model, k=4, steps=slice(2, None)))  # doctest: +ELLIPSIS
    1 edit...

    What this does to accuracy depends on the sampler: run the gentle one beside the default (`methods.md` section 9).
    It takes the place of an earlier bottleneck. The dtype of the sums is float32; in bfloat16 S differs from the
    plain soft embedding by rounding even if all tokens are kept.

    Args:
        k: keep the k most likely tokens, 1 to the size of the vocabulary; [B] for one a row. Give one of k, p and hard.
        p: keep tokens of probability p or more; [B] for one a row. It may be none: the row is then uniform (with
            "renormalize", the most likely token is kept).
        hard: the most likely token alone, with all the mass (k = 0 of one of the studies).
        mode: what becomes of the rest, "uniform" or "renormalize".
        steps, positions, blocks, rows: where it acts, as in `interp.edit`; data. S made by step t is what step
            t + 1 reads. If none is given, the full product with the table is left out of the program.
        count: static upper bound of tokens kept, by default just enough; k, p, hard and mode are data below it, so
            that a ladder over them compiles once with `count` at its largest k, or 1 / p.
        sampler: whose number of steps is the range of `steps`; by default the bundle's.
    """
    transformer = of(model)
    size, canvas = transformer.config.vocab_size, transformer.config.canvas_length
    if (k is not None) + (p is not None) + bool(hard) != 1:
        raise ValueError(f"give one of k, p and hard, got {k=}, {p=}, {hard=}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    count = _count(k, p, count, size)
    windows = (steps, positions, blocks, rows)
    gate = None
    if any(window is not None for window in windows):
        gate = Gate(
            jnp.float32(1), table(steps, num_steps(model, sampler), "steps", more=True), table(blocks, None, "blocks"),
            table(rows, None, "rows"), {"T": table(positions, canvas, "positions")},
        )  # fmt: skip
    new = Bottleneck(
        k=jnp.asarray(1 if hard else size if k is None else k, jnp.int32),
        p=jnp.asarray(0.0 if p is None else p, jnp.float32),
        spread=jnp.asarray(mode == "uniform" and not hard),
        count=count, table_sum=table_sum(transformer), gate=gate,
    )  # fmt: skip
    return rewrapped(model, surgery.soft_embedding(transformer).set(new))


def _count(k: Any, p: Any, count: int | None, size: int) -> int:
    """Rows of the table to look at; checks k and p where they are known."""
    limit = p if k is None else k
    if isinstance(limit, jax.core.Tracer):
        if count is None:
            raise ValueError("k or p is traced, so its largest number of tokens is not known: give count")
        needed = 1
    elif limit is None:
        needed = 1  # hard
    else:
        limits = np.asarray(limit)
        if limits.ndim > 1 or not limits.size:
            raise ValueError(f"k or p must be one number or one a row, got shape {limits.shape}")
        if k is not None and not ((limits == limits.astype(int)) & (limits >= 1) & (limits <= size)).all():
            raise ValueError(f"k must be an integer from 1 to {size}, got {k!r}")
        if k is None and not ((limits > 0) & (limits <= 1)).all():
            raise ValueError(f"p must be in (0, 1], got {p!r}")
        needed = int(limits.max()) if k is not None else kept_at_most(float(limits.min()), size)
    if count is None:
        return needed
    if not needed <= count <= size:
        raise ValueError(f"count must be from {needed} (what k or p can keep) to {size}, got {count}")
    return count


def kept_at_most(p: float, size: int) -> int:
    """How many tokens can have probability p, of a vocabulary of this size."""
    return min(size, math.floor(1 / p + 1e-6))


def table_sum(model: Any) -> Any:
    """[D] float32, the sum of the table's rows; without weights its shape."""
    table_VD = model.embedder.table.get_value()
    if isinstance(table_VD, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(table_VD.shape[1:], jnp.float32)
    return jnp.sum(table_VD, 0, dtype=jnp.float32)
