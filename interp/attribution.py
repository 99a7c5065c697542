"""Attribution patching: an estimate of every patch at once, from gradients.

    plain        (a_donor - a) . dm/da at the recipient: one backward pass for all places
    integrated   the same with the gradient averaged on a path from the recipient to the donor

m is the metric of a step, a an activation of the run that is changed. Plain: Nanda 2023. The path goes through the
inputs (EAP-IG, Hanna et al. 2403.17806) or through the activations themselves, a site at a time. Queries and keys go
through the exact softmax (AtP*, see `interp.softmax_patches`). How good an estimate is differs from model to model and
from site to site: correlate it with `interp.patch_sweep` at places of your own. Where the router comes to choose other
experts the metric jumps, and no gradient sees it. Gradients pass the model in its own dtype; differences, products and
sums are float32.
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
from dgemma_jax.nn.cache import slot_positions
from dgemma_jax.nn.functional import of
from interp.effect_maps import EffectMap
from interp.metrics import Metric
from interp.paired_runs import CARRIERS, Pairs, Side, forward, kept_bytes, minus, padded, path_points, run_pairs
from interp.places import Target, targets
from interp.rows import as_data, measured, that_fit
from interp.softmax_patches import key_effects, query_effects
from interp.sweep_inputs import chosen

PATHS = ("inputs", "sites")
_ATTENTION = ("attn_q", "attn_k", "attn_scores", "attn_pattern")


def attribution_patching(
    bundle: Any, clean: Any, corrupt: Any, metric: Metric, sites: str | Sequence[str], steps: Any = None,
    positions: Any = None, *, prompt_positions: Any = None, over: str | Sequence[str] = ("position",),
    phase: str = "denoise", form: str = "integrated", points: int = 5, path: str = "inputs", softmax: bool = True,
    direction: str = "denoising", seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
    rows_at_once: int | None = None, show_progress: bool | None = None,
) -> EffectMap:  # fmt: skip
    """Estimated effects of the single-step patches that `interp.patch_sweep` makes with the same arguments.

    Each step is taken from the recipient's own run, with the donor's at the same step and under the same seed beside
    it. Integrated over "inputs", the effects of all inputs together ("cache", "canvas_embed" and "soft"; in prefill
    "token_embed" in place of the cache) are the donor's metric - the recipient's. `method` says what share of it they
    miss, on average over steps and pairs: the completeness gap.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> metric = interp.LogitDifference(positions=2, tokens=7, others=8)
    >>> sampler = dg.SamplerConfig(max_denoising_steps=2, early_stop=False)
    >>> found = interp.attribution_patching(model, [5, 6], [5, 9], metric, "layers.*.resid_post", sampler=sampler)
    >>> found["layers.*.resid_post"].shape  # steps, layers, positions, pairs
    (2, 3, 12, 1)

    Args:
        bundle: a bundle or a model, edited or not.
        clean, corrupt: prompts as for `dg.generate`, in pairs of equally many tokens.
        metric: of one step, logits [B, C, V] -> [B], differentiable; see `interp.metrics`.
        sites: patterns as for `interp.at`, and the carriers "soft" (S fed into a step) and "cache" (keys and values of
            the prompt).
        steps: an integer, slice, list or mask; None for those that all runs took.
        positions: on the canvas; None for all.
        prompt_positions: of the prompt, for "cache" and `phase="prefill"`; None for all.
        over: along which axes places lie, beside layers: "position", "head", "expert". What is left out is summed.
        phase: "prefill" attributes to sites of the pass over the prompt: gradients go through its keys and values.
        form: "plain" or "integrated".
        points: of the path; the gradient is taken in the middle of as many equal parts.
        path: "inputs" moves all inputs from recipient to donor: `points` backward passes a step. "sites" moves one
            site of one layer, at all positions: as many for each of them.
        softmax: queries and keys of the canvas take effect through the exact softmax; False: to first order.
        direction: "denoising" puts clean values into the corrupt run, "noising" the other way round.
        seed: one, or one a pair.
        sampler: settings of the runs.
        rows_at_once: pairs times steps of one compiled pass; by default what fits the memory.
        show_progress: a bar; by default on a terminal.

    Raises:
        ValueError: prompts that do not pair, sites or steps that do not exist, a site without gradient.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    path_points(form, points)  # refuses what is wrong, before anything runs
    model, goals = of(bundle), tuple(targets(bundle, sites, phase, over))
    if any(goal.kind == "canvas" for goal in goals):
        raise ValueError("canvas holds tokens, which have no gradient: name canvas_embed, their embeddings")
    pairs = run_pairs(bundle, clean, corrupt, metric, steps, direction, seed, sampler)
    where = [_chosen(goal, model, pairs, positions, prompt_positions) for goal in goals]
    plan = _plan(goals, phase, form, path, points)
    given, options = (pairs.run.sampler, as_data(metric), where, plan), dict(goals=goals, phase=phase, softmax=softmax)
    count = len(pairs.run.steps)
    kept = 0 if rows_at_once else kept_bytes(model, pairs, {*_names(goals), *_inputs(phase)}, phase)
    most = that_fit(model, pairs.run, pairs.count, rows_at_once, kept)
    size = math.ceil(count / math.ceil(count / most))  # chunks of about equal size
    parts = []
    with progress.bar("attribution", count, show_progress, "steps") as done:
        for first in range(0, count, size):
            places = [min(place, count - 1) for place in range(first, first + size)]  # the last repeated: one program
            part = jax.device_get(_estimate(model, *pairs.at(places), *given, pairs=pairs.count, **options))
            parts.append([array[: count - first] for array in part])
            done(min(size, count - first))
    base, of_donor, total, *found = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    words = f", {points} points over {path}" if form == "integrated" else ""
    if form == "plain" or path == "inputs":
        words += f", completeness gap {_gap(total, of_donor - base):.2g}"
    own = [_place(goal, model, on) for goal, on in zip(goals, where, strict=True)]
    effects, index = _joined(goals, own, found, list(pairs.run.steps))
    return EffectMap(
        effects=effects, axes={name: "".join(numbers) + "B" for name, numbers in index.items()}, index=index,
        base=base, donor=of_donor, method=f"attribution ({direction}, {form}{words})",
        labels={"P": _words(pairs, getattr(bundle, "tokenizer", None))},
    )  # fmt: skip


