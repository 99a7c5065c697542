"""Intervals of g-mean²: the cross-fitted bootstrap of the intervention archetype, and one over instances for others.

All monitors are scored on the same draws, so that their differences have intervals too.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from interp.monitor import gmean


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Settings of the intervals; the defaults are those of the official runs.

    Attributes:
        draws: n_bootstrap.
        selection_share: rows of each (instance, arm) that decide eligibility, rounded up.
        kept_share: instances that take part in a draw (group_keep_frac).
        wald_k: standard errors that an effect must exceed on the selection fold.
        seed: of all draws.
    """

    draws: int = 200
    selection_share: float = 0.6
    kept_share: float = 1.0
    wald_k: float = 1.96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or not 0 < self.selection_share < 1 or not 0 < self.kept_share <= 1 or self.wald_k < 0:
            raise ValueError(
                f"needed are draws >= 1, selection_share in (0, 1), kept_share in (0, 1] and wald_k >= 0; got {self}"
            )


def cross_fitted(
    instance: np.ndarray, arm: np.ndarray, outcome: np.ndarray, verdicts: np.ndarray, settings: Bootstrap
) -> np.ndarray:
    """Mean g-mean² of the eligible instances, [M, draws]; NaN in draws that have none.

    In each draw the rows of every (instance, arm) are split in two folds and drawn anew with replacement within
    each. An instance is eligible if its effect passes Wald's gate on the one fold and is positive on the other, on
    which it is then scored.

    Args:
        instance, arm, outcome: [R] of the rollouts.
        verdicts: [M, R] bool of the monitors.
    """
    rng = np.random.default_rng(settings.seed)
    cells = [[np.flatnonzero((instance == i) & (arm == x)) for x in (False, True)] for i in np.unique(instance)]
    if any(len(rows) < 2 for pair in cells for rows in pair):
        raise ValueError("cross-fitting needs at least 2 rollouts of each instance in each arm; sample more")
    out = rng.permuted(np.tile(np.arange(len(cells)), (settings.draws, 1)), axis=1)  # who takes part, by draw
    taking = out < math.ceil(settings.kept_share * len(cells))
    total, count = np.zeros((len(verdicts), settings.draws)), np.zeros(settings.draws)
    for number, pair in enumerate(cells):
        (chosen0, scored0), (chosen1, scored1) = (_folds(rng, rows, settings) for rows in pair)
        passed = gmean.passes(outcome[chosen0], outcome[chosen1], settings.wald_k)
        each = gmean.of_arms(outcome[scored0], outcome[scored1], verdicts[:, scored0], verdicts[:, scored1]).gmean2
        eligible = taking[:, number] & passed & ~np.isnan(each[0])
        total += np.where(eligible, each, 0)
        count += eligible
    return total / np.where(count > 0, count, np.nan)


def _folds(rng: np.random.Generator, rows: np.ndarray, settings: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """Rows [draws, n] of the two folds: a random split, each part drawn anew with replacement; neither is empty."""
    mixed = rng.permuted(np.tile(rows, (settings.draws, 1)), axis=1)
    size = min(math.ceil(settings.selection_share * len(rows)), len(rows) - 1)
    return tuple(
        np.take_along_axis(fold, rng.integers(0, fold.shape[1], fold.shape), 1)
        for fold in (mixed[:, :size], mixed[:, size:])
    )


def over_instances(
    instance: np.ndarray, outcome: np.ndarray, verdicts: np.ndarray, settings: Bootstrap
) -> np.ndarray:
    """g-mean² of all rows, [M, draws], with instances drawn anew: rollouts of one prompt are not independent."""
    rng = np.random.default_rng(settings.seed)
    groups = [np.flatnonzero(instance == i) for i in np.unique(instance)]
    found = np.full((len(verdicts), settings.draws), np.nan)
    for draw in range(settings.draws):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        found[:, draw] = [gmean.of_property(outcome[rows], verdict[rows]).gmean2 for verdict in verdicts]
    return found
