"""Path patching: the effect that goes from a sender to receivers along the direct path alone.

Wang et al. 2022 (2211.00593, section 3.1 and appendix B), for a denoising step. The recipient's run, twice:

1. the sender writes what it writes in the donor's run; all other heads, MLPs and experts write what they write in the
   recipient's own run, whatever they read. What the receivers now read is kept;
2. the receivers alone read that; everything after them runs as it will, up to the metric.

Head, dense MLP and experts write to the residual stream through norms of their layer, the last two through a common
one; these norms are part of the path.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from interp import rows, surgery
from interp.components import OUTPUTS, Series, components, kinds
from interp.editing import put
from interp.edits import Replace
from interp.effect_maps import EffectMap
from interp.gates import table
from interp.metrics import Metric
from interp.sweep_inputs import check_metric
from interp.taps import tapped

SENDERS = ("heads", "attention", "mlp", "moe", "embeddings")
FROZEN = ("heads", "mlp", "moe")
LOGITS = "logits"
# What a component makes of what it reads, where the component can be told to have read something else.
_RECEIVERS = ("attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "mlp_out", "router_logits", "moe_out")


@dataclasses.dataclass(frozen=True)
class Receiver:
    """Where a path ends.

    Attributes:
        site: a pattern of full site names: "layers.5.attn_q" (or "attn_k", "attn_v": what a head reads by each of its
            three inputs), "attn_z" (by all three), "mlp_out", "router_logits", "moe_out" (what these read), or
            "logits": straight to the end.
        heads: which; key heads for "attn_k" and "attn_v". None for all.
        positions: canvas positions; None for all.
    """

    site: str = LOGITS
    heads: Any = None
    positions: Any = None

    def __str__(self) -> str:
        chosen = [f"{n} {s}" for n, s in (("heads", self.heads), ("positions", self.positions)) if s is not None]
        return " ".join([self.site, *chosen])


def path_patch(
    bundle: Any, recipient: Any, donor: Any, metric: Metric, senders: str | Sequence[str] = FROZEN,
    receivers: Any = LOGITS, steps: Any = None, *, layers: Any = None, positions: Any = None,
    each_position: bool = False, frozen: str | Sequence[str] = FROZEN, seed: int = 0,
    sampler: SamplerConfig | None = None, rows_at_once: int | None = None, progress: bool | None = None,
    **options: Any,
) -> EffectMap:  # fmt: skip
    """The effect of every sender on the metric of a step, by the direct path to every receiver.

    >>> maps = interp.path_patch(bundle, corrupt, clean, metric, receivers=["logits", "layers.3.mlp_out",
    ...     interp.Receiver("layers.2.attn_q", heads=1)])  # doctest: +SKIP
    >>> maps["heads -> layers.2.attn_q heads 1"]  # [R, L, N, B]  # doctest: +SKIP

    Both runs have the same seeds; each step starts from the recipient's own state there, and the donor's activations
    are of the donor's own step of that number. Activations of the canvas are exchanged, never those of the prompt, so
    prompts of a pair may be of unequal length.

    Args:
        bundle: a bundle or a model, edited or not.
        recipient, donor: prompts as for `dg.generate`, B of each, in pairs. The recipient's run is changed.
        metric: a function logits [B, C, V] -> [B], see `interp.metrics`.
        senders: kinds of components, each taken one by one: "heads", "attention" (all heads of a layer), "mlp", "moe",
            "embeddings" (the canvas as it enters layer 0).
        receivers: a pattern, a `Receiver`, a list of these, each by itself; or a dictionary from names to one or
            several, which then receive together, as the name movers do in the paper.
        steps: an integer, slice, list or mask; None for all that every prompt took.
        layers: of the senders; None for all. Another choice is another program.
        positions: canvas positions at which the sender is patched; None for all.
        each_position: senders at each position are told apart; adds an axis T.
        frozen: what keeps its own output in the first pass: "heads", "mlp", "moe". With "heads" alone the direct path
            may lead through MLPs and experts, as in the paper.
        seed: of the runs.
        rows_at_once: rows of a compiled step; by default what fits the free memory.
        progress: a bar; None shows it in a terminal or notebook.
        **options: further ones of `dg.generate` (canvas, pinned, soft, thinking).

    Returns:
        Effects by "sender -> receiver", axes R, L, (T,) (N,) B. All pairs are one program.

    Raises:
        ValueError: no such sender, receiver, layer or step; prompts that do not pair.
    """
    model, metric = of(bundle), rows.as_data(metric)
    senders, frozen = kinds(senders), kinds(frozen)
    _check(senders, SENDERS, "senders")
    _check(frozen, FROZEN, "frozen")
    sets = _sets(receivers)
    where = _places(model, sets)
    parts = Series(tuple(
        components(model, kind, layers=layers, positions=positions, each_position=each_position) for kind in senders
    ))  # fmt: skip
    own, given = (rows.ids_of(bundle, prompts, options) for prompts in (recipient, donor))
    if len(own) != len(given):
        raise ValueError(f"{len(own)} recipients and {len(given)} donors: give prompts in pairs")
    check_metric(metric, "step", len(own), (model.config.canvas_length, model.config.vocab_size), 0)
    runs = _pairs(bundle, own, given, steps, seed, sampler, options)
    found, base, given = _swept(model, runs, parts, where, tuple(frozen), metric, rows_at_once, progress)
    effects = {
        f"{kind} -> {name}": effect
        for number, name in enumerate(sets)
        for kind, effect in parts.split(found[:, number]).items()
    }
    lines = {part.what: part for part in parts.parts}
    by_pair = {pair: lines[pair.split(" -> ")[0]] for pair in effects}
    return EffectMap(
        effects=effects, axes={pair: f"R{part.axes}B" for pair, part in by_pair.items()},
        index={pair: {"R": list(runs.steps), **part.index} for pair, part in by_pair.items()}, base=base, donor=given,
        method="path patching",
    )  # fmt: skip


def _check(given: Sequence[str], known: Sequence[str], what: str) -> None:
    unknown = [kind for kind in given if kind not in known]
    if unknown or not given:
        raise ValueError(f"{what} must be of {', '.join(known)}, got {list(given)}")


def _sets(receivers: Any) -> dict[str, list[Receiver]]:
    """Receivers by name, each a set."""

    def listed(given: Any) -> list[Receiver]:
        many = [given] if isinstance(given, str | Receiver) else list(given)
        return [Receiver(one) if isinstance(one, str) else one for one in many]

    if isinstance(receivers, Mapping):
        sets = {name: listed(given) for name, given in receivers.items()}
    else:
        sets = {str(one): [one] for one in listed(receivers)}
    wrong = [one for given in sets.values() for one in given if not isinstance(one, Receiver)]
    if wrong or not sets or not all(sets.values()):
        raise ValueError(f"receivers must be patterns, interp.Receiver or named lists of these, got {receivers!r}")
    return sets


def _places(model: Any, sets: Mapping[str, list[Receiver]]) -> dict[str, np.ndarray]:
    """Where each set receives: bool [sets, C, heads or 1, ...] by full site name."""
    config, found = model.config, {}
    for number, given in enumerate(sets.values()):
        for one in given:
            infos = [_last(model)] if one.site == LOGITS else list(surgery.sites(model).matching(one.site))
            bad = [i.name for i in infos if one.site != LOGITS and i.name.split(".")[-1] not in _RECEIVERS]
            if bad:
                raise ValueError(f"{bad[0]} cannot receive; those that can are {', '.join((*_RECEIVERS, LOGITS))}")
            for info in infos:
                letters = info.axes[1:]
                mask = np.asarray(table(one.positions, config.canvas_length, "positions")) > 0.5
                mask = mask.reshape(-1, *[1] * (len(letters) - 1))
                if letters[1] in "NK":
                    heads = np.asarray(table(one.heads, info.shape[2], "heads")) > 0.5
                    mask = mask & heads.reshape(-1, 1)
                elif one.heads is not None:
                    raise ValueError(f"{info.name} has axes {info.axes}: no heads to choose from")
                found.setdefault(info.name, np.zeros((len(sets), *mask.shape), bool))[number] |= mask
    return found


def _last(model: Any) -> Any:
    """The site of the residual stream from which the logits are read."""
    return surgery.sites(model).matching(f"layers.{model.config.num_layers - 1}.resid_post")[0]


def _pairs(bundle, own, given, steps, seed, sampler, options) -> rows.Run:
    """The runs of recipients, then donors, as rows of one."""
    ranks = {"canvas": 2, "pinned": 2, "soft": 3}  # of those given for every row
    twice = {n: np.concatenate([v, v]) if np.ndim(v) == ranks.get(n) else v for n, v in options.items()}
    seeds = inputs.to_seeds(seed, len(own)) * 2
    return rows.run_of(bundle, own + given, steps, seed=seeds, sampler=sampler, **twice)


def _swept(
    model: Any, runs: rows.Run, parts: Series, where: Mapping[str, np.ndarray], frozen: tuple[str, ...],
    metric: Metric, rows_at_once: int | None, progress: bool | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Effects [R, sets, senders, B], and the metric of recipient and donor [R, B]."""
    config, half = model.config, len(runs.ids) // 2
    sets = len(next(iter(where.values())))
    layers = range(config.num_layers)
    kept = tuple(f"layers.{i}.{site}" for kind in frozen for site in OUTPUTS[kind] for i in layers)
    listened = list(dict.fromkeys([*kept, *parts.sites, _last(model).name]))
    listening, _ = tapped(model, listened)
    seen: dict[int, tuple[dict[str, jax.Array], jax.Array]] = {}
    given = []

    def one(step: int, chosen: np.ndarray) -> jax.Array:
        if step not in seen:
            seen.clear()
            seen[step] = _both(listening, runs.at(step), runs.sampler, metric)
            given.append(np.asarray(seen[step][1][1], np.float32))
        number, sender = np.unravel_index(np.maximum(chosen, 0), (sets, parts.count))
        sent = parts.masks(np.where(chosen < 0, rows.NOTHING, sender), config)
        read = {n: m[number] & (chosen >= 0).reshape(-1, *[1] * (m.ndim - 1)) for n, m in where.items()}
        return _paths(model, runs.at(step)[:half], runs.sampler, seen[step][0], sent, read, metric, frozen=kept)

    width = 2 * config.num_heads * max(config.head_dim, config.global_head_dim)
    at_once = rows.that_fit(model, runs, half, rows_at_once, 4 * len(where) * config.canvas_length * width)
    count = sets * parts.count
    effects, base = rows.sweep(one, runs, count, at_once, "path patching", progress)
    return effects.reshape(len(runs.steps), sets, parts.count, -1), base, np.stack(given)


