"""The forward process (uniform tokens) and what depends on the step alone: temperature and random keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig


def temperature(step: jax.Array | int, sampler: SamplerConfig) -> jax.Array:
    """t_min + (t_max - t_min) * (N - step) / N, float32, for 0-based steps; t_min itself is never reached."""
    remaining = sampler.max_denoising_steps - jnp.asarray(step, jnp.float32)
    return sampler.t_min + (sampler.t_max - sampler.t_min) * (remaining / sampler.max_denoising_steps)


def row_keys(seeds: jax.Array) -> jax.Array:
    """One random key a row, [B], from integer seeds [B]. Nothing else tells the rows of a batch apart."""
    return _keys(seeds.astype(jnp.uint32) if isinstance(seeds, jax.Array) else np.asarray(seeds).astype(np.uint32))


_keys = jax.jit(jax.vmap(jax.random.key), inline=True)


def moment_keys(keys: jax.Array, block: jax.Array, moment: jax.Array) -> jax.Array:
    """Keys [B] of one moment of each row: 0 draws the block's first canvas, step + 1 serves that step."""
    return jax.vmap(lambda k, j, m: jax.random.fold_in(jax.random.fold_in(k, j), m))(keys, block, moment)


def uniform_canvas(keys: jax.Array, length: int, vocab_size: int) -> jax.Array:
    """[B, C] tokens, each uniform over the whole vocabulary, special tokens included."""
    return jax.vmap(lambda k: jax.random.randint(k, (length,), 0, vocab_size, jnp.int32))(keys)


def corrupt(key: jax.Array, tokens_BC: jax.Array, level_B: jax.Array, vocab_size: int) -> jax.Array:
    """Forward noise at level t: each token replaced with probability t by a uniform one, [B, C]."""
    where, what = jax.random.split(key)
    noisy = jax.random.uniform(where, tokens_BC.shape) < level_B[:, None]
    return jnp.where(noisy, jax.random.randint(what, tokens_BC.shape, 0, vocab_size, tokens_BC.dtype), tokens_BC)
