"""Continuous batching: many prompts through few rows; where one has finished, the next takes its place.

    waiting prompt -> free row -> read into its slots -> some steps -> block committed -> read, next block | result

`generate` runs a batch in step: every block lasts as long as its slowest row, every batch as long as its longest
answer. Here each row has a block and a step of its own. The compiled loop over steps is that of `generate`; it is left
as soon as a row has finished its block; prompts and committed blocks are read a few rows at a time (`reading`).
The host is busy with the last steps while the device is at the next.

What a prompt gives depends on the prompt and its seed alone, as in `generate`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax import memory
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import generate as lockstep
from dgemma_jax.diffusion import loop, noise, reading
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.diffusion.joined import joined
from dgemma_jax.diffusion.kept_rows import KeptRows
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.trajectory import Record, Trajectory
from dgemma_jax.nn import functional, meshes
from dgemma_jax.nn.flattened import Flattened
from dgemma_jax.progress import bar

SPAN = 8  # steps recorded on the device before they are fetched
IDLE = 1 / 16  # share of the rows that may stand idle before the loop is left


def stream(
    bundle: Any, prompts: Any, seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
    max_new_tokens: int | Sequence[int] = 256, record: Record | None = None, *, rows: int = 8,
    capacity: int | None = None, directory: str | Path | None = None, thinking: bool = False,
) -> Iterator[tuple[int, lockstep.Generation]]:  # fmt: skip
    """Generate answers to many prompts and give each as it is finished.

    Each result is what `generate` gives for the prompt alone: a `Generation` of one row. An edit that tells rows by
    their number sees the row that a prompt happened to run in.

    Args:
        bundle, prompts, seed, sampler, record, thinking: as for `generate`.
        max_new_tokens: one for all prompts, or one each.
        rows: prompts that run at once. It changes speed and memory, not results.
        capacity: tokens that a row has room for, of prompt and answer; by default what these prompts need. Jobs of as
            many rows and one capacity share their programs.
        directory: keeps each finished result in a file. Called again with the same arguments, kept results come
            first, without running, and only the others are run.

    Yields:
        (number of the prompt, its `Generation`), in order of finishing.

    Raises:
        ValueError: at the call, before any work, for what `generate` refuses, rows < 1, too small a capacity, or a
            directory that holds results of another job.
    """
    work = _Work.of(bundle, prompts, seed, sampler, max_new_tokens, record, rows, thinking, capacity)
    return _results(work, None if directory is None else KeptRows.claim(directory, work.model, work.described()))


def generate_many(
    bundle: Any, prompts: Any, seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
    max_new_tokens: int | Sequence[int] = 256, record: Record | None = None, *, rows: int = 8,
    capacity: int | None = None, directory: str | Path | None = None, thinking: bool = False,
    progress: bool | None = None,
) -> lockstep.Generation:  # fmt: skip
    """Generate answers to many prompts, `rows` at a time: what `generate` gives for all of them at once.

    Args:
        progress: a bar; by default in a terminal or notebook. The others as for `stream`.
    """
    work = _Work.of(bundle, prompts, seed, sampler, max_new_tokens, record, rows, thinking, capacity)
    kept = None if directory is None else KeptRows.claim(directory, work.model, work.described())
    found: list[Any] = [None] * len(work.ids)
    with bar("generate", len(found), progress, "prompts") as done:
        for number, one in _results(work, kept):
            found[number] = one
            done(1)
    return collected(found)


def collected(results: Sequence[lockstep.Generation]) -> lockstep.Generation:
    """Results of one `stream`, in any choice and order, as one generation with a row each.

    Blocks that a row did not run are padding in `tokens` and zeros in every array of the trajectory.
    """
    again = [one.trajectory.replay for one in results]
    return joined(results, _Again(again[0].work, tuple(number for own in again for number in own.numbers)))


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is to be done, checked."""

    model: Any
    tokenizer: Any
    sampler: SamplerConfig
    record: Record
    ids: list[list[int]]
    seeds: list[int]
    num_blocks: list[int]
    rows: int
    capacity: int  # tokens of a row

    @classmethod
    def of(cls, bundle, prompts, seed, sampler, max_new_tokens, record, rows, thinking, capacity) -> _Work:
        model, tokenizer, default = inputs.parts(bundle)
        ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size, thinking)
        seeds = inputs.to_seeds(seed, len(ids))
        sampler, record = sampler or default, record or Record()
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows must be an integer >= 1, got {rows!r}")
        limits = np.asarray(max_new_tokens).tolist()
        limits = limits if isinstance(limits, list) else [limits] * len(ids)
        if len(limits) != len(ids):
            raise ValueError(f"max_new_tokens must be one integer or {len(ids)} of them (one a prompt); "
                             f"got {len(limits)}")  # fmt: skip
        blocks = [lockstep.blocks_for(len(own), limit, model.config) for own, limit in zip(ids, limits, strict=True)]
        lockstep.check_record(record, model.config.vocab_size, sampler)
        if hasattr(bundle, "check_finite"):
            bundle.check_finite()
        most = max(len(own) + n * model.config.canvas_length for own, n in zip(ids, blocks, strict=True))
        if capacity is not None and (not isinstance(capacity, int) or capacity < most):
            raise ValueError(f"the largest prompt and its answer take {most} tokens; needed is an integer of at least "
                             f"that, got capacity={capacity!r}")  # fmt: skip
        room = lockstep.bucket(most) if capacity is None else capacity
        work = cls(model, tokenizer, sampler, record, ids, seeds, blocks, min(rows, len(ids)), room)
        memory.check_generate(model, work.rows, work.capacity)
        return work

    def described(self) -> dict[str, Any]:
        """What results depend on, beside the model. `rows` is not among it."""
        own = ("ids", "seeds", "num_blocks", "sampler", "record")
        return {name: repr(getattr(self, name)) for name in own} | {"config": repr(self.model.config)}