def _words(pairs: Pairs, tokenizer: Any) -> list[str]:
    """The tokens of the first recipient's prompt."""
    return [str(i) if tokenizer is None else tokenizer.token(i) for i in pairs.run.ids[0]]


def _gap(total_RB: np.ndarray, wanted_RB: np.ndarray) -> float:
    """Mean |sum of attributions - difference| as a share of the mean |difference|; 0 where nothing differs."""
    return float(np.abs(total_RB - wanted_RB).mean() / max(np.abs(wanted_RB).mean(), 1e-12))


def _sizes(goal: Target, model: Any) -> dict[str, int]:
    """Heads and experts along the axes where places lie."""
    config = model.config
    heads = config.kv_heads(goal.layers[0]) if goal.layers else 0
    sizes = {"N": config.num_heads, "K": heads, "E": config.num_experts}
    return {letter: sizes[letter] for letter in goal.swept if letter in sizes}


def _chosen(goal: Target, model: Any, pairs: Pairs, positions: Any, prompt_positions: Any) -> np.ndarray:
    """[T] float32, 1 at the chosen positions: of the canvas, or of the padded prompt."""
    if goal.kind in ("prompt", "cache"):
        size, numbers = pairs.tokens.shape[1], chosen(prompt_positions, pairs.length, "prompt positions")
    else:
        size = model.config.canvas_length
        numbers = chosen(positions, size, "positions")
    return np.isin(np.arange(size), numbers).astype(np.float32)


