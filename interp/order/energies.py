"""The energy of any text: -log p of its tokens in one forward pass over the text itself.

A token is visible to the model while it is scored, so this is no leave-one-out likelihood: it says whether the model
would let the text stand (`methods.md` section 13.5). Texts are rows of one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dgemma_jax.diffusion import prompts as inputs
from interp.flow.saved import Saved
from interp.order.slot_reading import read


@dataclasses.dataclass(frozen=True, eq=False)
class Energy(Saved):
    """Attributes:
    logp: [B, C] log p of each token of the canvas, nats.
    tokens: [B, C] the canvas: text, end token, padding.
    own: [B, C] bool, the text and its end token.
    """

    logp: np.ndarray
    tokens: np.ndarray
    own: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """[B] energy of the text and its end: -sum of log p, nats."""
        return -(self.logp * self.own).sum(-1)

    @property
    def per_token(self) -> np.ndarray:
        """[B] the same, by token."""
        return self.total / self.own.sum(-1)

    def __repr__(self) -> str:
        return f"energy of {len(self.tokens)} text(s), nats a token: {np.round(self.per_token, 3).tolist()}"


def energy(
    bundle: Any, prompts: Any, texts: Sequence[Any], *, temperature: float = 1.0, soft: Any = None,
    progress: bool | None = None,
) -> Energy:  # fmt: skip
    """Score texts as answers to prompts, in one pass.

    Args:
        prompts: one for each text, or one for all.
        texts: texts, or lists of ids. They are followed by an end token and padding.
        temperature: of the softmax.
        soft: [C, D] or [B, C, D], S; by default zeros, as in a first step.

    Raises:
        ValueError: a text that does not fit a block, a temperature that is not positive.
    """
    model, tokenizer, sampler = inputs.parts(bundle)
    config = model.config
    ids = inputs.to_ids(prompts, tokenizer, config.vocab_size)
    if len(ids) not in (1, len(texts)):
        raise ValueError(f"{len(ids)} prompts and {len(texts)} texts: needed is one prompt for each, or one for all")
    canvas, own = np.full((len(texts), config.canvas_length), sampler.pad_token_id, np.int32), []
    for row, text in enumerate(texts):
        words = tokenizer.encode(text) if isinstance(text, str) else [int(i) for i in text]
        end = _end(sampler, config)
        if len(words) + 1 > config.canvas_length:
            raise ValueError(f"text {row} has {len(words)} tokens and an end; a block holds {config.canvas_length}")
        canvas[row, : len(words) + 1] = [*words, end]
        own.append(np.arange(config.canvas_length) <= len(words))
    soft = inputs.rows_of("soft", soft, (*canvas.shape, config.embed_dim), None)
    every = np.broadcast_to(np.arange(config.canvas_length), canvas.shape)
    owner = np.arange(len(texts)) if len(ids) > 1 else np.zeros(len(texts), int)
    logp = read(bundle, ids, owner, canvas, every, soft, tokens=canvas, temperature=temperature, progress=progress)
    return Energy(logp.astype(float), canvas, np.stack(own))


def _end(sampler: Any, config: Any) -> int:
    """The token with which the model ends a turn: the last of those the configuration names."""
    return int(config.eos_token_ids[-1])