@dataclasses.dataclass(frozen=True)
class _Again:
    """Recomputes moments of some prompts, as `Replay` does, after running their prompts through the model again."""

    work: _Work
    numbers: tuple[int, ...]

    def __call__(self, trajectory: Trajectory, block: int, step: int, model: Any = None) -> Moment:
        work = self.work
        (blocks, *others) = {work.num_blocks[n] for n in self.numbers}
        if others:
            raise ValueError("prompts with max_new_tokens of their own have no moments in common; use those of a "
                             "prompt alone, which `stream` gives")  # fmt: skip
        limit = blocks * work.model.config.canvas_length
        ids, seeds = [work.ids[n] for n in self.numbers], [work.seeds[n] for n in self.numbers]
        run = lockstep.begin(
            work.model if model is None else model, ids, seeds, work.sampler, limit, work.record, None, None, None,
            False, 1,
        )  # fmt: skip
        return lockstep.Replay(run)(trajectory, block, step)


class _Row:
    """A prompt on its way: the blocks behind it, and the steps of the one at hand."""

    def __init__(self, work: _Work, number: int) -> None:
        self.work, self.number = work, number
        none = np.zeros(1, np.int32)
        moment = Moment(
            state=None, cache=None, pinned=None, history=np.zeros((1, 0), np.int32), ended=none > 0, spent=none,
            sampler=work.sampler, num_blocks=work.num_blocks[number], prompts=(tuple(work.ids[number]),),
        )  # fmt: skip
        self.run = self.now = lockstep.Run(work.model, work.tokenizer, moment, work.record, [work.seeds[number]])
        self.closed = 0  # blocks
        self.blocks: list[tuple] = []  # those of them whose steps are here
        self.steps: list[loop.Buffers] = []
        self.first: np.ndarray | None = None  # the canvas that the block began with

    @property
    def is_over(self) -> bool:
        return bool(self.now.moment.ended[0]) or self.closed == self.now.moment.num_blocks

    def close(self, committed: np.ndarray, steps: int) -> None:
        """End the block at hand after so many steps, which may still lie on the device."""
        moment = self.now.moment
        history, ended = lockstep.commit(moment, committed[None])
        moment = dataclasses.replace(moment, history=history, ended=ended, spent=moment.spent + np.int32(steps))
        self.now = dataclasses.replace(self.now, moment=moment)
        self.closed += 1

    def keep(self, host: loop.Buffers, slot: int, taken: int) -> None:
        """Add the steps of a span that the row took."""
        count = int(host["valid"][:taken, slot].sum())
        self.steps.append(jax.tree.map(lambda a: np.array(a[:count, slot]), host))

    def assemble(self, committed: np.ndarray, stop: int) -> None:
        """Put the steps of the block that was closed together."""
        total, chosen = self.work.sampler.max_denoising_steps, self.work.record.site_steps

        def padded(*parts: np.ndarray) -> np.ndarray:
            array = np.zeros((total, 1, *parts[0].shape[1:]), parts[0].dtype)
            np.concatenate(parts, out=array[:taken, 0])
            return array

        taken = sum(len(part["valid"]) for part in self.steps)
        buffers = jax.tree.map(padded, *self.steps)
        if "sites" in buffers:
            buffers["site_steps"] = np.arange(total) if chosen is None else np.array(chosen)
            buffers["sites"] = jax.tree.map(lambda a: a[buffers["site_steps"]], buffers["sites"])
        steps, stop = np.array([taken], np.int32), np.array([stop], np.int32)
        self.blocks.append((self.first[None], buffers, committed[None], steps, stop))
        self.steps = []

    def result(self) -> lockstep.Generation:
        moment = self.now.moment
        out = lockstep.finish(self.run, self.blocks, moment.history, moment.ended, moment.spent)
        return _with_moments(out, self.work, self.number)