def _place(goal: Target, model: Any, on_T: np.ndarray) -> dict[str, list[int]]:
    """The numbers along each axis of places."""
    numbers = {letter: list(range(n)) for letter, n in _sizes(goal, model).items()}
    numbers |= {"L": list(goal.layers), "T": np.flatnonzero(on_T).tolist()}
    return {shown: numbers[letter] for letter, shown in zip(goal.swept, goal.shown, strict=True)}


def _joined(goals, places, found, steps) -> tuple[dict[str, np.ndarray], dict[str, dict[str, list[int]]]]:
    """Effects and numbers by name: chosen positions, and the layers of one name together."""
    effects, index = {}, {}
    for name in dict.fromkeys(goal.name for goal in goals):
        alike = [i for i, goal in enumerate(goals) if goal.name == name]
        parts = []
        for i in alike:
            axis = goals[i].swept.find("T")
            parts.append(found[i] if axis < 0 else found[i].take(places[i][goals[i].shown[axis]], axis + 1))
        own = {"R": steps} | places[alike[0]]
        if "L" in own:
            layers = [layer for i in alike for layer in places[i]["L"]]
            parts = [np.concatenate(parts, 1)[:, np.argsort(layers)]]
            own["L"] = sorted(layers)
        effects[name], index[name] = parts[0], own
    return effects, index


def _names(goals: Sequence[Target]) -> list[str]:
    """Full names of the sites, and carriers."""
    return [name for goal in goals for name in goal.sites or (goal.name,)]


def _inputs(phase: str) -> tuple[str, ...]:
    """All that the differentiated passes start from."""
    return ("token_embed" if phase == "prefill" else "cache", "canvas_embed", "soft")


def _plan(goals: Sequence[Target], phase: str, form: str, path: str, points: int) -> dict[str, Any]:
    """How many "points" there are; by name [n] "scale", how far it is moved there, "weight", what its gradient counts.

    n is larger than the number of points, so that all forms and numbers of points share a program.
    """
    middle, each = path_points(form, points)
    names, moved = _names(goals), _inputs(phase)
    if form == "plain" or path == "inputs":
        scale, weight = dict.fromkeys(moved, middle), dict.fromkeys([*names, *moved], each)
    else:
        own = dict(zip(names, np.eye(len(names), dtype=np.float32), strict=True))
        scale = {name: np.outer(mask, middle).ravel() for name, mask in own.items()}
        weight = {name: np.outer(mask, each).ravel() for name, mask in own.items()}
    plan = {what: {name: padded(x) for name, x in of.items()} for what, of in (("scale", scale), ("weight", weight))}
    return plan | {"points": np.int32(len(next(iter(weight.values()))))}


@functools.partial(jax.jit, static_argnames=("goals", "phase", "softmax", "pairs"))
def _estimate(model, recipient, donor, sampler, metric, where, plan, *, goals, phase, softmax, pairs):
    """Metric [r, B] of recipient and donor, sum of what the inputs got [r, B], effects [r, ..., B] by target."""
    names, moved = _names(goals), list(plan["scale"])
    exact = {n for n in names if softmax and phase == "denoise" and n.endswith(("attn_q", "attn_k"))}
    through = {name: _beside(name, "attn_pattern") if name in exact else name for name in names}
    listen = sorted({*names, *moved, *(_beside(n, site) for n in exact for site in _ATTENTION)} - set(CARRIERS))
    steps = recipient.tokens.shape[0] // pairs

    def run(adds: dict[str, Any], side: Side, listen: Sequence[str]) -> tuple[jax.Array, Any]:
        logits, seen = forward(model, side, adds, listen, sampler, phase)
        found = measured(metric, logits, steps)
        return found.sum(), (found, seen)

    def effects(gradient: dict[str, Any]) -> dict[str, jax.Array]:
        """By name, [r * B, ...] over the axes of its places."""
        found = {}
        for goal, on_T in zip(goals, where, strict=True):
            for name in goal.sites or (goal.name,):
                if name in exact:
                    product, axes = _through_softmax(name, change[name], gradient[through[name]], here)
                else:
                    product, axes = _product(goal, change[name], gradient[name], recipient)
                found[name] = _summed(product, axes, goal, on_T)
        return found

    # One program for both sides, so that equal runs differ by nothing at all.
    sides = jax.tree.map(lambda *x: jnp.stack(x), recipient, donor)
    (base, of_donor), seen = jax.lax.map(lambda side: run({}, side, listen)[1], sides)
    here, there = (jax.tree.map(lambda x, i=i: x[i], seen) for i in (0, 1))
    change = {name: minus(there[name], here[name]) for name in {*names, *moved}}
    still = {n: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), here[n]) for n in {*through.values(), *moved}}

    def add(point: jax.Array, sums: Any) -> Any:
        scale, weight = ({name: values[point] for name, values in plan[what].items()} for what in ("scale", "weight"))
        shift = {n: jax.tree.map(lambda x, n=n: scale[n] * x, change[n]) for n in moved}
        gradient, _ = jax.grad(run, has_aux=True)(still | shift, recipient, ())
        of_inputs = sum(weight[n] * _by_row(change[n], gradient[n]) for n in moved).reshape(base.shape)
        now = of_inputs, {name: weight[name] * effect for name, effect in effects(gradient).items()}
        return jax.tree.map(jnp.add, sums, now)

    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: (base, effects(still))))
    total, found = jax.lax.fori_loop(0, plan["points"], add, none)
    return base, of_donor, total, *(_by_step(goal, found, steps) for goal in goals)


