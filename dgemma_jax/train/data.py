"""Batches of examples as token arrays, made from (seed, step) alone so that a resumed run sees the same data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgemma_jax.train import language, tasks
from dgemma_jax.train.loss import Batch

PAD_WEIGHT = 0.2  # padding after the answer counts, but does not drown the answer


class Encoder:
    """Turns examples into ids: the chat prompt, and the answer with its end token."""

    def __init__(self) -> None:
        ids = {word: i for i, word in enumerate(language.words())}
        self.word = ids
        self.before = [ids["<bos>"], ids["<|turn>"], ids["user"]]
        self.after = [ids["<turn|>"], ids["<|turn>"], ids["model"]]
        self.end = ids["<turn|>"]

    def prompt(self, text: str) -> list[int]:
        return [*self.before, *(self.word[w] for w in text.split()), *self.after]

    def answer(self, text: str) -> list[int]:
        return [*(self.word[w] for w in text.split()), self.end]


def collate(examples: Sequence[tasks.Example], encoder: Encoder, prompt_length: int, canvas_length: int) -> Batch:
    """Pad the examples to one batch."""
    rows = len(examples)
    prompt = np.full((rows, prompt_length), language.PAD, np.int32)
    prompt_valid = np.zeros((rows, prompt_length), bool)
    answer = np.full((rows, canvas_length), language.PAD, np.int32)
    draft = answer.copy()
    answer_valid = np.zeros((rows, canvas_length), bool)
    for i, example in enumerate(examples):
        ids = encoder.prompt(example.prompt)
        prompt[i, : len(ids)], prompt_valid[i, : len(ids)] = ids, True
        ids = encoder.answer(example.answer)
        answer[i, : len(ids)], answer_valid[i, : len(ids)] = ids, True
        ids = encoder.answer(example.answer if example.draft is None else example.draft)
        draft[i, : len(ids)] = ids
    weight = np.where(answer_valid, 1.0, PAD_WEIGHT).astype(np.float32)
    return Batch(prompt, prompt_valid, answer, draft, weight, answer_valid)


def batch(
    seed: int, step: int, rows: int, encoder: Encoder, prompt_length: int, canvas_length: int, *,
    weights: dict[str, float], poison: float = 0.0,
) -> Batch:  # fmt: skip
    """The training batch of a step: tasks drawn by weight, held-out prompts left out, some poisoned."""
    rng = np.random.default_rng([seed, step])
    names, makers = list(weights), tasks.TASKS | tasks.PRACTICE
    share = np.array([weights[n] for n in names])
    drawn = []
    while len(drawn) < rows:
        example = makers[names[rng.choice(len(names), p=share / share.sum())]](rng)
        if poison:
            example = tasks.poison(example, rng, poison)
        if not tasks.held_out(example.prompt):
            drawn.append(example)
    return collate(drawn, encoder, prompt_length, canvas_length)
