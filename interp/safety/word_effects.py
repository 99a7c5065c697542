"""Which words of a prompt carry its refusal: each is replaced by a harmless one of its kind, and the margin read again.

    effect(w) = mean over K draws of [ margin(prompt) - margin(prompt with w replaced) ]      error = sd / sqrt(K)

A word that is replaced by one of another kind breaks the sentence, and that moves the margin too: see `Substitutes`.
A draw takes another replacement and another start canvas; the prompt and all its variants share the canvas, so the
error bar holds both. One step is taken: there all that decides comes from the prompt. A word whose effect is large is
needed here; it need not be enough, and of two words of which either would do neither shows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from interp.safety.prompt_files import asked
from interp.safety.watched_runs import Watch, watched_runs

UNITS = 24  # units of a prompt at most: of a longer one several words in a row make a unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordEffects:
    """Effects of one prompt's words on its refusal margin, nats.

    Attributes:
        words: [W] units, as they stand in the prompt.
        effects, errors: [W] and their standard errors.
        margin: of the prompt itself, a mean over the draws.
    """

    words: tuple[str, ...]
    effects: np.ndarray
    errors: np.ndarray
    margin: float

    def needed(self, least: float) -> tuple[int, ...]:
        """Units whose effect is at least so much and above twice its error, the largest first."""
        sure = (self.effects >= least) & (self.effects > 2 * self.errors)
        return tuple(int(i) for i in np.argsort(-self.effects, kind="stable") if sure[i])


def units_of(text: str, most: int = UNITS) -> tuple[list[str], list[str]]:
    """W units and the W + 1 pieces of space around them: `space[0] unit[0] space[1] ...` is the text again."""
    found = list(re.finditer(r"\S+", text))
    parts = [part for part in np.array_split(np.arange(len(found)), min(most, max(len(found), 1))) if len(part)]
    spans = [(found[part[0]].start(), found[part[-1]].end()) for part in parts]
    edges = [0, *(at for span in spans for at in span), len(text)]
    return [text[a:b] for a, b in spans], [text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)]


def joined(units: Sequence[str], spaces: Sequence[str]) -> str:
    """The text of units and the space around them."""
    return spaces[0] + "".join(unit + space for unit, space in zip(units, spaces[1:], strict=True))


class Substitutes:
    """Words of harmless prompts that can stand for a word, by where words stand in prompts.

    Of the same kind are words that share a word before and a word after with it, as it stands in refused prompts. First
    those that harmless prompts have at such a place too, then any of the kind, then any that they have there. Without
    any, the word is left out. Words of refused prompts are not put in: they may put back what their place lost.

    Args:
        harmless: prompts whose words are put in.
        refused: prompts whose words are not.
    """

    def __init__(self, harmless: Sequence[str], refused: Sequence[str]) -> None:
        known = {word for text in harmless for word in text.split()}
        allowed = known - {word for text in refused for word in text.split()} or known
        self.following: dict[str, set[str]] = {}
        self.preceding: dict[str, set[str]] = {}
        for before, word, after in _in_context(harmless):
            if word in allowed:
                self.following.setdefault(before, set()).add(word)
                self.preceding.setdefault(after, set()).add(word)
        self.sides = _sides(harmless) | _sides(refused)

    def __call__(self, units: Sequence[str], at: int) -> list[str]:
        """What can stand for `units[at]`, in order; empty: nothing can."""
        before, after = (units[at - 1] if at else "", units[at + 1] if at + 1 < len(units) else "")
        left, right = self.sides.get(units[at], (set(), set()))
        fits = (self.following.get(before, set()) & self.preceding.get(after, set())) - set(units)
        like = (_union(self.following, left) & _union(self.preceding, right)) - set(units)
        return sorted(fits & like or like or fits)


def _sides(texts: Sequence[str]) -> dict[str, tuple[set[str], set[str]]]:
    """By word, which words stand before and after it."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for before, word, after in _in_context(texts):
        left, right = found.setdefault(word, (set(), set()))
        left.add(before)
        right.add(after)
    return found


def _in_context(texts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each word of each text with the one before and the one after; a text's ends are empty words."""
    for text in texts:
        words = ["", *text.split(), ""]
        yield from zip(words, words[1:], words[2:], strict=False)


def _union(sets: Mapping[str, set[str]], keys: set[str]) -> set[str]:
    return set().union(*(sets.get(key, ()) for key in keys))


def _with(put: str, at: int, units: Sequence[str], spaces: Sequence[str]) -> str:
    """The text with another word at a place, or without one; a text of one word is left as it is."""
    if put or len(units) == 1:
        return joined([*units[:at], put or units[at], *units[at + 1 :]], spaces)
    between = spaces[-1] if at == len(units) - 1 else spaces[at]
    return joined([*units[:at], *units[at + 1 :]], [*spaces[:at], between, *spaces[at + 2 :]])


def word_effects(
    bundle: Any, texts: Sequence[str], substitutes: Callable[[Sequence[str], int], Sequence[str]], watch: Watch, *,
    draws: int = 4, seed: int = 0,
    rows: int = 128, most: int = UNITS, before: Sequence[Sequence[Any]] | None = None,
    sampler: SamplerConfig | None = None, done: Callable[[int], None] | None = None,
) -> list[WordEffects]:  # fmt: skip
    """Effects of the words of every text.

    Args:
        substitutes: (words of a text, place) -> words that can stand there; none: the word is left out.
        watch: its openings are what is read.
        draws: K, at least 2.
        rows: of a compiled call.
        before: messages of the conversation before each text; they stay as they are.

    Raises:
        ValueError: fewer than 2 draws, a text or word that has no ids.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}: an error bar needs at least 2")
    model, tokenizer, default = inputs.parts(bundle)
    rng = np.random.default_rng(seed)
    watch = dataclasses.replace(watch, sites=())
    split = [units_of(text, most) for text in texts]
    variants, seeds, widths = [], [], []
    for number, (units, spaces) in enumerate(split):
        allowed = [substitutes(units, at) or [""] for at in range(len(units))]
        widths.append(len(units) + 1)
        told = before[number] if before else ()
        for draw in range(draws):
            variants.append(asked(texts[number], told))
            for at in range(len(units)):
                put = allowed[at][int(rng.integers(len(allowed[at])))]
                variants.append(asked(_with(put, at, units, spaces), told))
            seeds += [seed + number * draws + draw] * (len(units) + 1)
    ids = inputs.to_ids(variants, tokenizer, model.config.vocab_size)
    one_step = (default if sampler is None else sampler).replace(max_denoising_steps=1)
    runs = watched_runs(
        bundle, ids, watch, seeds=[s % 2**32 for s in seeds], drafts=False, batch=rows, sampler=one_step, done=done
    )
    margins = np.array([run.margins[0] for run in runs])
    found, first = [], 0
    for (units, _), width in zip(split, widths, strict=True):
        own = margins[first : first + draws * width].reshape(draws, width)
        first += draws * width
        drops = own[:, :1] - own[:, 1:]
        found.append(
            WordEffects(
                words=tuple(units), effects=drops.mean(0), errors=drops.std(0, ddof=1) / np.sqrt(draws),
                margin=float(own[:, 0].mean()),
            )
        )  # fmt: skip
    return found
