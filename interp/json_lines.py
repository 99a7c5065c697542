"""Files with one JSON value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank; a `ValueError` instead of a value that is no JSON.

    Only a line feed ends a line: JSON may hold the other separators of Unicode as they are.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8"))
                except ValueError as error:
                    yield number, error


def json_objects(path: str | Path, *needed: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line, each with these keys.

    Raises:
        ValueError: names the first line that is not such an object; a file without one.
    """
    found = []
    for number, value in json_lines(path):
        if isinstance(value, ValueError):
            raise ValueError(f"{path}, line {number}: no JSON ({value})") from value
        if not isinstance(value, dict) or not set(needed) <= set(value):
            raise ValueError(f"{path}, line {number}: needed is an object with {', '.join(needed)}; got {value!r}")
        found.append((number, value))
    if not found:
        raise ValueError(f"{path} holds no line with {', '.join(needed)}")
    return found
