"""Attention rollout (Abnar and Zuidema 2020): where attention could have carried something from.

    A_l = (mean over heads of the pattern + 1) / 2,   R = A_L ... A_1

over prompt and canvas together: prompt rows see earlier prompt rows, canvas rows all of both. It knows nothing of the
target but the rows that it reads, and nothing of values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion.generate import PREFILL_CHUNK
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.cache import KVCache, slot_positions
from dgemma_jax.nn.functional import of
from interp.masking.game import Found, Game, ends
from interp.masking.input_values import of_model
from interp.taps import tapped

PLACES = ("token_embed", "cache", "canvas")


def attention_rollout(game: Game, *, budget: int = 2, tolerance: float | None = None, seed: int = 0) -> Found:
    """Share of the rows read by the target that rolls back to each unit.

    Args:
        budget, tolerance, seed: not used; one run, and the ends.

    Raises:
        ValueError: units that are no positions.
    """
    inner = of_model(game)
    given, config = inner.given, of(inner.bundle).config
    wrong = [place for place in given.cells if place not in PLACES]
    if wrong:
        raise ValueError(f"attention rollout knows positions of prompt and canvas, not {wrong[0]}: choose other units")
    prompt, length = int(np.asarray(given.valid).sum()), config.canvas_length
    shares = np.eye(prompt + length)
    for step in _steps(inner, prompt, length):
        shares = (step + np.eye(len(step))) / 2 @ shares
    rows = getattr(inner.metric, "positions", None)
    rows = np.arange(length) if rows is None else np.asarray(rows).ravel()
    read = shares[prompt + rows].mean(0)
    scores = np.zeros(len(inner.units))
    for place, cells in given.cells.items():
        own = np.asarray(cells)[:prompt] if place != "canvas" else np.asarray(cells)
        share = read[:prompt] if place != "canvas" else read[prompt:]
        np.add.at(scores, own[own >= 0], share[own >= 0])
    on, off = ends(game, [0])
    return Found(scores, np.full(len(scores), np.nan), on, float(off.mean()))


def _steps(game, prompt: int, length: int) -> list[np.ndarray]:
    """The mean pattern [T + C, T + C] of each layer."""
    model, given = of(game.bundle), game.given
    run = given.run
    cache = KVCache(jax.tree.map(jnp.zeros_like, run.cache.layers), jnp.zeros_like(run.cache.length))
    joint = [np.zeros((prompt + length, prompt + length)) for _ in model.layers]

    def put(found: dict, held: KVCache, rows: np.ndarray, own: np.ndarray) -> None:
        """Columns are the cache's slots, then those of the call."""
        for layer, entry in enumerate(held.layers):
            at = np.asarray(slot_positions(held.length, entry.k.shape[2]))[0]
            columns, pattern = np.concatenate([at, own]), np.asarray(found[f"layers.{layer}.attn_pattern"])[0]
            for row, share in zip(rows, pattern, strict=False):
                seen = (columns >= 0) & (share > 0)
                np.add.at(joint[layer][row], columns[seen], share[seen])

    reading = tapped(model, "layers.*.attn_pattern", phase="prefill", reduce=_over_heads)[0]
    for at in range(0, prompt, PREFILL_CHUNK):
        rows = np.arange(at, min(prompt, at + PREFILL_CHUNK))
        width = given.tokens[:, at : at + PREFILL_CHUNK].shape[1]
        filled = _prefilled(reading, *(x[:, at : at + width] for x in (given.tokens, given.valid)), cache)
        put(filled.sites, cache, rows, at + np.where(np.arange(width) < len(rows), np.arange(width), -1 - at))
        cache = filled.cache
    writing = tapped(model, "layers.*.attn_pattern", reduce=_over_heads)[0]
    state = run.state.replace(canvas=given.starts[:1])
    canvas = prompt + np.arange(length)
    put(_stepped(writing, state, cache, given.sampler, run.pinned), cache, canvas, canvas)
    return joint


def _over_heads(pattern_BNTS: jax.Array) -> jax.Array:
    return pattern_BNTS.mean(1)


@jax.jit
def _prefilled(model, tokens, valid, cache) -> dg.nn.transformer.Prefill:
    return dg.prefill(model, tokens, valid, cache)


@jax.jit
def _stepped(model, state, cache, sampler, pinned) -> dict[str, jax.Array]:
    return denoise_step(model, state, cache, sampler, pinned)[1].sites
