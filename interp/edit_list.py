"""Which edits a model holds, as a table."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import jax

from dgemma_jax.nn.embedder import SoftEmbed
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import is_open
from interp import surgery
from interp.edits import Chain, Edit


@dataclasses.dataclass(frozen=True)
class Line:
    """One edit at one site: what `describe` lists.

    Attributes:
        site: full name.
        kind: class of the edit.
        where: its gate in words.
        values: shapes and settings.
    """

    site: str
    kind: str
    where: str
    values: str


class Edits(tuple[Line, ...]):
    """The edits of a model, in the order of the sites and of their action; prints as a table."""

    __slots__ = ()

    def _rows(self) -> list[tuple[str, ...]]:
        alike: dict[tuple[str, ...], list[str]] = {}
        for line in self:
            alike.setdefault((surgery.fold(line.site), line.kind, line.where, line.values), []).append(line.site)
        rows = []
        for (site, kind, where, values), names in alike.items():
            layers = surgery.layer_ranges(names)
            rows.append((site if len(names) > 1 else names[0], kind, where, values, layers if len(names) > 1 else ""))
        return [("site", "edit", "acts", "values", "layers"), *rows]

    def __repr__(self) -> str:
        count = f"{len(self)} edit{'s' if len(self) != 1 else ''}"
        if not self:
            return f"{count}: the model is plain"
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join([count, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])

    def _repr_html_(self) -> str:
        cells = [[html.escape(cell) for cell in row] for row in self._rows()]
        head = "".join(f"<th>{cell}</th>" for cell in cells[0])
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:])
        return f"<table><tr>{head}</tr>{body}</table>"


def describe(model: Any) -> Edits:
    """The edits in a model or bundle: site, kind, where each acts, shapes. A table, in notebooks too."""
    transformer = of(model)
    lines = []
    for name, site in surgery.placed(transformer).items():
        for one in site.edits if isinstance(site, Chain) else [site]:
            if is_open(one):
                gate = getattr(one, "gate", None)
                acts = "everywhere" if gate is None else str(gate)
                if getattr(one, "phase", "denoise") != "denoise":
                    acts = f"{acts} ({one.phase})"
                lines.append(Line(name, type(one).__name__, acts, _values(one)))
    soft = surgery.soft_embedding(transformer).get()
    if type(soft) is not SoftEmbed:
        acts = "everywhere" if getattr(soft, "gate", None) is None else str(soft.gate)
        lines.append(Line("soft_embedding", type(soft).__name__, acts, _values(soft)))
    return Edits(lines)


_PLACING = {f.name for f in dataclasses.fields(Edit)}


def _values(edit: Any) -> str:
    """Shapes and settings of an edit, those that every edit has left out."""
    if not dataclasses.is_dataclass(edit):
        return ""

    def word(value: Any) -> str:
        if callable(value):
            return getattr(value, "__qualname__", repr(value))
        if isinstance(value, tuple):
            return f"({', '.join(map(word, value))})"
        if not hasattr(value, "shape"):
            return str(value)
        is_known = not isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
        return str(value.item()) if value.ndim == 0 and is_known else f"{value.dtype}{list(value.shape)}"

    shown = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit) if f.name not in _PLACING}
    empty = [name for name, value in shown.items() if value is None or (isinstance(value, tuple) and not value)]
    return ", ".join(f"{name}={word(value)}" for name, value in shown.items() if name not in empty)
