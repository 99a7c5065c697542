"""What an audit found: plain JSON, a page to read, a table."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.safety.audit_page import render
from interp.safety.audit_summary import summary

SCHEMA, SCHEMA_VERSION = "dgemma.audit", 1
_COLUMNS = (
    "line", "label", "group", "pair", "phrase", "verdict", "steps", "decided_at", "activation", "text", "answer"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class AuditReport:
    """An audit, as `data`:

    | key | content |
    |---|---|
    | schema, schema_version, created | "dgemma.audit", an integer, UTC |
    | model, manifest | what was audited, with what settings, from which file (SHA-256), by which versions |
    | problems | lines of the file that could not be read: line, problem, start |
    | prompts | a row each: text, label, group, pair, phrase, notes; why_not (it could not be run) or answer, verdict, |
    | | steps, decided_at, reversals, and by step verdicts, margins, entropy, activations (of the feature) |
    | | activation (at the prompt's end, 0 answered to 1 refused), arms (inside, outside, added), saliency, variants |
    | overview, labels, groups | shares with 95 % intervals: {"share", "low", "high", "of"} |
    | feature | where it was found, or why not |
    | sae | features of a given autoencoder that refusals share, see `shared_features`; None without one |
    | words, origin | words that refusals hang on; whether one alone is enough |
    | brittleness, jailbreaks, detectors | see `findings`, `jailbreaks`, `step_detectors` |
    | diff, triggers | against a reference, see `model_diff`, `trigger_search`; None without one |
    | withheld | by group: what probes know and the text does not say, see `withheld`; None without right answers |
    """

    data: Mapping[str, Any]

    def save(self, directory: str | Path) -> Path:
        """Write audit.html, audit.json and prompts.csv; returns the page."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.data, indent=1, allow_nan=False)
        (directory / "audit.json").write_text(text + "\n", "utf-8")
        with (directory / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            for row in self.data["prompts"]:
                table.writerow([_cell(row.get(name)) for name in _COLUMNS])
        page = directory / "audit.html"
        page.write_text(self.html(), "utf-8")
        return page

    @classmethod
    def load(cls, path: str | Path) -> AuditReport:
        """Read audit.json, or the directory that holds it.

        Raises:
            ValueError: it is no audit, or one of a newer version.
        """
        path = Path(path)
        path = path / "audit.json" if path.is_dir() else path
        data = json.loads(path.read_text("utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} holds no audit of version {SCHEMA_VERSION}")
        return cls(data)

    def html(self) -> str:
        """The whole page: no scripts, no network, no other files."""
        return render(self.data)

    def rows(self, **wanted: Any) -> list[Mapping[str, Any]]:
        """Prompts whose fields have these values: `rows(verdict="refusal")`."""
        return [row for row in self.data["prompts"] if all(row.get(k) == v for k, v in wanted.items())]

    def _repr_html_(self) -> str:
        style = "width:100%;height:900px;border:0"
        return f'<iframe sandbox title="Safety audit" style="{style}" srcdoc="{html.escape(self.html())}"></iframe>'

    def __repr__(self) -> str:
        return "\n".join(f"{point.title}: {point.text}" for point in summary(self.data))


def _cell(value: Any) -> Any:
    # Spreadsheets run what begins like a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
