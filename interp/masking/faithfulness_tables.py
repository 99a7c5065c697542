"""What a test of faithfulness found: a table of methods, who is ahead of whom, curves; saved and loaded."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np

from interp import array_files
from interp.intervals import of_shares

GRID = 21  # points of a curve that is kept
LEAST = 0.1  # of the change that is usual for a task
_KIND = "faithfulness"
_WORDS = ("methods", "replacements", "layers", "tasks")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness:
    """Maps of M methods on N cases under R replacements, beside K random rankings.

    Attributes:
        areas: [N, R, M, 4] under insertion and deletion, then of the reverse ranking. Of the target, 0 with all units
            off and 1 with all on.
        random: [N, R, K, 2] under insertion and deletion of random rankings.
        curves: [N, R, M + 1, 2, 21] insertion and deletion at even shares of the units; the last is the mean of the
            random rankings.
        comprehensiveness, sufficiency: [N, R, M] shares of the change lost.
        patching: [N, R, M] rank correlation with the exact effect of each unit.
        change: [N, R] the target with all units on minus all off, in its own units.
        gap: [N, M] of completeness, as a share of the change.
        planted: [N, M] 1 where the known cause was found, NaN where none is known.
        evaluations, seconds: [N, M] that a map took.
        weights: [S, L, M] rank correlation with the map of shuffled layers, of `layers` from the top.
        target, seeds: [S, M] with the maps of another target, of another seed.
        methods, replacements, layers, tasks: names of the axes; tasks of each case.
        about: settings.
    """

    areas: np.ndarray
    random: np.ndarray
    curves: np.ndarray
    comprehensiveness: np.ndarray
    sufficiency: np.ndarray
    patching: np.ndarray
    change: np.ndarray
    gap: np.ndarray
    planted: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray
    weights: np.ndarray
    target: np.ndarray
    seeds: np.ndarray
    methods: tuple[str, ...]
    replacements: tuple[str, ...]
    layers: tuple[int, ...]
    tasks: tuple[str, ...]
    about: dict[str, Any]

    @property
    def tells(self) -> np.ndarray:
        """[N, R] whether taking all units away changed the target enough to ask which of them did it.

        That is, by a tenth of the median change of the task. Random words may hold what they stand in for; areas are
        shares of the change, and without one they are noise of any size.
        """
        sizes, tasks = np.abs(self.change), np.array(self.tasks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a median of nothing is NaN
            usual = np.array([np.nanmedian(sizes[tasks == task]) for task in self.tasks])
        return sizes >= LEAST * usual[:, None]

    def _told(self, values: np.ndarray) -> np.ndarray:
        """Values [N, R, ...], NaN where the case tells nothing."""
        return np.where(self.tells.reshape(*self.change.shape, *[1] * (values.ndim - 2)), values, np.nan)

    def rows(self, replacement: str | None = None) -> list[dict[str, Any]]:
        """A line a method: means over the cases that tell something, under one replacement (the first by default)."""
        at, areas = self._at(replacement), self._told(self.areas)
        ahead = areas[..., 0] - areas[..., 1]
        chance = (self.random[..., 0] - self.random[..., 1]).mean(-1)[..., None]
        better = np.where(np.isnan(ahead), np.nan, ahead > chance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing is NaN
            columns = {
                "planted": np.nanmean(self.planted, 0),
                "insertion": np.nanmean(areas[:, at, :, 0], 0), "deletion": np.nanmean(areas[:, at, :, 1], 0),
                "beats random": np.nanmean(better[:, at], 0),
                "reverse": np.nanmean(areas[:, at, :, 2] - areas[:, at, :, 3], 0),
                "comprehensiveness": np.nanmean(self._told(self.comprehensiveness)[:, at], 0),
                "sufficiency": np.nanmean(self._told(self.sufficiency)[:, at], 0),
                "patching": np.nanmean(self.patching[:, at], 0), "gap": np.nanmedian(self.gap, 0),
                "weights": np.nanmean(self.weights[:, -1], 0), "target": np.nanmean(self.target, 0),
                "seeds": np.nanmean(self.seeds, 0), "evaluations": self.evaluations.mean(0),
                "seconds": np.median(self.seconds, 0),
            }  # fmt: skip
        return [{"method": name} | {k: float(v[i]) for k, v in columns.items()} for i, name in enumerate(self.methods)]

    def wins(self, method: str = "path", replacement: str | None = None) -> list[dict[str, Any]]:
        """Against every other method: share of cases with the better area, a tie counting half; 95 % intervals.

        Returns:
            Lines of "over", "insertion", "deletion" (shares), and "low", "high" of the mean of both (NaN of
            fewer than two cases).
        """
        if method not in self.methods:
            raise ValueError(f"{method!r} was not tested; there are {', '.join(self.methods)}")
        at, own, lines = self._at(replacement), self.methods.index(method), []
        areas = self._told(self.areas)[:, at]
        for i, name in enumerate(self.methods):
            if i == own:
                continue
            gaps = (areas[:, own, :2] - areas[:, i, :2]) * [1, -1]
            gaps = gaps[np.isfinite(gaps).all(1)]
            won = (gaps > 1e-9) + 0.5 * (np.abs(gaps) <= 1e-9)
            low, high = (float(x) for x in of_shares(won.mean(1))) if len(won) > 1 else (np.nan, np.nan)
            shares = won.mean(0) if len(won) else (np.nan, np.nan)
            lines.append({"over": name, "insertion": float(shares[0]), "deletion": float(shares[1]), "low": low,
                          "high": high})  # fmt: skip
        return lines

    def _at(self, replacement: str | None) -> int:
        if replacement is not None and replacement not in self.replacements:
            raise ValueError(f"{replacement!r} was not tested; there are {', '.join(self.replacements)}")
        return 0 if replacement is None else self.replacements.index(replacement)

    def table(self, replacement: str | None = None) -> str:
        """The lines of `rows` as text."""
        rows = self.rows(replacement)
        heads = {"beats random": "> random", "comprehensiveness": "compr.", "sufficiency": "suff.",
                 "evaluations": "evals", "seconds": "s"}  # fmt: skip
        names = [name for name in rows[0] if name != "method" and any(np.isfinite(row[name]) for row in rows)]
        wide = max(map(len, self.methods))
        lines = [" " * wide + "".join(f"{heads.get(name, name):>10}" for name in names)]
        for row in rows:
            cells = [f"{row[name]:.0f}" if name == "evaluations" else _number(row[name]) for name in names]
            lines.append(f"{row['method']:{wide}}" + "".join(f"{cell:>10}" for cell in cells))
        return "\n".join(lines)

    def plot(self) -> Any:
        """Mean insertion and deletion curves, a row of axes a replacement. A matplotlib figure."""
        from matplotlib.figure import Figure

        count = len(self.replacements)
        figure = Figure(figsize=(10, 3.2 * count), layout="constrained")
        axes = figure.subplots(count, 2, squeeze=False, sharex=True)
        at, curves = np.linspace(0, 1, GRID), self._told(self.curves)
        for r, pair in enumerate(axes):
            for side, (panel, word) in enumerate(zip(pair, ("insertion", "deletion"), strict=True)):
                for i, name in enumerate((*self.methods, "random") if self.tells[:, r].any() else ()):
                    style = {"color": "0.3", "linestyle": "--"} if name == "random" else {"color": f"C{i % 10}"}
                    style |= {"linestyle": ":"} if 10 <= i < len(self.methods) else {}
                    panel.plot(at, np.nanmean(curves[:, r, i, side], 0), label=name, **style)
                panel.set_title(f"{word}, {self.replacements[r]}")
                panel.set_ylabel("target, 0 all off, 1 all on")
        for panel in axes[-1]:
            panel.set_xlabel("share of the units")
        axes[0, 1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
        return figure

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        about = {"kind": _KIND, "about": fields.pop("about")} | {name: fields.pop(name) for name in _WORDS}
        return array_files.write(path, fields, about)

    @classmethod
    def load(cls, path: Any) -> Faithfulness:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, _KIND)
        about.pop("kind")
        return cls(**arrays, **{name: tuple(about.pop(name)) for name in _WORDS}, about=about.pop("about"))

    def __repr__(self) -> str:
        counts = {task: self.tasks.count(task) for task in dict.fromkeys(self.tasks)}
        cases = ", ".join(f"{n} {task}".rstrip() for task, n in counts.items())
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.about.items())
        parts = [f"faithfulness on {len(self.tasks)} cases ({cases}); {settings}"]
        for name, changes, tells in zip(self.replacements, self.change.T, self.tells.T, strict=True):
            if np.isnan(changes).all():  # no case brings prompts for contrast
                continue
            mute = (~tells & np.isfinite(changes)).sum()
            left = f", without {mute} case(s) whose target all of them hardly change" if mute else ""
            parts += ["", f"units replaced by {name}{left}", self.table(name)]
            if self.methods[0] == "path" and len(self.methods) > 1:
                wide = max(map(len, self.methods))
                parts += [f"{'path is ahead of':{wide}}{'insertion':>10}{'deletion':>10}   95 % of both"]
                parts += [f"{line['over']:{wide}}{line['insertion']:10.2f}{line['deletion']:10.2f}   "
                          f"{line['low']:.2f}..{line['high']:.2f}" for line in self.wins("path", name)]  # fmt: skip
        return "\n".join(parts)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"
