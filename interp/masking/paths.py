"""Unmasking along random paths: the Shapley value of every unit, with its standard error.

The reverse process of masked diffusion switches units on in a random order. What the target gains when unit i comes on,
averaged over orders, is its Shapley value (Castro et al. 2009); a path's gains sum to f(all on) - f(all off) exactly.
Each order is also walked backwards (antithetic), under the same baseline. Pairs: what two neighbours of an order gain
together beyond what each gains alone, averaged, is the Shapley interaction index (Grabisch and Roubens 1999).
"""

from __future__ import annotations

import numpy as np

from interp.masking.game import Found, Game, standard_error


def path(
    game: Game, *, budget: int = 2048, tolerance: float | None = None, seed: int = 0, interactions: bool = False
) -> Found:
    """Shapley values by antithetic unmasking paths.

    Args:
        budget: evaluations at most. An order with its reverse takes 2 * U - 1 (4 * U - 3 with interactions).
        tolerance: stop as soon as every standard error is at most this.
        interactions: of pairs as well.

    Raises:
        ValueError: the budget does not reach two orders.
    """
    count = len(game.names)
    each = 1 + 2 * (count - 1) * (2 if interactions else 1)
    pairs = (budget - 1) // each
    if pairs < 2:
        raise ValueError(
            f"budget={budget}: two orders of {count} units and their reverses take {2 * each + 1} evaluations; give a "
            "larger budget or fewer units, or method='gradient' or 'regression'"
        )
    rng = np.random.default_rng(seed)
    at_once = max(1, min(pairs, 256 // each))
    gains, offs, crossed = [], [], []
    on = float(game.values(np.ones((1, count)), np.zeros(1, np.int64))[0])
    while len(gains) < pairs:
        fresh = range(len(gains), min(pairs, len(gains) + at_once))
        draws = [number % game.draws for number in fresh]
        orders = [rng.permutation(count) for _ in fresh]
        masks = [_masks(order, interactions) for order in orders]
        values = game.values(np.concatenate(masks), np.repeat(draws, [len(m) for m in masks]))
        for order, found in zip(orders, values.reshape(len(orders), -1), strict=True):
            gain, cross = _gains(order, found, on, interactions)
            gains.append(gain)
            offs.append(found[0])
            crossed += cross
        if tolerance is not None and len(gains) > 1 and standard_error(np.stack(gains)).max() <= tolerance:
            break
    scores = np.stack(gains)
    both = _pairs(crossed, count) if interactions else (None, None)
    return Found(scores.mean(0), standard_error(scores), on, float(np.mean(offs)), *both)


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
