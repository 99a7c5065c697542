"""Continuous batching: the same results as alone, in any order and company; few programs; no row waits for another."""

import dataclasses

import jax
import numpy as np
import oracles
import pytest
from test_diffusion_generate import CONFIG, SAMPLER, C, J, model, row, same

import dgemma_jax as dg
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import loop, stream

__all__ = ["model"]  # the fixture

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, 64, n).tolist() for n in (3, 12, 1, 30, 7, 5, 40)]
SEEDS = [11, 12, 13, 14, 15, 16, 17]
LIMIT = J * C


def probe(view):
    return {"logits": view.logits.max(-1)}


RECORD = dg.Record(soft=True, fn=probe)


@pytest.fixture(scope="module")
def together(model):
    """All prompts by `generate`, in step."""
    return dg.generate(model, PROMPTS, SEEDS, SAMPLER, LIMIT, RECORD)


@pytest.fixture(scope="module")
def streamed(model):
    return dict(dg.stream(model, PROMPTS, SEEDS, SAMPLER, LIMIT, RECORD, rows=3))


def test_every_prompt_gives_what_it_gives_in_step(together, streamed):
    t = together.trajectory
    assert len(np.unique(t.num_steps)) >= 3 and {"eos", "max_new_tokens"} == set(together.stop_reason)
    assert len(np.unique((t.num_steps > 0).sum(0))) >= 2
    assert sorted(streamed) == list(range(len(PROMPTS))) and list(streamed) != sorted(streamed)
    for number, one in streamed.items():
        same(row(one, 0), row(together, number), atol=5e-3)
        assert one.prompt_tokens == [PROMPTS[number]] and one.seeds == [SEEDS[number]]
        assert one.stop_reason == [together.stop_reason[number]]
