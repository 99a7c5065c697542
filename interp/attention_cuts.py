"""Attention knock-out: queries that may not attend to some keys, of the prompt or of the canvas.

The score of a cut place falls so low that the softmax leaves it nothing and shares its weight among the others
(Geva et al. 2304.14767, section 3). A query with no key left reads nothing: its pattern is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.cache import slot_positions
from dgemma_jax.nn.functional import of
from interp import rows
from interp.editing import edit, put
from interp.edits import Patch, Replace
from interp.effect_maps import EffectMap
from interp.gates import lookup, table
from interp.metrics import Metric
from interp.sweep_inputs import check_metric

# Above the score of masked places: where every key is cut, the softmax falls on cut ones, and these are set to zero.
_CUT = float(jnp.finfo(jnp.float32).min) / 2


def cut_attention(
    model: Any, queries: Any = None, keys: Any = None, cached: Any = None, *, layers: Any = None, steps: Any = None,
    heads: Any = None, phase: str | None = None, **where: Any,
) -> Any:  # fmt: skip
    """The model, or bundle, in which some queries do not see some keys.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> no_prompt = interp.cut_attention(model, cached=slice(0, None), layers=slice(1, None))
    >>> no_neighbours = interp.cut_attention(model, queries=[2], keys=[0, 1, 3], steps=range(0, 4))

    Args:
        model: a model or a bundle, edited or not.
        queries: canvas positions; of the prompt (absolute positions) if `phase` is "prefill". None for all.
        keys: canvas positions that are not seen. If only one of `keys` and `cached` is given, the other is none.
        cached: absolute positions in the prompt, and in blocks before, that are not seen. Sliding layers hold the
            last `sliding_window - 1` only.
        layers, steps, heads: where; None for all.
        phase: "denoise" (by default), "prefill" or "both".
        **where: further choices of `interp.edit`: blocks, rows, mask, sampler.

    Raises:
        ValueError: no keys are given, or a choice is out of range.
    """
    if keys is None and cached is None:
        raise ValueError("say what is not seen: keys (positions on the canvas), cached (of the prompt), or both")
    chosen = dict(positions=queries, keys=keys, cached=cached, layers=layers, steps=steps, heads=heads, phase=phase)
    model = edit(model, "layers.*.attn_scores", Patch(_CUT), **chosen, **where)
    return edit(model, "layers.*.attn_pattern", Patch(0.0), **chosen, **where)


def attention_knock_out(
    bundle: Any, prompts: Any, metric: Metric, groups: Mapping[str, Mapping[str, Any]] | None = None, *,
    queries: Any = None, layers: Any = None, heads: Any = None, window: int = 1, steps: Any = None, seed: int = 0,
    sampler: SamplerConfig | None = None, rows_at_once: int | None = None, progress: bool | None = None,
    **options: Any,
) -> EffectMap:  # fmt: skip
    """The effect on the metric of a step when canvas positions do not see a group of keys, layer by layer.

    Args:
        bundle, prompts, metric, steps, seed, sampler, rows_at_once, progress, **options: as for `interp.knock_out`.
        groups: the keys that are cut together, by name: {"question": {"cached": range(3, 9)}, "canvas": {"keys":
            slice(0, None)}}. By default every token of the longest prompt by itself, then the whole canvas.
        queries: canvas positions; None for all.
        layers: which; None for all.
        heads: that are cut; None for all.
        window: layers that are cut together, the one named in the middle (the later of two); one layer alone
            seldom matters in a deep model.

    Returns:
        Effects "attention", axes R, L, S (the groups, by number; their names are in `labels["S"]`), B.

    Raises:
        ValueError: no such key, layer or step, or a window below 1.
    """
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an integer >= 1, the number of layers cut together; got {window!r}")
    model, metric, ids = of(bundle), rows.as_data(metric), rows.ids_of(bundle, prompts, options)
    check_metric(metric, "step", len(ids), (model.config.canvas_length, model.config.vocab_size), 0)
    config = model.config
    groups = _each_token(ids, inputs.parts(bundle)[1]) if groups is None else dict(groups)
    cut = _tables(groups, config.canvas_length)
    at = np.flatnonzero(np.asarray(table(layers, config.num_layers, "layers")) > 0)
    if not len(at):
        raise ValueError(f"layers={layers!r} chooses none")
    queries = table(queries, config.canvas_length, "queries") > 0.5
    heads = table(heads, config.num_heads, "heads") > 0.5
    run = rows.run_of(bundle, ids, steps, seed=seed, sampler=sampler, **options)

    def one(step: int, chosen: np.ndarray) -> jax.Array:
        layer, group = np.unravel_index(np.maximum(chosen, 0), (len(at), len(groups)))
        distance = np.arange(config.num_layers) - at[layer][:, None]
        on_IL = (chosen[:, None] >= 0) & (distance >= -(window // 2)) & (distance < window - window // 2)
        places = {name: entries[group] for name, entries in cut.items()}
        return _cut(model, run.at(step), run.sampler, on_IL, places, queries, heads, metric)

    count = len(at) * len(groups)
    at_once = rows.that_fit(model, run, len(run.ids), rows_at_once, metric=metric)
    effects, base = rows.sweep(one, run, count, at_once, "attention knock-out", progress)
    index = {"R": list(run.steps), "L": at.tolist(), "S": list(range(len(groups)))}
    return EffectMap(
        effects={"attention": effects.reshape(len(run.steps), len(at), len(groups), -1)}, axes={"attention": "RLSB"},
        index={"attention": index}, base=base, method=f"attention knock-out (window {window})",
        labels={"S": list(groups)},
    )  # fmt: skip


def _each_token(ids: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Every position of the longest prompt, then the canvas."""
    longest = max(ids, key=len)
    words = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in longest]
    groups: dict[str, dict[str, Any]] = {f"{at} {word}".strip(): {"cached": at} for at, word in enumerate(words)}
    return groups | {"canvas": {"keys": slice(0, None)}}


