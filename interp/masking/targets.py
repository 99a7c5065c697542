"""What is explained: from a text, an energy or a metric to a function of one step's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp.metrics import LogProb, SetLogProb


@dataclasses.dataclass(frozen=True)
class TextEnergy:
    """The score of a given text: sum of log p(token | noised text), in nats, over its tokens.

    The canvas holds the text, with each row replaced by a uniform token with probability `level`, anew for every draw;
    draws are the same for all masks. At level 1 the model sees nothing of the text, at 0 all of it.

    Attributes:
        text: a text, or ids.
        level: of noise, 0 to 1.
    """

    text: Any
    level: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 1:
            raise ValueError(f"level must be in 0..1, got {self.level}")


def text_ids(bundle: Any, text: Any) -> list[int]:
    """Ids of a text that stands on the canvas.

    Raises:
        ValueError: it is empty, longer than the canvas, or has no ids.
    """
    model, tokenizer, _ = inputs.parts(bundle)
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(f"{text!r} is text, but there is no tokenizer; give ids, or a bundle with a tokenizer")
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"the target {text!r} cannot be written in this model's tokens: {error}") from error
    else:
        ids = np.asarray(text).ravel().tolist()
        if any(not isinstance(i, int) or not 0 <= i < model.config.vocab_size for i in ids):
            raise ValueError(f"target ids must be integers in 0..{model.config.vocab_size - 1}, got {text!r}")
    if not ids:
        raise ValueError("the target is empty; give at least one token")
    if len(ids) > model.config.canvas_length:
        raise ValueError(
            f"the target has {len(ids)} tokens, one canvas holds {model.config.canvas_length}: give a part of it"
        )
    return ids


def said(bundle: Any, text: str, tokens: Sequence[int]) -> LogProb:
    """Log-probability of a text where the model says it.

    Args:
        tokens: [n] of the model's answer.

    Raises:
        ValueError: the answer does not hold the text.
    """
    tokenizer = bundle.tokenizer if hasattr(bundle, "tokenizer") else None
    wanted, said = text_ids(bundle, text), np.asarray(tokens).tolist()
    for start in range(len(said) - len(wanted) + 1):
        if said[start : start + len(wanted)] == wanted:
            return LogProb(start + np.arange(len(wanted)), wanted)
    answer = tokenizer.decode(said) if tokenizer is not None else said
    raise ValueError(
        f"the model answers {answer!r}, which does not hold {text!r}: choose words of the answer, or say where a text "
        "is looked for with interp.answer(ids), or score it with interp.TextEnergy(text)"
    )


def refusal_margin(
    bundle: Any, refusals: Sequence[str], answers: Sequence[str], rows: int = 1
) -> SetLogProb:  # fmt: skip
    """log p(a refusal opens) - log p(an answer opens), in nats, summed over the first rows of the canvas.

    Args:
        refusals, answers: words; of each the first token counts.

    Raises:
        ValueError: a word stands in both, or has no ids.
    """
    sides = [sorted({text_ids(bundle, text)[0] for text in texts}) for texts in (refusals, answers)]
    if not all(sides) or set(sides[0]) & set(sides[1]):
        raise ValueError(f"refusals={refusals!r} and answers={answers!r} must open with different tokens, at least one")
    return SetLogProb(np.arange(rows), *sides)


def energy_rows(bundle: Any, energy: TextEnergy, draws: int, seed: int) -> tuple[LogProb, jax.Array]:
    """The metric of an energy, and the noised canvases [draws, C] that it is read from."""
    model = of(bundle)
    config, ids = model.config, text_ids(bundle, energy.text)
    end = config.eos_token_ids[:1] if len(ids) < config.canvas_length else ()
    whole = [*ids, *end]
    canvas = np.full((draws, config.canvas_length), config.pad_token_id, np.int32)
    canvas[:, : len(whole)] = whole
    level = jnp.full(draws, energy.level)
    return LogProb(np.arange(len(ids)), ids), noise.corrupt(
        jax.random.key(seed), jnp.asarray(canvas), level, config.vocab_size
    )
