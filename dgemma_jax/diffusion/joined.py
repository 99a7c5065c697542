"""Generations of one row each as one generation of many rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dgemma_jax.diffusion.generate import Generation
from dgemma_jax.diffusion.trajectory import Trajectory

PER_BLOCK = ("start", "committed", "num_steps", "stop")  # [J, B, ...]; all other arrays are [J, R, B, ...]


def joined(rows: Sequence[Generation], replay: Callable[..., Any] | None = None) -> Generation:
    """One generation with these rows; those with fewer blocks are padded: tokens by padding, all else by zeros.

    Args:
        replay: recomputes moments of the whole; None where it cannot be done.
    """
    width = max(row.tokens.shape[1] for row in rows)
    pad = rows[0].sampler.pad_token_id
    tokens = np.full((len(rows), width), pad, rows[0].tokens.dtype)
    for own, row in zip(tokens, rows, strict=True):
        own[: row.tokens.shape[1]] = row.tokens[0]
    return Generation(
        texts=[text for row in rows for text in row.texts],
        tokens=tokens,
        prompt_tokens=[ids for row in rows for ids in row.prompt_tokens],
        trajectory=_trajectories([row.trajectory for row in rows], replay),
        num_steps=np.concatenate([row.num_steps for row in rows]),
        stop_reason=[reason for row in rows for reason in row.stop_reason],
        tokens_per_forward=np.concatenate([row.tokens_per_forward for row in rows]),
        sampler=rows[0].sampler,
        seeds=[seed for row in rows for seed in row.seeds],
    )


def _trajectories(rows: Sequence[Trajectory], replay: Callable[..., Any] | None) -> Trajectory:
    blocks = max(len(row.num_steps) for row in rows)

    def together(axis: int) -> Callable[..., np.ndarray]:
        def arrays(*own: np.ndarray) -> np.ndarray:
            whole = [a if len(a) == blocks else _padded(a, blocks) for a in map(np.asarray, own)]
            return np.concatenate(whole, axis)

        return arrays

    found: dict[str, Any] = {}
    for field in dataclasses.fields(Trajectory):
        own = [getattr(row, field.name) for row in rows]
        if field.name == "site_steps" or own[0] is None:
            found[field.name] = own[0]
        elif field.name != "replay":
            found[field.name] = jax.tree.map(together(1 if field.name in PER_BLOCK else 2), *own)
    return Trajectory(**found | {"replay": replay})


def _padded(array: np.ndarray, blocks: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((blocks - len(array), *array.shape[1:]), array.dtype)])
