"""Prompts of a study: a JSONL file, one object a line; what is wrong with a line is said and the rest goes on.

| key | content |
|---|---|
| prompt | a text, a chat ([{"role": ..., "content": ...}, ...]) or token ids |
| id | a text or number of its own; by default the number of the line |
| answer | a text that answers are graded against |
| group | its regime (kind of task); "all" by default |
| intervention | the prompt with the intervention, of studies with two arms |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from interp.json_lines import json_lines
from interp.questions import Questions


@dataclasses.dataclass(frozen=True)
class StudyPrompt:
    """One line. `line` counts from 1; the other fields are those of the file."""

    line: int
    id: str
    prompt: Any
    answer: str | None = None
    group: str = "all"
    intervention: Any = None


@dataclasses.dataclass(frozen=True)
class StudyPrompts:
    """Prompts, and a sentence on each line that is none."""

    prompts: tuple[StudyPrompt, ...]
    broken: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Any) -> StudyPrompts:
        """Of a path (or a text that ends in ".jsonl"), `interp.Questions`, a list of prompts or of such mappings.

        Raises:
            ValueError: nothing usable is in it; says what is wrong.
        """
        if isinstance(given, StudyPrompts):
            return given
        if isinstance(given, Questions):
            rows = zip(given.prompts, given.answers, given.groups, strict=True)
            given = [{"prompt": p, "answer": a, "group": g} for p, a, g in rows]
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith(".jsonl")):
            return _checked(json_lines(given), str(given))
        if isinstance(given, str):
            given = [given]
        entries = (entry if isinstance(entry, Mapping) else {"prompt": entry} for entry in given)
        return _checked(enumerate(entries, 1), "the list of prompts")


def _checked(entries: Iterable[tuple[int, Any]], name: str) -> StudyPrompts:
    found: dict[str, StudyPrompt] = {}
    broken = []
    for number, entry in entries:
        try:
            prompt = _prompt(number, entry)
            if prompt.id in found:
                raise ValueError(f"the id {prompt.id!r} is that of line {found[prompt.id].line}")
            found[prompt.id] = prompt
        except ValueError as error:
            broken.append(f"line {number}: {error}")
    if not found:
        raise ValueError(f"{name} holds no prompt" + "".join(f"; {said}" for said in broken[:5]))
    return StudyPrompts(tuple(found.values()), tuple(broken))


def _prompt(number: int, entry: Any) -> StudyPrompt:
    if isinstance(entry, ValueError):
        raise ValueError(f"no JSON ({entry})")
    if not isinstance(entry, Mapping) or "prompt" not in entry:
        raise ValueError('needed is an object with the key "prompt"')
    for key in ("prompt", "intervention"):
        value = entry.get(key)
        if (key == "prompt" or value is not None) and not (isinstance(value, str | list) and len(value)):
            raise ValueError(f"{key!r} must be a text, a chat or token ids, and not empty; got {value!r}")
    answer = entry.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"'answer' must be a text, got {answer!r}")
    id, group = (str(entry.get(key) if entry.get(key) is not None else other)
                 for key, other in (("id", number), ("group", "all")))  # fmt: skip
    return StudyPrompt(number, id, entry["prompt"], answer, group, entry.get("intervention"))
