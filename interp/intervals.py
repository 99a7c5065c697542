"""95 % intervals over prompts: the prompt is what is drawn at random, its runs under several seeds are a cluster.

Values are [..., N], one number a prompt (the mean of its runs); results are (low, high), each [...].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
RESAMPLES = 1999
MANY = 400  # prompts: from here on the mean is normal, and a bootstrap, RESAMPLES times as large, is not needed

Interval = tuple[np.ndarray, np.ndarray]


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
    for number, row in enumerate(flat):
        row = row[~np.isnan(row)]
        if len(row):
            bounds[:, number] = closed(row) if is_closed(row) else _bootstrap(row)
    low, high = bounds.reshape(2, *rows.shape[:-1])
    return low, high


def _bootstrap(row: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    if len(row) > MANY:
        return stats.norm.interval(LEVEL, row.mean(), stats.sem(row))
    settings = dict(n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0))
    found = stats.bootstrap((row,), np.mean, **settings)
    return found.confidence_interval.low, found.confidence_interval.high
