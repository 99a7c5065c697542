"""What stands in for a unit that is off: a pool of baselines, each with everything a run has at its step.

"noise" is the model's own forward process: uniform random tokens in place of the prompt's text and of the canvas, run
through the model, once for every draw. For canvas rows this is in distribution; a prompt of random words is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import prefill_prompts
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.cache import KVCache, slot_positions
from dgemma_jax.nn.functional import of
from interp.masking.units import Units, content
from interp.rows import Rows, repeated
from interp.taps import tapped

BASELINES = ("noise", "mean", "zero")
Pool = dict[str, Any]  # by place: [k, ...] of k draws; tokens as ids, all else as values


def pool_of(
    bundle: Any, ids: Sequence[int], units: Units, run: Rows, sampler: SamplerConfig, baseline: Any, draws: int,
    seed: int,
) -> tuple[Pool, int]:
    """What stands in at each place where units act, and how many draws there are.

    Args:
        run: the one row that is explained, before its step.
        baseline: "noise"; "mean": of the embedding table, of cached positions, of canvas rows; "zero"; or prompts of
            as many tokens, each run through the model on the canvas of the run explained.
        draws: of "noise".

    Raises:
        ValueError: no such baseline; prompts of another length; norms at zero.
    """
    places = list(units.cells)
    sites = [name for name in places if name.startswith("layers.")]
    model = of(bundle)
    if isinstance(baseline, str) and baseline in ("mean", "zero"):
        if baseline == "zero" and any(name.endswith("_norm_scale") for name in sites):
            raise ValueError("a norm cannot be divided by zero: for norms take baseline='mean' or 'noise'")
        return _constant(model, places, sites, run, sampler, baseline), 1
    if isinstance(baseline, str) and baseline == "noise":
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        others = _noise(model, content(bundle, ids), ids, run, draws, seed)
    elif isinstance(baseline, str):
        raise ValueError(
            f"baseline must be one of {', '.join(BASELINES)}, or a list of prompts of as many tokens; got {baseline!r}"
        )
    else:
        if "canvas" in places:
            raise ValueError("other prompts have no other canvas: for units of 'canvas' take 'noise', 'mean' or 'zero'")
        others = _resampled(bundle, ids, baseline, run)
    tokens, canvas = others
    pool: Pool = {"token_embed": tokens, "canvas": canvas}
    if sites or {"cache", "soft"} & set(places):
        cache = prefill_prompts(model, tokens.tolist(), 1)
        rows = repeated(run, len(tokens))
        state = rows.state.replace(canvas=jnp.asarray(canvas), soft=jnp.zeros_like(rows.state.soft))
        watched = tapped(model, sites)[0] if sites else model
        seen, soft = _seen(watched, state, cache, sampler, rows.pinned)  # S that noise makes of itself
        if sites and int(run.state.step.max()):
            seen = _seen(watched, state.replace(soft=soft), cache, sampler, rows.pinned)[0]
        pool |= {"cache": cache.layers, "soft": soft, **seen}
    return {name: pool[name] for name in places}, len(tokens)


def _noise(model, inside, ids, run, draws, seed) -> tuple[np.ndarray, np.ndarray]:
    """Uniform random tokens: prompts [k, T], template kept, and canvases [k, C]."""
    rng = np.random.default_rng(seed)
    tokens = np.tile(np.asarray(ids, np.int32), (draws, 1))
    tokens[:, inside] = rng.integers(0, model.config.vocab_size, (draws, len(inside)))
    canvas = rng.integers(0, model.config.vocab_size, (draws, run.state.canvas.shape[1]))
    return tokens, canvas.astype(np.int32)


def _resampled(bundle, ids, baseline, run) -> tuple[np.ndarray, np.ndarray]:
    """Other prompts [k, T], each with the canvas [k, C] of the run explained."""
    model, tokenizer, _ = inputs.parts(bundle)
    others = inputs.to_ids(baseline, tokenizer, model.config.vocab_size)
    wrong = [len(other) for other in others if len(other) != len(ids)]
    if wrong:
        raise ValueError(
            f"a baseline prompt has {wrong[0]} tokens, the prompt {len(ids)}: positions correspond only between "
            "prompts of equal length; change words one for one"
        )
    return np.asarray(others, np.int32), np.tile(np.asarray(run.state.canvas), (len(others), 1))


def _constant(model, places, sites, run, sampler, baseline) -> Pool:
    """Means of the run explained, or zeros: one draw."""
    table = model.embedder.table[...].astype(jnp.float32)
    embedding = jnp.mean(table, 0)[None, None] * model.embedder.scale
    seen = _seen(tapped(model, sites)[0], run.state, run.cache, sampler, run.pinned)[0] if sites else {}
    pool: Pool = {
        "token_embed": embedding, "canvas": embedding,
        "soft": jnp.mean(run.state.soft.astype(jnp.float32), 1, keepdims=True),
        "cache": [_mean_of_cache(entry, run.cache) for entry in run.cache.layers],
    }  # fmt: skip
    pool |= {name: jnp.mean(x.astype(jnp.float32), 1, keepdims=True) for name, x in seen.items()}
    pool = {name: pool[name] for name in places}
    return jax.tree.map(jnp.zeros_like, pool) if baseline == "zero" else pool


def _mean_of_cache(entry: Any, cache: KVCache) -> Any:
    """Keys and values, each the mean over the positions held."""

    def mean(x_BKSH: jax.Array) -> jax.Array:
        held_BS = slot_positions(cache.length, x_BKSH.shape[2]) >= 0
        weight = (held_BS / held_BS.sum(1, keepdims=True))[:, None, :, None]
        return jnp.broadcast_to((x_BKSH * weight).sum(2, keepdims=True), x_BKSH.shape).astype(x_BKSH.dtype)

    return jax.tree.map(mean, entry)


@jax.jit
def _seen(model, state, cache, sampler, pinned) -> tuple[dict[str, jax.Array], jax.Array]:
    """What taps saw in a step, and the S that it hands on."""
    view = denoise_step(model, state, cache, sampler, pinned)[1]
    return view.sites, view.next_soft