def _beside(name: str, site: str) -> str:
    """The full name of another site of the same layer."""
    return f"{name.rpartition('.')[0]}.{site}"


def _by_row(change: Any, gradient: Any) -> jax.Array:
    """[r * B] scalar products."""
    products = jax.tree.map(lambda x, g: jnp.sum(x * g, range(1, x.ndim)), change, gradient)
    return sum(jax.tree.leaves(products))


def _through_softmax(name: str, change: jax.Array, gradient: jax.Array, here: dict[str, Any]) -> tuple[jax.Array, str]:
    """Effect of each query or key, and the letters of its axes."""
    if name.endswith("attn_k"):
        return key_effects(change, here[_beside(name, "attn_q")], here[_beside(name, "attn_pattern")], gradient), "BTK"
    cached = here["cache"][int(name.split(".")[1])].k
    keys = jnp.concatenate([cached, here[_beside(name, "attn_k")].swapaxes(1, 2).astype(cached.dtype)], 2)
    return query_effects(change, keys, here[_beside(name, "attn_scores")], gradient), "BTN"


def _product(goal: Target, change: Any, gradient: Any, side: Side) -> tuple[jax.Array, str]:
    """Change times gradient, and the letters of its axes; of the cache by position, not by slot."""
    if goal.kind != "cache":
        return change * gradient, goal.axes
    layers = []
    for x, g in zip(change, gradient, strict=True):
        product_BKS = (x.k * g.k + x.v * g.v).sum(-1)
        product_BKS = product_BKS if "K" in goal.swept else product_BKS.sum(1, keepdims=True)
        slot_BS = slot_positions(side.steps.cache.length, product_BKS.shape[2])
        is_there_BST = slot_BS[..., None] == jnp.arange(side.tokens.shape[1])
        layers.append(jnp.einsum("bks,bst->btk", product_BKS, is_there_BST.astype(jnp.float32)))
    return jnp.stack(layers, 1), "BLTK"


def _summed(product: jax.Array, axes: str, goal: Target, on_T: jax.Array) -> jax.Array:
    """Summed over the axes along which no places lie; over the chosen positions alone."""
    product = product * on_T.reshape([-1 if letter == "T" else 1 for letter in axes])
    return product.sum([i for i, letter in enumerate(axes) if letter not in "B" + goal.swept])


def _by_step(goal: Target, found: dict[str, jax.Array], steps: int) -> jax.Array:
    """[r, ..., B], layers stacked."""
    own = [found[name] for name in goal.sites or (goal.name,)]
    rows = jnp.stack(own, 1) if goal.sites and goal.layers else own[0]
    return jnp.moveaxis(rows.reshape(steps, -1, *rows.shape[1:]), 1, -1)
