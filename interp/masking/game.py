"""The game: a number for every set of units that are on. All that an estimator knows of the model.

An estimator is any function `estimator(game, *, budget, tolerance, seed, **settings) -> Found`. It may ask

    game.names                       names of the U units
    game.draws                       how many baselines there are to draw from; draw d is the same for all masks
    game.on_varies                   whether the value with all units on depends on the draw (of a noised text)
    game.values(masks, draws)        [n] of masks [n, U] (1 on, 0 off) under the draws [n]
    game.gradients(masks, draws)     [n] and its gradients [n, U]; masks may lie between 0 and 1

`MaskedGame` asks the model; `FunctionGame` any function, such as one with known Shapley values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Game(Protocol):
    """What an estimator may ask; see the module."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def draws(self) -> int: ...

    @property
    def on_varies(self) -> bool: ...

    def values(self, masks: np.ndarray, draws: np.ndarray) -> np.ndarray: ...

    def gradients(self, masks: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Found:
    """What an estimator found of U units.

    Attributes:
        scores: [U] in units of the target.
        stderr: [U] standard errors; NaN where none can be said.
        on, off: the target with all units on, and with all off (means over the draws used).
        interactions, interactions_stderr: [U, U] of pairs, symmetric; NaN for a pair that was never drawn. None if
            they were not asked for.
        kept: [U] bool, the units that are enough for the target; None for estimators that do not choose.
    """

    scores: np.ndarray
    stderr: np.ndarray
    on: float
    off: float
    interactions: np.ndarray | None = None
    interactions_stderr: np.ndarray | None = None
    kept: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class FunctionGame:
    """A game that is a function of masks.

    Attributes:
        function: masks [n, U] -> [n]; of JAX if gradients are wanted.
        names: of the units.
    """

    function: Callable[[Any], Any]
    names: tuple[str, ...]
    draws: int = 1
    on_varies: bool = False

    def values(self, masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return np.asarray(self.function(np.asarray(masks, np.float32)), np.float64)

    def gradients(self, masks: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def total(masks: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = self.function(masks)
            return jnp.sum(values), values

        grads, values = jax.grad(total, has_aux=True)(jnp.asarray(masks, jnp.float32))
        return np.asarray(values, np.float64), np.asarray(grads, np.float64)


class Counted:
    """A game that counts what it is asked, says so to a bar, and stops at a number that is not finite.

    Attributes:
        evaluations: of the game so far; a gradient counts as one.
    """

    def __init__(self, game: Game, done: Callable[[int], None] = lambda n: None) -> None:
        self.game, self.done, self.evaluations = game, done, 0
        self.names, self.draws, self.on_varies = game.names, game.draws, game.on_varies

    def values(self, masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return self.counted(self.game.values(masks, draws), masks)

    def gradients(self, masks: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, grads = self.game.gradients(masks, draws)
        if not np.isfinite(grads).all():
            raise ValueError("the target's gradient is not finite; use a method that takes none, such as 'path'")
        return self.counted(values, masks), grads

    def counted(self, values: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Values [n], counted and checked."""
        self.evaluations += len(masks)
        self.done(len(masks))
        values = np.asarray(values, np.float64)
        if values.shape != (len(masks),):
            raise ValueError(f"the target makes shape {values.shape} of {len(masks)} masks; one number each is needed")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            share = float(np.mean(masks[bad[0]]))
            raise ValueError(
                f"the target is {values[bad[0]]} with {share:.0%} of the units on; a saliency needs finite numbers: "
                "choose a target such as a log-probability or a difference of logits"
            )
        return values


def ends(game: Game, draws: Sequence[int] | np.ndarray) -> tuple[float, np.ndarray]:
    """The target with all units on (mean over the draws), and with all off under each draw."""
    ons, offs = ends_of_draws(game, draws)
    return float(ons.mean()), offs


def ends_of_draws(game: Game, draws: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The target with all units on, and with all off, each [n] under n draws; all on is asked once if that will do."""
    draws = np.asarray(draws, np.int64)
    first, count = draws if game.on_varies else draws[:1], len(game.names)
    masks = np.concatenate([np.ones((len(first), count)), np.zeros((len(draws), count))])
    found = game.values(masks, np.concatenate([first, draws]))
    return np.broadcast_to(found[: len(first)], len(draws)), found[len(first) :]


def standard_error(samples: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis; NaN for fewer than two samples."""
    if len(samples) < 2:
        return np.full(samples.shape[1:], np.nan)
    return samples.std(0, ddof=1) / np.sqrt(len(samples))
