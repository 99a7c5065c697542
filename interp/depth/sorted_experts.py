"""The experts as the published code runs them: assignments sorted by expert, two ragged products, sorted back.

Source: google-deepmind/gemma 7691fd4, gemma/gm/nn/gemma4/_moe.py, `MoERagged`. The numbers are those of the other
forms of `dgemma_jax.nn.moe`; the depth is not, since a sort over all tokens of a call is deep.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dgemma_jax.nn.layers import gelu
from dgemma_jax.nn.moe import Experts
from dgemma_jax.nn.placement import with_experts
from dgemma_jax.nn.sites import Site


@nnx.dataclass(eq=False)
class SortedExperts(nnx.Module):
    """Stands in for `Experts`, with its weights and sites.

    Attributes:
        top: experts a token.
        gate_up, down: [E, 2F, D] and [E, F, D].
        hidden, out: the sites of experts, which this form does not visit.
    """

    top: int
    gate_up: nnx.Param
    down: nnx.Param
    hidden: Site
    out: Site

    def __call__(self, x_BTD: jax.Array, weights_BTE: jax.Array, form: str = "sorted") -> jax.Array:
        """sum_e weights[e] * expert_e(x) over the `top` largest weights, [B, T, D]. `form` is not asked."""
        (batch, length, width), experts = x_BTD.shape, weights_BTE.shape[-1]
        weight_BTX, expert_BTX = jax.lax.top_k(weights_BTE, self.top)
        order_A = jnp.argsort(expert_BTX.reshape(-1))  # of all assignments
        back_A = jnp.argsort(order_A)
        x_AD = x_BTD.reshape(-1, width)[order_A // self.top]
        sizes_E = jax.nn.one_hot(expert_BTX, experts, dtype=jnp.int32).sum((0, 1, 2))
        both_AF = jax.lax.ragged_dot(x_AD, self.gate_up[...].swapaxes(1, 2), sizes_E)
        gate_AF, up_AF = jnp.split(both_AF, 2, -1)
        out_AD = jax.lax.ragged_dot(gelu(gate_AF) * up_AF, self.down[...], sizes_E)
        out_BTXD = out_AD[back_A].reshape(batch, length, self.top, width)
        return jnp.einsum("btxd,btx->btd", out_BTXD, weight_BTX.astype(x_BTD.dtype))


def with_sorted_experts(model: Any) -> Any:
    """The model, with or without weights, with every layer's experts in this form."""

    def changed(node: Any) -> Any:
        if not isinstance(node, Experts):
            return node
        return SortedExperts(node.top, node.gate_up, node.down, node.hidden, node.out)

    return jax.tree.map(changed, with_experts(model, layout="efd"), is_leaf=lambda node: isinstance(node, Experts))
