"""The questions that maps are tested on: a prompt, a target, and the planted cause where one is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_jax.diffusion import prompts as inputs
from interp.masking.units import content


@dataclasses.dataclass(frozen=True)
class FaithfulnessCase:
    """One prompt to be explained.

    Attributes:
        prompt: as for `interp.saliency`.
        target: as there.
        units: as there.
        baseline: "noise", or other prompts of as many tokens that end the other way; half of these are left to tests.
        planted: whether scores (anything with `.scores`) have the known cause where it belongs; None if none is known.
        task: a word for it.
    """

    prompt: Any
    target: Any
    units: Any = "tokens"
    baseline: Any = "noise"
    planted: Callable[[Any], bool] | None = None
    task: str = ""


def planted_cases(bundle: Any, count: int, names: Sequence[str] | None = None) -> list[FaithfulnessCase]:
    """The first `count` cases of each planted task of an embedded organism.

    Raises:
        ValueError: the bundle is none.
    """
    from interp.masking import planted  # here: who brings cases need not load the tasks

    source = Path(getattr(bundle, "source", None) or "").name
    known = {name: study for name, study in planted.STUDIES.items() if study.wanted is not None}
    if source not in {study.organism for study in known.values()}:
        organisms = sorted({study.organism for study in known.values()})
        raise ValueError(f"only {' and '.join(organisms)} have planted cases: give pairs (prompt, target)")
    found = []
    for name in names or [task for task, study in known.items() if study.organism == source]:
        for case in known[name].cases(bundle, count):
            ids = bundle.tokenizer.chat([{"role": "user", "content": " ".join(case.words)}])
            at = content(bundle, ids)  # one word is one token
            units = {" ".join([*(case.words[i] for i in span), f"@{span[0]}"]): [at[i] for i in span]
                     for span in case.spans}  # fmt: skip
            rule = case.rules.get("by rank", case.rules[""])  # not all methods have standard errors
            found.append(FaithfulnessCase(ids, case.target, units, case.baseline, rule, name))
    return found


def as_cases(bundle: Any, cases: Iterable[Any], thinking: bool = False) -> list[FaithfulnessCase]:
    """Cases with their prompts as ids.

    Raises:
        ValueError: no cases; one that is neither a pair nor a case.
    """
    model, tokenizer, _ = inputs.parts(bundle)
    found = []
    for case in cases:
        if isinstance(case, tuple) and len(case) == 2:
            case = FaithfulnessCase(*case)
        if not isinstance(case, FaithfulnessCase):
            raise ValueError(f"a case is a pair (prompt, target) or a FaithfulnessCase, got {type(case).__name__}")
        ids = inputs.to_ids(case.prompt, tokenizer, model.config.vocab_size, thinking)
        if len(ids) != 1:
            raise ValueError(f"a case has one prompt, got {len(ids)}")
        found.append(dataclasses.replace(case, prompt=ids[0]))
    if not found:
        raise ValueError("there are no cases; give at least one pair (prompt, target)")
    return found


def resampled(bundle: Any, cases: Sequence[FaithfulnessCase], number: int, draws: int, seed: int) -> list[list[int]]:
    """Prompts as long as case `number`'s, template kept, each word drawn from the other cases' prompts."""
    own = list(cases[number].prompt)
    others = [c.prompt for i, c in enumerate(cases) if i != number] or [own]
    words = np.concatenate([np.asarray(ids)[content(bundle, ids)] for ids in others])
    rng, at, found = np.random.default_rng([seed, number]), content(bundle, own), []
    for _ in range(draws):
        fresh = np.array(own)
        fresh[at] = rng.choice(words, len(at))
        found.append(fresh.tolist())
    return found
