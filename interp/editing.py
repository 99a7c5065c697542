"""Put edits into a model, and take them out again.

The model given is never touched: weights are shared, not copied. Which sites are edited, by what class, is structure
(one compile); where the edits act and which values they use is data (no compile).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.nn.embedder import SoftEmbed
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site, SiteInfo, is_open
from interp import surgery
from interp.edits import Chain, Edit
from interp.gates import Gate, table

PHASES = ("denoise", "prefill", "both")
_HEADS = ("N", "K")


def edit(
    model: Any, pattern: str, edit: Edit, *, steps: Any = None, blocks: Any = None, layers: Any = None,
    positions: Any = None, rows: Any = None, heads: Any = None, experts: Any = None, units: Any = None,
    keys: Any = None, cached: Any = None, mask: Any = None, phase: str | None = None,
    per_layer: bool | None = None, per_step: bool = False, sampler: SamplerConfig | None = None,
) -> Any:  # fmt: skip
    """The model, or bundle, with an edit at every site that matches. The one given stays as it is.

    >>> import dgemma_jax as dg, interp, jax.numpy as jnp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> edited = interp.edit(model, "layers.*.resid_post", interp.Add(jnp.ones(32)), steps=[0, 3])
    >>> interp.describe(edited)  # doctest: +ELLIPSIS
    1 edit...

    What is chosen may be an integer, a slice, a list, a mask or strengths, see `interp.gates`. All of it is data:
    another choice, and other values of the same shape, share the compiled program. An edit put where one is already
    acts after it.

    Args:
        model: a model or a bundle, edited or not, with or without weights.
        pattern: of full site names, as for `interp.at`.
        edit: `Patch`, `Add`, `Scale`, `ProjectOut`, `Replace`, `Zero`, `Mean`, `Resample`, `Renoise`, or your own.
            Its values broadcast against the site. With an axis more, its first axis goes over the matched sites in
            the order of `interp.sites`; a mapping by full name gives each site its own.
        steps, blocks: denoising steps, and blocks, in which it acts.
        layers: layers in which it acts, of those that match.
        positions: on the canvas; of the prompt (absolute positions) if `phase` is "prefill".
        rows: of the batch.
        heads, experts: where the site has them. Keys and values have key heads.
        units: along the site's last axis.
        keys, cached: for attention scores and patterns: key slots, by position on the canvas and by absolute
            position among the cached tokens. If only one is given, the other is none.
        mask: [B, T, ...], broadcasts against the site, with an axis of layers in front if it has one axis more:
            any further choice or strength.
        phase: "denoise" (canvas passes), "prefill" (the prompt and committed blocks), "both". By default the
            passes of denoising, and prefill at `token_embed`, which has no other.
        per_layer: the values have a first axis over the matched sites, where their rank leaves it open.
        per_step: the values have an axis of steps next (first if there is none of layers).
        sampler: whose number of steps is the range of `steps`; by default the bundle's.

    Raises:
        ValueError: no such site, a choice out of range, values that do not fit, a function that changes the shape.
    """
    transformer = of(model)
    if not isinstance(edit, Edit):
        raise ValueError(f"edit must be an edit such as interp.Patch(value), got {type(edit).__name__}")
    infos = list(surgery.sites(transformer).matching(pattern))
    if (allowed := edit.ONLY_AT) is not None and any(_own(info.name) not in allowed for info in infos):
        raise ValueError(f"{type(edit).__name__} acts at {', '.join(allowed)}, not at {pattern!r}")
    chosen = dict(
        steps=table(steps, num_steps(model, sampler), "steps", more=True), blocks=table(blocks, None, "blocks"),
        layers=_layers(layers, transformer.config.num_layers, infos), rows=table(rows, None, "rows"),
        positions=positions, heads=heads, experts=experts, units=units, keys=keys, cached=cached,
    )  # fmt: skip
    placed, checked = {}, set()
    values = _split(edit, infos, per_layer, per_step)
    masks = _split_mask(mask, infos, per_layer)
    for info, own_values, own_mask in zip(infos, values, masks, strict=True):
        own_phase = _phase(phase, info, chosen)
        gate = _gate(info, own_phase, chosen, own_mask, transformer.config.canvas_length)
        new = dataclasses.replace(
            edit, name=_own(info.name), axes=info.axes.replace("C", "T"), phase=own_phase, stepped=per_step,
            gate=gate, **own_values,
        )  # fmt: skip
        kind = (_own(info.name), info.shape, *(v.shape for v in own_values.values()))
        if kind not in checked:
            _check(new, info, transformer)
        checked.add(kind)
        placed[info.name] = new
    return rewrapped(model, put(transformer, placed))


def put(model: Any, placed: Mapping[str, Site]) -> Any:
    """The model with more at sites, by full name; after what is there already."""
    found = surgery.every(model)
    changes = {
        path: _after(site, placed[name])
        for path, site in found.get_by_path().items()
        if (name := surgery.full_name(path, site)) in placed
    }
    return found.where(lambda path, _: path in changes, with_keypath=True).set_by_path(changes)


def _after(old: Site, new: Site) -> Site:
    if not is_open(old):
        return new
    return Chain(old.name, [*(old.edits if isinstance(old, Chain) else [old]), new])


def rewrapped(original: Any, model: Any) -> Any:
    """The model in a bundle if the original was one."""
    return original.with_model(model) if hasattr(original, "with_model") else model


def _own(name: str) -> str:
    """The name of a site without its layer."""
    return name.split(".")[-1]


def num_steps(model: Any, sampler: SamplerConfig | None) -> int:
    """The range of steps: of this sampler, or the bundle's, or the default one."""
    return (sampler or getattr(model, "sampler", None) or SamplerConfig()).max_denoising_steps


