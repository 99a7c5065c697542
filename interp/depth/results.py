"""What an analysis of depth found: a number, the path it lies on, and how it prints, plots and is kept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from interp import array_files, surgery


@dataclasses.dataclass(frozen=True)
class Visit:
    """A place on the critical path.

    Attributes:
        site: the mark that was reached; outside marks the `jax.named_scope`, or "(output)".
        times: how often the path comes by.
        depth: of everything on the way to it, all times together.
        operations: that depth by primitive.
    """

    site: str
    times: int
    depth: int
    operations: dict[str, int]


@dataclasses.dataclass(frozen=True)
class SerialDepth:
    """The opaque serial depth of a program.

    Attributes:
        depth: gates on the longest path without an interpretable node inside.
        start, end: the nodes that this path joins: a cut, "inputs", "outputs".
        segments: the longest path that ends at each cut, and at the outputs.
        path: places on the critical path, in the order of the first visit; their depths add up to `depth`.
        cuts: patterns of interpretable marks.
        costs: name of the table.
        equations: how many were walked.
        unknown: primitives that the table counts without knowing them.
    """

    depth: int
    start: str
    end: str
    segments: dict[str, int]
    path: tuple[Visit, ...]
    cuts: tuple[str, ...]
    costs: str
    equations: int
    unknown: tuple[str, ...] = ()

    @property
    def folded(self) -> tuple[Visit, ...]:
        """The path with `layers.3.attn_z` and `layers.4.attn_z` as one place, deepest first."""
        return tuple(sorted(_added(self.path, surgery.fold), key=lambda visit: -visit.depth))

    @property
    def operations(self) -> dict[str, int]:
        """Depth of the path by primitive, deepest first."""
        total: Counter[str] = Counter()
        for visit in self.path:
            total.update(visit.operations)
        return dict(total.most_common())

    def __repr__(self) -> str:
        rows = [("site", "times", "depth", "share", "operations")]
        for visit in self.folded:
            said = ", ".join(f"{name} {depth:,}" for name, depth in Counter(visit.operations).most_common(4))
            share = f"{visit.depth / max(self.depth, 1):.1%}"
            rows.append((visit.site, f"{visit.times:,}", f"{visit.depth:,}", share, said))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:4], widths[1:4]), row[4])) for row in rows]
        head = f"serial depth {self.depth:,}, from {self.start} to {self.end} ({self.equations:,} equations)"
        if self.unknown:
            head += f"\nunknown and counted as the table {self.costs!r} says: {', '.join(self.unknown)}"
        return "\n".join([head, *(line.rstrip() for line in cells)])

    def plot(self) -> Any:
        """A bar for each place on the path, deepest first. Returns the figure."""
        from matplotlib.figure import Figure

        shown = self.folded[:25]
        figure = Figure(figsize=(7, 0.8 + 0.26 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.barh([visit.site for visit in shown], [visit.depth for visit in shown], color="#4c72b0")
        axes.invert_yaxis()
        axes.set_xlabel("depth on the critical path, gates")
        axes.set_title(f"serial depth {self.depth:,}, {self.start} to {self.end}")
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the result to an `.npz` file and say where."""
        about = dataclasses.asdict(self) | {"kind": "SerialDepth"}
        return array_files.write(path, {"depth": np.array(self.depth)}, about)

    @classmethod
    def load(cls, path: str | Path) -> SerialDepth:
        """Read what `save` wrote."""
        about = array_files.read(path, "SerialDepth")[1]
        about.pop("kind")
        visits = tuple(Visit(**visit) for visit in about.pop("path"))
        return cls(path=visits, cuts=tuple(about.pop("cuts")), unknown=tuple(about.pop("unknown")), **about)


def _added(visits: Any, name_of: Any) -> list[Visit]:
    found: dict[str, Visit] = {}
    for visit in visits:
        name = name_of(visit.site)
        old = found.get(name, Visit(name, 0, 0, {}))
        operations = dict(Counter(old.operations) + Counter(visit.operations))
        found[name] = Visit(name, old.times + visit.times, old.depth + visit.depth, operations)
    return list(found.values())
