"""Attribution patching of edges: how much of a sender's change takes effect through one receiver.

    score(s -> r) = (c_donor - c)_s . dm/d(input of r), summed over positions and width; EAP, Syed et al. 2310.10348

The residual stream is a sum of what its senders wrote, so c_s, what s adds to the stream, reaches every later receiver.
In this model attention, the dense MLP and the experts pass norms before they are added: c_s is what is left behind
them, at the denominators of its own run. The gradient at a receiver's input is the gradient at what it computes, pulled
back through the receiver alone; integrated, it is averaged on a path over the inputs (EAP-IG, Hanna et al. 2403.17806).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.nn import sites
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import is_open
from interp.edge_maps import EdgeMap
from interp.metrics import Metric
from interp.paired_runs import Side, forward, kept_bytes, minus, padded, path_points, run_pairs
from interp.rows import as_data, measured, that_fit
from interp.sweep_inputs import chosen

_INPUTS = ("cache", "canvas_embed", "soft")
_READ = ("attn_q", "attn_k", "attn_v", "mlp", "router", "experts")
_FELT = ("attn_q", "attn_k", "attn_v", "mlp_out", "moe_out")
_WRITTEN = ("attn_z", "mlp_out", "moe_out", *(f"post_{n}_norm_scale" for n in ("attn", "mlp", "moe", "ffw")))


def edge_attribution_patching(
    bundle: Any, clean: Any, corrupt: Any, metric: Metric, steps: Any = None, positions: Any = None, *,
    heads: bool = False, form: str = "integrated", points: int = 5, direction: str = "denoising",
    seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None, rows_at_once: int | None = None,
    show_progress: bool | None = None,
) -> EdgeMap:  # fmt: skip
    """Estimated effects of the edges of a denoising step.

    Senders are the embedded canvas, the self-conditioning signal, and of each layer attention (or its heads), MLP and
    experts; and the cached prompt, which reaches keys and values alone. Receivers are of each layer the inputs of
    queries, keys, values, MLP, router and experts; and the logits.

    Args:
        bundle, clean, corrupt, metric, steps, direction, seed, sampler: as for `interp.attribution_patching`.
        positions: on the canvas, over which scores are summed; None for all.
        heads: every attention head is a sender of its own.
        form, points: "plain", or "integrated" over the inputs.
        rows_at_once: pairs times steps of one compiled pass; by default what fits the memory.
        show_progress: a bar; by default on a terminal.

    Raises:
        ValueError: prompts that do not pair, steps that were not taken, an unknown form.
    """
    alphas, _ = path_points(form, points)
    model = of(bundle)
    canvas = model.config.canvas_length
    chosen_T = np.isin(np.arange(canvas), chosen(positions, canvas, "positions")).astype(np.float32)
    pairs = run_pairs(bundle, clean, corrupt, metric, steps, direction, seed, sampler)
    senders, receivers = _senders(model, heads), _receivers(model)
    count = len(pairs.run.steps)
    stacks = 4 * canvas * model.config.embed_dim * (2 * len(senders) + len(_READ))
    kept = 0 if rows_at_once else kept_bytes(model, pairs, _INPUTS, "denoise") + stacks
    most = that_fit(model, pairs.run, pairs.count, rows_at_once, kept)
    size = math.ceil(count / math.ceil(count / most))
    given = (pairs.run.sampler, as_data(metric), chosen_T, padded(alphas), np.int32(len(alphas)))
    parts = []
    with progress.bar("edges", count, show_progress, "steps") as done:
        for first in range(0, count, size):
            places = [min(place, count - 1) for place in range(first, first + size)]  # the last repeated: one program
            part = jax.device_get(_estimate(model, *pairs.at(places), *given, heads=heads, pairs=pairs.count))
            parts.append([array[: count - first] for array in part])
            done(min(size, count - first))
    base, of_donor, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return EdgeMap(
        scores=scores, senders=tuple(senders), receivers=tuple(receivers), steps=list(pairs.run.steps), base=base,
        donor=of_donor, method=f"edges ({direction}, {form}{f', {points} points' if form != 'plain' else ''})",
    )  # fmt: skip


def _senders(model: Any, heads: bool) -> dict[str, tuple[int, int]]:
    """By name: the layer, and when within a step it writes. Order is that of the computation."""
    found = {"canvas_embed": (0, -1), "self_conditioning": (0, -1)}
    for i in range(model.config.num_layers):
        names = [f"attn_z.{n}" for n in range(model.config.num_heads)] if heads else ["attn_out"]
        found |= {f"layers.{i}.{name}": (i, 4 * i + 1) for name in names}
        found |= {f"layers.{i}.{name}": (i, 4 * i + 3) for name in ("mlp_out", "moe_out")}
    return found | {"cache": (0, -1)}


def _receivers(model: Any) -> dict[str, tuple[int, int]]:
    """By name: the layer, and when within a step it reads."""
    found = {}
    for i in range(model.config.num_layers):
        found |= {f"layers.{i}.{name}": (i, 4 * i + (0 if name.startswith("attn") else 2)) for name in _READ}
    return found | {"logits": (model.config.num_layers, 4 * model.config.num_layers)}


@functools.partial(jax.jit, static_argnames=("heads", "pairs"))
def _estimate(model, recipient, donor, sampler, metric, chosen_T, alphas, points, *, heads, pairs):
    """Metric [r, B] of the recipient and of the donor; scores [r, senders, receivers, B]."""
    layers = range(model.config.num_layers)
    felt = [f"layers.{i}.{name}" for i in layers for name in _FELT] + [f"layers.{layers[-1]}.resid_post"]
    read = [f"layers.{i}.{name}" for i in layers for name in ("resid_pre", "resid_mid")]
    written = [f"layers.{i}.{name}" for i in layers for name in _WRITTEN]
    written += ["canvas_embed", "self_conditioning", "input_embed_norm_scale"]
    steps = recipient.tokens.shape[0] // pairs

    def run(adds: dict[str, Any], side: Side, listen: Sequence[str]) -> tuple[jax.Array, Any]:
        logits, seen = forward(model, side, adds, listen, sampler, "denoise")
        found = measured(metric, logits, steps)
        return found.sum(), (found, seen)

    # One program for both sides, so that equal runs differ by nothing at all.
    sides = jax.tree.map(lambda *x: jnp.stack(x), recipient, donor)
    (base, of_donor), seen = jax.lax.map(lambda side: run({}, side, sorted({*written, *felt}))[1], sides)
    here, there = (jax.tree.map(lambda x, i=i: x[i], seen) for i in (0, 1))
    still = {name: jnp.zeros(here[name].shape, jnp.float32) for name in felt}
    moves = minus({name: there[name] for name in _INPUTS}, {name: here[name] for name in _INPUTS})
    change_SBTD = _writings(model, there, heads) - _writings(model, here, heads)
    change_SBTD = change_SBTD * chosen_T[:, None]
    bound = _bound(model, recipient)

    def add(point: jax.Array, sums: jax.Array) -> jax.Array:
        shift = jax.tree.map(lambda x: alphas[point] * x, moves)
        gradient, (_, seen) = jax.grad(run, has_aux=True)(still | shift, recipient, read)
        columns = []
        for i in layers:
            own = jnp.stack(_pulled_back(bound, i, seen, gradient, recipient))
            columns.append(jnp.einsum("sbtd,rbtd->srb", change_SBTD, own))
        last = gradient[felt[-1]][None]
        columns.append(jnp.einsum("sbtd,rbtd->srb", change_SBTD, last))
        scores = jnp.concatenate(columns, 1)
        prompt = _of_cache(moves["cache"], gradient["cache"], scores.shape[1])[None]
        return sums + jnp.concatenate([scores, prompt]) / points

    shape = (len(_senders(model, heads)), len(_receivers(model)), recipient.tokens.shape[0])
    scores = jax.lax.fori_loop(0, points, add, jnp.zeros(shape, jnp.float32))
    scores = scores * _reach(model, heads)[..., None]
    return base, of_donor, jnp.moveaxis(scores.reshape(*shape[:2], steps, -1), 2, 0)


def _writings(model: Any, seen: dict[str, jax.Array], heads: bool) -> jax.Array:
    """[S, B, T, D] float32: what each sender but the cache adds to the residual stream, in the units of its layer."""

    def normed(x: jax.Array, norm: Any, scale: jax.Array) -> jax.Array:
        weight = 1.0 if norm.weight is None else norm.weight[...].astype(jnp.float32)
        return x.astype(jnp.float32) / scale * weight

    first = seen["input_embed_norm_scale"]
    names = ("canvas_embed", "self_conditioning")
    found = [normed(seen[name], model.self_conditioning.post_norm, first) for name in names]
    for i, layer in enumerate(model.layers):
        own = {name: seen[f"layers.{i}.{name}"] for name in _WRITTEN}
        rule = "btnh,dnh->nbtd" if heads else "btnh,dnh->btd"
        z = jnp.einsum(rule, own["attn_z"], layer.attention.o[...])
        z = normed(z, layer.post_attn_norm, own["post_attn_norm_scale"])
        found += list(z) if heads else [z]
        for name, norm in (("mlp", layer.post_mlp_norm), ("moe", layer.post_moe_norm)):
            out = normed(own[f"{name}_out"], norm, own[f"post_{name}_norm_scale"])
            found.append(normed(out, layer.post_ffw_norm, own["post_ffw_norm_scale"]))
    return jnp.stack(found)


def _bound(model: Any, side: Side) -> Any:
    """The model told where it stands, for edits that it may hold."""
    state, length = side.steps.state, side.steps.cache.length
    return sites.bind(
        model, phase="denoise", step=state.step, block=state.block, keys=state.keys, length=length,
        canvas=state.canvas, soft=state.soft, embedder=model.embedder,
    )  # fmt: skip


def _pulled_back(model: Any, i: int, seen: dict, gradient: dict, side: Side) -> list[jax.Array]:
    """[B, T, D] gradients at the inputs of a layer's receivers, in the order of `_READ`, float32."""
    layer = model.layers[i]
    before, middle = seen[f"layers.{i}.resid_pre"], seen[f"layers.{i}.resid_mid"]
    felt = {name: gradient[f"layers.{i}.{name}"] for name in _FELT}
    positions = side.steps.cache.length[:, None] + jnp.arange(before.shape[1])
    form = "dense" if is_open(layer.router.weights) else model.moe

    out, project = jax.vjp(lambda x: layer.attention.project(layer.input_norm(x), positions), before)
    none = [jnp.zeros_like(x) for x in out]
    found = []
    for place, name in enumerate(("attn_q", "attn_k", "attn_v")):
        cotangent = [felt[name].astype(x.dtype) if j == place else x for j, x in enumerate(none)]
        found.append(project(tuple(cotangent))[0])
    out, dense = jax.vjp(lambda x: layer.mlp_out(layer.mlp(layer.pre_mlp_norm(x))), middle)
    found.append(dense(felt["mlp_out"].astype(out.dtype))[0])

    def experts(routed: jax.Array, x: jax.Array) -> jax.Array:
        return layer.moe_out(layer.experts(layer.pre_moe_norm(x), layer.router(routed), form))

    out, mixed = jax.vjp(experts, middle, middle)
    return [x.astype(jnp.float32) for x in [*found, *mixed(felt["moe_out"].astype(out.dtype))]]