def _layers(spec: Any, count: int, infos: list[SiteInfo]) -> jax.Array:
    if spec is not None and not all(info.name.startswith("layers.") for info in infos):
        raise ValueError(f"layers is given, but {infos[0].name!r} is not in a layer")
    entries = table(spec, count, "layers")
    matched = sorted({int(info.name.split(".")[1]) for info in infos if info.name.startswith("layers.")})
    if spec is not None and not isinstance(entries, jax.core.Tracer):
        beside = sorted(set(np.flatnonzero(entries)) - set(matched))
        if beside and len(matched) < count and not isinstance(spec, slice):
            raise ValueError(f"layers has {int(beside[0])}; the pattern matches layers {matched}")
    return entries


def _phase(phase: str | None, info: SiteInfo, chosen: Mapping[str, Any]) -> str:
    if phase not in (None, *PHASES):
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    only = "prefill" if info.name == "token_embed" else "denoise" if "C" in info.axes else None
    if phase is None:
        phase = only or "denoise"
    if only and phase not in (only, "both"):
        raise ValueError(f"{info.name} exists in {only} only; phase is {phase!r}")
    if phase == "both" and not only and chosen["positions"] is not None:
        raise ValueError(
            "positions mean the canvas in one pass and the prompt in the other: edit one phase after the other"
        )
    return only or phase


def _gate(info: SiteInfo, phase: str, chosen: Mapping[str, Any], mask: Any, canvas: int) -> Gate:
    letters = info.axes.replace("C", "T")
    layer = int(info.name.split(".")[1]) if info.name.startswith("layers.") else None
    on = jnp.float32(1) if layer is None else chosen["layers"][layer]
    is_off = not isinstance(on, jax.core.Tracer) and float(on) == 0  # its own tables do not count then
    axes: dict[str, jax.Array] = {}
    if phase == "prefill":
        axes["T"] = table(chosen["positions"], None, "prompt positions")
    elif phase == "denoise":
        axes["T"] = table(chosen["positions"], canvas, "positions")
    for what, possible in (("heads", _HEADS), ("experts", ("E",)), ("units", tuple(letters[-1:]))):
        letter = next((a for a in letters if a in possible), None)
        spec = chosen[what]
        if spec is None and (what == "units" or letter is None):
            continue
        if letter is None or (what == "units" and letter in "TS1"):
            raise ValueError(f"{info.name} has axes {info.axes}: no {what} to choose from")
        if letter in axes:
            raise ValueError(f"the last axis of {info.name} is of experts: choose by experts, not by units")
        axes[letter] = table(False if is_off else spec, info.shape[info.axes.index(letter)], what)
    return Gate(on, chosen["steps"], chosen["blocks"], chosen["rows"], axes, _keys(info, phase, chosen, canvas), mask)


def _keys(info: SiteInfo, phase: str, chosen: Mapping[str, Any], canvas: int) -> dict[str, jax.Array] | None:
    keys, cached = chosen["keys"], chosen["cached"]
    if keys is None and cached is None:
        return None
    if not info.axes.endswith("S"):
        raise ValueError(f"{info.name} has axes {info.axes}: no keys to choose from")
    if keys is not None and phase != "denoise":
        raise ValueError("keys are positions on the canvas, which prefill does not have; give cached")
    return {
        "canvas": table(False if keys is None else keys, canvas, "keys"),
        "cached": table(False if cached is None else cached, None, "prompt positions"),
    }


def _dtype(info: SiteInfo) -> Any:
    return jnp.dtype(info.dtype)


def _split(edit: Edit, infos: list[SiteInfo], per_layer: bool | None, per_step: bool) -> list[dict[str, jax.Array]]:
    """The values of the edit for each matched site."""
    split: list[dict[str, jax.Array]] = [{} for _ in infos]
    given = {name: rank for name, rank in edit.VALUES.items() if getattr(edit, name) is not None}
    if not given and (per_layer or per_step):
        raise ValueError(f"{type(edit).__name__} has no values, hence none per layer or per step")
    for name, rank in given.items():
        value = getattr(edit, name)
        if isinstance(value, Mapping):
            missing = [info.name for info in infos if info.name not in value]
            if missing:
                raise ValueError(f"{name} has nothing for {missing[0]}; it has {', '.join(list(value)[:6])}")
            per_site = [value[info.name] for info in infos]
        else:
            value = value if isinstance(value, jax.Array) else np.asarray(value)
            full = (len(infos[0].axes) if rank is None else rank) + per_step
            layered = value.ndim > full if per_layer is None else per_layer
            if layered and len(value) != len(infos):
                raise ValueError(
                    f"{name} has shape {value.shape}: a first axis over the {len(infos)} sites that match is needed "
                    f"({infos[0].name} has axes {infos[0].axes})"
                )
            per_site = list(value) if layered else [value] * len(infos)
        for own, part, info in zip(split, per_site, infos, strict=True):
            own[name] = jnp.asarray(part, _dtype(info) if rank is None else jnp.float32)
    return split


