"""What a sweep is given, checked: pairs of prompts, positions, steps, the metric; and the unpatched runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.moment import Moment
from interp.gates import table
from interp.metrics import Metric
from interp.rows import as_data


@dataclasses.dataclass(frozen=True)
class Run:
    """An unpatched run of P prompts."""

    ids: list[list[int]]
    out: dg.Generation
    _found: dict[int, Moment] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Any, ids: list[list[int]], seeds: list[int], **options: Any) -> Run:
        return cls(ids, dg.generate(bundle, ids, seed=seeds, record=dg.Record.nothing(), **options))

    @property
    def num_steps(self) -> np.ndarray:
        """[P] steps taken in the first block."""
        return self.out.trajectory.num_steps[0]

    def at(self, step: int) -> Moment:
        """Before a step of the first block; a row that has ended stands as at its end."""
        step = min(step, int(self.num_steps.max()))
        if step not in self._found:
            near = max((found for found in self._found if found < step), default=None)
            trajectory = self.out.trajectory
            self._found[step] = (
                trajectory.moment(0, step) if near is None else trajectory.replay.onward(self._found[near], step)
            )
        return self._found[step]

    @property
    def moment(self) -> Moment:
        return self.at(0)


def pairs(clean: Any, corrupt: Any, source: str, tokenizer: Any, vocab_size: int) -> tuple[list, list]:
    """Ids of both sides, pairs of equal length."""
    if corrupt is None and source == "donor":
        raise ValueError("corrupt is None: give the other prompts, or source='zero' or another that needs no donor")
    sides = [inputs.to_ids(p, tokenizer, vocab_size) for p in (clean, clean if corrupt is None else corrupt)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{len(sides[0])} clean and {len(sides[1])} corrupt prompts; give them in pairs")
    for row, (a, b) in enumerate(zip(*sides, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"pair {row} has {len(a)} clean and {len(b)} corrupt tokens; places correspond only between prompts of "
                "equal length: change words one for one"
            )
    return sides[0], sides[1]


def chosen(spec: Any, size: int, what: str) -> list[int]:
    """The numbers that a choice means; at least one."""
    found = np.flatnonzero(np.asarray(table(spec, size, what))).tolist()
    if not found:
        raise ValueError(f"{what}={spec!r} chooses none")
    return found


def steps_of(steps: Any, sampler: SamplerConfig, *runs: Run) -> tuple[int, ...]:
    """The chosen steps, which all rows of both runs took."""
    taken = min(int(run.num_steps.min()) for run in runs)
    if steps is None:
        return tuple(range(taken))
    found = np.flatnonzero(np.asarray(table(steps, sampler.max_denoising_steps, "steps")))
    if not len(found) or found[-1] >= taken:
        raise ValueError(
            f"steps={steps!r}, but the shortest run took {taken}: choose among 0..{taken - 1}, or give a sampler with "
            "early_stop=False"
        )
    return tuple(map(int, found))


def check_metric(metric: Metric, effect: str, pairs: int, logits: tuple[int, int], tokens: int) -> None:
    """Raise a ValueError unless the metric makes [P] of what it will be given."""
    given = np.zeros((pairs, tokens), np.int32) if effect == "text" else np.zeros((1,), np.float32)
    try:
        if effect == "text":
            shape = np.shape(metric(given))
        else:
            shape = jax.eval_shape(as_data(metric), jax.ShapeDtypeStruct((pairs, *logits), np.float32)).shape
    except (TypeError, IndexError, AttributeError) as error:
        what = "tokens [P, n]" if effect == "text" else "logits [P, C, V]"
        raise ValueError(f"the metric fails on {what}, which effect={effect!r} gives: {error}") from error
    if shape != (pairs,):
        raise ValueError(f"the metric makes shape {shape} of {pairs} pair(s); one number a pair is needed, [{pairs}]")
