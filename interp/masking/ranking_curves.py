"""A ranking put to the test: what the target does as units come on, or go off, in its order.

Deleting in one order visits the same masks as inserting in the other, so that every ranking is measured together with
its reverse, and masks that rankings share are asked once. Values are normalised: 0 with all units off, 1 with all on.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from interp.masking.game import Game

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of units, for comprehensiveness and sufficiency (DeYoung et al. 2020)


@dataclasses.dataclass(frozen=True)
class Curves:
    """K rankings of U units.

    Attributes:
        insertion: [K, U + 1] the target, normalised, with the first k units of the ranking on.
        deletion: [K, U + 1] the same with the first k off.
        alone: [U] what the target loses, in its own units, when one unit is off: the exact patch.
        on, off: the target at both ends, in its own units, mean over draws.
    """

    insertion: np.ndarray
    deletion: np.ndarray
    alone: np.ndarray
    on: float
    off: float

    @property
    def areas(self) -> np.ndarray:
        """[K, 4] under insertion and deletion of the ranking, then of its reverse."""
        ins, gone = _area(self.insertion), _area(self.deletion)
        return np.stack([ins, gone, gone, ins], 1)

    @property
    def comprehensiveness(self) -> np.ndarray:
        """[K] share of the change that is lost with the top units off, mean over `SHARES` of units."""
        return np.mean(1 - self.deletion[:, self._kept()], 1)

    @property
    def sufficiency(self) -> np.ndarray:
        """[K] share of the change that is lost with the top units alone on; lower is better."""
        return np.mean(1 - self.insertion[:, self._kept()], 1)

    def facing(self, signed: np.ndarray) -> Curves:
        """The same with rankings [K] of signed scores turned round if the target falls as units come on.

        What made it fall is then what lowers it most, the last of such a ranking.
        """
        turned = (np.asarray(signed) & (self.on < self.off))[:, None]
        return dataclasses.replace(
            self, insertion=np.where(turned, self.deletion[:, ::-1], self.insertion),
            deletion=np.where(turned, self.insertion[:, ::-1], self.deletion),
        )  # fmt: skip

    def _kept(self) -> np.ndarray:
        return np.ceil(np.array(SHARES) * (self.insertion.shape[1] - 1)).astype(int)

    def on_grid(self, points: int) -> np.ndarray:
        """[K, 2, points] both curves at even fractions of the units."""
        at, own = np.linspace(0, 1, points), np.linspace(0, 1, self.insertion.shape[1])
        return np.array([[np.interp(at, own, row) for row in pair]
                         for pair in zip(self.insertion, self.deletion, strict=True)])  # fmt: skip


def curves(game: Game, orders: np.ndarray) -> Curves:
    """Insertion and deletion along orders [K, U] (units, first to last), averaged over the game's draws."""
    orders = np.asarray(orders)
    count, units = orders.shape
    ranks = np.argsort(orders, 1)
    levels = np.arange(units + 1)[:, None]
    inserted = ranks[:, None] < levels
    asked = np.concatenate([inserted, ~inserted]).reshape(-1, units)
    asked = np.concatenate([asked, ~np.eye(units, dtype=bool)])
    masks, where = np.unique(asked, axis=0, return_inverse=True)
    draws = game.draws
    values = game.values(np.tile(masks.astype(np.float32), (draws, 1)), np.repeat(np.arange(draws), len(masks)))
    found = values.reshape(draws, -1).mean(0)[where.ravel()]
    on, off = float(found[units]), float(found[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(on != off, (found[:-units] - off) / (on - off), np.nan)
    both = shares.reshape(2, count, units + 1)
    return Curves(both[0], both[1], on - found[-units:], on, off)


def untested(count: int, units: int) -> Curves:
    """NaN for `count` rankings."""
    nothing = np.full((count, units + 1), np.nan)
    return Curves(nothing, nothing, np.full(units, np.nan), float("nan"), float("nan"))


def order_of(scores: np.ndarray) -> np.ndarray:
    """Units from the largest score down; the first first among equals."""
    return np.argsort(-np.asarray(scores), kind="stable")


def _area(curve: np.ndarray) -> np.ndarray:
    return (curve[..., 1:] + curve[..., :-1]).mean(-1) / 2
