"""Knock-outs: what the metric of a step loses when one head, expert, MLP or layer is taken out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from interp import rows
from interp.components import Series, components, kinds
from interp.editing import put
from interp.edits import Edit, Replace
from interp.effect_maps import EffectMap
from interp.metrics import Metric
from interp.routing import Reroute
from interp.sweep_inputs import check_metric
from interp.taps import tapped

KINDS = ("heads", "experts", "attention", "mlp", "moe", "layers")
HOW = ("zero", "mean", "resample", "reroute")
# Where an expert is best reached; nothing of all experts' outputs is needed there.
_SITES = {("experts", "zero"): ("router_weights",), ("experts", "reroute"): ("router_logits",)}


def knock_out(
    bundle: Any, prompts: Any, metric: Metric, what: str | Sequence[str] = "heads", how: str = "zero",
    steps: Any = None, *, layers: Any = None, positions: Any = None, each_position: bool = False,
    reference: Any = None, seed: int = 0, sampler: SamplerConfig | None = None, rows_at_once: int | None = None,
    progress: bool | None = None, **options: Any,
) -> EffectMap:  # fmt: skip
    """The effect of every single knock-out on a metric of the step in which it is made.

    Each step starts from the run's own state there; one component is out for this step, in the canvas pass. Components
    back each other up in trained models: little effect of one is no proof that a set of them has little. To knock out
    a set, or for a whole run, use `interp.edit(bundle, "layers.3.attn_z", interp.Zero(), heads=[0, 2])`.

    Args:
        bundle: a bundle or a model, edited or not.
        prompts: as for `dg.generate`, B of them.
        metric: a function logits [B, C, V] -> [B], see `interp.metrics`.
        what: "heads" (`attn_z`), "experts", "attention" (`attn_out`), "mlp" (`mlp_out`), "moe" (`moe_out`), "layers"
            (the last three; the residual stream then passes by), or several of them.
        how: what stands in the component's place. "zero"; "mean", over prompts and canvas positions of the same step;
            "resample", the component's output in another prompt; "reroute", for experts: the router may not choose
            the expert and takes its next choice. Zero takes an expert's weight and leaves those of the others.
        steps: an integer, slice, list or mask; None for all that every prompt took.
        layers: which; None for all. Another choice is another program.
        positions: canvas positions at which the component is out; None for all.
        each_position: components are out at one position at a time; adds an axis T.
        reference: prompts for "mean" and "resample"; by default those studied, of which "resample" takes another one.
        seed: of the runs; also draws the donors of "resample".
        rows_at_once: rows of a compiled step; by default what fits the free memory.
        progress: a bar; None shows it in a terminal or notebook.
        **options: further ones of `dg.generate` (canvas, pinned, soft, thinking).

    Returns:
        Effects by the names in `what`, axes R, L, (T,) (N or E,) B. All of them are one program.

    Raises:
        ValueError: no such kind, way, step, layer or position; one prompt alone to be resampled.
    """
    _check(what, how)
    model, metric, ids = of(bundle), rows.as_data(metric), rows.ids_of(bundle, prompts, options)
    if how == "resample" and reference is None and len(ids) < 2:
        raise ValueError("how='resample' takes the activations of another prompt; give two prompts, or a reference")
    check_metric(metric, "step", len(ids), (model.config.canvas_length, model.config.vocab_size), 0)
    parts = tuple(
        components(model, kind, sites=_SITES.get((kind, how)), layers=layers, positions=positions,
                   each_position=each_position)
        for kind in kinds(what)
    )  # fmt: skip
    run = rows.run_of(bundle, ids, steps, seed=seed, sampler=sampler, **options)
    own = None
    if reference is not None and how in ("mean", "resample"):
        own = rows.run_of(bundle, reference, list(run.steps), seed=seed, sampler=sampler, **options)
    found, base = _swept(model, run, own, Series(parts), how, seed, metric, rows_at_once, progress)
    return EffectMap(
        effects=Series(parts).split(found), base=base, axes={part.what: f"R{part.axes}B" for part in parts},
        index={part.what: {"R": list(run.steps), **part.index} for part in parts}, method=f"knock-out ({how})",
    )  # fmt: skip


def _check(what: str | Sequence[str], how: str) -> None:
    unknown = [kind for kind in kinds(what) if kind not in KINDS]
    if unknown or not kinds(what):
        raise ValueError(f"what must be of {', '.join(KINDS)}, got {what!r}")
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, got {how!r}")
    if how == "reroute" and kinds(what) != ["experts"]:
        raise ValueError(f"how='reroute' is for what='experts', got {what!r}; zero, mean and resample are for all")


def _swept(
    model: Any, run: rows.Run, reference: rows.Run | None, parts: Series, how: str, seed: int, metric: Metric,
    rows_at_once: int | None, progress: bool | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Effects [R, components, B] and the metric without knock-out [R, B]."""
    source = run if reference is None else reference
    donors = _donors(run, reference, seed) if how == "resample" else None
    values: dict[int, Any] = {}

    def one(step: int, chosen: np.ndarray) -> jax.Array:
        if how in ("mean", "resample") and step not in values:
            values.clear()
            values[step] = _values(model, source.at(step), run.sampler, parts, donors)
        masks = parts.masks(chosen, model.config)
        return _knocked(model, run.at(step), run.sampler, values.get(step), masks, metric, reroute=how == "reroute")

    at_once = rows.that_fit(model, run, len(run.ids), rows_at_once, metric=metric)
    return rows.sweep(one, run, parts.count, at_once, f"knock-out ({how})", progress)


