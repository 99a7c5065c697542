"""Two runs of a pair of prompts, and a step of either that can be differentiated in all that goes into it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import bucket
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.cache import KVCache
from dgemma_jax.nn.sites import SiteInfo
from interp import surgery
from interp.editing import put
from interp.edits import Add
from interp.metrics import Metric
from interp.rows import Rows, Run, repeated, run_of
from interp.sweep_inputs import check_metric
from interp.sweep_inputs import pairs as as_pairs
from interp.taps import tapped

DIRECTIONS, FORMS = ("denoising", "noising"), ("plain", "integrated")
CARRIERS = ("soft", "cache")  # what flows into a step beside its canvas: S, cached keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """What goes into r steps of B prompts of one run.

    Attributes:
        steps: rows [r * B, ...]: all prompts at the first step, then all at the next.
        tokens, valid: [r * B, T], the prompts, padded at the end.
    """

    steps: Rows
    tokens: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """The first block of both runs of B pairs of prompts, under the same seeds.

    Attributes:
        run: of 2 * B prompts, the recipients and then the donors.
        tokens, valid: [2 * B, T], the prompts, padded at the end.
    """

    run: Run
    tokens: np.ndarray
    valid: np.ndarray

    @property
    def count(self) -> int:
        """B."""
        return len(self.tokens) // 2

    @property
    def length(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.valid.sum(1).max())

    def at(self, places: Sequence[int]) -> tuple[Side, Side]:
        """Recipient and donor at some of the chosen steps, given by their index in `run.steps`."""
        rows = [self.run.at(place) for place in places]
        count = self.count
        return tuple(self._side(rows, slice(i * count, (i + 1) * count)) for i in (0, 1))

    def _side(self, steps: list[Rows], own: slice) -> Side:
        steps = [Rows(*jax.tree.map(lambda x: x[own], (s.state, s.cache, s.pinned))) for s in steps]
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *steps)
        return Side(rows, *repeated((jnp.asarray(self.tokens[own]), jnp.asarray(self.valid[own])), len(steps)))


def run_pairs(
    bundle: Any, clean: Any, corrupt: Any, metric: Metric, steps: Any, direction: str, seed: int | Sequence[int],
    sampler: SamplerConfig | None,
) -> Pairs:  # fmt: skip
    """Run both prompts of every pair for one block.

    Args:
        clean, corrupt: as prompts of `dg.generate`, as many of one as of the other, pairs of equal length in tokens.
        steps: an integer, slice, list or mask; None for those that both runs of all pairs took.
        direction: "denoising" changes the runs of `corrupt` by those of `clean`, "noising" the other way round.

    Raises:
        ValueError: the prompts do not pair, the metric does not give a number a pair, or a step was not taken.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    model, tokenizer, _ = inputs.parts(bundle)
    good, bad = as_pairs(clean, corrupt, "donor", tokenizer, model.config.vocab_size)
    check_metric(metric, "step", len(good), (model.config.canvas_length, model.config.vocab_size), 0)
    both = bad + good if direction == "denoising" else good + bad
    run = run_of(bundle, both, steps, seed=inputs.to_seeds(seed, len(good)) * 2, sampler=sampler)
    tokens = np.zeros((len(both), bucket(max(map(len, both)))), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(both):
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    return Pairs(run=run, tokens=tokens, valid=valid)


def forward(
    model: Any, side: Side, adds: dict[str, Any], listen: Iterable[str], sampler: SamplerConfig, phase: str
) -> tuple[jax.Array, dict[str, Any]]:
    """One step with something added at sites and carriers. To be traced within a compiled function.

    Args:
        adds: arrays by full site name, as at the site; also for "soft" (S fed in) and "cache" (its layers).
        listen: full site names.
        phase: of the sites that both passes have. The prompt is run again if a site of its pass is named.

    Returns:
        Logits [r * B, C, V]; by name the activations listened to, and the carriers.
    """
    infos = {info.name: info for info in surgery.sites(model)}
    phases = {name: phase_of(infos[name], phase) for name in [*adds, *listen] if name not in CARRIERS}
    model = put(model, {n: _add(infos[n], x, phases[n]) for n, x in adds.items() if n in phases})
    for one in ("prefill", "denoise"):
        names = [name for name in listen if phases[name] == one]
        model = tapped(model, names, phase=one)[0] if names else model
    cache, seen = side.steps.cache, {}
    if "prefill" in phases.values():
        empty = KVCache(jax.tree.map(jnp.zeros_like, cache.layers), jnp.zeros_like(cache.length))
        prompt = dg.prefill(model, side.tokens, side.valid, empty)
        cache, seen = prompt.cache, prompt.sites
    if "cache" in adds:
        cache = cache.replace(layers=_sum(cache.layers, adds["cache"]))
    state = side.steps.state
    if "soft" in adds:
        state = state.replace(soft=_sum(state.soft, adds["soft"]))
    view = denoise_step(model, state, cache, sampler, side.steps.pinned)[1]
    return view.logits, {**seen, **view.sites, "soft": state.soft, "cache": cache.layers}


def phase_of(info: SiteInfo, phase: str) -> str:
    """The pass in which a site is meant: its only one, or `phase`."""
    return "prefill" if info.name == "token_embed" else "denoise" if "C" in info.axes else phase


def _add(info: SiteInfo, value: jax.Array, phase: str) -> Add:
    return Add(value, name=info.name.split(".")[-1], axes=info.axes.replace("C", "T"), phase=phase)


def _sum(one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), one, other)


def minus(one: Any, other: Any) -> Any:
    """one - other in float32, for trees of arrays."""
    return jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), one, other)


def path_points(form: str, points: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] how far along a path the gradient is taken, and what it counts there: the middles of n equal parts.

    "plain" takes it at the start alone.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if not isinstance(points, int) or points < 1:
        raise ValueError(f"points must be an integer >= 1, got {points!r}")
    middle = np.zeros(1) if form == "plain" else (np.arange(points) + 0.5) / points
    return middle.astype(np.float32), np.full(len(middle), 1 / len(middle), np.float32)


def padded(values: np.ndarray) -> np.ndarray:
    """Zeros behind, up to one of few lengths."""
    return np.pad(values, (0, max(64, 1 << (len(values) - 1).bit_length()) - len(values)))


def kept_bytes(model: Any, pairs: Pairs, names: Iterable[str], phase: str) -> int:
    """Bytes a row that gradients at these sites and carriers need: what is kept of the forward pass, and themselves."""

    def kept(count: int) -> int:
        side, _ = jax.eval_shape(lambda: pairs.at([0] * count))
        shapes = jax.eval_shape(_kept, model, side, pairs.run.sampler, names=tuple(sorted(names)), phase=phase)
        residuals, values = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for part in shapes)
        return residuals + 4 * values  # of both runs, their difference and the gradient

    return (kept(2) - kept(1)) // pairs.count


@functools.partial(jax.jit, static_argnames=("names", "phase"))  # traced once for all calls of these shapes
def _kept(model, side, sampler, *, names, phase):
    seen = forward(model, side, {}, [name for name in names if name not in CARRIERS], sampler, phase)[1]
    zeros = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), seen[name]) for name in names}
    return jax.vjp(lambda adds: forward(model, side, adds, (), sampler, phase)[0], zeros)[1], zeros
