"""The Jacobian lens: each layer read through the mean linear effect that it has on the last residual.

    J_l = E[d h_last / d h_l]        lens_l(h) = softmax(cap tanh(W norm(J_l h) / cap))

For an output dimension a cotangent of 1 stands at all target positions; its gradient at layer l is averaged over the
source positions: a sum over targets, a mean over sources. On the bidirectional canvas every target counts for every
source. github.com/anthropics/jacobian-lens; `methods.md` 12.5. `AffineLens.directions` gives J_l^T w_v for ablations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax import progress
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from interp.affine_lens import AffineLens, chosen_layers
from interp.editing import put
from interp.edits import Add
from interp.gates import table
from interp.taps import tapped


def fit_jacobian_lens(
    bundle: Any, moments: Moment | Sequence[Moment], layers: Any = None, *, positions: Any = None, chunk: int = 16,
    show: bool | None = None,
) -> AffineLens:  # fmt: skip
    """Estimate J_l at the steps that follow some moments. `interp.logit_lens(..., lens=...)` reads through it.

    For the expectation over clean texts, as published, make the moments from texts:
    `dg.generate(bundle, [[bos]] * n, canvas=texts).trajectory.moment(0, 0)` stands before a step that sees the texts
    on the canvas and no self-conditioning. Moments of real generations average over noise levels.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> moment = dg.generate(model, [[5, 6]], max_new_tokens=12).trajectory.moment(0, 1)
    >>> interp.fit_jacobian_lens(model, moment, layers=[1, 2])
    Jacobian (1 row) lens of 2 layers, width 32

    Args:
        bundle: a bundle or a model, edited or not.
        moments: one or several; their rows have equal weight.
        layers: an integer, slice, list or mask; None for all.
        positions: on the canvas, both sources and targets; None for all. A mask or a list, not strengths.
        chunk: output dimensions of one backward pass. The model runs forward D / chunk times a moment.
        show: draw a progress bar; None draws it on a terminal.

    Raises:
        ValueError: no moment, position or layer, or not of this model.
    """
    model = of(bundle)
    width, canvas = model.config.embed_dim, model.config.canvas_length
    moments = [moments] if isinstance(moments, Moment) else list(moments)
    if not moments or not all(isinstance(moment, Moment) for moment in moments):
        raise ValueError("moments must be one or several moments of runs: out.trajectory.moment(block, step)")
    for moment in moments:
        if moment.soft.shape[1:] != (canvas, width):
            raise ValueError(f"a moment has S of shape {moment.soft.shape}; this model needs [B, {canvas}, {width}]")
    if not isinstance(chunk, int) or not 1 <= chunk <= width:
        raise ValueError(f"chunk must be an integer in 1..{width}, got {chunk!r}")
    chosen = np.asarray(table(positions, canvas, "positions"))
    if not chosen.any() or not np.isin(chosen, (0, 1)).all():
        raise ValueError(f"positions must choose at least one of the {canvas}, and none in part; got {positions!r}")
    layers = chosen_layers(model, layers)
    total, rows = np.zeros((len(layers), width, width), np.float32), 0
    with progress.bar("Jacobian", len(moments) * width, show) as done:
        for moment in moments:
            batch = moment.canvas.shape[0]
            rows += batch
            for first in range(0, width, chunk):
                dims = np.arange(first, first + chunk) % width  # the last wraps around: one shape
                found = _gradients(
                    model, moment.state, moment.cache, moment.sampler, moment.pinned, jnp.asarray(dims),
                    jnp.asarray(chosen), layers=layers,
                )  # fmt: skip
                own = min(chunk, width - first)
                total[:, first : first + own] += np.asarray(found)[:, :own]
                done(own)
    method = f"Jacobian ({rows} row{'s' if rows > 1 else ''})"
    return AffineLens(jnp.asarray(total / rows), jnp.zeros((len(layers), width), jnp.float32), layers, method)


@functools.partial(jax.jit, static_argnames="layers")
def _gradients(model, state, cache, sampler, pinned, dims, chosen_C, *, layers) -> jax.Array:
    """[L, n, D]: of n output dimensions, summed over targets and rows, averaged over the chosen source positions."""
    end = _site(model.config.num_layers - 1)

    def last(deltas: list[jax.Array]) -> jax.Array:
        adds = {
            _site(layer): Add(delta, name="resid_post", axes="BTD", phase="denoise")
            for layer, delta in zip(layers, deltas, strict=True)
        }
        listening, _ = tapped(put(model, adds), end)
        return denoise_step(listening, state, cache, sampler, pinned)[1].sites[end]

    zeros = [jnp.zeros(state.soft.shape, model.dtype) for _ in layers]
    out_BCD, backward = jax.vjp(last, zeros)

    def of_dimension(dim: jax.Array) -> jax.Array:
        cotangent_D = jax.nn.one_hot(dim, out_BCD.shape[-1], dtype=out_BCD.dtype)
        cotangent_CD = chosen_C.astype(out_BCD.dtype)[:, None] * cotangent_D
        grads = jnp.stack(backward(jnp.broadcast_to(cotangent_CD, out_BCD.shape))[0]).astype(jnp.float32)
        return jnp.einsum("lbcd,c->ld", grads, chosen_C) / chosen_C.sum()

    return jax.vmap(of_dimension, out_axes=1)(dims)


def _site(layer: int) -> str:
    return f"layers.{layer}.resid_post"
