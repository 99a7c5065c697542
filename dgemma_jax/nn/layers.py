"""Parts that every block uses: the norm, projections, the gated feed-forward, the soft cap."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn.packed import contract
from dgemma_jax.nn.sites import Site


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    """A parameter drawn from N(0, 1 / fan_in)."""
    return nnx.Param((jax.random.normal(rngs.params(), shape) / math.sqrt(fan_in)).astype(dtype))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32, given back in the dtype of x. No weight if `size` is None."""

    def __init__(self, size: int | None, *, eps: float, dtype: jnp.dtype, site: str) -> None:
        self.eps = eps
        self.weight = None if size is None else nnx.Param(jnp.ones((size,), dtype))
        self.scale = Site(site)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide / self.scale(jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps))
        if self.weight is not None:
            wide = wide * self.weight[...].astype(jnp.float32)
        return wide.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh form of GELU, as in the release."""
    return jax.nn.gelu(x, approximate=True)


class GatedMLP(nnx.Module):
    """down(gelu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.gate = normal(rngs, (hidden, width), width, dtype)
        self.up = normal(rngs, (hidden, width), width, dtype)
        self.down = normal(rngs, (width, hidden), hidden, dtype)
        self.pre, self.post = Site("mlp_pre"), Site("mlp_post")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = self.pre(contract("btd,fd->btf", x_BTD, self.gate))
        up_BTF = contract("btd,fd->btf", x_BTD, self.up)
        return contract("btf,df->btd", self.post(gelu(gate_BTF) * up_BTF), self.down)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap)."""
    return cap * jnp.tanh(x / cap)
