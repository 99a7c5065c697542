"""The results of a long benchmark: a file with a JSON object a line, written as it goes, read to go on.

| line | says |
|---|---|
| {"header": {...}} | first line: what is measured, where, with which versions |
| {"begin": item, "by": who} | this is being tried; if it is the last line, the process was cut off there |
| {"died": item, "by": who, "why": text} | this ended the process; it is not tried again |
| {"item": name, "rows": [...], "peak_gb": GB} | the item has ended |
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Lines:
    """What a file of results holds so far.

    Attributes:
        header: what was measured, and where; None before the first line.
        items: finished items by name, in order: their rows.
        died: (item, who) that ended the process, and why; who is "" where the whole item did.
        begun: (item, who) of the last line, if it is a beginning.
        peak_gb: most that the device had held when an item ended, where it says.
    """

    header: dict[str, Any] | None
    items: dict[str, list[dict[str, Any]]]
    died: dict[tuple[str, str], str]
    begun: tuple[str, str] | None
    peak_gb: dict[str, float] = dataclasses.field(default_factory=dict)


def read(path: Path) -> Lines:
    """What the file holds; nothing if it is not there. A last line that was cut off is left out.

    Raises:
        ValueError: a line before the last is no JSON object, or the first is no header.
    """
    found = Lines(None, {}, {}, None)
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    for number, text in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            found = _with(found, line, first=number == 1)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no line of benchmark results ({error}); remove it") from error
    return found


def _with(found: Lines, line: dict[str, Any], first: bool) -> Lines:
    begun = None
    if first:
        return dataclasses.replace(found, header=line["header"])
    if "begin" in line:
        begun = (line["begin"], line["by"])
    elif "died" in line:
        found.died[line["died"], line["by"]] = line["why"]
    else:
        found.items[line["item"]] = line["rows"]
        found.peak_gb.update({line["item"]: line["peak_gb"]} if "peak_gb" in line else {})
    return dataclasses.replace(found, begun=begun)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line and make sure that it is on the disk; the rest of a line that was cut off goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(0)
            file.truncate(len(file.read().rpartition(b"\n")[0]) + 1)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
