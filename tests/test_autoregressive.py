"""Token by token with the causal pass: equal to the plain way, which runs the whole text again for every token."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
from dgemma_jax.config import FULL, SLIDING
from dgemma_jax.weights import tree as trees

CONFIG = dg.ModelConfig.tiny(layer_types=(SLIDING, FULL), sliding_window=6, max_position_embeddings=64)
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [20], [30, 31, 32, 33]]
NEW = 7


@pytest.fixture(scope="module")
def model():
    """Its final norm has signs, so that the tied table does not just repeat the last token."""
    model = oracles.build(CONFIG, seed=2)
    scale = np.random.default_rng(0).standard_normal(CONFIG.embed_dim).astype(np.float32)
    return trees.replace(model, trees.leaves(model) | {("final_norm", "weight"): scale})


@pytest.fixture(scope="module")
def plain(model):
    """Greedy continuations without a cache that grows: one prefill of the whole text a token."""
    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(text)] = text
            hidden = dg.prefill(model, padded, np.arange(16)[None] < len(text)).hidden
            text.append(int(dg.unembed(model, hidden[:, len(text) - 1]).argmax()))
        found.append(text[len(prompt) :])
    return np.array(found)


def bundle(model, *ends):
    return dg.Bundle(CONFIG, model, sampler=dg.SamplerConfig(eos_token_ids=ends))


def test_equals_a_prefill_of_every_length(model, plain):
    out = dg.autoregress(bundle(model), PROMPTS, NEW)
    np.testing.assert_array_equal(out.tokens, plain)
    assert len({tuple(row) for row in plain}) == 3  # rows differ, and no row repeats one token
    assert out.stop_reason == ["max_new_tokens"] * 3 and out.num_tokens.tolist() == [NEW] * 3
    assert out.prompt_tokens == PROMPTS and out.texts == [None] * 3


def test_each_row_stops_at_its_own_end(model, plain):
    end = int(plain[0, 2])
    out = dg.autoregress(bundle(model, end), PROMPTS, NEW)
    for row, expected in enumerate(plain):
        where = np.flatnonzero(expected == end)
        count = int(where[0]) + 1 if len(where) else NEW
        assert out.num_tokens[row] == count and (out.stop_reason[row] == "eos") == bool(len(where))
        np.testing.assert_array_equal(out.tokens[row], [*expected[:count], *[0] * (NEW - count)])
    assert out.num_tokens[0] == 3


@pytest.mark.heavy
def test_samples_follow_the_distribution(model):
    """First tokens of many seeds, against the softmax of the logits at that temperature."""
    seeds, temperature = list(range(4000)), 0.5
    drawn = dg.autoregress(bundle(model), [PROMPTS[1]] * len(seeds), 1, temperature, seeds).tokens[:, 0]
    logits = dg.unembed(model, dg.prefill(model, [PROMPTS[1]]).hidden[:, -1])[0]
    expected = np.asarray(jnp.exp(logits / temperature - jnp.max(logits / temperature)))
    expected = expected / expected.sum()
    share = np.bincount(drawn, minlength=CONFIG.vocab_size) / len(seeds)
    error = np.sqrt(expected * (1 - expected) / len(seeds))
    assert (np.abs(share - expected) < 5 * error + 1e-3).all() and expected.max() < 0.9


@pytest.mark.heavy
def test_a_sample_depends_on_its_seed_alone(model):
    out = dg.autoregress(bundle(model), [PROMPTS[0], *PROMPTS], NEW, 1.0, [5, 5, 6, 7])
    alone = dg.autoregress(bundle(model), PROMPTS[0], NEW, 1.0, 5)
    np.testing.assert_array_equal(out.tokens[:2], np.repeat(alone.tokens, 2, 0))
    other = dg.autoregress(bundle(model), PROMPTS[0], NEW, 1.0, 6)
    assert (other.tokens != alone.tokens).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be an integer >= 1"),
        (dict(temperature=-1.0), "temperature must be a finite number >= 0, got -1.0"),
        (dict(temperature=float("nan")), "temperature must be a finite number"),
        (dict(max_new_tokens=60), "9 tokens and 60 new ones exceed the context of 64"),
        (dict(seed=[1, 2]), "seed must be one integer or 3"),
    ],
)
def test_mistakes_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        dg.autoregress(bundle(model), PROMPTS, **arguments)
