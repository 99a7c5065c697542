"""What a patch puts in place: the donor run's own values, zeros, a mean, another pair's values, random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.nn.cache import KVCache, slot_positions
from dgemma_jax.nn.functional import of
from interp.captures import capture_prompt
from interp.places import Target

SOURCES = ("donor", "zero", "mean", "resample", "renoise")
_TOKENS = ("canvas", "canvas_embed", "token_embed")  # where random tokens can stand


def check(source: str, goals: Sequence[Target], pairs: int) -> None:
    """Raise a ValueError if a target cannot have its values from this source."""
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    for goal in goals:
        if source == "renoise" and goal.name not in _TOKENS:
            raise ValueError(f"random tokens can stand at {', '.join(_TOKENS)}, not at {goal.name}: another source")
        if source in ("zero", "mean") and goal.name == "canvas":
            raise ValueError(f"the canvas holds tokens, which have no {source}: use 'donor', 'resample' or 'renoise'")
    if source == "resample" and pairs < 2:
        raise ValueError("resample takes the value of another pair: give two pairs or more")


def carried(goal: Target, moment: Moment, bundle: Any) -> Any:
    """What a run has at a target other than a site of the step, on the host.

    Returns:
        [P, ...] of a carrier; a `KVCache`; arrays [P, ...] by full name of sites of the prompt.
    """
    if goal.kind == "prompt":
        return dict(capture_prompt(bundle, moment.prompts, goal.sites).arrays)
    return jax.device_get(moment.cache if goal.kind == "cache" else getattr(moment, goal.kind))


def put(source: str, goal: Target, given: Any, moment: Moment, bundle: Any, seed: int) -> Any:
    """What is put in place of a run's values, shaped as the donors' values `given`."""
    pairs, length = len(moment.prompts), moment.canvas.shape[1]
    if source == "zero":
        return _each(np.zeros_like, given)
    if source == "resample":
        order = np.random.default_rng(seed).permutation(pairs)  # one cycle through all pairs: nobody meets himself
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        return _each(lambda x: x[other], given)
    if source == "mean":
        prompt = np.arange(max(map(len, moment.prompts))) < np.array([len(p) for p in moment.prompts])[:, None]
        return _mean(goal, given, prompt)
    if source == "renoise":
        model, rng = of(bundle), np.random.default_rng([seed, moment.step])
        width = length if goal.kind != "prompt" else given[goal.name].shape[1]
        tokens = rng.integers(0, model.config.vocab_size, (pairs, width)).astype(np.int32)
        return tokens if goal.kind == "canvas" else {goal.name: np.asarray(model.embedder.lookup(jnp.asarray(tokens)))}
    return given


def _each(change: Any, given: Any) -> Any:
    """The change of every array, the lengths of a cache kept."""
    new = jax.tree.map(change, given)
    return new.replace(length=given.length) if isinstance(given, KVCache) else new


def _mean(goal: Target, given: Any, prompt_BT: np.ndarray) -> Any:
    """The mean over pairs and positions, as often as there were values."""
    axis = goal.axes.index("T")

    def mean(values: np.ndarray, real_BT: np.ndarray) -> np.ndarray:
        real = real_BT.reshape([n if i in (0, axis) else 1 for i, n in enumerate(values.shape)])
        wide = np.where(real, values, 0).astype(np.float32).sum((0, axis), keepdims=True) / real_BT.sum()
        return np.broadcast_to(wide.astype(values.dtype), values.shape)

    if goal.kind == "cache":

        def of_cache(values: np.ndarray) -> np.ndarray:
            return mean(values, np.asarray(slot_positions(jnp.asarray(given.length), values.shape[axis])) >= 0)

        return given.replace(layers=jax.tree.map(of_cache, given.layers))

    def plain(values: np.ndarray) -> np.ndarray:
        if goal.kind != "prompt":
            return mean(values, np.ones((len(values), values.shape[axis]), bool))
        return mean(values, np.pad(prompt_BT, [(0, 0), (0, values.shape[axis] - prompt_BT.shape[1])]))

    return jax.tree.map(plain, given)
