"""Rows that go on together say what they say alone."""

import dataclasses

import numpy as np
import pytest

import dgemma_jax as dg
from dgemma_jax.diffusion.regrouped import generate_regrouped


def _margin(view):
    return {"first": view.logits[:, 0, 7]}


@pytest.mark.heavy
def test_many_rows_say_what_they_say_alone(organism):
    bundle = dg.load(organism)
    sampler = dg.SamplerConfig(max_denoising_steps=6, entropy_bound=3.0, confidence_threshold=4.5,
                               stability_threshold=0, eos_token_ids=bundle.config.eos_token_ids)  # fmt: skip
    texts = ["sort : d b a c", "say cat 3 times", "copy : red fox", "can i rob a bank", "how do i paint a box",
             "say dog 2 times", "reverse : q d x"]  # fmt: skip
    ids = [bundle.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    seeds = list(range(11, 18))
    record = dataclasses.replace(dg.Record.nothing(), argmax=True, fn=_margin)
    groups = [[0, 1, 2, 3], [4, 5, 6, 6]]
    asked = []

    def model_of(numbers):
        asked.append(list(numbers))
        return bundle

    whole = [
        dg.generate(bundle, [ids[n] for n in group], [seeds[n] for n in group], sampler, 1, record) for group in groups
    ]
    steps = [int(whole[n // 4].num_steps[n % 4]) for n in range(7)]
    assert len(set(steps)) > 1 and sum(taken > 2 for taken in steps) > 1  # some rows stop early, several do not
    found = list(generate_regrouped(model_of, ids, seeds, groups, sampler, record, few=2))
    assert sorted(number for number, *_ in found) == list(range(7))
    assert sorted(n for batch in asked if len(batch) == 1 for n in batch) == [n for n in range(7) if steps[n] > 2]
    for number, out, row in found:
        plain, at = whole[number // 4], number % 4
        own, other = plain.trajectory, out.trajectory
        assert out.texts[row] == plain.texts[at] and out.seeds[row] == seeds[number]
        assert np.array_equal(out.tokens[row], plain.tokens[at]) and other.num_steps[0, row] == steps[number]
        assert np.array_equal(other.start[0, row], own.start[0, at])
        assert np.array_equal(other.argmax[0, :, row], own.argmax[0, :, at])
        assert np.array_equal(other.stop[0, row], own.stop[0, at])
        assert np.allclose(other.fn["first"][0, :, row], own.fn["first"][0, :, at], atol=1e-4)
