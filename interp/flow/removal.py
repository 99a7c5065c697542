"""A step of which some positions had a carrier taken away: the canvas token, S, or both.

A taken canvas token is a fresh uniform one, which is what an un-accepted position holds. A taken S is that of the
uniform distribution (`interp.Flat`), which is not a zero S (`methods.md`, trap 6); either can be chosen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from interp.rows import Rows, Run, repeated, that_fit

BLANKS = ("uniform", "zero")


def blank_soft(model: Any, blank: str) -> jax.Array:
    """[D] the S that says nothing."""
    if blank not in BLANKS:
        raise ValueError(f"blank must be one of {', '.join(BLANKS)}, got {blank!r}")
    config = of(model).config
    uniform = dg.soft_embed(model, jnp.zeros((1, 1, config.vocab_size), jnp.float32))[0, 0]
    return uniform if blank == "uniform" else jnp.zeros_like(uniform)


def noise_tokens(run: Run, model: Any, seed: int) -> np.ndarray:
    """[R, B, C] uniform tokens: the same for every intervention, other ones at every step."""
    return np.random.default_rng(seed).integers(0, of(model).config.vocab_size, run.canvas.shape, np.int32)


def without(
    model: Any, at: Rows, sampler: Any, canvas_IBC: Any, soft_IBC: Any, tokens_BC: Any, noise_BC: Any, blank_D: Any
) -> tuple[jax.Array, jax.Array]:
    """One step under I choices of positions to take the canvas and S from; the first choice is the measure.

    Args:
        canvas_IBC, soft_IBC: bool, where each is taken.
        tokens_BC: whose log-probability is read.

    Returns:
        log p(token) [I, B, C], and D(p of the first choice || p) [I, B, C], of shaped distributions, in nats.
    """
    return _without(model, at, sampler, *map(jnp.asarray, (canvas_IBC, soft_IBC, tokens_BC, noise_BC, blank_D)))


@jax.jit
def _without(model, at, sampler, canvas_IBC, soft_IBC, tokens_BC, noise_BC, blank_D):
    count, batch, length = canvas_IBC.shape
    many = repeated(at, count)
    state = many.state.replace(
        canvas=jnp.where(canvas_IBC, noise_BC, at.state.canvas).reshape(-1, length),
        soft=jnp.where(soft_IBC.reshape(-1, length, 1), blank_D, many.state.soft),
        done=jnp.zeros(count * batch, bool),
    )  # fmt: skip
    view = denoise_step(model, state, many.cache, sampler, many.pinned)[1]
    logp_IBCV = jax.nn.log_softmax(view.shaped_logits, -1).reshape(count, batch, length, -1)
    tokens = jnp.broadcast_to(tokens_BC, canvas_IBC.shape)[..., None]
    first_BCV = logp_IBCV[0]
    kl_IBC = jnp.einsum("bcv,ibcv->ibc", jnp.exp(first_BCV), first_BCV - logp_IBCV)
    return jnp.take_along_axis(logp_IBCV, tokens, -1)[..., 0], kl_IBC


def prompts_that_fit(model: Any, run: Run, choices: int, rows_at_once: int | None) -> int:
    """How many prompts, each under this many choices, fit one call."""
    fit = that_fit(model, run, 1, rows_at_once)
    if fit < choices:
        raise ValueError(f"rows_at_once={fit}: one prompt under {choices} interventions takes {choices} rows")
    return min(fit // choices, run.canvas.shape[1])


def padded_rows(count: int, at_once: int) -> list[np.ndarray]:
    """Rows in chunks of one size: the last chunk repeats its last row."""
    return [np.minimum(np.arange(first, first + at_once), count - 1) for first in range(0, count, at_once)]