def _with_moments(out: lockstep.Generation, work: _Work, number: int) -> lockstep.Generation:
    trajectory = dataclasses.replace(out.trajectory, replay=_Again(work, (number,)))
    return dataclasses.replace(out, trajectory=trajectory)


def _results(work: _Work, kept: KeptRows | None) -> Iterator[tuple[int, lockstep.Generation]]:
    there = set() if kept is None else kept.numbers
    for number in sorted(there):
        yield number, _with_moments(kept.load(number), work, number)
    for row in _finished(work, [n for n in range(len(work.ids)) if n not in there]):
        out = row.result()
        if kept is not None:
            kept.save(row.number, out)
        yield row.number, out


@dataclasses.dataclass
class _Span:
    """Some steps of all rows, from the time they are asked for until they are here.

    Attributes:
        rows: by place; None where none runs.
        begun: places at which a block begins.
        canvas: [B, C] before the first of the steps, on the device.
        taken, state, buffers: what the loop gave, on the device.
        closed: (place, committed tokens, stop) of the blocks that end here.
    """

    rows: list[_Row | None]
    begun: list[int]
    canvas: jax.Array
    taken: jax.Array
    state: sampling.State
    buffers: loop.Buffers
    closed: list[tuple[int, np.ndarray, int]] = dataclasses.field(default_factory=list)

    def close(self, sampler: SamplerConfig) -> None:
        """Wait for the steps, and end the blocks that are done."""
        state = self.state
        last = state.canvas if sampler.commit == "canvas" else state.argmax
        done, last, steps, stop = meshes.to_host((state.done, last, state.step, state.stop))
        for place, row in enumerate(self.rows):
            if row is not None and done[place]:
                row.close(last[place], steps[place])
                self.closed.append((place, last[place], int(stop[place])))

    def fetch(self) -> Iterator[_Row]:
        """Take the record of the steps over from the device; rows that are over, each with all it needs."""
        told = {name: buffer for name, buffer in self.buffers.items() if name != "slot"}
        host, canvas, taken = meshes.to_host((told, self.canvas, self.taken))
        for place in self.begun:
            self.rows[place].first = np.array(canvas[place])
        for place, row in enumerate(self.rows):
            if row is not None:
                row.keep(host, place, int(taken))
        for place, committed, stop in self.closed:
            row = self.rows[place]
            row.assemble(committed, stop)
            if row.is_over:
                yield row


