"""The small parts: norm, feed-forward, soft cap, embedding table, self-conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import layers, transformer

CONFIG = ModelConfig.tiny(layer_types=("full_attention",))


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG, seed=1)


def wide(parameter):
    return np.asarray(parameter[...], np.float64)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_norm(model):
    x = 100 * draw(2, 3, 32)
    norm = model.layers[0].input_norm
    np.testing.assert_allclose(norm(x), oracles.rms(x.astype(float), wide(norm.weight)), atol=1e-5)
    np.testing.assert_allclose(norm(x), norm(1000 * x), atol=1e-5)  # the size of x is gone
    plain = model.self_conditioning.post_norm
    assert plain.weight is None
    np.testing.assert_allclose(np.mean(np.square(plain(x)), -1), 1, rtol=1e-5)
    np.testing.assert_array_equal(plain(np.zeros((1, 1, 32), np.float32)), 0)  # eps keeps zero finite
    # float32 inside: sums of bfloat16 squares would lose the small ones
    rough = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(norm(rough), norm(rough.astype(jnp.float32)).astype(jnp.bfloat16))
    assert norm(rough).dtype == jnp.bfloat16


def test_feed_forward(model):
    mlp, x = model.layers[0].mlp, draw(2, 3, 32)
    expected = (oracles.gelu(x @ wide(mlp.gate).T) * (x @ wide(mlp.up).T)) @ wide(mlp.down).T
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)
    points = np.array([-3.0, -1.0, 0.0, 1.0, 3.0], np.float32)
    np.testing.assert_allclose(layers.gelu(points), [-0.0036374, -0.158808, 0, 0.841192, 2.996363], atol=1e-5)


def test_soft_cap():
    x = np.array([-1e6, -1.0, 0.0, 1e-3, 30.0, 1e6], np.float32)
    got = np.asarray(layers.soft_cap(x, 30.0))
    np.testing.assert_allclose(got, 30 * np.tanh(x.astype(float) / 30), rtol=1e-5)
    assert (np.diff(got) > 0).all() and np.abs(got).max() <= 30


def test_lookup_and_logits(model):
    tokens, hidden, table = np.array([[0, 95, 7]]), 5 * draw(1, 3, 32), wide(model.embedder.table)
    np.testing.assert_allclose(model.embedder.lookup(tokens), np.sqrt(32) * table[tokens], rtol=1e-5)
    np.testing.assert_allclose(model.embedder.logits(hidden), 30 * np.tanh(hidden @ table.T / 30), atol=1e-4)
    assert float(transformer.abstract(ModelConfig(), jnp.bfloat16).embedder.table.shape[1] ** 0.5) == pytest.approx(
        53.066, abs=1e-3
    )
    assert float(jnp.asarray(2816**0.5, jnp.bfloat16)) == 53.0  # what the scale becomes in the release


def test_soft_embedding(model):
    """S of a certain distribution is the token's own embedding; S is linear in the distribution."""
    tokens = np.array([[3, 95], [0, 7]])
    sure = np.eye(96, dtype=np.float32)[tokens]
    lookup = np.asarray(model.embedder.lookup(tokens))
    np.testing.assert_allclose(model.soft_embed(sure), lookup, atol=1e-5)
    even = (sure[:, :1] + sure[:, 1:]) / 2
    np.testing.assert_allclose(model.soft_embed(even)[:, 0], lookup.mean(1), atol=1e-5)
    rough = jax.eval_shape(lambda m, p: m.soft_embed(p), oracles.build(CONFIG, dtype=jnp.bfloat16), sure)
    assert rough.dtype == jnp.bfloat16


def test_self_conditioning(model):
    part, embedded, soft = model.self_conditioning, 9 * draw(2, 3, 32), draw(2, 3, 32, seed=4)
    normed = oracles.rms(soft.astype(float), wide(part.pre_norm.weight))
    signal = (oracles.gelu(normed @ wide(part.gate).T) * (normed @ wide(part.up).T)) @ wide(part.down).T
    np.testing.assert_allclose(part(embedded, soft), oracles.rms(embedded + signal), atol=1e-4)
    first = part(embedded, np.zeros_like(soft))  # S = 0: no signal, and yet the outer norm
    np.testing.assert_allclose(first, oracles.rms(embedded.astype(float)), atol=1e-5)
