"""The values at the places where units act, as data: for methods that move values, not masks.

With every unit off, a game reads its pool in place of the run's own values. A pool that holds these very values makes
the run itself; its derivative is that of the target in every embedding, key, residual or weight that units cover.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.diffusion.generate import bucket
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.cache import LayerCache, slot_positions
from dgemma_jax.nn.functional import of
from interp.masking import masked_game
from interp.masking.game import Counted, Game
from interp.masking.masked_game import MaskedGame
from interp.masking.replacements import Pool
from interp.taps import tapped


def of_model(game: Game) -> MaskedGame:
    """The game itself, of a model.

    Raises:
        ValueError: it is a function of masks alone, or what it explains has no derivative.
    """
    inner = game.game if isinstance(game, Counted) else game
    if not isinstance(inner, MaskedGame):
        raise ValueError("this method looks inside a model; a function of masks takes 'path', 'occlusion' or 'rise'")
    if inner.limit is not None or inner.reads == "tokens":
        raise ValueError("sampled tokens have no derivative: explain one step (scope='step') and its logits")
    return inner


def own_values(game: Game) -> Pool:
    """The run's own values [k, ...] at each place, float32 on the host; k counts the canvases that rows start from."""
    game = of_model(game)
    given, model = game.given, of(game.bundle)
    places = list(game.units.cells)
    run = given.run
    state = run.state.replace(canvas=given.starts[:1])
    sites = [name for name in places if name.startswith("layers.")]
    found: Pool = _seen(tapped(model, sites)[0], state, run.cache, given.sampler, run.pinned) if sites else {}
    other = {
        "token_embed": lambda: model.embedder.lookup(given.tokens),
        "canvas": lambda: model.embedder.lookup(given.starts),
        "soft": lambda: run.state.soft,
        "cache": lambda: run.cache.layers,
    }
    found |= {place: other[place]() for place in places if place in other}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


@jax.jit
def _seen(model, state, cache, sampler, pinned) -> dict[str, jax.Array]:
    return denoise_step(model, state, cache, sampler, pinned)[1].sites


def gradients_at(game: Game, pool: Pool, count: int) -> tuple[np.ndarray, Pool]:
    """The target and its derivative, `count` rows that take their values from a pool in turn.

    Args:
        pool: arrays [k, ...] as of `own_values`.

    Returns:
        Values [count], and derivatives in the shapes of the pool with `count` rows.
    """
    inner = of_model(game)
    given, size = dataclasses.replace(inner.given, pool={}), inner.gradients_at_once
    masks = np.zeros((size, bucket(len(inner.units) + 1)), np.float32)
    masks[:, len(inner.units) :] = 1  # cells of no unit keep what they have
    values, grads = [], []
    for at in range(0, count, size):
        rows = np.minimum(np.arange(at, at + size), count - 1)
        part = jax.tree.map(lambda x, rows=rows: x[rows % len(x)], pool)
        found, slopes = _differentiated(of(inner.bundle), given, part, masks, rows, inner.metric)
        kept = min(size, count - at)
        values.append(np.asarray(found, np.float64)[:kept])
        grads.append(jax.tree.map(lambda x, kept=kept: np.asarray(x, np.float32)[:kept], slopes))
    values = np.concatenate(values)
    grads = jax.tree.map(lambda *parts: np.concatenate(parts), *grads)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(grads)):
        raise ValueError("the target's gradient is not finite; use a method that takes none, such as 'path'")
    if isinstance(game, Counted):
        game.counted(values, np.ones((count, 1)))
    return values, grads


@jax.jit
def _differentiated(model, given, pool, masks, starts, metric) -> tuple[jax.Array, Pool]:
    def total(pool: Pool) -> tuple[jax.Array, jax.Array]:
        number = jnp.arange(len(masks))
        own = dataclasses.replace(given, pool=pool, starts=given.starts[starts % len(given.starts)])
        values = masked_game._target(model, own, masks, number, metric, "logits")
        return values.sum(), values

    slopes, values = jax.grad(total, has_aux=True)(pool)
    return values, slopes


def by_unit(game: Game, values: Pool) -> np.ndarray:
    """Sums [n, U] of values [n, ...] over the cells of each unit."""
    game = of_model(game)
    cells = _cells(game)
    count = len(game.units)
    total = 0
    for leaf, own in zip(jax.tree.leaves(values), jax.tree.leaves(cells), strict=True):
        which = np.broadcast_to(own, leaf.shape[1:]).ravel() + 1
        total = total + np.stack([np.bincount(which, row.ravel(), count + 1)[1:] for row in leaf])
    return total


def _cells(game: MaskedGame) -> dict[str, Any]:
    """The unit of each cell, in shapes that broadcast to rows of the values there."""

    def at_place(place: str, own: np.ndarray) -> Any:
        if place.startswith("layers."):
            return own
        if place != "cache":
            return own[:, None]
        cache, found = game.given.run.cache, []
        for entry in cache.layers:
            at = np.asarray(slot_positions(cache.length, entry.k.shape[2]))[0]
            held = np.where(at >= 0, own[np.clip(at, 0, len(own) - 1)], -1)[None, :, None]
            found.append(LayerCache(held, held))
        return found

    return {place: at_place(place, np.asarray(own)) for place, own in game.given.cells.items()}