@jax.jit
def _both(model, at, sampler, metric) -> tuple[dict[str, jax.Array], jax.Array]:
    """Activations [2 * B, ...] of recipients and donors, and the metric of both [2, B]."""
    view = denoise_step(model, at.state, at.cache, sampler, at.pinned)[1]
    return view.sites, rows.measured(metric, view.logits, 2)


@functools.partial(jax.jit, static_argnames="frozen")
def _paths(model, at, sampler, seen, sent, read, metric, frozen) -> jax.Array:
    """The metric [I, B]: in intervention i the places `sent` have the donor's values, and `read` hears of it."""
    count, half, last = len(next(iter(sent.values()))), at.count, _last(model).name
    sent, read = ({n: jnp.repeat(m, half, 0) for n, m in masks.items()} for masks in (sent, read))
    own = {name: rows.repeated(x[:half], count) for name, x in seen.items()}
    donor = {name: rows.repeated(seen[name][half:], count) for name in sent}
    every = rows.repeated(at, count)

    def logits_and_sites(model: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        view = denoise_step(model, every.state, every.cache, sampler, every.pinned)[1]
        return view.logits, view.sites

    def placed(fn: Any, name: str, *args: Any) -> Replace:
        return Replace(fn, args, name=name.split(".")[-1], phase="denoise")

    nowhere = jnp.zeros((), bool)
    first = {n: placed(_sent, n, sent.get(n, nowhere), donor.get(n, own[n]), own[n] if n in frozen else None)
             for n in {*sent, *frozen}}  # fmt: skip
    # A tap stands before what freezes its site: it hears what would have been written.
    _, heard = logits_and_sites(put(tapped(model, list(read))[0], first))
    if set(read) == {last}:  # the second pass is the end of the first
        second = {last: placed(_sent, last, read[last], heard[last], own[last])}
    else:
        second = {n: placed(_sent, n, where, heard[n], None) for n, where in read.items() if n != last}
        if last in read:
            second[last] = placed(_more, last, read[last], heard[last], own[last])
    return rows.measured(metric, logits_and_sites(put(model, second))[0], count)


def _sent(x: jax.Array, where: jax.Array, new: jax.Array, frozen: jax.Array | None) -> jax.Array:
    """The new value where it is sent; elsewhere the frozen one, or what is there."""
    return jnp.where(where, new, x if frozen is None else frozen)


def _more(x: jax.Array, where: jax.Array, new: jax.Array, own: jax.Array) -> jax.Array:
    """What arrives beside what the other receivers make of it."""
    return x + jnp.where(where, new - own, 0)
