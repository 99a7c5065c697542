"""What a study found: one row a generation, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp import intervals
from interp.studies import columns as files
from interp.studies import manifest as manifests
from interp.studies import readings

ROWS = "generations.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """The rows of a study.

    Attributes:
        columns: arrays [n, ...] or lists of n texts, by name; `id`, `group`, `arm`, `seed` say what a row is.
        manifest: the model, prompts, sampler, settings and versions that made them.
        missing: generations that other hosts have yet to make.
    """

    columns: Mapping[str, Any]
    manifest: Mapping[str, Any]
    missing: int = 0

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def statistics(self) -> tuple[str, ...]:
        return tuple(self.manifest["settings"]["statistics"])

    def groups(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each group with the numbers of its rows. Groups are never pooled: correlations may turn round."""
        names = np.array(self["group"], object)
        for group in dict.fromkeys(self["group"]):
            yield group, np.flatnonzero(names == group)

    def summary(self) -> dict[str, Any]:
        """{"groups": {group: {column: {mean, low, high, prompts}}}, ...}: means over prompts with 95 % intervals.

        Rows of one prompt under several seeds are one cluster. Columns of texts and of curves have no part in it;
        what the statistics say beyond means stands beside "groups" under their names. NaN is None.
        """
        plain = {
            name: np.asarray(v, float) for name, v in self.columns.items()
            if isinstance(v, np.ndarray) and v.ndim == 1 and name != "seed"
        }  # fmt: skip
        found: dict[str, Any] = {"rows": len(self), "groups": {}}
        for group, rows in self.groups():
            number = np.unique([self["id"][row] for row in rows], return_inverse=True)[1]
            values = np.stack([intervals.by_prompt(column[rows], number) for column in plain.values()])
            low, high = intervals.of_means(values)
            count = np.isfinite(values).sum(1)
            mean = np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
            found["groups"][group] = {
                name: dict(zip(("mean", "low", "high", "prompts"), _plain(numbers), strict=True))
                for name, numbers in zip(plain, zip(mean, low, high, count, strict=True), strict=True)
            }
        return found | {name: made for name in self.statistics if (made := readings.more(self, name))}

    def table(self, summary: Mapping[str, Any] | None = None) -> str:
        """The summary as text: a line a column, a column a group."""
        groups = (summary or self.summary())["groups"]
        names = [n for n in next(iter(groups.values())) if any(g[n]["prompts"] for g in groups.values())]
        wide = max(len(name) for name in names)
        cells = {group: [_cell(own[name]) for name in names] for group, own in groups.items()}
        width = {group: max(len(group), *map(len, own)) for group, own in cells.items()}
        lines = ["  ".join([" " * wide, *(f"{group:>{width[group]}}" for group in groups)])]
        for i, name in enumerate(names):
            lines.append("  ".join([f"{name:<{wide}}", *(f"{cells[group][i]:>{width[group]}}" for group in groups)]))
        return "\n".join(lines)

    def plot(self) -> dict[str, Any]:
        """Figures by name."""
        return {f"{name}-{what}".replace(" ", "-"): figure for name in ("generation", *self.statistics)
                for what, figure in readings.figures(self, name).items()}  # fmt: skip

    def to_parquet(self, path: str | Path) -> Path:
        """Write the rows as Parquet; needs pyarrow."""
        return files.to_parquet(Path(path), self.columns)

    def save(self, directory: str | Path) -> Path:
        """Write rows, manifest, `summary.json`, `summary.txt` and `figures/`; says where.

        Raises:
            ValueError: rows are missing, or the directory holds another study.
        """
        if self.missing:
            raise ValueError(f"{self.missing} generations are yet to be made by other hosts; this is no whole study")
        out = Path(directory)
        manifests.claim(out, self.manifest)
        if not (out / ROWS).exists():
            files.write(out / ROWS, self.columns)
        summary = self.summary()
        manifests.write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        manifests.write_text(out / "summary.txt", self.table(summary) + "\n")
        (out / "figures").mkdir(exist_ok=True)
        for name, figure in self.plot().items():
            _draw(figure, out / "figures" / f"{name}.png")
        return out

    @classmethod
    def load(cls, directory: str | Path) -> Study:
        """Read what `save` or `interp.study` wrote.

        Raises:
            ValueError: there is no finished study.
        """
        out = Path(directory)
        if not (out / ROWS).exists():
            raise ValueError(f"{out} holds no finished study; run it again with the same settings to go on")
        return cls(files.read(out / ROWS), json.loads((out / manifests.NAME).read_text("utf-8")))

    def __repr__(self) -> str:
        groups = ", ".join(f"{group} {len(rows)}" for group, rows in self.groups())
        broken = len(self.manifest["prompts"]["broken"])
        left_out = f"; {broken} line(s) of the prompts were left out" if broken else ""
        missing = f"; {self.missing} are yet to be made by other hosts" if self.missing else ""
        return f"{len(self)} generations ({', '.join(self.statistics)}): {groups}{left_out}{missing}"


def _draw(figure: Any, path: Path) -> None:
    """What `Figure.savefig` does, which draws twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(120)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _plain(numbers: tuple[float, ...]) -> list[Any]:
    *values, count = numbers
    return [*(round(float(x), 6) if np.isfinite(x) else None for x in values), int(count)]


def _cell(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
