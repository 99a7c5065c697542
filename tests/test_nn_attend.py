"""Attention without its scores is softmax attention, at once and over chunks of keys, in values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
from dgemma_jax.config import FULL, SLIDING, ModelConfig
from dgemma_jax.diffusion import noise, sampler
from dgemma_jax.nn import attend, cache, masks, transformer

B, N, K, T, S, H = 2, 4, 2, 3, 11, 8
CHUNKED = {"at once": (100, 100), "chunks": (0, 4), "chunks that fit": (0, 7), "chunks for one of both": (0, 5)}


def example():
    """Queries, cached and own keys, and who sees whom: rows of 4 and 11 tokens, causal in a window."""
    rng = np.random.default_rng(0)
    q, ck, cv, k, v = (
        rng.standard_normal(shape).astype(np.float32) * 2
        for shape in ((B, N, T, H), (B, K, S, H), (B, K, S, H), (B, K, T, H), (B, K, T, H))
    )
    length = np.array([4, 11])
    own = length[:, None] + np.arange(T)
    sight = masks.causal(own, cache.slot_positions(length, S), own, 6)
    return q, cache.LayerCache(ck, cv), cache.LayerCache(k, v), sight


def by_hand(q, cached, own, sight):
    """float64, key head by key head."""
    k, v = (np.concatenate(pair, 2).astype(np.float64) for pair in ((cached.k, own.k), (cached.v, own.v)))
    k, v = (np.repeat(a, N // K, 1) for a in (k, v))
    scores = np.where(np.asarray(sight.mask())[:, None], np.einsum("bnth,bnsh->bnts", q, k), -np.inf)
    return np.einsum("bnts,bnsh->bnth", oracles.softmax(scores), v)


@pytest.fixture(params=CHUNKED)
def way(request, monkeypatch):
    at_once, chunk = CHUNKED[request.param]
    monkeypatch.setattr(attend, "AT_ONCE", at_once)
    monkeypatch.setattr(attend, "CHUNK", chunk)


def test_is_softmax_attention(way):
    given = example()
    np.testing.assert_allclose(attend.attend(*given), by_hand(*given), atol=1e-5)


def test_each_query_may_look_from_one_place(way):
    q, cached, own, sight = example()
    sight = masks.canvas(sight.key_BS[:, :S], sight.key_BS[:, S:])
    np.testing.assert_allclose(attend.attend(q, cached, own, sight), by_hand(q, cached, own, sight), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_softmax_is_that_of_jax_in_values_and_derivatives(dtype):
    scores, way, back = np.random.default_rng(1).standard_normal((3, 2, 5, 7)).astype(np.float32)
    scores = np.where(np.arange(7) < 5, 10 * scores, np.finfo(np.float32).min)  # two keys that nobody sees

    def own(x):
        return attend._softmax(x, dtype)

    def outcomes(softmax):
        value, change = jax.jvp(softmax, (scores,), (way,))
        return value, change, jax.vjp(softmax, scores)[1](back)[0], jax.jit(jax.vmap(softmax))(scores)

    for found, wanted in zip(outcomes(own), outcomes(jax.nn.softmax), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.heavy
def test_chunks_differentiate_and_map_as_all_keys_at_once(monkeypatch):
    q, cached, own, sight = example()
    q = q / 4  # scores of a few units: rounding is below the bound on every processor

    def outcomes():
        def z(q, cached, own):
            return jnp.sin(attend.attend(q, cached, own, sight))

        def total(*args):
            return z(*args).sum()

        forward = jax.jvp(z, (q, cached, own), (q, cached, own))
        mapped = jax.vmap(jax.grad(total), (0, None, 0))(
            jnp.stack([q, 2 * q]), cached, jax.tree.map(lambda a: jnp.stack([a, -a]), own)
        )
        return forward, jax.grad(total, (0, 1, 2))(q, cached, own), mapped

    monkeypatch.setattr(attend, "AT_ONCE", 100)
    expected = outcomes()
    monkeypatch.setattr(attend, "AT_ONCE", 0)
    monkeypatch.setattr(attend, "CHUNK", 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), outcomes(), expected)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1


@pytest.mark.heavy
def test_a_long_prompt_in_a_small_model(monkeypatch):
    """Chunks of the prompt, chunks of keys and the window, all of which end at different places, against the oracle."""
    monkeypatch.setattr(attend, "AT_ONCE", 12)
    monkeypatch.setattr(attend, "CHUNK", 7)
    config = ModelConfig.tiny(
        layer_types=(SLIDING, FULL), sliding_window=6, canvas_length=4, max_position_embeddings=60
    )
    model, rng = oracles.build(config, seed=2), np.random.default_rng(1)
    prompt, canvas = rng.integers(0, 96, 48), rng.integers(0, 96, 4)
    numbers = oracles.Numbers(config, model)
    hidden, memory = numbers.causal(prompt)
    out = dg.prefill(model, prompt[None], chunk=16, cache_length=52)
    np.testing.assert_allclose(out.hidden[0], hidden, atol=2e-4, rtol=1e-3)
    expected = numbers.logits(numbers.canvas(canvas, np.zeros((4, 32)), memory))
    np.testing.assert_allclose(dg.denoise(model, canvas[None], out.cache)[0], expected, atol=2e-3)


def largest(jaxpr) -> int:
    """Elements of the largest array of a traced program, of programs inside it too."""
    sizes = [int(np.prod(v.aval.shape)) for eqn in jaxpr.eqns for v in eqn.outvars]
    inside = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
    return max(sizes + [largest(program) for program in inside if hasattr(program, "eqns")])


def test_the_release_takes_its_whole_context():
    """Traced, nothing computed: a step and a piece of prompt hold no scores of queries times context."""
    config = ModelConfig(layer_types=(SLIDING, FULL), num_experts=8)
    model, context = transformer.abstract(config), config.max_position_embeddings
    assert context == 262_144
    held = jax.eval_shape(lambda: cache.empty(config, 1, context, jnp.bfloat16))
    prompt = jax.ShapeDtypeStruct((1, 1024), jnp.int32), jax.ShapeDtypeStruct((1, 1024), bool)
    piece = jax.make_jaxpr(lambda m, t, v, c: m.prefill(t, v, c).cache)(model, *prompt, held)
    assert piece.out_avals[2].shape == held.layers[1].k.shape
    keys = noise.row_keys(jnp.zeros(1, jnp.uint32))
    state = jax.eval_shape(lambda: sampler.start(keys, jnp.zeros(1, int), jnp.zeros(1, bool), 256, model))
    step = jax.make_jaxpr(lambda m, s, c: sampler.denoise_step(m, s, c, dg.SamplerConfig())[0])(model, state, held)
    biggest = context * config.num_global_kv_heads * config.global_head_dim  # the cache of a layer, read and written
    assert largest(piece.jaxpr) <= biggest and largest(step.jaxpr) <= biggest


def test_pieces_write_over_their_own_cache_only():
    model = oracles.build(ModelConfig.tiny(layer_types=(SLIDING, FULL), sliding_window=4))
    first = dg.prefill(model, np.arange(6)[None], cache_length=20)
    kept = jax.tree.map(np.array, first.cache)
    second = dg.prefill(model, np.arange(6)[None], cache=first.cache, chunk=3)
    jax.tree.map(np.testing.assert_array_equal, first.cache, kept)  # still there, and as it was
    assert int(second.cache.length[0]) == 12
