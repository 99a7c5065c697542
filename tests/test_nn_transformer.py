"""The model: equal to the oracle however the tokens come, causal where it must be, with nothing to spare."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import dgemma_jax as dg
from dgemma_jax.config import FULL, SLIDING, ModelConfig
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import transformer

WINDOW, LENGTHS, T, C = 4, (15, 9, 3), 15, 5
CONFIG = ModelConfig.tiny(
    layer_types=(SLIDING, FULL), sliding_window=WINDOW, canvas_length=C, max_position_embeddings=40, rope_theta=50.0,
    global_rope_theta=90.0, global_rope_fraction=0.5,
)  # fmt: skip
TOLERANCE = dict(atol=2e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG, seed=3)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(4)
    return [rng.integers(0, 96, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Each prompt by itself, by the oracle: hidden states and memory."""
    numbers = oracles.Numbers(CONFIG, model)
    return [numbers.causal(p) for p in prompts]


def pieces(prompts, counts, size, seed=0):
    """(tokens, valid) calls of [3, size]: call i takes the next counts[i][b] tokens of row b, at random places."""
    rng, taken = np.random.default_rng(seed), [0] * len(prompts)
    for count in counts:
        tokens, valid = rng.integers(0, 96, (len(prompts), size)), np.zeros((len(prompts), size), bool)
        for b, prompt in enumerate(prompts):
            where = np.sort(rng.permutation(size)[: count[b]])
            tokens[b, where], valid[b, where] = prompt[taken[b] : taken[b] + count[b]], True
            taken[b] += count[b]
        yield tokens, valid
    assert tuple(taken) == LENGTHS


def run(model, calls):
    """Hidden states of the real tokens of each row, and the cache."""
    cache, hidden = kv.empty(CONFIG, 3, T + C, jnp.float32), [[], [], []]
    for tokens, valid in calls:
        out = dg.prefill(model, tokens, valid, cache)
        cache = out.cache
        for b in range(3):
            hidden[b].append(np.asarray(out.hidden)[b, valid[b]])
    return [np.concatenate(h) for h in hidden], cache


def check(outcome, alone):
    hidden, cache = outcome
    np.testing.assert_array_equal(cache.length, LENGTHS)
    for b, (expected, memory) in enumerate(alone):
        np.testing.assert_allclose(hidden[b], expected, **TOLERANCE)
        for entry, (keys, values) in zip(cache.layers, memory, strict=True):
            held = np.array(oracles.ring(LENGTHS[b], entry.k.shape[2]))
            for got, wanted in ((entry.k, keys), (entry.v, values)):
                np.testing.assert_allclose(
                    np.asarray(got)[b][:, held >= 0].swapaxes(0, 1), wanted[held[held >= 0]], **TOLERANCE
                )


def right_padded(prompts):
    tokens, valid = np.full((3, T), 11), np.arange(T) < np.array(LENGTHS)[:, None]
    tokens[valid] = np.concatenate(prompts)
    return tokens, valid


def test_unequal_prompts_are_each_alone(model, prompts, alone):
    check(run(model, [right_padded(prompts)]), alone)


@pytest.mark.parametrize("seed", [0, 1])
def test_padding_may_stand_anywhere(model, prompts, alone, seed):
    check(run(model, pieces(prompts, [LENGTHS], T, seed)), alone)


WAYS = {
    "even": [(5, 5, 3), (5, 4, 0), (5, 0, 0)],
    "uneven": [(1, 2, 3), (5, 5, 0), (4, 0, 0), (5, 2, 0)],  # rows fall behind one another, a whole ring at once
    "slow": [(3, 1, 1), (4, 3, 1), (2, 2, 0), (3, 3, 1), (3, 0, 0)],
}


@pytest.mark.parametrize("way", WAYS)
def test_prefill_then_append_is_one_prefill(model, prompts, alone, way):
    check(run(model, pieces(prompts, WAYS[way], 5, seed=2)), alone)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_are_the_whole(model, prompts, alone, chunk):
    """One token at a time, and chunks longer than the window."""
    tokens, valid = right_padded(prompts)
    out = dg.prefill(model, tokens, valid, cache_length=T + C, chunk=chunk)
    assert out.hidden.shape == (3, T, 32)
    check(([np.asarray(out.hidden)[b, valid[b]] for b in range(3)], out.cache), alone)


def test_denoise_is_the_oracle_and_leaves_the_cache_alone(model, prompts, alone):
    numbers = oracles.Numbers(CONFIG, model)
    cache = run(model, [right_padded(prompts)])[1]
    before = jax.tree.map(np.array, cache)
    rng = np.random.default_rng(6)
    canvas, soft = rng.integers(0, 96, (3, C)), rng.standard_normal((3, C, 32)).astype(np.float32)
    for given in (None, soft):
        logits = dg.denoise(model, canvas, cache, given)
        assert logits.dtype == jnp.float32 and logits.shape == (3, C, 96)
        for b, (_, memory) in enumerate(alone):
            hidden = numbers.canvas(canvas[b], np.zeros((C, 32)) if given is None else soft[b], memory)
            np.testing.assert_allclose(logits[b], numbers.logits(hidden), atol=2e-3)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    assert not np.allclose(logits, dg.denoise(model, canvas, cache), atol=1e-2)  # S has a say


