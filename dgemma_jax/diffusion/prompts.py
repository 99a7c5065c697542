"""From what users give to rows of ids: texts, chats, ids, seeds, arrays a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.nn import functional


def parts(bundle: Any) -> tuple[Any, Any, SamplerConfig]:
    """(model, tokenizer or None, sampler) of a bundle or of a bare model."""
    model = functional.of(bundle)
    default = SamplerConfig(eos_token_ids=model.config.eos_token_ids, pad_token_id=model.config.pad_token_id)
    return model, getattr(bundle, "tokenizer", None), getattr(bundle, "sampler", None) or default


def to_ids(prompts: Any, tokenizer: Any, vocab_size: int, thinking: bool = False) -> list[list[int]]:
    """Ids of every prompt; raises a ValueError that names the prompt at fault."""
    rows = []
    for number, prompt in enumerate(_as_rows(prompts)):
        where = f"prompt {number}"
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], dict)):
            if tokenizer is None:
                raise ValueError(
                    f"{where} is text, but there is no tokenizer; give token ids, or a bundle with a tokenizer"
                )
            if isinstance(prompt, str) and not prompt.strip():
                raise ValueError(f"{where} is empty; give at least one word")
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            prompt = tokenizer.chat(messages, thinking=thinking)
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"{where} is empty or not a list of ids: shape {ids.shape}")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{where} holds {ids.dtype} values; token ids must be integers")
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"{where} holds id {bad}; ids must be in 0..{vocab_size - 1}")
        rows.append(ids.tolist())
    return rows


def _as_rows(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "ndim"):
        prompts = np.asarray(prompts)
        if prompts.ndim not in (1, 2):
            raise ValueError(f"prompts has shape {prompts.shape}; give ids of shape [T] or [B, T]")
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be text, a chat, ids or a list of these, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts is empty; give at least one prompt")
    first = prompts[0]
    is_one = isinstance(first, dict | int | np.integer)
    return [prompts] if is_one else list(prompts)


def to_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """One seed a row."""
    seeds = np.asarray(seed)
    if not np.issubdtype(seeds.dtype, np.integer) or seeds.ndim > 1 or (seeds.ndim == 1 and len(seeds) != rows):
        raise ValueError(f"seed must be one integer or {rows} of them (one a prompt), got {seed!r}")
    if seeds.min() < 0 or seeds.max() >= 2**32:
        raise ValueError(f"seeds must be in 0..2**32-1, got {seed!r}")
    return np.broadcast_to(seeds, (rows,)).tolist()


def rows_of(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """`value` as an array of `shape`, one row repeated if the batch axis is missing; None stays None."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.shape == shape[1:]:
        array = np.broadcast_to(array, shape)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; needed is {shape} or {shape[1:]}")
    if dtype is np.int32 and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} holds {array.dtype} values; token ids must be integers")
    if dtype is bool and array.dtype != bool:
        raise ValueError(f"{name} must be bool, got {array.dtype}")
    return array if dtype is None else array.astype(dtype)
