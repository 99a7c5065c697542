"""Products with one matrix for each group of rows, under every transform that methods need.

Rows lie sorted by group; `sizes_E` says how many belong to each, and together they are all rows. Two products:

    rows   x [A, I], w [E, I, O]  ->  [A, O]      each row times the matrix of its group
    outer  x [A, I], y [A, O]     ->  [E, I, O]   for each group the sum of x_a (outer) y_a

The derivatives of each are products of these two kinds, so reverse mode passes any number of times. `vmap` folds the
mapped axis into the rows (or, of `outer`, into the groups): still one call. JAX refuses forward mode (`jvp`, `jacfwd`):
"can't apply forward-mode autodiff (jvp) to a custom_vjp function"; take the dense form of the experts there.

A kernel computes both for one kind of machine: `XLA` anywhere, `HOPPER` on NVIDIA GPUs of compute capability 9.0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

_ROWS = 64  # a tile of the Hopper kernels; the width and depth of a matrix must be multiples of it


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How the two products are computed.

    Attributes:
        rows: (x_AI, w, sizes_E, turned) -> [A, O]; `turned` says that w lies as [E, O, I].
        outer: (x_AI, y_AO, sizes_E) -> [E, I, O].
    """

    rows: Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
    outer: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


# --- the rules; cached, since each refers to the other


@functools.cache
def rows(kernel: Kernel, turned: bool) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function (x_AI, w, sizes_E) -> [A, O]; w lies as [E, I, O], or turned as [E, O, I]."""
    mapped = _rows_mapped(kernel, turned)

    @jax.custom_vjp
    def product(x_AI, w, sizes_E):
        return mapped(x_AI, w, sizes_E)

    def forward(x, w, sizes):
        # What is not asked for is not computed: the gradient in the weights has a kernel of its own.
        kept = (x.value if w.perturbed else None, w.value if x.perturbed else None, sizes.value)
        return product(x.value, w.value, sizes.value), kept

    def backward(kept, dy):
        x_AI, w, sizes_E = kept
        dy_AO = _array(dy)
        dx = None if w is None else rows(kernel, not turned)(dy_AO, w, sizes_E)
        pair = (dy_AO, x_AI) if turned else (x_AI, dy_AO)
        return dx, None if x_AI is None else outer(kernel)(*pair, sizes_E), None

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product


@functools.cache
def outer(kernel: Kernel) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function (x_AI, y_AO, sizes_E) -> [E, I, O]."""
    mapped = _outer_mapped(kernel)

    @jax.custom_vjp
    def product(x_AI, y_AO, sizes_E):
        return mapped(x_AI, y_AO, sizes_E)

    def backward(kept, dw_EIO):
        x_AI, y_AO, sizes_E = kept
        return rows(kernel, True)(y_AO, dw_EIO, sizes_E), rows(kernel, False)(x_AI, dw_EIO, sizes_E), None

    product.defvjp(lambda *args: (product(*args), args), backward)
    return product


def _rows_mapped(kernel: Kernel, turned: bool) -> Callable[..., jax.Array]:
    @custom_vmap
    def product(x_AI, w, sizes_E):
        return kernel.rows(x_AI, w, sizes_E, turned)

    @product.def_vmap
    def rule(count, mapped, x, w, sizes):
        x, sizes = _spread(count, (x, mapped[0]), (sizes, mapped[2]))
        if mapped[1]:  # its own matrices for each: a kernel would search too many groups
            return jax.lax.map(lambda args: product(*args), (x, w, sizes)), True
        number = x.shape[1]
        ends = jnp.cumsum(sizes, 1)
        owner = jnp.sum(ends[:, None] <= jnp.arange(number)[:, None], -1)
        order = jnp.argsort(owner.reshape(-1))  # of the rows of all, sorted by group again
        y = product(gather(x.reshape(count * number, -1), order), w, sizes.sum(0))
        return scatter(y, order).reshape(count, number, -1), True

    return product


