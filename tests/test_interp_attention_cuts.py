"""Attention knock-out: the one edge that carries the answer is found, and cutting is exact."""

import hand_built as hb
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from interp import taps
from interp.attention_cuts import _cut
from interp.rows import run_of

C = hb.LENGTH
SAMPLER = dg.SamplerConfig(max_denoising_steps=3, eos_token_ids=(1,))
PROMPTS = hb.prompts(4)
AT = 3
METRIC = interp.LogProb([AT], hb.answer(PROMPTS)[:, AT : AT + 1])
NONE = 1e-2  # nats; an effect below this is none


@pytest.fixture(scope="module")
def model():
    return hb.model()


@pytest.fixture(scope="module")
def moment(model):
    return run_of(model, PROMPTS, None, seed=0, sampler=SAMPLER).moment


def knocked_out(model, **options):
    return interp.attention_knock_out(
        model, PROMPTS, METRIC, steps=0, sampler=SAMPLER, rows_at_once=40, progress=False, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenwise(model):
    before = _cut._cache_size()
    maps = knocked_out(model)
    assert _cut._cache_size() == before + 1
    return maps


def test_the_one_edge_is_found(tokenwise):
    effect = tokenwise["attention"]
    assert tokenwise.axes["attention"] == "RLSB" and effect.shape == (1, 4, C + 1, 4)
    assert tokenwise.labels["S"] == [f"{i} {t}" for i, t in enumerate(PROMPTS[0])] + ["canvas"]
    assert effect[0, hb.HEAD[0], AT].max() < -5
    rest = effect.copy()
    rest[0, hb.HEAD[0], AT] = 0
    assert abs(rest).max() < NONE


def test_only_the_queries_that_are_cut_lose_it(model, tokenwise):
    same = knocked_out(model, queries=AT)["attention"]
    np.testing.assert_allclose(same[0, hb.HEAD[0], AT], tokenwise["attention"][0, hb.HEAD[0], AT], rtol=1e-3)
    others = [q for q in range(C) if q != AT]
    assert abs(knocked_out(model, queries=others)["attention"]).max() < NONE
    assert abs(knocked_out(model, heads=[0, 1, 3])["attention"]).max() < NONE


def test_layers_and_keys_are_cut_together(model, tokenwise):
    others = {"cached": [p for p in range(C) if p != AT]}
    groups = {"others": others, "own": {"cached": AT, "keys": [0, 1]}, "canvas": {"keys": slice(0, None)}}
    effect = knocked_out(model, groups=groups, window=2)["attention"]
    layer = hb.HEAD[0]  # the window of layer l holds l - 1 and l
    assert effect[0, layer : layer + 2, 1].max() < -5
    assert abs(effect[0, :, [0, 2]]).max() < NONE and abs(effect[0, [0, 3], 1]).max() < NONE


def test_an_effect_is_that_of_the_real_cut(model, moment, tokenwise):
    """Over a run too: the position that may not see its source answers wrongly at first, the others rightly."""
    layer = hb.HEAD[0]
    found, plain = (
        np.asarray(dg.denoise(interp.cut_attention(model, queries=AT, cached=AT, layers=at), moment.canvas, moment.cache))
        for at in (layer, [])
    )
    np.testing.assert_allclose(METRIC(plain), tokenwise.base[0], atol=1e-5)
    is_right = found.argmax(-1) == hb.answer(PROMPTS)
    assert not is_right[:, AT].any() and np.delete(is_right, AT, 1).all()
    effect = tokenwise["attention"][0, layer, AT]
    np.testing.assert_allclose(METRIC(found) - METRIC(plain), effect, rtol=1e-4)
    elsewhere = interp.cut_attention(model, cached=[p for p in range(C) if p != AT], layers=slice(0, layer + 1))
    found = dg.denoise(elsewhere, moment.canvas, moment.cache)
    np.testing.assert_allclose(found[:, AT], plain[:, AT], atol=2e-2)


# Exactness, on random weights

TOKENS = [[7, 8, 9, 10], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def random():
    sizes = dict(layer_types=("sliding_attention", "full_attention"), canvas_length=C, embed_dim=16, vocab_size=32)
    return oracles.build(dg.ModelConfig.tiny(hidden_dim=16, sliding_window=6, **sizes))


@pytest.fixture(scope="module")
def cache(random):
    return dg.prefill(random, TOKENS).cache


def seen(model, cache):
    """Patterns and what they read, of both layers."""
    zero = jnp.zeros(2, jnp.int32)
    state = dg.diffusion.start(jax.random.split(jax.random.key(0), 2), zero, zero > 0, C, model)
    tapped, _ = taps.tapped(model, ["layers.*.attn_pattern", "layers.*.attn_z"])
    return {name: np.asarray(x) for name, x in taps._one_step(tapped, state, cache, SAMPLER, None).items()}


EVERYWHERE = dict(heads=slice(0, None), steps=slice(0, None), sampler=SAMPLER)  # one structure for all cuts


def test_what_is_left_shares_the_weight(random, cache):
    """p * (1 - cut) / sum, for the chosen queries and heads; cached slots are found by position."""
    given = EVERYWHERE | dict(queries=[1, 2], keys=[0, 5], cached=[2, 3], heads=1, layers=1)
    name = "layers.1.attn_pattern"
    old, new = (seen(m, cache)[name] for m in (random, interp.cut_attention(random, **given)))
    expected = old.copy()
    slots = old.shape[-1] - C
    gone = [2, 3, slots + 0, slots + 5]
    part = old[:, 1, 1:3].copy()
    part[..., gone] = 0
    expected[:, 1, 1:3] = part / part.sum(-1, keepdims=True)
    np.testing.assert_allclose(new, expected, atol=1e-6)
    assert (new[:, 1, 1:3][..., gone] == 0).all()
    off = interp.cut_attention(random, **given | dict(steps=[]))
    np.testing.assert_array_equal(seen(off, cache)[name], old)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_query_with_nothing_left_reads_nothing(random, cache, layer):
    """Not the empty slots of the cache either."""
    given = EVERYWHERE | dict(queries=2, keys=slice(0, None), cached=slice(0, None), layers=layer)
    z = seen(interp.cut_attention(random, **given), cache)[f"layers.{layer}.attn_z"]
    assert (z[:, 2] == 0).all() and (abs(z[:, [0, 1, 3]]).max((1, 2, 3)) > 0.1).all()


def test_cuts_in_the_prompt_pass(random):
    """A prompt token blind to all it could see reads nothing, above all not what comes later."""
    name = "layers.0.attn_z"
    cut = interp.cut_attention(random, queries=[0, 2], cached=[0, 1, 2], layers=0, phase="prefill")
    blind, plain = (interp.capture_prompt(m, TOKENS, name)[name] for m in (cut, random))
    assert (blind[:, [0, 2]] == 0).all() and (abs(plain).max((2, 3)) > 0.1).all()
    np.testing.assert_allclose(blind[:, [1, 3]], plain[:, [1, 3]], atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say what is not seen"),
        (dict(keys=C), f"keys has {C}"),
        (dict(keys=0, queries=C), f"positions has {C}"),
        (dict(keys=0, layers=4), "layers has 4"),
        (dict(keys=0, phase="prefill"), "give cached"),
    ],
)
def test_cut_attention_refuses(model, given, message):
    with pytest.raises(ValueError, match=message):
        interp.cut_attention(model, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(window=0), "window must be an integer >= 1"),
        (dict(groups={}), "groups is empty"),
        (dict(groups={"a": {"prompt": 3}}), "group 'a' must be of keys and cached"),
        (dict(groups={"a": {}}), "group 'a' must be"),
        (dict(groups={"a": {"keys": C}}), f"keys has {C}"),
        (dict(layers=[]), "chooses none"),
        (dict(queries=C), f"queries has {C}"),
    ],
)
def test_the_sweep_refuses(model, given, message):
    with pytest.raises(ValueError, match=message):
        knocked_out(model, **given)
