"""Weights kept in few bits, and the products with them.

A module that holds a weight asks for products by `contract` and for rows by `weight[rows]`; it cannot tell a plain
parameter from a `Packed` one. Only weights are packed: activations, norms, router and cache keep their dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# The dtype of the stored values, and the largest value used of it.
FORMS = {"int8": (jnp.int8, 127.0), "int4": (jnp.int4, 7.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
GROUP = 128  # int4 values that share a scale


class Packed(nnx.Module):
    """A weight as values times scales: w ~ values * scale, the scale constant along the axes where its size is one.

    Where the last axis of `scale` is shorter than that of `values` and not one, each scale serves a group of
    neighbours.

    Attributes:
        values: [..] of few bits.
        scale: [..] float32.
        dtype: of what `weight[...]` gives; static.
    """

    def __init__(self, values: jax.Array, scale: jax.Array, dtype: Any) -> None:
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)
        self.dtype = jnp.dtype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def grouped(self) -> bool:
        return 1 < self.scale.shape[-1] < self.values.shape[-1]

    def __getitem__(self, index: Any) -> jax.Array:
        """The weight `w[...]`, or some of it by an index into the first axis, unpacked."""
        values, scale = self.values[index], self.scale[...]
        if index is not Ellipsis:
            scale = scale[index] if scale.shape[0] == self.shape[0] else scale[0]
        wide = values.astype(jnp.float32)
        if self.grouped:
            groups = (*wide.shape[:-1], scale.shape[-1], -1)
            return (wide.reshape(groups) * scale[..., None]).reshape(wide.shape).astype(self.dtype)
        return (wide * scale).astype(self.dtype)


def contract(rule: str, x: jax.Array, weight: Any, dtype: Any = None) -> jax.Array:
    """einsum(rule, x, weight) for a parameter, an array or a `Packed` weight.

    The scales of a packed weight are taken out of the product, so that compilers fuse the conversion of the values
    into it and never write an unpacked copy; groups cannot be taken out, and are unpacked first.

    Args:
        rule: as of `jnp.einsum`, two operands, the weight second; it says the shapes of both and of the result.
        x: floating.
        dtype: of the result; None gives that of `x` times the weight.
    """
    if not isinstance(weight, Packed) or weight.grouped:
        return jnp.einsum(rule, x, weight[...], preferred_element_type=dtype)
    operands, result = rule.split("->")
    left, right = operands.split(",")
    varying = [letter for letter, size in zip(right, weight.scale.shape, strict=True) if size > 1]
    scale = weight.scale[...].reshape([size for size in weight.scale.shape if size > 1])
    values = weight.values[...].astype(weight.dtype)
    wanted = dtype or jnp.result_type(x.dtype, weight.dtype)
    if all(letter in left for letter in varying):  # the scale belongs to what is summed over
        x = (x * _along(scale, varying, left)).astype(x.dtype)
        return jnp.einsum(rule, x, values, preferred_element_type=dtype)
    if not all(letter in result for letter in varying):
        return jnp.einsum(rule, x, weight[...], preferred_element_type=dtype)
    return (jnp.einsum(rule, x, values, preferred_element_type=dtype) * _along(scale, varying, result)).astype(wanted)


def _along(scale: jax.Array, letters: list[str], target: str) -> jax.Array:
    """The scale with its axes where `target` has their letters, and ones elsewhere."""
    order = [letters.index(letter) for letter in target if letter in letters]
    sizes = iter(scale.transpose(order).shape)
    return scale.transpose(order).reshape([next(sizes) if letter in letters else 1 for letter in target])


def pack(weight: jax.Array, form: str, shared: tuple[int, ...], dtype: Any = None) -> Packed:
    """A weight in a format: symmetric, the largest magnitude along the shared axes kept exactly.

    scale = max |w| / largest value; values = round(w / scale).

    Args:
        weight: floating.
        form: one of `FORMS`.
        shared: axes along which values share a scale. For "int4" groups of up to `GROUP` along the last axis instead.
        dtype: of the unpacked weight; None keeps that of `weight`.
    """
    stored, largest = FORMS[form]
    wide = weight.astype(jnp.float32)
    if form == "int4":
        size = group_size(weight.shape[-1])
        wide = wide.reshape(*weight.shape[:-1], -1, size)
        shared = (-1,)
    peak = jnp.max(jnp.abs(wide), shared, keepdims=True)
    scale = jnp.where(peak > 0, peak, 1.0) / largest
    scaled = wide / scale
    if jnp.issubdtype(stored, jnp.integer):
        scaled = jnp.clip(jnp.round(scaled), -largest, largest)
    values = scaled.astype(stored).reshape(weight.shape)
    return Packed(values, scale[..., 0] if form == "int4" else scale, dtype or weight.dtype)


def group_size(length: int) -> int:
    """The largest power of two that divides the length, `GROUP` at most."""
    size = GROUP
    while length % size:
        size //= 2
    return size
