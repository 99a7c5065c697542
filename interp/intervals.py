"""95 % intervals over prompts: the prompt is what is drawn at random, its runs under several seeds are a cluster.

Values are [..., N], one number a prompt (the mean of its runs); results are (low, high), each [...].
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np

LEVEL = 0.95
RESAMPLES = 1999
MOST_DRAWN = 1 << 23  # numbers that a bootstrap holds at a time
MANY = 400  # prompts: from here on the mean is normal, and a bootstrap, RESAMPLES times as large, is not needed

Interval = tuple[np.ndarray, np.ndarray]


def by_prompt(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """[prompts] mean over the runs of each prompt, NaN without any; of values [.., runs] with the numbers [runs] of
    their prompts, NaN left out."""
    runs = np.asarray(values, float).reshape(-1, len(number))
    there = np.isfinite(runs)
    count = np.bincount(number, there.sum(0))
    total = np.bincount(number, np.where(there, runs, 0).sum(0))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def of_shares(shares: np.ndarray) -> Interval:
    """Of a mean share: Wilson's where each prompt has 0 or 1, else a bootstrap over prompts."""
    return _each(shares, _wilson, lambda row: bool(np.isin(row, (0, 1)).all()))


def of_means(values: np.ndarray) -> Interval:
    """Of a mean of any numbers: a bootstrap over prompts; no width where all are equal. Prompts of NaN are left out."""
    return _each(values, lambda row: (row.mean(), row.mean()), _is_constant)


def of_differences(differences: np.ndarray) -> Interval:
    """Of a mean difference of two shares of the same prompts: a bootstrap over prompts.

    Where no prompt differs from the others a bootstrap has no width. The interval there is as wide as the share of
    other prompts that may have been missed: Wilson's upper limit of 0 in N.
    """

    def around(row: np.ndarray) -> tuple[float, float]:
        missed = _wilson(np.zeros(len(row)))[1]
        return max(-1.0, row[0] - missed), min(1.0, row[0] + missed)

    return _each(differences, around, _is_constant)


def _is_constant(row: np.ndarray) -> bool:
    return bool((row == row[0]).all())


def _wilson(row: np.ndarray) -> tuple[float, float]:
    from scipy import stats  # takes a while to import

    found = stats.binomtest(int(row.sum()), len(row)).proportion_ci(LEVEL, "wilson")
    return found.low, found.high


def _each(values: np.ndarray, closed: Callable, is_closed: Callable[[np.ndarray], bool]) -> Interval:
    """The interval of every row: in closed form where there is one, else by a bootstrap of fixed seed."""
    rows = np.asarray(values, float)
    flat = rows.reshape(-1, rows.shape[-1])
    bounds = np.full((2, len(flat)), np.nan)
    drawn: dict[int, list[int]] = collections.defaultdict(list)  # by number of prompts
    there = ~np.isnan(flat)
    for number, row in enumerate(flat):
        own = row[there[number]]
        if len(own) and is_closed(own):
            bounds[:, number] = closed(own)
        elif len(own):
            drawn[len(own)].append(number)
    for count, numbers in drawn.items():
        at_once = max(1, MOST_DRAWN // (RESAMPLES * count))
        for some in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
            bounds[:, some] = _bootstrap(np.stack([flat[number][there[number]] for number in some]))
    low, high = bounds.reshape(2, *rows.shape[:-1])
    return low, high


def _bootstrap(rows: np.ndarray) -> Interval:
    """Of rows [n, N], each drawn with the same numbers, as it would be alone."""
    from scipy import stats

    if rows.shape[1] > MANY:
        return stats.norm.interval(LEVEL, rows.mean(1), stats.sem(rows, 1))
    settings = dict(n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0))
    found = stats.bootstrap((rows,), np.mean, axis=-1, **settings)
    return found.confidence_interval.low, found.confidence_interval.high
