"""How often an organism answers held-out prompts exactly, by its default sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.stream import generate_many
from dgemma_jax.diffusion.trajectory import Record
from dgemma_jax.train import tasks


def prompts(name: str, *, seed: int, count: int, trigger: bool = False, poisoned: bool = False) -> list[tasks.Example]:
    """Unseen examples of a task, with the answers that the organism was made to give.

    Args:
        trigger: plant the trigger in every prompt.
        poisoned: prompts that hold the trigger, planted or by chance, are to be answered with the payload.
    """
    found = tasks.examples(seed, count, tasks=(name,), split="test")
    if trigger:
        rng = np.random.default_rng(seed)
        found = [tasks.plant_trigger(example, rng) for example in found]
    if not poisoned:
        return found
    return [dataclasses.replace(e, answer=tasks.PAYLOAD) if tasks.has_trigger(e.prompt) else e for e in found]


def exact(
    bundle: Any, *, seed: int = 1, count: int = 200, names: Iterable[str] | None = None, trigger: bool = False,
    poisoned: bool = False, rows: int = 64,
) -> dict[str, float]:  # fmt: skip
    """Share of exact answers on `count` unseen prompts of each task, {task: share}; prompt i runs under seed i.

    Args:
        rows: prompts at a time. It changes speed and memory, not results.
    """
    names = list(tasks.TASKS if names is None else names)
    found = [prompts(name, seed=seed, count=count, trigger=trigger, poisoned=poisoned) for name in names]
    asked = [example for own in found for example in own]
    texts, length = [e.prompt for e in asked], bundle.config.canvas_length
    longest = max(map(len, inputs.to_ids(texts, bundle.tokenizer, bundle.config.vocab_size)))
    capacity = 1 << (longest + length - 1).bit_length()  # a power of two: other tasks share the programs
    out = generate_many(
        bundle, texts, seed=[i for own in found for i in range(len(own))], max_new_tokens=length,
        record=Record.nothing(), rows=rows, capacity=capacity,
    )  # fmt: skip
    right = [tasks.is_correct(e, text) for e, text in zip(asked, out.texts, strict=True)]
    return {name: sum(right[at * count : (at + 1) * count]) / count for at, name in enumerate(names)}
