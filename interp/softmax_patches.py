"""What a patched query or key does to the attention pattern, exactly; from there on to first order.

AtP*, Kramar et al., arXiv 2403.00745, section 3.1: the softmax saturates, so the gradient at a query or key says little
of a large change. The change of the pattern is therefore computed, and its effect estimated as (A' - A) . dm/dA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def query_effects(
    change_BTNH: jax.Array, keys_BKSH: jax.Array, scores_BNTS: jax.Array, gradient_BNTS: jax.Array
) -> jax.Array:
    """[B, T, N] effect of each query that takes the donor's value.

    Args:
        change_BTNH: donor's queries - the recipient's.
        keys_BKSH: of the recipient, cached and own.
        scores_BNTS: of the recipient; masked places hold the lowest float.
        gradient_BNTS: of the metric in the pattern.
    """
    batch, heads, length, _ = scores_BNTS.shape
    kv_heads = keys_BKSH.shape[1]
    grouped = change_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, -1)
    moved = jnp.einsum("btkgh,bksh->bkgts", grouped, keys_BKSH.astype(jnp.float32)).reshape(scores_BNTS.shape)
    is_masked = scores_BNTS <= jnp.finfo(scores_BNTS.dtype).min
    new = jax.nn.softmax(jnp.where(is_masked, scores_BNTS, scores_BNTS + moved), -1)
    change = new - jax.nn.softmax(scores_BNTS, -1)
    return jnp.einsum("bnts,bnts->btn", change, gradient_BNTS)


def key_effects(
    change_BTKH: jax.Array, queries_BTNH: jax.Array, pattern_BNTS: jax.Array, gradient_BNTS: jax.Array
) -> jax.Array:
    """[B, T, K] effect of each key of this call that takes the donor's value, summed over the queries that see it.

    One score of a row rises by d, its weight p becomes p e^d / (1 - p + p e^d), and the other weights shrink in
    proportion. With m the mean of the gradient g under the pattern, the effect on the row is

        p (e^d - 1) / (1 - p + p e^d) * (g - m)

    Args:
        change_BTKH: donor's keys - the recipient's.
        queries_BTNH, pattern_BNTS: of the recipient.
        gradient_BNTS: of the metric in the pattern.
    """
    batch, length, kv_heads, _ = change_BTKH.shape
    heads = queries_BTNH.shape[2]
    grouped = queries_BTNH.astype(jnp.float32).reshape(batch, length, kv_heads, heads // kv_heads, -1)
    risen = jnp.einsum("btkgh,bskh->bkgts", grouped, change_BTKH).reshape(batch, heads, length, length)
    risen = jnp.clip(risen, -80, 80)  # e^80 is a float; beyond it nothing changes
    mean = jnp.sum(pattern_BNTS * gradient_BNTS, -1, keepdims=True)
    own, gradient = pattern_BNTS[..., -length:], gradient_BNTS[..., -length:]
    up, down = jnp.exp(jnp.minimum(risen, 0)), jnp.exp(-jnp.maximum(risen, 0))  # e^d = up / down, neither is large
    effect = own * (up - down) / ((1 - own) * down + own * up) * (gradient - mean)
    return effect.reshape(batch, kv_heads, -1, length, length).sum((2, 3)).swapaxes(1, 2)
