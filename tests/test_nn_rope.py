"""Rotary embedding: against complex numbers, and the laws that make it a relative position."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dgemma_jax.nn import rope

KINDS = [(8, 10_000.0, 1.0, False), (16, 1e6, 0.25, True), (16, 100.0, 0.5, False), (12, 100.0, 0.5, True)]
rotate = jax.jit(lambda x, positions, frequencies: rope.rotate(x, positions, frequencies))


def test_frequencies_by_hand():
    np.testing.assert_allclose(rope.inverse_frequencies(8, 16.0, 1.0, False), [1, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(rope.inverse_frequencies(8, 16.0, 0.5, True), [1, 0.5, 0, 0])  # the spectrum is cut
    np.testing.assert_allclose(rope.inverse_frequencies(8, 16.0, 0.5, False), [1, 0.25])  # the head is cut
    release = rope.inverse_frequencies(512, 1e6, 0.25, True)
    assert release.shape == (256,) and (release > 0).sum() == 64 and release.dtype == np.float32
    np.testing.assert_allclose(release[63], 1e6 ** (-126 / 512), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_against_complex_numbers(kind):
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 5, 3, kind[0])).astype(np.float32), rng.integers(0, 300, (2, 5))
    got = rotate(x, positions, rope.inverse_frequencies(*kind))
    expected = [
        [[oracles.rope(h, p, *kind[1:]) for h in t] for t, p in zip(*row, strict=True)]
        for row in zip(x, positions, strict=False)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_distance_only(kind):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, kind[0])).astype(np.float32)
    turn = lambda x, p: np.asarray(rotate(x, np.array([[p]]), rope.inverse_frequencies(*kind))).ravel()  # noqa: E731
    scores = {p: turn(q, p + 7) @ turn(k, p) for p in (0, 1, 50, 400)}
    assert max(scores.values()) - min(scores.values()) < 1e-3
    assert abs(turn(q, 8) @ turn(k, 0) - scores[0]) > 1e-3  # another distance, another score
    np.testing.assert_allclose(np.linalg.norm(turn(q, 123)), np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_array_equal(turn(q, 0), q.ravel())


def test_dtype_of_the_input_is_kept():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    out = jax.eval_shape(rope.rotate, x, np.zeros((1, 2), np.int32), rope.inverse_frequencies(*KINDS[0]))
    assert out.dtype == jnp.bfloat16 and out.shape == x.shape
