"""Numbers of every step of every row, with their mean over rows and a plot."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np

from interp import intervals
from interp.flow.saved import Saved


@dataclasses.dataclass(frozen=True, eq=False)
class StepCurves(Saved):
    """Curves over the denoising steps.

    Attributes:
        values: [J, R, B] by name; NaN where a row took no step.
        unit: of the values.
        about: one line on what they are.
    """

    values: dict[str, np.ndarray]
    unit: str
    about: str

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(f"no curve {name!r}; there are {', '.join(self.values)}")
        return self.values[name]

    def aligned(self, points: int = 20) -> StepCurves:
        """The curves over the share of its steps that a row has taken, [J, points, B]: first step 0, last step 1.

        Rows that stop early are then compared at the same share, not at the same number.
        """
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}")
        return dataclasses.replace(
            self, values={n: _resampled(v, points) for n, v in self.values.items()}, about=f"{self.about}, aligned"
        )

    def mean(self, name: str) -> np.ndarray:
        """[J, R] mean over rows; warns where rows are missing at some of the steps."""
        values = self[name]
        there = np.isfinite(values)
        count = there.sum(-1)
        if ((count > 0) & (count < there.any(1).sum(-1)[:, None])).any():
            warnings.warn(
                "rows stop at different steps, so later means are over fewer rows: use .aligned(), or a sampler with "
                "early_stop=False",
                stacklevel=2,
            )
        return np.where(count > 0, np.nansum(values, -1) / np.maximum(count, 1), np.nan)

    def plot(self, block: int = 0) -> Any:
        """A line for each curve, with the 95 % interval over rows; returns the figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, values in self.values.items():
            values = values[block]
            values = values[np.isfinite(values).any(-1)]
            middle, (low, high) = np.nanmean(values, -1), intervals.of_means(values)
            axes.plot(middle, label=name)
            axes.fill_between(range(len(middle)), low, high, alpha=0.2, linewidth=0)
        axes.set(xlabel="step", ylabel=self.unit, title=self.about)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        blocks, steps, rows = next(iter(self.values.values())).shape
        return f"{self.about}: {', '.join(self.values)} ({self.unit}); {blocks} block(s), {steps} steps, {rows} row(s)"


def of_rows(values_JRB: np.ndarray, valid_JRB: np.ndarray) -> np.ndarray:
    """Values as float, NaN where a row took no step."""
    return np.where(valid_JRB, np.asarray(values_JRB, float), np.nan)


def _resampled(values: np.ndarray, points: int) -> np.ndarray:
    out = np.full((values.shape[0], points, values.shape[2]), np.nan)
    for block, row in np.ndindex(values.shape[0], values.shape[2]):
        own = values[block, :, row]
        own = own[np.isfinite(own)]
        if len(own):
            out[block, :, row] = np.interp(np.linspace(0, len(own) - 1, points), np.arange(len(own)), own)
    return out
