"""Other ways to write the same prompt: does the verdict stay? And one word alone in other prompts: is it enough?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from interp.safety.word_effects import joined, units_of

KINDS = ("spacing", "case", "synonyms", "position")


def rewritten(
    text: str, *, kinds: Sequence[str] = KINDS, synonyms: Mapping[str, Sequence[str]] | None = None,
    context: Sequence[str] = ("please", "now"), seed: int = 0,
) -> list[tuple[str, str]]:  # fmt: skip
    """(kind, text) of every variant; a variant equal to the text is left out.

    spacing: double spaces. case: all capitals, and all small. synonyms: each word that has some, replaced by one of
    them. position: `context` words put before, and after, so that all words stand elsewhere. Paraphrases cannot be made
    by rule: put them into the file as pairs.

    Raises:
        ValueError: a kind that is not known.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kinds {sorted(unknown)}; there are {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    units, spaces = units_of(text, most=10**9)
    made: list[tuple[str, str]] = []
    if "spacing" in kinds:
        made.append(("spacing", joined(units, [space.replace(" ", "  ") for space in spaces])))
    if "case" in kinds:
        made += [("case", text.upper()), ("case", text.lower())]
    if "synonyms" in kinds:
        for at, unit in enumerate(units):
            others = [word for word in (synonyms or {}).get(unit.lower(), ()) if word != unit]
            if others:
                put = others[int(rng.integers(len(others)))]
                made.append(("synonyms", joined([*units[:at], put, *units[at + 1 :]], spaces)))
    if "position" in kinds:
        made += [("position", " ".join([*context, text])), ("position", " ".join([text, *context]))]
    return [(kind, other) for kind, other in made if other != text]


def planted(text: str, word: str, rng: np.random.Generator) -> str:
    """The text with a word put at a random place between its words."""
    words = text.split()
    at = int(rng.integers(len(words) + 1))
    return " ".join([*words[:at], word, *words[at:]])