def _of_cache(change: list, gradient: list, receivers: int) -> jax.Array:
    """[receivers, B] scores of the cached prompt: into the keys and the values of each layer."""
    none = jnp.zeros(change[0].k.shape[0], jnp.float32)
    found = []
    for x, g in zip(change, gradient, strict=True):
        keys, values = (jnp.sum(a * b, (1, 2, 3)) for a, b in ((x.k, g.k), (x.v, g.v)))
        found += [{"attn_k": keys, "attn_v": values}.get(name, none) for name in _READ]
    return jnp.stack([*found, none])[:receivers]


def _reach(model: Any, heads: bool) -> jax.Array:
    """[senders, receivers] by how much the stream is scaled on the way; 0 where the receiver reads too early."""
    scalars = jnp.stack([layer.denoise_scalar[...].astype(jnp.float32)[0] for layer in model.layers])
    grown = [jnp.concatenate([jnp.zeros(i), jnp.ones(1), jnp.cumprod(scalars[i:])]) for i in range(len(model.layers))]
    rows = []
    for name, (layer, written) in _senders(model, heads).items():
        columns = _receivers(model).values()
        own = [1.0 if name == "cache" else grown[layer][to] * (read > written) for to, read in columns]
        rows.append(jnp.stack([jnp.asarray(x, jnp.float32) for x in own]))
    return jnp.stack(rows)
