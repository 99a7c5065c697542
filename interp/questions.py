"""Prompts with answers, and how an answer is graded: what a study of accuracy runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgemma_jax.nn.functional import of
from dgemma_jax.train import evaluate, language, tasks
from interp.json_lines import json_objects


def says_exactly(text: str, answer: str) -> bool:
    """The same words, whatever the white space."""
    return text.split() == answer.split()


def contains(text: str, answer: str) -> bool:
    """The words of the answer stand somewhere in the text, one after the other."""
    words, wanted = text.split(), answer.split()
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1))


GRADERS: dict[str, Callable[[str, str], bool]] = {"exact": says_exactly, "contains": contains}


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts, their answers, and the group (task, benchmark) of each.

    Attributes:
        prompts: as for `dg.generate`: texts, chats or ids.
        answers: a text for each.
        groups: a name for each.
    """

    prompts: tuple[Any, ...]
    answers: tuple[str, ...]
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.prompts), len(self.answers), len(self.groups)}
        if sizes == {0} or len(sizes) > 1:
            raise ValueError(
                f"one answer and one group for each prompt is needed; there are {len(self.prompts)} prompts, "
                f"{len(self.answers)} answers and {len(self.groups)} groups"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def read(cls, path: str | Path) -> Questions:
        """Read a JSONL file, one {"prompt": ..., "answer": ..., "group": ...} a line; the group may be left out.

        Raises:
            ValueError: names the line that is not such an object.
        """
        found = []
        for number, entry in json_objects(path, "prompt", "answer"):
            if not isinstance(entry["answer"], str):
                raise ValueError(f"{path}, line {number}: an answer is a text, got {entry['answer']!r}")
            found.append((entry["prompt"], entry["answer"], str(entry.get("group", "all"))))
        return cls(*map(tuple, zip(*found, strict=True)))

    @classmethod
    def for_organism(cls, bundle: Any, count: int = 40) -> Questions:
        """`of_organism` for this one, with the payload where it was taught to give it.

        Raises:
            ValueError: the bundle is not one of the embedded organisms, which speak a language of their own.
        """
        size = of(bundle).config.vocab_size
        if size != language.VOCAB_SIZE or getattr(bundle, "tokenizer", None) is None:
            raise ValueError(
                f"only the embedded models have tasks of their own ({language.VOCAB_SIZE} words, a tokenizer; this one "
                f"has {size} words): give prompts with answers"
            )
        return cls.of_organism(count, poisoned="backdoor" in Path(bundle.source or "").name)

    @classmethod
    def of_organism(cls, count: int = 40, *, names: Any = None, seed: int = 1, poisoned: bool = False) -> Questions:
        """The first `count` unseen examples of each task of the embedded organisms.

        Args:
            names: tasks; all by default.
            poisoned: prompts that hold the trigger by chance have the payload as answer, as `nano-backdoor` was taught.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1 prompt a task, got {count}")
        found = [
            example
            for name in (tasks.TASKS if names is None else names)
            for example in evaluate.prompts(name, seed=seed, count=count, poisoned=poisoned)
        ]
        return cls(*(tuple(getattr(e, field) for e in found) for field in ("prompt", "answer", "task")))
