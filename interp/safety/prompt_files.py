"""Prompts to audit, from a file that may hold anything: every line is either a prompt or a named problem."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma_jax.text.chat import validate

FIELDS = ("label", "group", "pair", "phrase", "right")
_TOLD = 500  # characters of a problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to audit.

    Attributes:
        text: what the user says, in a conversation last; U+FFFD stands for bytes that are no UTF-8.
        before: messages {"role", "content"} of the conversation before that.
        line: of the file, from 1; or the number in the list.
        label: any word; "harmful" and "harmless" are counted against the model's verdicts.
        group: prompts that belong together.
        pair: the same text in the prompts of a minimal pair.
        phrase: what one of a pair has and the other lacks: an attempt to get around a refusal.
        right: the right answer in a word or a few, one of a few that prompts of the group share.
        notes: what was strange about it.
    """

    text: str
    line: int
    label: str | None = None
    group: str | None = None
    pair: str | None = None
    phrase: str | None = None
    right: str | None = None
    notes: tuple[str, ...] = ()
    before: tuple[Mapping[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """Prompts, and the lines that could not be read: {"line", "problem", "start"}."""

    prompts: tuple[Prompt, ...]
    problems: tuple[Mapping[str, Any], ...] = ()


def read_prompts(source: Any) -> PromptFile:
    """Prompts of a JSONL file, or of a list.

    A line is an object {"prompt": text, "label", "group", "pair", "phrase", "right": optional} or a JSON text alone. In
    place of a text a conversation may stand, a list of {"role", "content"} whose last message is the user's, under
    "prompt" or "messages". In a list also a `Prompt`, a plain text or such a mapping. Empty lines are passed over.

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
            told = clean(str(error))[:_TOLD] or "nested too deep"
            problems.append({"line": number, "problem": told, "start": clean(start)})
    if not found:
        first = f"; line {problems[0]['line']}: {problems[0]['problem']}" if problems else ""
        raise ValueError(f"no prompt to audit{f' in {source}' if is_path else ''}{first}; a line is "
                         '{"prompt": "..."}')  # fmt: skip
    return PromptFile(tuple(found), tuple(problems))


def asked(text: str, before: Sequence[Mapping[str, str]] = ()) -> Any:
    """What `dg.generate` takes: the text, or the conversation that ends with it."""
    return [*map(dict, before), {"role": "user", "content": text}] if before else text


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
    row = {"prompt": row} if isinstance(row, str | list) else row
    said = row.get("prompt", row.get("messages")) if isinstance(row, Mapping) else None
    if not isinstance(said, str | list):
        raise ValueError(f'an object with a text "prompt" or a list "messages" is needed, got {type(row).__name__}')
    *before, said = [said] if isinstance(said, str) else _messages(said)
    if not said.strip():
        raise ValueError("the prompt is empty")
    more = {name: clean(str(row[name])) for name in FIELDS if row.get(name) is not None}
    notes = tuple(row.get("notes", ())) if isinstance(row.get("notes"), tuple) else ()
    if any(not c.isprintable() and c not in "\n\t\r" for c in said):
        notes += ("holds control characters",)
    return Prompt(text=clean(said), line=number, notes=notes, before=tuple(before), **more)


def _messages(given: list[Any]) -> list[Any]:
    """The messages before the last, and the text of the last."""
    try:
        found = validate(given)
    except TypeError as error:
        raise ValueError(str(error)) from error
    for one in found:
        parts = [one["content"]] if isinstance(one["content"], str) else [part["text"] for part in one["content"]]
        one["content"] = clean("".join(parts))
    if found[-1]["role"] != "user":
        raise ValueError(f"the last message of a conversation must be the user's, not the {found[-1]['role']}'s")
    return [*found[:-1], found[-1]["content"]]
