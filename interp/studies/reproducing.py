"""The tables and figures of the two papers: their values, the commands that make them here, and what came out.

The tables are data, `papers/<arXiv number>.json`:

| key of an artefact | content |
|---|---|
| where, what | table or figure, and what it shows |
| command | makes `file`; RESULTS stands for the directory of results |
| file | JSON in that directory; "depth" has the options of `model_depth` that make it at once, without weights |
| needs | why there is no command that fills the values in; "the release" otherwise |
| values | {what, paper, at}: `at` leads to ours in the file (keys, numbers, or {key: value} to pick from a list) |

A value agrees if it lies `within` so much of the paper's, within a `share` of it, `between` two numbers (the interval
that the paper gives), is at `least` or at `most` a number.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma_jax.config import ModelConfig

PAPERS = ("2606.20560", "2606.14620")
RELEASE = "the release"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A value of a paper, and ours.

    Attributes:
        where, what: table or figure, and what the value is.
        command: what makes it; None if nothing does.
        paper, ours: numbers; None where there is none.
        tolerance: in words; empty if none is set.
        verdict: "agrees", "differs", "no goal", or what it needs.
    """

    where: str
    what: str
    command: str | None
    paper: float | None
    ours: float | None
    tolerance: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A paper, value by value."""

    arxiv: str
    title: str
    rows: tuple[Comparison, ...]

    def __repr__(self) -> str:
        lines = [f"{self.title} (arXiv {self.arxiv})"]
        above: tuple[str, str | None] | None = None
        for row in self.rows:
            artefact, _, value = row.what.partition(" | ")
            if (artefact, row.command) != above:
                above = artefact, row.command
                lines += ["", f"{row.where}: {artefact}", f"  $ {row.command}" if row.command else "  no command"]
            if value:
                numbers = "  ".join(f"{name} {_shown(x)}" for name, x in (("paper", row.paper), ("ours", row.ours)))
                lines.append(f"    {value:<58}  {numbers}  {row.tolerance}  {row.verdict}".rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str | None], tag: str = "td") -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell or '')}</{tag}>" for cell in cells) + "</tr>"

        head = line(("where", "what", "paper", "ours", "tolerance", "verdict", "command"), "th")
        rows = (
            line((r.where, r.what, _shown(r.paper), _shown(r.ours), r.tolerance, r.verdict, r.command))
            for r in self.rows
        )
        return f"<b>{html.escape(self.title)}</b><table>{head}{''.join(rows)}</table>"

    def save(self, path: str | Path) -> Path:
        """Write as JSON and say where."""
        path = Path(path)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")
        return path


def reproduce(paper: str, results: str | Path | None = None, *, compute: bool = True) -> Reproduction:
    """Each value of a paper beside ours.

    Args:
        paper: an arXiv number of `PAPERS`.
        results: directory that the commands wrote into; what is not there is listed as needed.
        compute: make what needs no weights (opaque serial depth: a minute or two), and keep it in `results`.

    Raises:
        ValueError: another paper, or no such directory.
    """
    number = paper.lower().removeprefix("arxiv:").strip()
    if number not in PAPERS:
        raise ValueError(f"known papers are {', '.join(PAPERS)}; got {paper!r}")
    directory = None if results is None else Path(results)
    if directory is not None and not directory.is_dir():
        raise ValueError(f"{directory} is no directory of results")
    about = published(number)
    known: dict[str, Any] = {}
    rows = []
    for artefact in about["artefacts"]:
        name = artefact.get("file")
        if name and name not in known:
            known[name] = _results(name, directory, artefact.get("depth") if compute else None)
        found = known.get(name)
        common = (artefact["where"], artefact.get("command"))
        if not artefact["values"]:
            rows.append(Comparison(common[0], artefact["what"], common[1], None, None, "", _needs(artefact)))
        for value in artefact["values"]:
            ours = None if found is None or "at" not in value else _at(found, value["at"])
            what = f"{artefact['what']} | {value['what']}"
            verdict = _needs(artefact) if ours is None else _verdict(value, ours)
            rows.append(Comparison(common[0], what, common[1], value["paper"], ours, _tolerance(value), verdict))
    return Reproduction(number, about["title"], tuple(rows))


def published(number: str) -> dict[str, Any]:
    """The table of a paper."""
    file = importlib.resources.files(__package__).joinpath("papers", f"{number}.json")
    return json.loads(file.read_text("utf-8"))


def _results(name: str, directory: Path | None, depth: Mapping[str, Any] | None) -> Any:
    path = None if directory is None else directory / name
    if path is not None and path.exists():
        return json.loads(path.read_text("utf-8"))
    if depth is None:
        return None
    from interp.depth.programs import model_depth

    found = model_depth(ModelConfig(), **depth)
    if path is not None:
        found.save(path)
    return {"rows": found.rows()}


def _at(found: Any, path: Sequence[Any]) -> float | None:
    """The number that a path leads to; None where it ends early."""
    for key in path:
        if isinstance(key, Mapping):
            found = next((e for e in found if all(k in e and e[k] == v for k, v in key.items())), None)
        elif isinstance(key, int):
            found = found[key] if len(found) > key else None
        else:
            found = found.get(key)
        if found is None:
            return None
    return float(found)


def _verdict(value: Mapping[str, Any], ours: float) -> str:
    paper = value["paper"]
    tests = {
        "within": lambda limit: abs(ours - paper) <= limit,
        "share": lambda limit: abs(ours - paper) <= limit * abs(paper),
        "between": lambda limits: limits[0] <= ours <= limits[1],
        "least": lambda limit: ours >= limit,
        "most": lambda limit: ours <= limit,
    }
    met = [test(value[name]) for name, test in tests.items() if name in value]
    return "no goal" if not met else "agrees" if all(met) else "differs"


def _tolerance(value: Mapping[str, Any]) -> str:
    words = {
        "within": lambda x: f"± {x:g}", "share": lambda x: f"± {x:.0%}", "between": lambda x: f"{x[0]:g} to {x[1]:g}",
        "least": lambda x: f"at least {x:g}", "most": lambda x: f"at most {x:g}",
    }  # fmt: skip
    return ", ".join(say(value[name]) for name, say in words.items() if name in value)


def _needs(artefact: Mapping[str, Any]) -> str:
    return f"needs {artefact.get('needs', RELEASE)}"


def _shown(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:g}" if number == round(number, 3) else f"{number:.3f}"
