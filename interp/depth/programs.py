"""The model's programs as published depths count them, traced and never run; and the table of their depths.

    causal pass         tokens -> layers -> logits of the last one; autoregressive Gemma
    T denoising steps   noise -> (canvas, S) -> ... -> committed tokens -> cache

arXiv 2606.20560, Table 1, at 262,144 tokens of context: Gemma 4 26B-A4B 21,235; one step between interpretable points
23,571; 48 steps through an opaque S 608,016. Both lie on D(T) = 11,136 + 12,435 T: T steps, then the causal pass that
puts the canvas into the cache. The published code under the table `CIRCUIT`, one canvas of 256 a step: its causal pass
over a canvas has depth 11,118, all of Gemma 21,384, D(T) = 11,171 + 11,641 T. Of the 794 that its step lacks, 721 are
there with two canvases in a step (12,362): the two sorts of a layer are then over 2^12 assignments of tokens to experts
instead of 2^11, 12 each. That the published step was traced so is a guess from the number; `canvases=2` says the same
of ours, whose ratios are then 1.114 and 27.96 (published 1.110 and 28.63; with one canvas 1.050 and 26.37).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import functional
from dgemma_jax.nn.transformer import abstract
from interp.depth.costs import CIRCUIT, Costs
from interp.depth.marks import mark, marked
from interp.depth.results import SerialDepth
from interp.depth.serial import serial_depth
from interp.depth.sorted_experts import with_sorted_experts

# What the model's programs can be cut at, beside any site of `interp.sites`.
READY = {"canvas": "canvas", "S": "soft_embed", "cache": "cache"}
PUBLISHED = {"causal": 21_235, 1: 23_571, 48: 608_016}  # arXiv 2606.20560, Table 1
CLOCK = "clock"
EXPERTS = ("sorted", "dense", "scan", "blocks", "auto")


def causal(model: Any, tokens_BT: jax.Array) -> jax.Array:
    """Logits [B, V] of the last token of one causal pass over the context."""
    empty = kv.empty(model.config, tokens_BT.shape[0], 0, model.dtype)
    out = model.prefill(tokens_BT, jnp.ones(tokens_BT.shape, bool), empty)
    return model.unembed(out.hidden[:, -1:])[:, 0]


def denoised(model: Any, cache: kv.KVCache, keys_B: jax.Array, sampler: SamplerConfig) -> kv.KVCache:
    """The cache after one block: denoising steps from noise, and the causal pass over what they wrote."""
    none_B = jnp.zeros(keys_B.shape, jnp.int32)
    state = sampling.start(keys_B, none_B, none_B > 0, model.config.canvas_length, model)
    cache = mark("cache", cache)

    def step(state: sampling.State) -> sampling.State:
        view = sampling.denoise_step(model, state, cache, sampler)[1]
        # No row stops early. The freezing of rows that are done would else be a path of its own from step to step.
        soft_BCD = view.next_soft.astype(state.soft.dtype)
        # What step it is follows from the program, not from what the model computed.
        clock_B = mark(CLOCK, state.step + 1)
        return state.replace(canvas=view.next_canvas, soft=soft_BCD, argmax=view.argmax, step=clock_B)

    state = jax.lax.while_loop(lambda state: jnp.any(state.step < sampler.max_denoising_steps), step, state)
    tokens_BC = mark("canvas", state.canvas if sampler.commit == "canvas" else state.argmax)
    return mark("cache", functional.prefill(model, tokens_BC, cache=cache).cache)


def answered(model: Any, tokens_BT: jax.Array, keys_B: jax.Array, sampler: SamplerConfig) -> kv.KVCache:
    """`denoised` after a causal pass over the context."""
    cache = functional.prefill(model, tokens_BT, cache_length=tokens_BT.shape[1] + model.config.canvas_length).cache
    return denoised(model, cache, keys_B, sampler)


@dataclasses.dataclass(frozen=True)
class ModelDepth:
    """Depths of a model's programs.

    Attributes:
        causal: of the causal pass over the context.
        steps: of a block of so many denoising steps, by number.
        context: tokens.
        experts: how experts run in the traced program.
        cuts: where the program can be read.
        canvases: denoised in one step.
    """

    causal: SerialDepth
    steps: dict[int, SerialDepth]
    context: int
    experts: str
    cuts: tuple[str, ...]
    canvases: int = 1

    @property
    def line(self) -> tuple[int, int] | None:
        """(a, b) of D(T) = a + b T through the two largest T; None if there is only one."""
        if len(self.steps) < 2:
            return None
        low, high = sorted(self.steps)[-2:]
        slope = round((self.steps[high].depth - self.steps[low].depth) / (high - low))
        return self.steps[high].depth - slope * high, slope

    def rows(self) -> list[dict[str, Any]]:
        """One row a program, as plain values; `ratio` is to the causal pass."""
        named = {f"causal pass over {self.context:,} tokens": self.causal}
        named |= {f"{n} denoising step{'s' * (n > 1)}, then into the cache": d for n, d in sorted(self.steps.items())}
        return [
            {"program": name, "depth": found.depth, "ratio": found.depth / self.causal.depth,
             "from": found.start, "to": found.end}
            for name, found in named.items()
        ]  # fmt: skip

    def __repr__(self) -> str:
        rows = self.rows()
        width = max(len(row["program"]) for row in rows)
        lines = [f"{'program':{width}}  {'depth':>9}  {'ratio':>6}  longest path"]
        lines += [
            f"{r['program']:{width}}  {r['depth']:>9,}  {r['ratio']:>5.2f}x  {r['from']} to {r['to']}" for r in rows
        ]
        if self.line is not None and not set(self.cuts) - {"cache"}:
            lines.append("D(T) = {:,} + {:,} T".format(*self.line))
        cuts = ", ".join(self.cuts) or "nothing"
        many = f"; {self.canvases} canvases a step" if self.canvases > 1 else ""
        return "\n".join([*lines, f"experts {self.experts}; read between: {cuts}; costs {self.causal.costs}{many}"])

    def plot(self) -> Any:
        """Depth against the number of steps, with the causal pass as a line. Returns the figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        steps = sorted(self.steps)
        axes.plot(steps, [self.steps[n].depth for n in steps], "o-", label="denoising steps, then into the cache")
        axes.axhline(self.causal.depth, color="0.4", ls="--", label="causal pass")
        axes.set_xlabel("denoising steps")
        axes.set_ylabel("opaque serial depth, gates")
        axes.legend()
        return figure

    def save(self, path: str | Path) -> Path:
        """Write all depths with their paths as JSON and say where."""
        path = Path(path)
        path.write_text(json.dumps(dataclasses.asdict(self) | {"rows": self.rows()}, indent=1) + "\n", "utf-8")
        return path


