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
    """The soft embedding of a few tokens; in place of `SoftEmbed`.

    Attributes:
        k: keeps this many tokens; None if `p` decides. Data.
        p: keeps tokens of at least this probability; None if `k` decides. Data.
        count: rows of the table that are gathered, an upper bound of what is kept; static.
        mode: "uniform" spreads the rest over the other tokens; "renormalize" scales the kept ones up, of which
            there is always one; "hard" takes the most likely token alone. Static.
        table_sum: [D] float32, the sum of all rows of the table.
        gate: where the bottleneck acts; None everywhere, which saves the full product.
        context: what `sites.bind` told it.
    """

    k: Any = nnx.data()
    p: Any = nnx.data()
    count: int
    mode: str
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
        if extra_BCK.size <= table_VD.shape[0]:  # few rows: gather them
            rows_BCKD = table_VD[ids_BCK].astype(jnp.float32)
            kept_BCD = jnp.einsum("bck,bckd->bcd", extra_BCK, rows_BCKD)
        else:  # many: one product with the whole table
            b, c = jnp.indices(ids_BCK.shape[:2])
            dense_BCV = jnp.zeros(probs_BCV.shape, jnp.float32)
            dense_BCV = dense_BCV.at[b[..., None], c[..., None], ids_BCK].add(extra_BCK)
            kept_BCD = jnp.einsum("bcv,vd->bcd", dense_BCV, table_VD.astype(jnp.float32))
        soft_BCD = kept_BCD + rest_BC1 * self.table_sum[None, None]
        return (soft_BCD * embedder.scale.astype(jnp.float32)).astype(table_VD.dtype)

    def split(self, probs_BCV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Candidates: what each has above the rest [B, C, count], their ids; and u [B, C, 1], what every token has."""
        probs_BCV = probs_BCV.astype(jnp.float32)
        top_BCK, ids_BCK = jax.lax.top_k(probs_BCV, self.count)
        mass_BC1 = jnp.sum(probs_BCV, -1, keepdims=True)
        if self.mode == "hard":
            return (mass_BC1 > 0).astype(jnp.float32), ids_BCK, jnp.zeros_like(mass_BC1)
        rank_K = jnp.arange(self.count)[None, None]
        is_kept = rank_K < self.k if self.p is None else top_BCK >= self.p
        if self.mode == "renormalize":
            kept_BCK = jnp.where(is_kept | (rank_K == 0), top_BCK, 0.0)
            sum_BC1 = jnp.sum(kept_BCK, -1, keepdims=True)
            kept_BCK = kept_BCK * jnp.where(sum_BC1 > 0, mass_BC1 / jnp.where(sum_BC1 > 0, sum_BC1, 1.0), 0.0)
            return kept_BCK, ids_BCK, jnp.zeros_like(mass_BC1)
        kept_BCK = jnp.where(is_kept, top_BCK, 0.0)
        others_BC1 = probs_BCV.shape[-1] - jnp.sum(is_kept, -1, keepdims=True)
        rest_BC1 = jnp.maximum(mass_BC1 - jnp.sum(kept_BCK, -1, keepdims=True), 0.0)
        rest_BC1 = jnp.where(others_BC1 > 0, rest_BC1 / jnp.maximum(others_BC1, 1), 0.0)
        return jnp.where(is_kept, top_BCK - rest_BC1, 0.0), ids_BCK, rest_BC1


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
        k: keep the k most likely tokens, 1 to the size of the vocabulary. Give one of k, p and hard.
        p: keep tokens of probability p or more. It may be none: the row is then uniform (with "renormalize", the
            most likely token is kept).
        hard: the most likely token alone, with all the mass (k = 0 of one of the studies).
        mode: what becomes of the rest, "uniform" or "renormalize".
        steps, positions, blocks, rows: where it acts, as in `interp.edit`; data. S made by step t is what step
            t + 1 reads. If none is given, the full product with the table is left out of the program.
        count: static upper bound of tokens kept, by default just enough; k and p are data below it, so a ladder
            over k compiles once with `count` at its largest k.
        sampler: whose number of steps is the range of `steps`; by default the bundle's.
    """
    transformer = of(model)
    size, canvas = transformer.config.vocab_size, transformer.config.canvas_length
    if (k is not None) + (p is not None) + bool(hard) != 1:
        raise ValueError(f"give one of k, p and hard, got {k=}, {p=}, {hard=}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    count = _count(k, p, hard, count, size)
    windows = (steps, positions, blocks, rows)
    gate = None
    if any(window is not None for window in windows):
        gate = Gate(
            jnp.float32(1), table(steps, num_steps(model, sampler), "steps", more=True), table(blocks, None, "blocks"),
            table(rows, None, "rows"), {"T": table(positions, canvas, "positions")},
        )  # fmt: skip
    new = Bottleneck(
        k=None if k is None else jnp.asarray(k, jnp.int32), p=None if p is None else jnp.asarray(p, jnp.float32),
        count=count, mode="hard" if hard else mode, table_sum=table_sum(transformer), gate=gate,
    )  # fmt: skip
    return rewrapped(model, surgery.soft_embedding(transformer).set(new))


def _count(k: Any, p: Any, hard: bool, count: int | None, size: int) -> int:
    """Rows to gather; checks k and p where they are known."""
    needed = 1
    if k is not None and not isinstance(k, jax.core.Tracer):
        needed = int(k)
        if needed != k or not 1 <= needed <= size:
            raise ValueError(f"k must be an integer from 1 to {size}, got {k!r}")
    elif p is not None and not isinstance(p, jax.core.Tracer):
        if not 0 < p <= 1:
            raise ValueError(f"p must be in (0, 1], got {p!r}")
        needed = min(size, math.floor(1 / float(p) + 1e-6))  # that many tokens can have probability p
    elif not hard and count is None:
        raise ValueError("k or p is traced, so its largest number of tokens is not known: give count")
    if count is None:
        return needed
    if not needed <= count <= size or hard:
        raise ValueError(
            f"count must be from {needed} (what k or p can keep) to {size}, and none with hard; got {count}"
        )
    return count


def table_sum(model: Any) -> Any:
    """[D] float32, the sum of the table's rows; without weights its shape."""
    table_VD = model.embedder.table.get_value()
    if isinstance(table_VD, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(table_VD.shape[1:], jnp.float32)
    return jnp.sum(table_VD, 0, dtype=jnp.float32)
