"""Linear classifiers of many cells (layers x steps x classes) in one compiled program.

    ridge     W = (X'X + l2 n I)^-1 X'Y, in closed form; Y one-hot, its mean taken off
    logistic  minimise the mean cross-entropy of softmax(X W + b) + l2 |W|^2 / 2, by L-BFGS

X is standardised by mean and deviation of the training samples; weights are given for x as it is.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

ITERATIONS = 40  # of L-BFGS
METHODS = ("ridge", "logistic")


@functools.partial(jax.jit, static_argnames="method")
def fit_cells(x_GND: jax.Array, y_GNK: jax.Array, weight_GN: jax.Array, l2: jax.Array, method: str):
    """Weights [G, D, K] and biases [G, K] of G cells, one after the other.

    Args:
        x_GND: samples.
        y_GNK: their classes, one-hot.
        weight_GN: 1 for the samples to train on, 0 for the others.
        l2: penalty, in units of standardised features.
    """
    return jax.lax.map(lambda cell: _one(*cell, l2, method), (x_GND, y_GNK, weight_GN))


def _one(x_ND, y_NK, weight_N, l2, method):
    count = jnp.maximum(weight_N.sum(), 1)
    mean_D = weight_N @ x_ND / count
    deviation_D = jnp.sqrt(weight_N @ (x_ND - mean_D) ** 2 / count) + 1e-6
    x_ND = (x_ND - mean_D) / deviation_D
    prior_K = weight_N @ y_NK / count
    if method == "ridge":
        gram_DD = jnp.einsum("nd,n,ne->de", x_ND, weight_N, x_ND) / count + l2 * jnp.eye(x_ND.shape[1])
        moment_DK = jnp.einsum("nd,n,nk->dk", x_ND, weight_N, y_NK - prior_K) / count
        w_DK = jax.scipy.linalg.solve(gram_DD, moment_DK, assume_a="pos")
        b_K = prior_K
    else:
        w_DK, b_K = _logistic(x_ND, y_NK, weight_N / count, l2)
    w_DK = w_DK / deviation_D[:, None]
    return w_DK, b_K - mean_D @ w_DK


def _logistic(x_ND, y_NK, share_N, l2):
    def loss(params):
        w_DK, b_K = params
        nats_N = optax.softmax_cross_entropy(x_ND @ w_DK + b_K, y_NK)
        return share_N @ nats_N + 0.5 * l2 * jnp.sum(w_DK**2)

    solver = optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(12, store_grad=True))
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        change, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, change), state), None

    start = (jnp.zeros((x_ND.shape[1], y_NK.shape[1])), jnp.zeros(y_NK.shape[1]))
    (params, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=ITERATIONS)
    return params


@jax.jit
def score_cells(x_GND: jax.Array, w_HDK: jax.Array, b_HK: jax.Array) -> jax.Array:
    """[H, G, N, K]: the scores of every classifier on the samples of every cell."""
    return jnp.einsum("gnd,hdk->hgnk", x_GND, w_HDK) + b_HK[:, None, None]
