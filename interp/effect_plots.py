"""Effect maps as heat maps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import activations

if TYPE_CHECKING:
    from interp.effect_maps import EffectMap

WORDS = activations.WORDS | {"L": "layer", "T": "canvas position", "P": "prompt position"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One heat map: values [y, x] and the letters of its axes."""

    title: str
    values: np.ndarray
    y: str
    x: str


def panels(found: EffectMap, name: str, values: np.ndarray, most: int) -> list[Panel]:
    """The heat maps of one site, of values without the axis of rows."""
    axes, index = found.axes[name][:-1], found.index[name]
    y = "L" if "L" in axes else "R"
    x = next((a for a in axes if a in "TP"), next((a for a in axes if a not in (y, "R")), "R" if y == "L" else y))
    steps = range(len(index["R"]))
    if "R" in (x, y):
        return [Panel(name, _flat(values, axes, y, x), y, x)]
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(most, len(steps)))})
    return [Panel(f"{name}, step {index['R'][i]}", _flat(values[i], axes[1:], y, x), y, x) for i in shown]


def _flat(values: np.ndarray, axes: str, y: str, x: str) -> np.ndarray:
    """[y, x], by the entry of largest size along all other axes."""
    if y == x:
        return values.reshape(len(values), -1)[:, :1]
    order = [axes.index(y), axes.index(x), *(i for i, a in enumerate(axes) if a not in (y, x))]
    values = values.transpose(order).reshape(values.shape[order[0]], values.shape[order[1]], -1)
    largest = np.abs(np.nan_to_num(values)).argmax(-1)
    return np.take_along_axis(values, largest[..., None], -1)[..., 0]


def draw(found: EffectMap, recovery: bool, row: int | None, most: int) -> Any:
    """The figure of `EffectMap.plot`."""
    import matplotlib.pyplot as plt

    rows = []
    for name in found.effects:
        values = found.recovery(name) if recovery else found[name]
        if row is None:  # where no pair has a recovery, there is none
            count = np.isfinite(values).sum(-1)
            values = np.where(count, np.nansum(values, -1) / np.maximum(count, 1), np.nan)
        else:
            values = values[..., row]
        rows.append((name, panels(found, name, values, most)))
    columns = max(len(line) for _, line in rows)
    size = (1.5 + 3.6 * columns, 1 + 2.8 * len(rows))
    figure, grid = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    limit = max(np.nanmax(np.abs(panel.values), initial=0) for _, line in rows for panel in line) or 1.0
    for (name, line), places in zip(rows, grid, strict=True):
        for panel, place in zip(line, places[: len(line)], strict=True):
            image = place.imshow(panel.values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower")
            place.set(title=panel.title, xlabel=WORDS[panel.x], ylabel=WORDS[panel.y])
            _ticks(place, "x", found, name, panel.x)
            _ticks(place, "y", found, name, panel.y)
        for place in places[len(line) :]:
            place.set_axis_off()
    what = "share of the donor's metric recovered" if recovery else "effect on the metric"
    figure.colorbar(image, ax=grid, label=what)
    plt.close(figure)  # a notebook shows what is returned, once
    return figure


def _ticks(place: Any, which: str, found: EffectMap, name: str, letter: str) -> None:
    """Words where there are some, numbers else; few enough to be read."""
    numbers = found.index[name][letter]
    words = found.labels.get(letter)
    every = 1 if words else max(1, len(numbers) // 12)
    at = range(0, len(numbers), every)
    texts = [words[numbers[i]] if words and numbers[i] < len(words) else str(numbers[i]) for i in at]
    axis = place.xaxis if which == "x" else place.yaxis
    axis.set_ticks(list(at), texts)
    if words and which == "x":
        place.tick_params("x", rotation=90, labelsize=8)
