"""What all statistics read: arrays of a record, what counts as content, the states fed into its steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp.rows import Run

_RECORDS = {"top_ids": "top_k=8", "top_probs": "top_k=8", "fn": "fn=interp.TokenWatch(...)"}


@dataclasses.dataclass(frozen=True)
class Specials:
    """Ids that are not content.

    Attributes:
        ends: end an answer; nothing after the first of them counts.
        others: padding, begin, marks of turns, wherever they stand.
    """

    ends: tuple[int, ...]
    others: tuple[int, ...] = ()

    @classmethod
    def of(cls, bundle: Any) -> Specials:
        """Those of a bundle: end tokens of its sampler, special ids of its tokenizer."""
        _, tokenizer, sampler = inputs.parts(bundle)
        config = of(bundle).config
        marks = {config.pad_token_id, config.bos_token_id, sampler.pad_token_id} | set(
            getattr(tokenizer, "special_ids", ())
        )
        ends = set(sampler.eos_token_ids)
        return cls(tuple(sorted(ends)), tuple(sorted(marks - ends)))

    @property
    def closing(self) -> tuple[int, ...]:
        """Ends and others: what a position after the answer holds."""
        return tuple(sorted({*self.ends, *self.others}))


def kept(trajectory: dg.Trajectory, *names: str) -> list[np.ndarray]:
    """Arrays of a trajectory by name.

    Raises:
        ValueError: the record left one out; says which record keeps it.
    """
    if not isinstance(trajectory, dg.Trajectory):
        raise ValueError(f"needed is a trajectory (out.trajectory of dg.generate), got {type(trajectory).__name__}")
    for name in names:
        if getattr(trajectory, name) is None:
            wanted = _RECORDS.get(name, f"{name}=True")
            raise ValueError(f"the record left {name!r} out; generate with record=dg.Record({wanted})")
    return [getattr(trajectory, name) for name in names]


def last_steps(trajectory: dg.Trajectory) -> np.ndarray:
    """[J, B] index of the last step taken; -1 where a row took none."""
    valid_JRB = trajectory.valid
    last_JB = valid_JRB.shape[1] - 1 - valid_JRB[:, ::-1].argmax(1)
    return np.where(valid_JRB.any(1), last_JB, -1)


def at_last(trajectory: dg.Trajectory, values: np.ndarray) -> np.ndarray:
    """[J, B, ...] of values [J, R, B, ...] at the last step of each row."""
    last_JB = np.maximum(last_steps(trajectory), 0)
    blocks, rows = np.indices(last_JB.shape)
    return values[blocks, last_JB, rows]


def content(trajectory: dg.Trajectory, specials: Specials, skip: int = 0) -> np.ndarray:
    """[J, B, C] bool: positions of the answer, before its end and without special tokens.

    Args:
        skip: positions at the start of the answer left out: a chat template may open with a header.
    """
    final_JBC = trajectory.committed
    blocks, rows, length = final_JBC.shape
    answer_BT = joined(final_JBC)
    ended_BT = np.cumsum(np.isin(answer_BT, specials.ends), 1) > 0
    own_BT = ~ended_BT & ~np.isin(answer_BT, specials.others)
    own_BT[:, :skip] = False
    own_JBC = own_BT.reshape(rows, blocks, length).swapaxes(0, 1)
    return own_JBC & (trajectory.num_steps > 0)[..., None]


def of_rows(trajectory: dg.Trajectory, rows: Any) -> dg.Trajectory:
    """The record of some rows alone: an array of row numbers. It recomputes no moments."""
    rows = np.asarray(rows)
    by_block = {"start", "committed", "num_steps", "stop"}  # [J, B, ...]; all others are [J, R, B, ...]
    changed = {}
    for field in dataclasses.fields(trajectory):
        value = getattr(trajectory, field.name)
        if field.name in ("replay", "site_steps") or value is None:
            continue
        axis = 1 if field.name in by_block else 2
        changed[field.name] = jax.tree.map(lambda a, axis=axis: np.take(a, rows, axis), value)
    return dataclasses.replace(trajectory, **changed, replay=None)


def joined(values_JBC: np.ndarray) -> np.ndarray:
    """[B, J * C]: the blocks of each row one after the other."""
    return np.moveaxis(values_JBC, 0, 1).reshape(values_JBC.shape[1], -1)


def run_of_block(trajectory: dg.Trajectory, block: int = 0) -> Run:
    """The states fed into the steps of a block, as `interp.rows` takes them.

    Raises:
        ValueError: the record has no tokens or no S, or the trajectory was loaded from a file.
    """
    tokens, soft = kept(trajectory, "tokens", "soft")
    moment = trajectory.moment(block, 0)
    steps = tuple(range(int(trajectory.num_steps[block].max())))

    def fed(first: Any, after: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(first)[None], after[block, : len(steps) - 1]])

    return Run(moment=moment, canvas=fed(moment.canvas, tokens), soft=fed(moment.soft, soft), steps=steps)


def last_of(run: Run, trajectory: dg.Trajectory, block: int = 0) -> Any:
    """What goes into the last step of each row; rows end at different steps."""
    last_B = np.maximum(last_steps(trajectory)[block], 0)
    rows = np.arange(len(last_B))
    at = run.at(0)
    state = at.state.replace(
        canvas=jnp.asarray(run.canvas[last_B, rows]), soft=jnp.asarray(run.soft[last_B, rows]),
        step=jnp.asarray(last_B, jnp.int32),
    )  # fmt: skip
    return dataclasses.replace(at, state=state)
