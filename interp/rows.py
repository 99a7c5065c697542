"""Interventions on single steps of a run, laid along the rows of a batch: what knock-outs and path patching share.

A chunk of I interventions on B prompts is one compiled step of I * B rows, all prompts under the first intervention,
then all under the next. A sweep is a few such chunks a step, all of one shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import State
from dgemma_jax.diffusion.trajectory import StepView
from dgemma_jax.nn import meshes
from dgemma_jax.nn.cache import KVCache
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site
from dgemma_jax.progress import bar
from interp.gates import table
from interp.metrics import Metric, at_positions, narrowed

NOTHING = -1  # the intervention that changes nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What goes into one step of some rows."""

    state: State
    cache: KVCache
    pinned: jax.Array | None

    def __getitem__(self, rows: Any) -> Rows:
        return jax.tree.map(lambda x: x[rows], self)

    @property
    def count(self) -> int:
        return self.state.canvas.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The first block of a run of B prompts, and the steps of it to be studied.

    Attributes:
        moment: before the first step.
        canvas, soft: [R, B, C] and [R, B, C, D], fed into each of these steps; on the host.
        steps: which these are.
    """

    moment: Moment
    canvas: np.ndarray
    soft: np.ndarray
    steps: tuple[int, ...]

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """The prompts."""
        return self.moment.prompts

    @property
    def sampler(self) -> SamplerConfig:
        return self.moment.sampler

    def at(self, index: int) -> Rows:
        """What goes into the step `steps[index]`."""
        state = self.moment.state
        state = state.replace(
            canvas=jnp.asarray(self.canvas[index]), soft=jnp.asarray(self.soft[index]),
            step=jnp.full_like(state.step, self.steps[index]),
        )  # fmt: skip
        return Rows(state, self.moment.cache, self.moment.pinned)


def ids_of(bundle: Any, prompts: Any, options: Mapping[str, Any]) -> list[list[int]]:
    """Prompts as ids, checked."""
    model, tokenizer, _ = inputs.parts(bundle)
    return inputs.to_ids(prompts, tokenizer, model.config.vocab_size, options.get("thinking", False))


def run_of(
    bundle: Any, prompts: Any, steps: Any, *, seed: int | Sequence[int], sampler: SamplerConfig | None, **options: Any
) -> Run:
    """Run prompts for one block.

    Args:
        steps: an integer, slice, list or mask; None for those that all prompts took.
        **options: further ones of `dg.generate` (canvas, pinned, soft, thinking).

    Raises:
        ValueError: a step that was not taken.
    """
    sampler = inputs.parts(bundle)[2] if sampler is None else sampler
    chosen = None if steps is None else np.flatnonzero(np.asarray(table(steps, sampler.max_denoising_steps, "steps")))
    if chosen is not None and not len(chosen):
        raise ValueError(f"steps={steps!r} chooses none")
    record = dataclasses.replace(dg.Record.nothing(), tokens=True, soft=True)
    length = of(bundle).config.canvas_length
    run = dg.generate(bundle, prompts, seed, sampler, max_new_tokens=length, record=record, **options).trajectory
    taken = int(run.num_steps[0].min())
    chosen = np.arange(taken) if chosen is None else chosen
    if chosen[-1] >= taken:
        raise ValueError(
            f"step {chosen[-1]} was not taken by all prompts: the shortest run stopped after {taken} steps; choose "
            "earlier ones, or give a sampler with early_stop=False"
        )
    moment = run.moment(0, 0)

    def fed(first: Any, after: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(first) if step == 0 else after[0, step - 1] for step in chosen])

    return Run(
        moment=moment, canvas=fed(moment.canvas, run.tokens), soft=fed(moment.soft, run.soft),
        steps=tuple(map(int, chosen)),
    )  # fmt: skip


def repeated(tree: Any, count: int) -> Any:
    """Arrays [B, ...] as [count * B, ...]."""

    def one(x: jax.Array) -> jax.Array:
        return x[jnp.arange(count * x.shape[0]) % x.shape[0]]  # keys of random numbers cannot be tiled

    return jax.tree.map(one, tree)


def as_data(metric: Metric) -> Metric:
    """The metric as an argument of a compiled function: a plain function is told by its identity."""
    if not callable(metric):
        raise ValueError(f"metric must be a function logits [B, C, V] -> [B], got {type(metric).__name__}")
    return jax.tree_util.Partial(metric) if jax.tree_util.all_leaves([metric]) else metric


def where_read(metric: Metric, model: Any) -> tuple[Any, Metric] | None:
    """`narrowed`; None also where all logits are made: something acts on them, or the model is not one of ours."""
    return narrowed(metric) if type(getattr(model, "logits", None)) is Site else None


def of_step(metric: Metric, model: Any, view: StepView, count: int) -> jax.Array:
    """[count, B] of a step of count * B rows; logits are made where the metric reads them alone, if it says where."""
    narrow = where_read(metric, model)
    if narrow is None:
        return measured(metric, view.logits, count)
    prompts = len(view.hidden) // count
    positions_BN = jnp.broadcast_to(narrow[0], (prompts, narrow[0].shape[-1]))
    hidden = at_positions(view.hidden, jnp.tile(positions_BN, (count, 1)))
    return measured(narrow[1], model.unembed(hidden), count)


def measured(metric: Metric, logits: jax.Array, count: int) -> jax.Array:
    """[count, B] of logits [count * B, C, V]."""
    found = jax.vmap(metric)(logits.reshape(count, -1, *logits.shape[1:]))
    if found.shape != (count, logits.shape[0] // count):
        raise ValueError(f"the metric makes shape {found.shape[1:]} of {logits.shape[0] // count} rows; needed is [B]")
    return found


def sweep(
    one: Callable[[int, np.ndarray], jax.Array], run: Run, count: int, at_once: int, title: str, progress: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """Every intervention at every step of a run.

    Args:
        one: the metric [I, B] at a step (its index in `run.steps`) under interventions [I], `NOTHING` among them.
        count: how many there are.
        at_once: I, how many of them one call may take.
        progress: a bar; None shows it in a terminal or notebook.

    Returns:
        Effects [R, count, B] and the metric without intervention [R, B], float32.
    """
    size = min(at_once, count + 1)  # not evened out: sweeps of other lengths then share the program
    calls = math.ceil((count + 1) / size)
    padded = np.full((calls, size), NOTHING)
    padded.ravel()[1 : count + 1] = np.arange(count)
    found = []
    with bar(title, len(run.steps) * calls, progress) as done:
        for step in range(len(run.steps)):
            for chunk in padded:
                found.append(np.asarray(one(step, chunk), np.float32))
                done(1)
    values = np.stack(found).reshape(len(run.steps), calls * size, -1)
    base = values[:, 0]
    return values[:, 1 : count + 1] - base[:, None], base


def that_fit(
    model: Any, run: Run, prompts: int, rows_at_once: int | None, more: int = 0, metric: Metric | None = None
) -> int:
    """How many interventions on this many prompts fit one call.

    Args:
        rows_at_once: as the user says; None estimates it from the free memory of the device.
        more: bytes that a row needs beside its cache, its logits and the usual intermediates.
        metric: by which `of_step` measures, so that a row may need few logits; None for those of the whole canvas.

    Raises:
        ValueError: not even one fits.
    """
    config = of(model).config
    if rows_at_once is None:
        cache = sum(x.nbytes for x in jax.tree.leaves(run.moment.cache)) // len(run.ids)
        slots = config.canvas_length + max(entry.k.shape[2] for entry in run.moment.cache.layers)
        scores = 8 * config.num_heads * config.canvas_length * slots
        narrow = None if metric is None else where_read(metric, of(model))
        read = config.canvas_length if narrow is None else narrow[0].shape[-1]
        row = cache + scores + 4 * (3 * read * config.vocab_size + 24 * config.canvas_length * config.embed_dim) + more
        ways = meshes.ways(meshes.of(of(model)))  # each device has its share of the rows
        rows_at_once = max(prompts, min(_free() // row, 2048) * ways)
    if rows_at_once < prompts:
        raise ValueError(f"rows_at_once={rows_at_once}: one intervention on {prompts} prompts takes {prompts} rows")
    return rows_at_once // prompts


def _free() -> int:
    """Half of the device memory that is free; 2 GiB where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return 2 << 30
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