def _finished(work: _Work, numbers: Sequence[int]) -> Iterator[_Row]:
    """Run the prompts of these numbers; rows in the order in which they finish.

    What a span of steps recorded is fetched while the device is at the next one, and so is all that is done with the
    rows that this gives.
    """
    if not numbers:
        return
    model, config, waiting = work.model, work.model.config, collections.deque(numbers)
    count, record = min(work.rows, len(waiting)), _all_sites(work.record)
    flat, sizes = Flattened(model), reading.piece_sizes(config.canvas_length)
    places: list[_Row | None] = [None] * count
    pieces: dict[int, list[Sequence[int]]] = {}  # by place: what the model must read before the next block
    cache = meshes.empty_cache(config, count, work.capacity, model.dtype, meshes.of(model))
    state = _idle(model, count)
    buffers = behind = None
    while True:
        empty = [place for place in range(count) if places[place] is None]
        fresh = empty[: len(waiting)]
        for place in fresh:
            places[place] = row = _Row(work, waiting.popleft())
            pieces[place] = reading.cut(work.ids[row.number], sizes)
        ahead, live = None, count - len(empty) + len(fresh)
        if live:
            cache = reading.read(flat, cache, pieces, fresh, sizes)
            state = _begun(flat, state, places, sorted(pieces))
            if buffers is None:
                buffers = loop.empty_buffers(model, state, cache, work.sampler, None, record)
                buffers = {n: b if n == "slot" else jax.tree.map(lambda a: a[:SPAN], b) for n, b in buffers.items()}
                _check_rows(buffers, count)
            least, canvas = live - max(1, int(live * IDLE)) + 1, state.canvas
            taken, state, buffers = loop.some(flat, state, cache, buffers, work.sampler, record, least=least)
            ahead = _Span(list(places), sorted(pieces), canvas, taken, state, buffers)
        if behind is not None:
            yield from behind.fetch()
        if ahead is None:
            return
        ahead.close(work.sampler)
        pieces = {}
        for place, committed, _ in ahead.closed:
            if places[place].is_over:
                places[place] = None
            else:
                pieces[place] = [committed]
        behind = ahead


def _all_sites(record: Record) -> Record:
    """Rows are at steps of their own, so captured sites are chosen on the host."""
    return dataclasses.replace(record, site_steps=None)


def _check_rows(buffers: loop.Buffers, count: int) -> None:
    for leaf in jax.tree.leaves(buffers.get("fn")):
        if leaf.ndim < 2 or leaf.shape[1] != count:
            raise ValueError(
                f"Record.fn gave an array of shape {leaf.shape[1:]}; prompts that run in rows need arrays [B, ...]"
            )


def _begun(model: Any, state: sampling.State, places: Sequence[_Row | None], begin: Sequence[int]) -> sampling.State:
    """The state with a new block begun at some places."""
    seeds = [0 if row is None else row.run.seeds[0] for row in places]
    block = [0 if row is None else row.closed for row in places]
    begins = np.isin(np.arange(len(places)), begin)
    return _new_blocks(model, state, np.array(seeds, np.uint32), np.array(block, np.int32), begins)


@functools.partial(jax.jit, static_argnames="count")
def _idle(model, count) -> sampling.State:
    zeros = jnp.zeros(count, jnp.int32)
    return sampling.start(noise.row_keys(zeros), zeros, zeros == 0, model.config.canvas_length, model)


@jax.jit
def _new_blocks(model, state, seeds, block, begins) -> sampling.State:
    new = sampling.start(noise.row_keys(seeds), block, ~begins, state.canvas.shape[1], functional.of(model))

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(begins.reshape(-1, *[1] * (b.ndim - 1)), a, b)

    return jax.tree.map(chosen, new, state)