def _outer_mapped(kernel: Kernel) -> Callable[..., jax.Array]:
    @custom_vmap
    def product(x_AI, y_AO, sizes_E):
        return kernel.outer(x_AI, y_AO, sizes_E)

    @product.def_vmap
    def rule(count, mapped, *args):
        x, y, sizes = _spread(count, *zip(args, mapped, strict=True))
        # One after the other they are the sorted rows of `count` times as many groups.
        w = product(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), sizes.reshape(-1))
        return w.reshape(count, -1, *w.shape[1:]), True

    return product


def _spread(count: int, *args: tuple[jax.Array, bool]) -> list[jax.Array]:
    """Every array with the mapped axis in front."""
    return [a if mapped else jnp.broadcast_to(a, (count, *a.shape)) for a, mapped in args]


def gather(x_AI: jax.Array, order_A: jax.Array) -> jax.Array:
    """Rows in this order, a permutation: neither this nor its derivative needs to add up rows."""
    return x_AI.at[order_A].get(unique_indices=True, mode="promise_in_bounds")


def scatter(x_AI: jax.Array, order_A: jax.Array) -> jax.Array:
    """The inverse of `gather`."""
    return jnp.zeros_like(x_AI).at[order_A].set(x_AI, unique_indices=True, mode="promise_in_bounds")


def _array(cotangent: jax.Array | SymbolicZero) -> jax.Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


# --- the kernels; under `jit`, so that all layers share one trace


@functools.partial(jax.jit, static_argnums=3)
def _xla_rows(x_AI, w, sizes_E, turned):
    return jax.lax.ragged_dot(x_AI, w.swapaxes(1, 2) if turned else w, sizes_E)


@jax.jit
def _xla_outer(x_AI, y_AO, sizes_E):
    axes = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x_AI, y_AO, sizes_E, axes)


def _tiles(width: int) -> dict[str, int]:
    wide = 2 * _ROWS if width % (2 * _ROWS) == 0 else _ROWS
    return dict(block_m=_ROWS, block_n=wide, block_k=_ROWS, max_concurrent_steps=4, grid_block_n=1)


@functools.partial(jax.jit, static_argnums=3)
def _hopper_rows(x_AI, w, sizes_E, turned):
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    tiles = _tiles(w.shape[1 if turned else 2])
    y_AO = ragged_dot(_padded(x_AI, 8), w, group_sizes=sizes_E, transpose_rhs=turned, **tiles)
    return y_AO[: x_AI.shape[0]]


@jax.jit
def _hopper_outer(x_AI, y_AO, sizes_E):
    if not hasattr(jax.devices()[0], "core_count"):
        # JAX's kernel asks the first device for its multiprocessors while it is traced, so without a GPU it cannot
        # be traced, and what is lowered here for one is not what runs there.
        return _xla_outer(x_AI, y_AO, sizes_E)
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    x_AI, y_AO = _padded(x_AI, _ROWS), _padded(y_AO, _ROWS)
    return transposed_ragged_dot(x_AI, y_AO, group_sizes=sizes_E, **_tiles(y_AO.shape[1]))


def _padded(x_AI: jax.Array, multiple: int) -> jax.Array:
    """With rows that belong to no group, until their number is one that the kernel copies."""
    return jnp.pad(x_AI, ((0, -x_AI.shape[0] % multiple), (0, 0)))


XLA = Kernel(_xla_rows, _xla_outer)
HOPPER = Kernel(_hopper_rows, _hopper_outer)


def fits_hopper(x_AI: jax.Array, *weights: jax.Array) -> bool:
    """Whether the Hopper kernels take these: one 16-bit dtype, and whole tiles along both sides of every matrix."""
    dtypes = {x.dtype for x in (x_AI, *weights)}
    whole = all(size % _ROWS == 0 for w in weights for size in w.shape[1:])
    return whole and len(dtypes) == 1 and dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