def _donors(run: rows.Run, reference: rows.Run | None, seed: int) -> np.ndarray:
    """Which prompt gives its activations to each: one of the reference, or another of their own."""
    rng, count = np.random.default_rng(seed), len(run.ids)
    if reference is not None:
        return rng.integers(0, len(reference.ids), count)
    return (np.arange(count) + rng.integers(1, count)) % count


def _values(model: Any, at: rows.Rows, sampler: SamplerConfig, parts: Series, donors: np.ndarray | None) -> Any:
    """What stands in the components' place at one step: means [1, 1, ...] or the donors' outputs [B, C, ...]."""
    seen = _seen(tapped(model, list(parts.sites))[0], at, sampler, donors is None)
    return seen if donors is None else jax.tree.map(lambda x: x[donors], seen)


@functools.partial(jax.jit, static_argnames="mean")
def _seen(model: Any, at: rows.Rows, sampler: SamplerConfig, mean: bool) -> dict[str, jax.Array]:
    seen = denoise_step(model, at.state, at.cache, sampler, at.pinned)[1].sites
    if not mean:
        return seen
    return {n: jnp.mean(x.astype(jnp.float32), (0, 1), keepdims=True).astype(x.dtype) for n, x in seen.items()}


@functools.partial(jax.jit, static_argnames="reroute")
def _knocked(model, at, sampler, values, masks, metric, reroute) -> jax.Array:
    """The metric [I, B] with component i out in the rows of intervention i."""
    count = len(next(iter(masks.values())))

    def edit(name: str) -> Edit:
        site = name.split(".")[-1]
        where = jnp.repeat(masks[name], at.count, 0)
        if reroute:
            return Reroute(where.astype(jnp.float32), top=model.config.experts_per_token, name=site, axes="BTE")
        value = jnp.zeros((1,) * where.ndim, jnp.float32) if values is None else values[name]
        value = value if len(value) == 1 else rows.repeated(value, count)
        return Replace(_instead, (where, value), name=site, phase="denoise")

    edited = put(model, {name: edit(name) for name in masks})
    every = rows.repeated(at, count)
    view = denoise_step(edited, every.state, every.cache, sampler, every.pinned)[1]
    return rows.of_step(metric, edited, view, count)


def _instead(x: jax.Array, where: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(where, value.astype(x.dtype), x)
