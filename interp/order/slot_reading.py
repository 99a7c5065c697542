"""Distributions at chosen positions of many canvases, as rows of few calls: what energies and cloze tests run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.diffusion.generate import prefill_prompts
from dgemma_jax.nn import sites
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.flow.removal import padded_rows

LOGIT_BYTES = 1 << 30  # of one call


def read(
    bundle: Any, ids: Sequence[Sequence[int]], owner: np.ndarray, canvas: np.ndarray, slots: np.ndarray,
    soft: Any = None, *, tokens: np.ndarray | None = None, temperature: float = 1.0, progress: bool | None = None,
) -> np.ndarray:  # fmt: skip
    """Log-probabilities at slots of canvases, each fed to a first step.

    Args:
        ids: prompts, run once each.
        owner: [n] which prompt each canvas belongs to.
        canvas: [n, C] ids.
        slots: [n, s] positions.
        soft: [n, C, D], or None for zeros.
        tokens: [n, s] read their log-probability alone.
        temperature: of the softmax.

    Returns:
        [n, s] with tokens, else [n, s, V]; float32, nats.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    model = of(bundle)
    config, count = model.config, len(canvas)
    cache = prefill_prompts(model, ids, 1)
    size = min(count, max(1, LOGIT_BYTES // (4 * config.canvas_length * config.vocab_size)))
    chunks = padded_rows(count, size)
    found = []
    with bar("readings", len(chunks), progress) as done:
        for rows in chunks:
            own = jax.tree.map(lambda x, at=owner[rows]: x[at], cache)
            part = np.zeros((size, config.canvas_length, config.embed_dim)) if soft is None else soft[rows]
            part = jnp.asarray(part, model.dtype)
            given = jnp.asarray(canvas[rows], jnp.int32), own, part, jnp.asarray(slots[rows])
            picked = None if tokens is None else jnp.asarray(tokens[rows])
            found.append(np.asarray(_read(model, *given, picked, jnp.float32(temperature))))
            done(1)
    return np.concatenate(found)[:count]


@jax.jit
def _read(model, canvas_BC, cache, soft_BCD, slots_BN, tokens_BN, temperature):
    zero = jnp.zeros(canvas_BC.shape[0], jnp.int32)
    model = sites.bind(
        model, phase="denoise", step=zero, block=zero, embedder=model.embedder, length=cache.length, canvas=canvas_BC,
        soft=soft_BCD,
    )  # fmt: skip
    hidden_BCD = model.denoise(canvas_BC, cache, soft_BCD)
    logits_BNV = model.unembed(jnp.take_along_axis(hidden_BCD, slots_BN[..., None], 1))
    logp_BNV = jax.nn.log_softmax(logits_BNV / temperature, -1)
    return logp_BNV if tokens_BN is None else jnp.take_along_axis(logp_BNV, tokens_BN[..., None], -1)[..., 0]