def test_unembed_keeps_the_leading_axes(model):
    hidden = np.random.default_rng(0).standard_normal((2, 3, 2, 32)).astype(np.float32)
    expected = oracles.Numbers(CONFIG, model).logits(hidden.astype(float))
    np.testing.assert_allclose(dg.unembed(model, hidden), expected, atol=1e-4)
    np.testing.assert_allclose(dg.unembed(model, hidden[0, 0, 0]), expected[0, 0, 0], atol=1e-4)


def test_soft_embed_takes_shaped_logits(model):
    shaped = np.random.default_rng(0).standard_normal((1, 2, 96)).astype(np.float32)
    table = np.asarray(model.embedder.table[...], float)
    np.testing.assert_allclose(dg.soft_embed(model, shaped), 32**0.5 * oracles.softmax(shaped) @ table, atol=1e-5)


@pytest.mark.parametrize("kinds", [(FULL,), pytest.param((SLIDING, SLIDING), marks=pytest.mark.heavy)])
def test_who_depends_on_whom(kinds):
    """Derivatives of hidden states by embeddings: exactly zero where there is no path, non-zero where there is."""
    prompt_length, canvas_length, window = 9, 3, 3
    config = ModelConfig.tiny(layer_types=kinds, sliding_window=window, canvas_length=canvas_length)
    model = oracles.build(config, seed=8)
    ids = np.arange(prompt_length + canvas_length) + 20  # each row of the table stands for one place

    def hidden(table):
        graph = jax.tree_util.tree_map_with_path(
            lambda p, x: table if "embedder" in jax.tree_util.keystr(p) else x, model
        )
        tokens = ids[None, :prompt_length]
        pre = graph.prefill(tokens, np.ones_like(tokens, bool), kv.empty(config, 1, prompt_length + 1, jnp.float32))
        soft = jnp.zeros((1, canvas_length, 32))
        return jnp.concatenate([pre.hidden, graph.denoise(ids[None, prompt_length:], pre.cache, soft)], 1)[0]

    @jax.jit
    def influence(table):
        out, pull = jax.vjp(hidden, table)
        direction = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
        one_place = np.eye(len(out), dtype=np.float32)[:, :, None] * direction[None]
        return jnp.abs(jax.vmap(lambda g: pull(g)[0])(one_place)).sum(-1)[:, ids]

    distance = np.arange(prompt_length)[:, None] - np.arange(prompt_length)
    reach = prompt_length if kinds == (FULL,) else len(kinds) * (window - 1) + 1
    expected = np.ones((len(ids), len(ids)), bool)  # the canvas sees all of itself
    expected[:prompt_length, :prompt_length] = (distance >= 0) & (distance < reach)
    expected[:prompt_length, prompt_length:] = False
    # Every canvas row, near or far, sees the last window - 1 tokens; these saw window - 1 more in the layer before.
    seen = prompt_length if kinds == (FULL,) else len(kinds) * (window - 1)
    expected[prompt_length:, : prompt_length - seen] = False
    np.testing.assert_array_equal(np.asarray(influence(model.embedder.table[...])) != 0, expected)


