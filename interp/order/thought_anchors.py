"""Thought anchors: the steps at which the outcome is decided, by resampling from every step with other draws.

A run is resumed many times from one of its moments, each time under keys of its own. The spread of outcomes falls
from step to step; where it falls most, the outcome was decided there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import noise
from dgemma_jax.progress import bar
from interp.flow.saved import Saved
from interp.sweeps import rows_of


@dataclasses.dataclass(frozen=True, eq=False)
class Anchors(Saved):
    """Outcomes of resampled runs.

    Attributes:
        outcomes: [R, n, B] number of the outcome in `names`.
        plain: [B] outcome of the run itself.
        names: outcomes.
        steps: [R], from which steps.
    """

    outcomes: np.ndarray
    plain: np.ndarray
    names: tuple[Any, ...]
    steps: tuple[int, ...]

    def shares(self) -> np.ndarray:
        """[R, B, outcomes] how often each outcome came."""
        return (self.outcomes[..., None] == np.arange(len(self.names))).mean(1)

    def agreement(self) -> np.ndarray:
        """[R, B] share of branches that end as the run did."""
        return (self.outcomes == self.plain).mean(1)

    def importance(self) -> np.ndarray:
        """[R - 1, B] total variation between the outcomes from one step and from the next."""
        return np.abs(np.diff(self.shares(), axis=0)).sum(-1) / 2

    def null(self, seed: int = 0, draws: int = 200) -> np.ndarray:
        """[R - 1, B] the 95th percentile of the importance when the branches of both steps are mixed at random."""
        rng, count = np.random.default_rng(seed), self.outcomes.shape[1]
        kinds = np.arange(len(self.names))
        both = np.concatenate([self.outcomes[:-1], self.outcomes[1:]], 1)
        found = []
        for _ in range(draws):
            mixed = rng.permuted(both, axis=1)
            share = [(part[..., None] == kinds).mean(1) for part in (mixed[:, :count], mixed[:, count:])]
            found.append(np.abs(share[0] - share[1]).sum(-1) / 2)
        return np.quantile(np.stack(found), 0.95, axis=0)

    def __repr__(self) -> str:
        said = ", ".join(f"step {s}: {a:.0%}" for s, a in zip(self.steps, self.agreement().mean(1), strict=True))
        return f"{self.outcomes.shape[1]} branches from each step; they end as the run did, {said}"


def thought_anchors(
    bundle: Any, trajectory: dg.Trajectory, steps: Any, count: int = 16, block: int = 0, *,
    outcome: Callable[[np.ndarray], Any] | None = None, seed: int = 0, rows_at_once: int | None = None,
    progress: bool | None = None,
) -> Anchors:  # fmt: skip
    """Resample a run from some of its steps.

    Args:
        bundle: the model of the run.
        steps: such that every row took them.
        count: branches from each.
        outcome: of the ids [n] of an answer; hashable. By default the answer itself.
        seed: of the branches.
        rows_at_once: of a compiled run; by default all (count + 1) * B of a step.

    Raises:
        ValueError: a step that was not taken, no branch, or fewer rows at once than the run has.
    """
    chosen = tuple(int(s) for s in np.atleast_1d(steps))
    taken = int(trajectory.num_steps[block].min())
    if not chosen or min(chosen) < 0 or max(chosen) >= taken or count < 1:
        raise ValueError(f"steps={list(chosen)}, count={count}: steps are 0..{taken - 1}, and a branch is needed")
    outcome = outcome or (lambda ids: tuple(ids.tolist()))
    rows = trajectory.committed.shape[1]
    if rows_at_once is not None and rows_at_once < rows:
        raise ValueError(f"rows_at_once={rows_at_once}: a branch of this run has {rows} rows")
    size = count + 1 if rows_at_once is None else min(count + 1, rows_at_once // rows)
    calls = -(-(count + 1) // size)
    ends, found, quiet = [], [], dg.Record.nothing()
    with bar("branches", len(chosen) * calls, progress) as done:
        for number, step in enumerate(chosen):
            moment = rows_of(trajectory.moment(block, step), size)
            drawn = np.random.default_rng([seed, number]).integers(0, 2**32, count * rows)
            seeds = np.pad(np.r_[np.zeros(rows, int), drawn], (0, (calls * size - count - 1) * rows))
            branches = []
            for call in range(calls):
                fresh = noise.row_keys(seeds.reshape(calls, -1)[call])
                # The first copy keeps the keys of the run: what it did itself.
                own = jnp.arange(size * rows) < (rows if call == 0 else 0)
                keys = jnp.where(own, moment.keys, fresh)
                tokens = dg.resume(bundle, moment.replace(keys=keys), record=quiet).tokens.reshape(size, rows, -1)
                branches += [[outcome(ids) for ids in branch] for branch in tokens]
                done(1)
            ends, found = branches[0], [*found, branches[1 : count + 1]]
    names = tuple(dict.fromkeys([*ends, *(o for step in found for branch in step for o in branch)]))
    number_of = {name: number for number, name in enumerate(names)}
    outcomes = np.array([[[number_of[o] for o in branch] for branch in step] for step in found])
    return Anchors(outcomes, np.array([number_of[o] for o in ends]), names, chosen)