def model_depth(
    source: Any, *, context: int | None = None, steps: int | Sequence[int] = (1, 48),
    cuts: str | Sequence[str] = "cache", sampler: SamplerConfig | None = None, experts: str = "sorted",
    costs: Costs = CIRCUIT, canvases: int = 1,
) -> ModelDepth:  # fmt: skip
    """Opaque serial depth of a model's causal pass and of blocks of denoising steps. Needs no weights.

    Args:
        source: a model, a bundle, or a `ModelConfig`.
        context: tokens before the canvas; by default all that the model has room for.
        steps: numbers of denoising steps of a block.
        cuts: "canvas", "S", "cache", or globs of site names. Without "cache" the context's own causal pass is on
            the path.
        sampler: the bundle's by default; steps are counted as if none stopped early.
        experts: "sorted" as the published code runs them, or a form of `dgemma_jax.nn.moe`.
        costs: the table.
        canvases: rows that are denoised together, each with its own cache: more tokens to sort for experts.

    Raises:
        ValueError: a context or a number of steps or canvases that the model cannot have, an unknown form, a cut
            without mark.
    """
    config = source if isinstance(source, ModelConfig) else functional.of(source).config
    sampler = sampler or getattr(source, "sampler", None) or SamplerConfig()
    context = config.max_position_embeddings if context is None else context
    counts = (steps,) if isinstance(steps, int) else tuple(steps)
    if not 1 <= context <= config.max_position_embeddings:
        raise ValueError(f"context must be 1 to {config.max_position_embeddings} tokens, got {context}")
    if not counts or min(counts) < 1:
        raise ValueError(f"steps must be numbers of at least 1, got {steps!r}")
    if canvases < 1:
        raise ValueError(f"canvases must be at least 1, got {canvases}")
    if experts not in EXPERTS:
        raise ValueError(f"experts must be one of {EXPERTS}, got {experts!r}")
    named = (cuts,) if isinstance(cuts, str) else tuple(cuts)
    patterns = tuple(READY.get(cut, cut) for cut in named)
    model = abstract(config) if isinstance(source, ModelConfig) else jax.eval_shape(lambda m: m, functional.of(source))
    model = _prepared(model, experts)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    keys = jax.eval_shape(noise.row_keys, shape(canvases))
    readable, room = "cache" in patterns, (canvases, context)
    given = jax.eval_shape(lambda: kv.empty(config, *room, model.dtype)) if readable else shape(*room)
    program = functools.partial(denoised if readable else answered, sampler=sampler)
    traced = jax.make_jaxpr(program)(model, given, keys)
    depths = {count: serial_depth(traced, cuts=(*patterns, CLOCK), while_bounds=count, costs=costs) for count in counts}
    sites = [pattern for pattern in patterns if pattern not in ("cache", "canvas", "soft_embed")]
    alone = serial_depth(causal, model, shape(1, context), cuts=sites, costs=costs)
    return ModelDepth(alone, depths, context, experts, named, canvases)


def _prepared(model: Any, experts: str) -> Any:
    """The model with its sites marked and its experts in the form asked for."""
    if experts == "sorted":
        return marked(with_sorted_experts(model))
    model = marked(model)
    model.moe = experts  # a copy: the model given stays as it is
    return model