def test_bfloat16(prompts, alone):
    """The stream is bfloat16, logits are float32, and the numbers are near those of float32."""
    rough = oracles.build(CONFIG, seed=3, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    tokens, valid = right_padded(prompts)
    pre = dg.prefill(rough, tokens, valid, cache_length=T + C)
    logits = dg.denoise(rough, tokens[:, :C], pre.cache)
    assert pre.hidden.dtype == jnp.bfloat16 and pre.cache.layers[0].k.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert jax.eval_shape(dg.soft_embed, rough, logits).dtype == jnp.bfloat16
    got = np.asarray(pre.hidden, float)[0]
    error = np.linalg.norm(got - alone[0][0]) / np.linalg.norm(alone[0][0])
    assert 0 < error < 0.15  # 8 bits of precision, and now and then another expert


def test_the_tree():
    config = ModelConfig.tiny()
    first, second = transformer.abstract(config, jnp.float32), transformer.abstract(config, jnp.float32)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    first.layers.pop()  # each caller has modules of its own
    assert len(second.layers) == len(transformer.abstract(config, jnp.float32).layers) == config.num_layers
    assert jax.tree.structure(first) != jax.tree.structure(transformer.abstract(ModelConfig.tiny(sliding_window=9)))
    model = oracles.build(config)
    assert nnx.find_duplicates(model) == []
    assert sum(x.size for x in jax.tree.leaves(model)) == config.num_parameters
    assert {str(x.dtype) for x in jax.tree.leaves(model)} == {"float32"}
    assert model.layers[2].attention.v is None and model.layers[1].attention.v is not None


def test_initial_weights_are_of_order_one():
    """Every projection keeps the scale of its input: its rows have unit length on average."""
    tiny = transformer.initialize(ModelConfig.tiny())
    assert jax.tree.structure(tiny) == jax.tree.structure(oracles.build(ModelConfig.tiny()))
    a, layer = tiny.layers[0].attention, tiny.layers[0]
    inputs = {"q": (a.q, (2,)), "o": (a.o, (1, 2)), "down": (layer.mlp.down, (1,)), "gate": (layer.mlp.gate, (1,)),
              "gate_up": (layer.experts.gate_up, (2,)), "expert down": (layer.experts.down, (1,)),
              "table": (tiny.embedder.table, (1,))}  # fmt: skip
    sizes = {name: float(np.mean(np.sum(np.square(p[...]), axes))) for name, (p, axes) in inputs.items()}
    assert all(0.8 < size < 1.2 for size in sizes.values()), sizes
    assert all(np.all(np.asarray(n.weight[...]) == 1) for n in (layer.input_norm, tiny.final_norm, a.q_norm))


@pytest.mark.slow
def test_the_release_costs_nothing_until_it_is_loaded():
    """The abstract 26B model: all parameters counted, none allocated (the memory of a fresh process)."""
    code = """
import json, resource, jax, math
from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import transformer
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leaves = jax.tree.leaves(transformer.abstract(ModelConfig()))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
print(json.dumps([sum(math.prod(x.shape) for x in leaves), used, sorted({type(x).__name__ for x in leaves})]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, kilobytes, kinds = json.loads(out)
    assert count == 25_250_986_812 == ModelConfig().num_parameters
    assert kilobytes < 500_000 and kinds == ["ShapeDtypeStruct"]


def test_who_calls_with_nonsense_is_told(model):
    tokens = np.zeros((2, 3), int)
    full, other = kv.empty(CONFIG, 2, 4, jnp.float32), kv.empty(CONFIG, 1, 9, jnp.float32)
    sliding = oracles.build(ModelConfig.tiny(layer_types=(SLIDING,), sliding_window=9))
    cases = [
        (lambda: dg.prefill(model, tokens[0]), r"tokens must be integers of shape \[B, T\], got int\d+ \(3,\)"),
        (lambda: dg.prefill(model, tokens / 2), r"tokens must be integers of shape \[B, T\], got float64"),
        (lambda: dg.prefill(model, tokens[:, :0]), r"tokens is empty: shape \(2, 0\); give at least one token for each row"),
        (lambda: dg.prefill(model, tokens + 96), r"tokens holds id 96; ids must be in 0..95"),
        (lambda: dg.prefill(model, tokens - 1), r"tokens holds id -1; ids must be in 0..95"),
        (lambda: dg.prefill(model, tokens, [True] * 3), r"valid has shape \(3,\), tokens \(2, 3\); they must be equal"),
        (lambda: dg.prefill(model, tokens, [[True] * 3, [False] * 3]), "row 1 has no valid token; give at least one"),
        (lambda: dg.prefill(model, tokens, cache=full, cache_length=9), "give either cache or cache_length, not both"),
        (lambda: dg.prefill(model, tokens, cache=other), "the cache holds 1 rows, tokens has 2"),
        (lambda: dg.prefill(model, tokens, cache_length=2), "3 tokens do not fit a cache of 2; make it with cache_length=3 or more"),
        (lambda: dg.prefill(model, np.zeros((1, 41), int), cache_length=99), "41 tokens exceed the context of 40; shorten"),
        (lambda: dg.prefill(sliding, tokens, cache_length=2), "3 tokens do not fit a cache of 2"),
        (lambda: dg.prefill(model, tokens, chunk=0), "chunk must be at least 1 token, got 0"),
        (lambda: dg.denoise(model, tokens + 96, full), "canvas holds id 96; ids must be in 0..95"),
        (lambda: dg.denoise(model, tokens, other), "the cache holds 1 rows, the canvas 2"),
        (lambda: dg.denoise(model, tokens, full, np.zeros((2, 3, 31))), r"has shape \(2, 3, 31\); canvas \(2, 3\) needs \(2, 3, 32\)"),
        (lambda: dg.unembed(model, np.zeros((2, 3))), r"hidden has shape \(2, 3\); its last axis must be the width 32"),
        (lambda: dg.soft_embed(model, np.zeros((2, 96))), r"shaped_logits has shape \(2, 96\); needed is \[B, C, 96\]"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_whole_ring_never_overflows():
    """Without full layers any number of tokens fits, as long as the ring is whole."""
    config = ModelConfig.tiny(layer_types=(SLIDING,), sliding_window=WINDOW)
    model = oracles.build(config)
    checked = []

    def stop(*args):
        checked.append(True)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dgemma_jax.nn.functional._prefill", stop)
        with pytest.raises(InterruptedError):
            dg.prefill(model, np.zeros((1, 50), int), cache_length=WINDOW - 1)
    assert checked
