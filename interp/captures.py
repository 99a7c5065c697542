"""Capture activations of whole generations and of prompts.

Taps are put into the model; `dg.generate` carries what they see out of its compiled loop, so that a captured run is
the run. Values are those that the rest of the model reads, after the edits at the site.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import bucket
from dgemma_jax.diffusion.sampler import denoise_step, start
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import SiteInfo
from interp.activations import Activations, readable
from interp.editing import rewrapped
from interp.gates import table
from interp.taps import Reduce, tapped

_ROWS = 2  # of the step whose shapes are asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSize:
    """What a capture needs, and how it will be run.

    Attributes:
        by_site: bytes a step and row, by full name.
        steps, rows, blocks: how many.
        limit: bytes of device memory that captures may take.
        rows_at_once, steps_at_once: what fits; fewer than all means several runs.
    """

    by_site: dict[str, int]
    steps: int
    rows: int
    blocks: int
    limit: int
    rows_at_once: int
    steps_at_once: int

    @property
    def total(self) -> int:
        """Bytes of the result, on the host; at most, as runs may stop early."""
        return sum(self.by_site.values()) * self.steps * self.rows * self.blocks

    @property
    def device(self) -> int:
        """Bytes of captures on the device at a time: one block, and one step more."""
        return sum(self.by_site.values()) * (self.steps_at_once + 1) * self.rows_at_once

    @property
    def runs(self) -> int:
        """Generations needed."""
        return math.ceil(self.rows / self.rows_at_once) * math.ceil(self.steps / self.steps_at_once)

    def __str__(self) -> str:
        what = f"{len(self.by_site)} sites x {self.steps} steps x {self.rows} rows x {self.blocks} blocks"
        device = f"{readable(self.device)} of {readable(self.limit)} on the device"
        return f"{what}: {readable(self.total)} on the host, {device}, {self.runs} run(s)"


def capture(
    bundle: Any, prompts: Any, sites: str | Sequence[str], steps: Any = None, *, seed: int | Sequence[int] = 0,
    sampler: SamplerConfig | None = None, max_new_tokens: int | None = None, positions: Any = None,
    reduce: Reduce | None = None, memory_limit: int | None = None, **options: Any,
) -> Activations:  # fmt: skip
    """Activations of a generation: the same run as `dg.generate` with these arguments.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> sampler = dg.SamplerConfig(max_denoising_steps=3)
    >>> acts = interp.capture(model, [[5, 6]], "layers.*.resid_post", steps=[0, 2], sampler=sampler)
    >>> acts["layers.1.resid_post"].shape
    (2, 1, 12, 32)

    Args:
        bundle: a bundle or a model, edited or not.
        prompts: as for `dg.generate`.
        sites: a pattern or several, as for `interp.at`. Attention patterns and the inside of experts open the
            slower path of their layer.
        steps: an integer, slice, list or mask; None for all.
        max_new_tokens: by default one block.
        positions: canvas positions kept; None for all.
        reduce: a function of one site's values [B, C, ...], run on the device at every step; its result keeps the
            rows. A function of a module compiles once.
        memory_limit: bytes of device memory for captures; by default half of what is free, or 4 GiB where the device
            does not say. What does not fit is moved to the host in parts: first fewer rows a run, then fewer steps
            a run, each of which repeats the generation. Rows do not depend on each other, so the tokens are those
            of one run.
        **options: further ones of `dg.generate` (canvas, pinned, soft, thinking).

    Raises:
        ValueError: no such site, steps out of range, one step of one row or the whole beyond memory.
    """
    plan = _plan(bundle, prompts, sites, steps, seed, sampler, max_new_tokens, positions, reduce, memory_limit, options)
    size = plan.size
    free = _host_free()
    if free is not None and size.total > free:
        raise ValueError(f"{size}; the host has {readable(free)} free: choose fewer sites, steps or positions")
    windows = [plan.steps[i : i + size.steps_at_once] for i in range(0, size.steps, size.steps_at_once)]
    windows[-1] = plan.steps[-size.steps_at_once :]  # of equal length: one program
    parts = []
    for first in range(0, size.rows, size.rows_at_once):
        rows = [min(r, size.rows - 1) for r in range(first, first + size.rows_at_once)]  # the last repeated
        parts.append([_run(plan, rows, window) for window in windows])
    return _join(plan, parts)


def capture_size(
    bundle: Any, prompts: Any, sites: str | Sequence[str], steps: Any = None, *, sampler: SamplerConfig | None = None,
    max_new_tokens: int | None = None, positions: Any = None, reduce: Reduce | None = None,
    memory_limit: int | None = None,
) -> CaptureSize:  # fmt: skip
    """What `capture` with these arguments needs; nothing is run."""
    return _plan(bundle, prompts, sites, steps, 0, sampler, max_new_tokens, positions, reduce, memory_limit, {}).size


def capture_prompt(
    bundle: Any, prompts: Any, sites: str | Sequence[str], *, reduce: Reduce | None = None, thinking: bool = False
) -> Activations:
    """Activations of the causal pass over the prompts: [B, T, ...] by full name, rows padded at the end."""
    model, tokenizer, _ = inputs.parts(bundle)
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size, thinking)
    model, infos = tapped(model, sites, phase="prefill", reduce=reduce)
    tokens, valid = _padded(ids)
    seen = jax.device_get(dg.prefill(model, tokens, valid, cache_length=tokens.shape[1]).sites)
    return Activations(
        arrays={info.name: np.asarray(seen[info.name]) for info in infos},
        axes={info.name: info.axes if reduce is None else "B" for info in infos},
        steps=(), valid=valid, texts=(), tokens=tokens, seeds=(),
    )  # fmt: skip


def _padded(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    length = bucket(max(map(len, ids)))
    tokens, valid = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), bool)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    return tokens, valid


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """A capture about to run."""

    bundle: Any  # with taps
    infos: list[SiteInfo]
    ids: list[list[int]]
    seeds: list[int]
    steps: tuple[int, ...]
    sampler: SamplerConfig
    max_new_tokens: int
    is_reduced: bool
    size: CaptureSize
    options: dict[str, Any]


def _plan(bundle, prompts, sites, steps, seed, sampler, max_new_tokens, positions, reduce, limit, options) -> _Plan:
    model, tokenizer, default = inputs.parts(bundle)
    sampler = default if sampler is None else sampler
    options = dict(options)
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size, options.pop("thinking", False))
    seeds = inputs.to_seeds(seed, len(ids))
    chosen = np.flatnonzero(np.asarray(table(steps, sampler.max_denoising_steps, "steps")))
    if not len(chosen):
        raise ValueError(f"steps={steps!r} chooses none")
    canvas = model.config.canvas_length
    max_new_tokens = canvas if max_new_tokens is None else max_new_tokens
    blocks = math.ceil(max_new_tokens / canvas)
    model, infos = tapped(model, sites, positions=positions, reduce=reduce)
    capacity = bucket(max(map(len, ids)) + blocks * canvas)
    by_site = _bytes(model, capacity, sampler)
    size = _fit(by_site, len(chosen), len(ids), blocks, _device_free() if limit is None else limit)
    return _Plan(
        bundle=rewrapped(bundle, model), infos=infos, ids=ids, seeds=seeds, steps=tuple(map(int, chosen)),
        sampler=sampler, max_new_tokens=max_new_tokens, is_reduced=reduce is not None, size=size, options=options,
    )  # fmt: skip


def _bytes(model: Any, capacity: int, sampler: SamplerConfig) -> dict[str, int]:
    """Bytes a step and row of each tap, from the shapes of a step."""
    shapes = _seen.eval_shape(model, sampler, capacity=capacity)
    for name, shape in shapes.items():
        if shape.shape[:1] != (_ROWS,):
            raise ValueError(
                f"reduce makes shape {shape.shape} of {_ROWS} rows at {name}; the first axis must stay the rows"
            )
    return {name: s.size * s.dtype.itemsize // _ROWS for name, s in shapes.items()}


@functools.partial(jax.jit, static_argnames="capacity")  # never run: so that a model is traced once, not in every call
def _seen(model: Any, sampler: SamplerConfig, *, capacity: int) -> dict[str, jax.Array]:
    """What the taps of a model hear in a step of two rows."""
    zero = jnp.zeros(_ROWS, jnp.int32)
    cache = kv.empty(model.config, _ROWS, capacity, model.dtype)
    keys = jax.random.split(jax.random.key(0), _ROWS)
    state = start(keys, zero, zero > 0, model.config.canvas_length, model)
    return denoise_step(model, state, cache, sampler)[1].sites


def _fit(by_site: dict[str, int], steps: int, rows: int, blocks: int, limit: int) -> CaptureSize:
    """How many rows and steps fit the limit at a time."""
    one = sum(by_site.values())
    rows_at_once, steps_at_once = min(rows, limit // max(1, one * (steps + 1))), steps
    if rows_at_once == 0:
        rows_at_once, steps_at_once = 1, min(steps, limit // one - 1)
    if steps_at_once < 1:
        raise ValueError(
            f"one step of one row takes {readable(2 * one)} with its buffer; memory_limit is {readable(limit)}: "
            "choose fewer sites or positions, or a reduction"
        )
    rows_at_once = math.ceil(rows / math.ceil(rows / rows_at_once))  # runs of about equal size
    return CaptureSize(
        by_site=by_site, steps=steps, rows=rows, blocks=blocks, limit=limit, rows_at_once=rows_at_once,
        steps_at_once=steps_at_once,
    )  # fmt: skip


def _run(plan: _Plan, rows: list[int], window: tuple[int, ...]) -> dg.Generation:
    record = dataclasses.replace(dg.Record.nothing(), site_steps=window)
    options = {k: _rows_of(v, rows, len(plan.ids)) for k, v in plan.options.items()}
    return dg.generate(
        plan.bundle, [plan.ids[r] for r in rows], seed=[plan.seeds[r] for r in rows], sampler=plan.sampler,
        max_new_tokens=plan.max_new_tokens, record=record, **options,
    )  # fmt: skip


def _rows_of(value: Any, rows: list[int], count: int) -> Any:
    """The rows of an option that has one entry a row."""
    return np.asarray(value)[rows] if np.ndim(value) > 1 and len(value) == count else value


def _join(plan: _Plan, parts: list[list[dg.Generation]]) -> Activations:
    """One result of the runs: steps joined, then rows; rows that were there twice left out."""
    size, blocks = plan.size, max(p[0].trajectory.valid.shape[0] for p in parts)
    last = size.steps - size.steps_at_once  # where the last window begins: it may overlap the one before

    def over_steps(part: list[dg.Generation], of_run: Callable[[dg.Generation], np.ndarray]) -> np.ndarray:
        arrays = [of_run(run) for run in part]
        if len(arrays) > 1:
            done = (len(arrays) - 1) * size.steps_at_once
            arrays[-1] = arrays[-1][:, done - last :]
            arrays = [np.concatenate(arrays, 1)]
        array = arrays[0]  # [J, R, B, ...]; rows may have needed fewer blocks than others
        return np.pad(array, [(0, blocks - len(array))] + [(0, 0)] * (array.ndim - 1)) if len(array) < blocks else array

    def over_rows(arrays: list[np.ndarray]) -> np.ndarray:
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, 2)[:, :, : size.rows]
        return array[0] if blocks == 1 else array

    canvas = of(plan.bundle).config.canvas_length
    arrays = {}
    for info in plan.infos:
        is_wide = info.axes.endswith("S") and not plan.is_reduced
        own = [over_steps(part, lambda run, name=info.name: run.trajectory.sites[name]) for part in parts]
        arrays[info.name] = over_rows(_same_slots(own, canvas) if is_wide else own)
    valid = over_rows([over_steps(p, lambda run: run.trajectory.valid[:, run.trajectory.site_steps]) for p in parts])
    lead = "RB" if blocks == 1 else "JRB"
    tokens = [np.asarray(p[0].tokens) for p in parts]
    width = max(t.shape[1] for t in tokens)
    pad = plan.sampler.pad_token_id
    tokens = np.concatenate([np.pad(t, [(0, 0), (0, width - t.shape[1])], constant_values=pad) for t in tokens])
    return Activations(
        arrays=arrays,
        axes={i.name: lead + ("" if plan.is_reduced else i.axes[1:].replace("T", "C")) for i in plan.infos},
        steps=plan.steps, valid=valid, texts=tuple(t for p in parts for t in p[0].texts)[: size.rows],
        tokens=tokens[: size.rows], seeds=tuple(plan.seeds),
    )  # fmt: skip


def _same_slots(arrays: list[np.ndarray], own: int) -> list[np.ndarray]:
    """Key slots padded to equal number, between the cached ones and those of the canvas."""
    most = max(a.shape[-1] for a in arrays)

    def widen(a: np.ndarray) -> np.ndarray:
        gap = np.zeros((*a.shape[:-1], most - a.shape[-1]), a.dtype)
        return np.concatenate([a[..., :-own], gap, a[..., -own:]], -1) if gap.size else a

    return [widen(a) for a in arrays]


def _device_free() -> int:
    """Half of the device memory that is free; 4 GiB where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return 4 << 30
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2


def _host_free() -> int | None:
    """Bytes of host memory that can be had; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10
