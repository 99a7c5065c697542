"""Rotary position embedding, over a whole head or "proportional" over part of its spectrum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(head_dim: int, theta: float, fraction: float, proportional: bool) -> np.ndarray:
    """Angles per position, [head_dim / 2] (proportional) or [head_dim * fraction / 2], float32.

    Both forms rotate pairs (j, j + n) of the first 2n channels. The proportional form keeps the exponent's
    denominator at the whole head dimension and sets the angles beyond `fraction` to zero: the spectrum is
    cut, the head is not (`transformers`, `_compute_proportional_rope_parameters`).
    """
    if proportional:
        live = int(fraction * head_dim // 2)
        exponent = np.arange(0, 2 * live, 2, dtype=np.float32) / np.float32(head_dim)
        return np.concatenate([1.0 / theta**exponent, np.zeros(head_dim // 2 - live)]).astype(np.float32)
    size = int(head_dim * fraction)
    return (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))).astype(np.float32)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotate channel pairs (j, j + H/2) by position * frequency; angles in float32, products in x's dtype."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    cos = jnp.cos(angles).astype(x_BTNH.dtype)[:, :, None, :]
    sin = jnp.sin(angles).astype(x_BTNH.dtype)[:, :, None, :]
    half = frequencies.shape[0]
    a, b, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
