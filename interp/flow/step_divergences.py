"""How far the distribution of each step is from that of the step before, and from the last one.

The states of a recorded run are put through the model once more, so that the divergences are over the whole
vocabulary and no distribution is kept but the last two (`methods.md` section 8).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.flow.recorded import last_of, run_of_block
from interp.flow.step_curves import StepCurves


def divergences(
    bundle: Any, trajectory: dg.Trajectory, block: int = 0, where: np.ndarray | None = None,
    progress: bool | None = None,
) -> StepCurves:  # fmt: skip
    """Mean over positions, in nats, of D(p_t || p_{t-1}) and D(p_final || p_t), of shaped distributions.

    Before the first step the distribution is uniform: D(p_0 || uniform) = ln V - H.

    Args:
        bundle: the model of the run.
        trajectory: of `record=dg.Record(soft=True)`.
        where: [B, C] bool, positions that count; None for all.

    Returns:
        Curves "to previous" and "from final", [1, R, B].

    Raises:
        ValueError: the record has no S, or the trajectory was loaded from a file.
    """
    run, model = run_of_block(trajectory, block), of(bundle)
    shape = (*run.canvas.shape[1:], model.config.vocab_size)
    where = np.ones(shape[:2], bool) if where is None else np.broadcast_to(where, shape[:2])
    uniform = jnp.zeros(shape, jnp.float32)
    final, *_ = _compared(model, last_of(run, trajectory, block), run.sampler, uniform, uniform, where)
    before, found = uniform, []
    with bar("divergences", len(run.steps), progress) as done:
        for step in run.steps:
            before, *both = _compared(model, run.at(step), run.sampler, before, final, where)
            found.append(np.stack(both))
            done(1)
    values = np.full((2, 1, *trajectory.valid.shape[1:]), np.nan)
    values[:, 0, : len(found)] = np.stack(found, 1)
    values[:, ~trajectory.valid[block][None]] = np.nan
    return StepCurves(dict(zip(("to previous", "from final"), values, strict=True)), "nats", "divergence of steps")


@jax.jit
def _compared(model, at, sampler, before_BCV, final_BCV, where_BC):
    """Log-probabilities of a step, and its two divergences [B]."""
    view = denoise_step(model, at.state, at.cache, sampler, at.pinned)[1]
    now_BCV, before_BCV, final_BCV = (jax.nn.log_softmax(x, -1) for x in (view.shaped_logits, before_BCV, final_BCV))

    def mean(p_BCV: jax.Array, q_BCV: jax.Array) -> jax.Array:
        kl_BC = jnp.einsum("bcv,bcv->bc", jnp.exp(p_BCV), p_BCV - q_BCV)
        return jnp.sum(kl_BC * where_BC, -1) / jnp.sum(where_BC, -1)

    return now_BCV, mean(now_BCV, before_BCV), mean(final_BCV, now_BCV)