def _split_mask(mask: Any, infos: list[SiteInfo], per_layer: bool | None) -> list[jax.Array | None]:
    if mask is None:
        return [None] * len(infos)
    mask = jnp.asarray(mask, jnp.float32)
    if not mask.ndim > len(infos[0].axes) and not (per_layer and mask.ndim and len(mask) == len(infos)):
        return [mask] * len(infos)
    if len(mask) != len(infos):
        raise ValueError(f"mask has shape {mask.shape}: a first axis over the {len(infos)} sites that match is needed")
    return list(mask)


def sizes(info: SiteInfo, *, batch: int, length: int, slots: int) -> tuple[int, ...]:
    """The site's shape with numbers for the letters that the configuration leaves open."""
    known = {"B": batch, "T": length, "S": slots}
    return tuple(known.get(s, s) if isinstance(s, str) else s for s in info.shape)


def _check(new: Edit, info: SiteInfo, model: Any) -> None:
    """Raise a ValueError unless the edit's values broadcast and its result has the site's shape."""
    letters = info.axes.replace("C", "T")
    prefill, rank = new.phase == "prefill", len(letters)
    canvas = model.config.canvas_length
    wanted = sizes(info, batch=0, length=0 if new.phase != "denoise" else canvas, slots=0)  # 0: any
    shown = ", ".join(a if not n else f"{a}={n}" if a != "1" else a for a, n in zip(letters, wanted, strict=True))
    batch, slots = 2, 4 + canvas
    fields = {n: (getattr(new, n), r) for n, r in new.VALUES.items()} | {"mask": (new.gate.mask, None)}
    for name, (value, own_rank) in fields.items():
        if value is None:
            continue
        stepped = new.stepped and name != "mask"
        shape = value.shape[1:] if stepped else value.shape
        if own_rank is not None:  # directions: only the width counts
            if not 1 <= len(shape) <= own_rank or shape[-1] != wanted[-1]:
                raise ValueError(
                    f"{info.name} has shape [{shown}]; {name} has shape {shape}: its width must be {wanted[-1]}"
                )
            continue
        fits = len(shape) <= rank and all(
            n in (1, w) or w == 0 for n, w in zip(shape[::-1], wanted[::-1], strict=False)
        )
        if not fits or (stepped and value.ndim == 0):
            raise ValueError(
                f"{info.name} has shape [{shown}]; {name} has shape {tuple(value.shape)}"
                f"{', the first axis being steps,' if stepped else ''} which does not broadcast to it"
            )
        if stepped and new.phase != "denoise":
            raise ValueError("values per step act in denoising only")
        if len(shape) == rank and shape[0] > 1:
            batch = max(batch, shape[0])
        if letters.endswith("S") and shape and shape[-1] > 1:  # as many keys as it was captured from
            slots = shape[-1]
    length = 3 if prefill else canvas
    shape = sizes(info, batch=batch, length=length, slots=slots)
    context = _mock(batch, length, model, prefill)
    new = dataclasses.replace(new)  # a trial; modules of this trace only

    def trial(site: Edit, x: jax.Array, context: dict[str, Any]) -> jax.Array:
        return dataclasses.replace(site, context=context).apply(x)

    try:
        out = jax.eval_shape(trial, new, jax.ShapeDtypeStruct(shape, _dtype(info)), context)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{type(new).__name__} does not fit {info.name} of shape [{shown}]: {error}") from error
    if out.shape != shape:
        raise ValueError(
            f"{type(new).__name__} makes shape {out.shape} of {shape} at {info.name} [{shown}]; it must keep the shape"
        )


def _mock(batch: int, length: int, model: Any, prefill: bool) -> dict[str, Any]:
    """A context without contents, to try an edit's shapes with."""
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    common = {"length": rows, "embedder": model.embedder}
    if prefill:
        return common | {"positions": tokens}
    soft = jax.ShapeDtypeStruct((batch, length, model.config.embed_dim), model.dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return common | dict(step=rows, block=rows, canvas=tokens, next_canvas=tokens, soft=soft, keys=keys)


def remove(model: Any, pattern: str | None = None) -> Any:
    """The model without the edits at the sites that match; without any, and with the plain soft embedding, if None.

    The pattern "soft_embedding" stands for what `interp.token_bottleneck` put in.
    """
    transformer = of(model)
    if pattern in (None, "soft_embedding"):
        transformer = surgery.soft_embedding(transformer).set(SoftEmbed())
    if pattern != "soft_embedding":
        found = surgery.at(transformer, "*" if pattern is None else pattern)
        transformer = found.apply(lambda site: Site(site.name))
    return rewrapped(model, transformer)