def _tables(groups: Mapping[str, Mapping[str, Any]], canvas: int) -> dict[str, np.ndarray]:
    """Which keys each group holds: "keys" [groups, C], "cached" [groups, P], of which the last stands for the rest."""
    if not groups:
        raise ValueError("groups is empty; name at least one, such as {'canvas': {'keys': slice(0, None)}}")
    found: dict[str, list[np.ndarray]] = {"keys": [], "cached": []}
    for name, places in groups.items():
        if not isinstance(places, Mapping) or not places or not set(places) <= set(found):
            raise ValueError(f"group {name!r} must be of keys and cached, such as {{'cached': [3, 4]}}; got {places!r}")
        found["keys"].append(np.asarray(table(places.get("keys", False), canvas, "keys")))
        found["cached"].append(np.asarray(table(places.get("cached", False), None, "prompt positions")))
    most = max(map(len, found["cached"]))
    found["cached"] = [np.pad(entries, (0, most - len(entries)), "edge") for entries in found["cached"]]
    return {name: np.stack(entries) for name, entries in found.items()}


@jax.jit
def _cut(model, at, sampler, on_IL, places, queries_C, heads_N, metric) -> jax.Array:
    """The metric [I, B] where intervention i cuts its group of keys in its layers."""
    count = len(on_IL)
    every = rows.repeated(at, count)
    on_BL, keys_BC, cached_BP = (jnp.repeat(x, at.count, 0) for x in (on_IL, places["keys"], places["cached"]))
    edits = {}
    for layer, entry in enumerate(every.cache.layers):
        held_BS = slot_positions(every.cache.length, entry.k.shape[2])
        found_BS = jnp.concatenate([jax.vmap(lookup)(cached_BP, held_BS), keys_BC], 1) > 0.5
        where = (on_BL[:, layer, None] & found_BS)[:, None, None] & queries_C[:, None] & heads_N[:, None, None]
        for site, value in (("attn_scores", _CUT), ("attn_pattern", 0.0)):
            edits[f"layers.{layer}.{site}"] = Replace(_set, (where, value), name=site, phase="denoise")
    model = put(model, edits)
    view = denoise_step(model, every.state, every.cache, sampler, every.pinned)[1]
    return rows.of_step(metric, model, view, count)


def _set(x: jax.Array, where: jax.Array, value: float) -> jax.Array:
    return jnp.where(where, value, x)
