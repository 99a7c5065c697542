"""Maps of effects over places of a run: what sweeps, attribution and knock-outs return."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import numpy as np

from interp import array_files, effect_plots
from interp.activations import WORDS

PLACES = WORDS | {"L": "layer", "P": "prompt position"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EffectMap:
    """How far an intervention at each place moved a metric.

    `effects["layers.*.resid_post"]` has the axes `axes["layers.*.resid_post"]`, always with R (steps) first and B
    (rows: pairs of prompts) last, and between them L (layers), T (canvas positions) or P (positions of the prompt), N
    or K (heads), E (experts), as the sweep had them. An effect is metric(with the intervention) - metric(without), in
    the units of the metric.

    Attributes:
        effects: float32 arrays by folded site name ("layers.*.resid_post", "canvas").
        axes: letters of each array's axes.
        index: for each site, the numbers along each axis but B, by letter: {"R": [0, 5], "L": [0, 1, 2], ...}.
        base: [R, B] metric of the run that was changed, without a change.
        donor: [R, B] metric of the run that gave the values; None where there is none.
        noise: [R, B] standard deviation of `base` over other seeds, the floor under which an effect says nothing;
            None if it was not asked for.
        method: in words: "patch", "attribution (integrated, 5 points)".
        labels: words for all numbers of an axis, by letter: {"P": ["<bos>", "recall", ...]}; of row 0.
    """

    effects: dict[str, np.ndarray]
    axes: dict[str, str]
    index: dict[str, dict[str, list[int]]]
    base: np.ndarray
    donor: np.ndarray | None = None
    noise: np.ndarray | None = None
    method: str = ""
    labels: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, effect in self.effects.items():
            axes, index = self.axes[name], self.index[name]
            sizes = tuple(len(index[a]) for a in axes[:-1])
            if effect.shape[:-1] != sizes or axes[0] != "R" or axes[-1] != "B" or set(index) != set(axes[:-1]):
                raise ValueError(f"{name} has shape {effect.shape}, axes {axes} and an index of {sizes}")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.effects:
            raise KeyError(f"{name!r} was not swept; swept are {', '.join(self.effects)}")
        return self.effects[name]

    @property
    def size(self) -> int:
        """Interventions, all rows counted."""
        return sum(effect.size for effect in self.effects.values())

    def recovery(self, name: str) -> np.ndarray:
        """The effect as a share of the way from the changed run to the donor: 0 nothing, 1 all of it.

        NaN where the two runs do not differ in the metric by more than 1e-6.
        """
        if self.donor is None:
            raise ValueError("there is no donor run here, hence no recovery; read the effects")
        gap_RB = self.donor - self.base
        gap_RB = np.where(np.abs(gap_RB) > 1e-6, gap_RB, np.nan)
        effect = self[name]
        return effect / gap_RB.reshape(len(gap_RB), *[1] * (effect.ndim - 2), gap_RB.shape[1])

    def top(self, count: int = 10) -> list[tuple[str, dict[str, int], float]]:
        """The places with the largest mean effect over rows, by size: (site, {"step": 3, "layer": 2, ...}, effect)."""
        found = []
        for name, effect in self.effects.items():
            mean = effect.mean(-1)
            for at in np.argsort(-np.abs(mean), None)[:count]:
                place = np.unravel_index(at, mean.shape)
                numbers = {
                    PLACES[a]: self.index[name][a][i] for a, i in zip(self.axes[name][:-1], place, strict=True)
                }
                found.append((name, numbers, float(mean[place])))
        return sorted(found, key=lambda entry: -abs(entry[2]))[:count]

    def flat(self) -> np.ndarray:
        """Every effect in one vector, in the order of the sites: to compare two maps of the same places."""
        return np.concatenate([self.effects[name].ravel() for name in self.effects])

    def plot(self, *, recovery: bool = False, row: int | None = None, most: int = 6) -> Any:
        """Heat maps, one line of them a site: layer x position for each step, or step x position without layers.

        Axes beyond these two are shown by the entry of largest size along them. All maps share one scale.

        Args:
            recovery: show the share of the way to the donor's metric instead of the metric's own units.
            row: of the pairs; None shows their mean.
            most: steps shown at most, evenly chosen.

        Returns:
            A matplotlib figure.
        """
        return effect_plots.draw(self, recovery, row, most)

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {f"effects/{name}": effect for name, effect in self.effects.items()} | {"base": self.base}
        arrays |= {name: getattr(self, name) for name in ("donor", "noise") if getattr(self, name) is not None}
        about = {"axes": self.axes, "index": self.index, "method": self.method, "labels": self.labels}
        return array_files.write(path, arrays, {"kind": "effect map"} | about)

    @classmethod
    def load(cls, path: Any) -> EffectMap:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "effect map")
        effects = {n.removeprefix("effects/"): a for n, a in arrays.items() if n.startswith("effects/")}
        return cls(
            effects=effects, axes=about["axes"], index=about["index"], base=arrays["base"], donor=arrays.get("donor"),
            noise=arrays.get("noise"), method=about["method"], labels=about["labels"],
        )  # fmt: skip

    def _repr_html_(self) -> str:
        lines = [html.escape(line) for line in repr(self).splitlines()]
        rows = [("site", "place", "mean effect")]
        for name, place, effect in self.top():
            rows.append((name, ", ".join(f"{word} {number}" for word, number in place.items()), f"{effect:.4g}"))
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return f"<p>{'<br>'.join(lines)}</p><table><tr>{'</tr><tr>'.join(cells)}</tr></table>"

    def __repr__(self) -> str:
        lines = [f"{self.method or 'effects'}: {self.size} interventions, metric {float(np.mean(self.base)):.4g}"]
        if self.donor is not None:
            lines[0] += f", of the donor {float(np.mean(self.donor)):.4g}"
        if self.noise is not None:
            lines[0] += f", noise floor {float(np.mean(self.noise)):.2g}"
        lines += [f"{name}  {self.axes[name]}  {list(effect.shape)}" for name, effect in self.effects.items()]
        return "\n".join(lines)
