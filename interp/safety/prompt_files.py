"""Prompts to audit, from a file that may hold anything: every line is either a prompt or a named problem."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FIELDS = ("label", "group", "pair", "phrase")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to audit.

    Attributes:
        text: what the user says; U+FFFD stands for bytes that are no UTF-8.
        line: of the file, from 1; or the number in the list.
        label: any word; "harmful" and "harmless" are counted against the model's verdicts.
        group: prompts that belong together.
        pair: the same text in the prompts of a minimal pair.
        phrase: what one of a pair has and the other lacks: an attempt to get around a refusal.
        notes: what was strange about it.
    """

    text: str
    line: int
    label: str | None = None
    group: str | None = None
    pair: str | None = None
    phrase: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """Prompts, and the lines that could not be read: {"line", "problem", "start"}."""

    prompts: tuple[Prompt, ...]
    problems: tuple[Mapping[str, Any], ...] = ()


def read_prompts(source: Any) -> PromptFile:
    """Prompts of a JSONL file, or of a list.

    A line is an object {"prompt": text, "label", "group", "pair", "phrase": text, optional} or a JSON text alone. In a
    list also a `Prompt`, a plain text or such a mapping. Empty lines are passed over.

    Raises:
        ValueError: nothing at all can be audited.
        OSError: the file cannot be read.
    """
    is_path = isinstance(source, str | Path)
    found, problems = [], []
    for number, item in _lines(Path(source)) if is_path else enumerate(source, 1):
        try:
            found.append(item if isinstance(item, Prompt) else _prompt(_parsed(item) if is_path else item, number))
        except (ValueError, RecursionError) as error:
            start = item[:80].decode("utf-8", "backslashreplace") if isinstance(item, bytes) else repr(item)[:80]
            problems.append({"line": number, "problem": str(error) or "nested too deep", "start": clean(start)})
    if not found:
        first = f"; line {problems[0]['line']}: {problems[0]['problem']}" if problems else ""
        raise ValueError(f"no prompt to audit{f' in {source}' if is_path else ''}{first}; a line is "
                         '{"prompt": "..."}')  # fmt: skip
    return PromptFile(tuple(found), tuple(problems))


def clean(text: str) -> str:
    """The text with halves of surrogate pairs spelled out, so that it can be written anywhere."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _lines(path: Path) -> Iterable[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line.strip()


def _parsed(line: bytes) -> Any:
    text = line.decode("utf-8", "replace")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at character {error.colno}") from error
    row = {"prompt": row} if isinstance(row, str) else row
    is_hurt = "\ufffd" in text and text.encode("utf-8") != line
    return row | {"notes": ("holds bytes that are no UTF-8",)} if is_hurt and isinstance(row, dict) else row


def _prompt(row: Any, number: int) -> Prompt:
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'an object with a text "prompt" is needed, got {type(row).__name__}')
    if not row["prompt"].strip():
        raise ValueError("the prompt is empty")
    more = {name: clean(str(row[name])) for name in FIELDS if row.get(name) is not None}
    notes = tuple(row.get("notes", ())) if isinstance(row.get("notes"), tuple) else ()
    if any(not c.isprintable() and c not in "\n\t\r" for c in row["prompt"]):
        notes += ("holds control characters",)
    return Prompt(text=clean(row["prompt"]), line=number, notes=notes, **more)
