"""Unmasking along random paths: the Shapley value of every unit, with its standard error.

The reverse process of masked diffusion switches units on in a random order. What the target gains when unit i comes on,
averaged over orders, is its Shapley value (Castro et al. 2009); a path's gains sum to f(all on) - f(all off) exactly.
Each order is also walked backwards (antithetic), under the same baseline. Pairs: what two neighbours of an order gain
together beyond what each gains alone, averaged, is the Shapley interaction index (Grabisch and Roubens 1999).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from interp.masking.game import Found, Game, standard_error


def path(
    game: Game, *, budget: int = 2048, tolerance: float | None = None, seed: int = 0, interactions: bool = False,
    enough: Callable[[np.ndarray], bool] | None = None,
) -> Found:  # fmt: skip
    """Shapley values by antithetic unmasking paths.

    Args:
        budget: evaluations at most. An order with its reverse takes 2 * U - 1 (4 * U - 3 with interactions), all
            units on is asked once (once a draw, where it depends on the draw).
        tolerance: stop as soon as every standard error is at most this.
        interactions: of pairs as well.
        enough: stop as soon as this is true of the gains [n, U] of n >= 2 orders so far; see `leads`.

    Raises:
        ValueError: the budget does not reach two orders.
    """
    count = len(game.names)
    each = 1 + 2 * (count - 1) * (2 if interactions else 1)
    most = game.draws if game.on_varies else 1  # times that all on is asked
    pairs = max((budget - most) // each, min(budget // (each + 1), most))
    if pairs < 2:
        raise ValueError(
            f"budget={budget}: two orders of {count} units and their reverses take {2 * each + min(2, most)} "
            "evaluations; give a larger budget or fewer units, or method='gradient' or 'regression'"
        )
    rng = np.random.default_rng(seed)
    may_stop = tolerance is not None or enough is not None
    room = 256 if not may_stop else 64 if each < 32 else 128  # rows between two looks at the rules, all on among them
    at_once = max(1, min(pairs, (room - 1) // each))
    gains, ons, offs, crossed = [], [], [], []
    on_by_draw: dict[int, float] = {}
    while len(gains) < pairs:
        draws = [number % game.draws for number in range(len(gains), min(pairs, len(gains) + at_once))]
        orders = [rng.permutation(count) for _ in draws]
        tops = draws if game.on_varies else [0] * len(draws)
        new = [draw for draw in dict.fromkeys(tops) if draw not in on_by_draw]
        # All on is asked together with the orders: a call of few rows costs as much as a full one.
        masks = np.concatenate([np.ones((len(new), count)), *(_masks(order, interactions) for order in orders)])
        values = game.values(masks, np.concatenate([new, np.repeat(draws, each)]).astype(np.int64))
        on_by_draw |= dict(zip(new, values.tolist(), strict=False))
        walks = values[len(new) :].reshape(len(orders), -1)
        for order, draw, walk in zip(orders, tops, walks, strict=True):
            gain, cross = _gains(order, walk, on_by_draw[draw], interactions)
            gains.append(gain)
            ons.append(on_by_draw[draw])
            offs.append(walk[0])
            crossed += cross
        if len(gains) > 1 and may_stop and _stops(np.stack(gains), tolerance, enough):
            break
    scores = np.stack(gains)
    both = _pairs(crossed, count) if interactions else (None, None)
    return Found(scores.mean(0), standard_error(scores), float(np.mean(ons)), float(np.mean(offs)), *both)


def leads(count: int = 1, sign: int = 1, errors: float = 3.0, least: int = 4) -> Callable[[np.ndarray], bool]:
    """A rule for `enough`: whether the `count` largest scores stand clear of all others.

    The smallest of them must lead every other unit by `errors` standard errors of the difference, orders being shared
    by all units. Looked at often, the rule is a little more generous than its number says.

    Args:
        sign: 1 for the largest scores, -1 for the most negative.
        least: orders before the rule is asked.
    """

    def rule(gains: np.ndarray) -> bool:
        if len(gains) < least:
            return False
        order = np.argsort(-sign * gains.mean(0), kind="stable")
        gap = sign * (gains[:, order[count - 1], None] - gains[:, order[count:]])
        return bool((gap.mean(0) > errors * standard_error(gap)).all())

    return rule


def _stops(gains: np.ndarray, tolerance: float | None, enough: Callable[[np.ndarray], bool] | None) -> bool:
    exact = tolerance is not None and standard_error(gains).max() <= tolerance
    return bool(exact or (enough is not None and enough(gains)))


def _masks(order: np.ndarray, interactions: bool) -> np.ndarray:
    """All off; then for the order and its reverse the sets between the ends, and those with neighbours swapped."""
    count = len(order)
    levels = np.arange(1, count)[:, None]
    parts = [np.zeros((1, count), bool)]
    for walk in (order, order[::-1]):
        rank = np.argsort(walk)
        parts.append(rank < levels)
        if interactions:
            parts.append((rank < levels - 1) | (rank == levels))  # of neighbours k-1, k the second alone is on
    return np.concatenate(parts).astype(np.float32)


def _gains(order: np.ndarray, values: np.ndarray, on: float, interactions: bool) -> tuple[np.ndarray, list]:
    """[U] mean gain over an order and its reverse; (i, j, gain of both beyond the sum) of neighbours."""
    count = len(order)
    walks = values[1:].reshape(2, -1)
    gains, crossed = np.zeros(count), []
    for walk, found in zip((order, order[::-1]), walks, strict=True):
        reached = np.concatenate([values[:1], found[: count - 1], [on]])
        gains[walk] += np.diff(reached) / 2
        if interactions:
            second = reached[2:] - reached[1:-1] - found[count - 1 :] + reached[:-2]
            crossed += list(zip(walk[:-1], walk[1:], second, strict=True))
    return gains, crossed


def _pairs(crossed: list, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors [U, U] of what was found of each pair."""
    total, square, times = (np.zeros((count, count)) for _ in range(3))
    for i, j, gain in crossed:
        for a, b in ((i, j), (j, i)):
            total[a, b], square[a, b], times[a, b] = total[a, b] + gain, square[a, b] + gain**2, times[a, b] + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / times
        error = np.sqrt(np.maximum(square / times - mean**2, 0) / (times - 1))
    error[times < 2] = np.nan
    return mean, error
