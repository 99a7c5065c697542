"""Many prompts through batches of a fixed number of rows; rows that take longer than most go on together.

    batch --FEW steps--> rows that are done
                         the others, of several batches --> one narrow batch --all steps--> done

A batch runs until its slowest row has ended. Where most rows need a few steps and some take all that are allowed, most
of the work would go to rows that are done. Rows do not depend on each other, so packing changes nothing that they say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import generate as runs
from dgemma_jax.diffusion import loop
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.trajectory import Record

FEW = 4  # steps of a whole batch: two are the fewest in which a row can settle
_NARROW = 4  # times fewer rows go on

Numbers = Sequence[int]


def generate_many(
    model_of: Callable[[Numbers], Any], ids: Sequence[Sequence[int]], seeds: Sequence[int], groups: Sequence[Numbers],
    sampler: SamplerConfig, record: Record, *, few: int = FEW,
) -> Iterator[tuple[int, runs.Generation, int]]:  # fmt: skip
    """Generate one block for every prompt; yields (number of the prompt, generation, its row there), each once.

    Args:
        model_of: the model or bundle of a batch, by the numbers of its rows: edits may differ by row.
        ids: prompts.
        groups: numbers of the prompts of each batch, of equal length; a number may stand there again, to fill up.
        few: steps that a whole batch takes.

    The trajectories are those of `generate`, without `moment`.
    """
    left: dict[Any, _Left] = {}
    for group in groups:
        run = runs._start(
            model_of(group), [ids[n] for n in group], [seeds[n] for n in group], sampler, 1, record, None, None, None,
            False, 1,
        )  # fmt: skip
        moment = run.moment
        given = (run.model, moment.state, moment.cache, sampler, None, record)
        rows = _Rows(moment.state, moment.cache, loop.empty_buffers(*given), moment.canvas)
        rows = _denoised(run.model, rows, sampler, record, 0, few)
        fresh = [row for row, number in enumerate(group) if number not in group[:row]]
        late = [row for row in fresh if not np.asarray(rows.state.done)[row] and few < sampler.max_denoising_steps]
        if len(late) < len(fresh):
            out = _finished(run, rows)
            yield from ((group[row], out, row) for row in fresh if row not in late)
        if not late:
            continue
        width = max(1, len(group) // _NARROW)
        shape = (width, *(leaf.shape[1:] for leaf in jax.tree.leaves(rows.cache)))
        held = left.setdefault(shape, _Left([], _taken(rows, rows, np.zeros(width, np.int32))))
        while late:
            at = [*range(len(held.numbers)), *(width + row for row in late[: width - len(held.numbers)])]
            held.numbers += [group[row - width] for row in at[len(held.numbers) :]]
            held.rows = _taken(held.rows, rows, np.array(at + at[-1:] * (width - len(at)), np.int32))
            late = late[sum(row >= width for row in at) :]
            if len(held.numbers) == width:
                yield from _to_the_end(model_of, ids, seeds, held, sampler, record, few)
                held.numbers = []
    for held in left.values():
        if held.numbers:
            yield from _to_the_end(model_of, ids, seeds, held, sampler, record, few)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows in the middle of a block: state, cache, what was recorded, and the canvas they began with."""

    state: Any
    cache: Any
    buffers: Any
    first: Any


@dataclasses.dataclass
class _Left:
    """Rows that go on: the numbers of their prompts; rows beyond these repeat the last."""

    numbers: list[int]
    rows: _Rows


@jax.jit
def _taken(held: _Rows, more: _Rows, at: jax.Array) -> _Rows:
    """Rows `at` of both together."""

    def take(axis: int) -> Callable:
        return lambda a, b: jnp.take(jnp.concatenate([a, b], axis), at, axis)

    parts = {name: jax.tree.map(take(0), getattr(held, name), getattr(more, name)) for name in ("state", "cache")}
    buffers = {
        name: old if name == "slot" else jax.tree.map(take(1), old, more.buffers[name])  # which steps are kept
        for name, old in held.buffers.items()
    }
    return _Rows(**parts, buffers=buffers, first=take(0)(held.first, more.first))


def _denoised(model: Any, rows: _Rows, sampler: SamplerConfig, record: Record, first: int, limit: int) -> _Rows:
    limit = min(limit, sampler.max_denoising_steps)
    given = (model, rows.state, rows.cache, rows.buffers, sampler, None, record)
    state, buffers = loop.compiled(*given, first=first, limit=limit)
    return _Rows(state, rows.cache, buffers, rows.first)


def _to_the_end(model_of, ids, seeds, held: _Left, sampler, record, few) -> Iterator[tuple[int, runs.Generation, int]]:
    width = len(held.rows.first)
    numbers = held.numbers + held.numbers[-1:] * (width - len(held.numbers))
    model, tokenizer, _ = inputs.parts(model_of(numbers))
    moment = Moment(
        state=held.rows.state, cache=held.rows.cache, pinned=None, history=np.zeros((width, 0), np.int32),
        ended=np.zeros(width, bool), spent=np.zeros(width, np.int32), sampler=sampler, num_blocks=1,
        prompts=tuple(tuple(ids[n]) for n in numbers),
    )  # fmt: skip
    run = runs._Run(model, tokenizer, moment, record, [seeds[n] for n in numbers])
    out = _finished(run, _denoised(model, held.rows, sampler, record, few, sampler.max_denoising_steps))
    yield from ((number, out, row) for row, number in enumerate(held.numbers))


def _finished(run: Any, rows: _Rows) -> runs.Generation:
    """What `generate` gives of rows that are done."""
    moment, state = run.moment, rows.state
    committed = np.asarray(state.canvas if moment.sampler.commit == "canvas" else state.argmax)
    steps = np.asarray(state.step)
    block = (np.asarray(rows.first), loop.fetched(rows.buffers), committed, steps, np.asarray(state.stop))
    history, ended = runs._commit(moment, committed)
    out = runs._finish(run, [block], history, ended, moment.spent + steps)
    return dataclasses.replace(out, trajectory=dataclasses.replace(out.trajectory, replay=None))
