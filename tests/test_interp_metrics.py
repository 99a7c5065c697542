"""Metrics equal numpy, take numbers a row, are data to compiled functions, and refuse what they cannot measure."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import softmax

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import denoise_step
from interp import rows

B, C, V = 2, 4, 9
LOGITS = np.random.default_rng(0).normal(size=(B, C, V)).astype(np.float32) * 3
LOGP = np.log(softmax(LOGITS.astype(np.float64)))


def test_they_equal_numpy():
    expected = LOGP[:, 1, 3] + LOGP[:, 2, 5]
    np.testing.assert_allclose(interp.LogProb([1, 2], [3, 5])(LOGITS), expected, rtol=1e-5)
    np.testing.assert_allclose(interp.answer([3, 5], start=1)(LOGITS), expected, rtol=1e-5)
    difference = LOGITS[:, 1, 3] - LOGITS[:, 1, 4]
    np.testing.assert_allclose(interp.LogitDifference(1, 3, 4)(LOGITS), difference, rtol=1e-5)
    other = LOGITS[::-1]
    p, q = LOGP[::-1], LOGP
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(interp.Divergence(other)(LOGITS), kl.mean(-1), rtol=1e-4)
    np.testing.assert_allclose(interp.Divergence(other, [0, 3])(LOGITS), kl[:, [0, 3]].mean(-1), rtol=1e-4)
    inside, outside = np.exp(LOGP[:, 0, [1, 2]]).sum(-1), np.exp(LOGP[:, 0, [5, 6, 7]]).sum(-1)
    found = interp.SetLogProb(0, [1, 2], [5, 6, 7])(LOGITS)
    np.testing.assert_allclose(found, np.log(inside / outside), rtol=1e-4)
    np.testing.assert_allclose(interp.SetLogProb(0, [1, 2])(LOGITS), np.log(inside / (1 - inside)), rtol=1e-4)
    tokens = np.array([[4, 5, 6, 7], [4, 8, 8, 8]])
    np.testing.assert_allclose(interp.Says([0, 1], [4, 5])(tokens), [1, 0.5])


def test_a_run_does_not_diverge_from_itself():
    np.testing.assert_array_equal(interp.Divergence(LOGITS)(LOGITS), 0)


def test_numbers_may_be_given_a_row():
    both = interp.LogProb([[1, 2], [0, 3]], [[3, 5], [7, 7]])(LOGITS)
    np.testing.assert_allclose(both, [LOGP[0, 1, 3] + LOGP[0, 2, 5], LOGP[1, 0, 7] + LOGP[1, 3, 7]], rtol=1e-5)
    found = interp.LogitDifference([[1], [2]], [[3], [4]], 0)(LOGITS)
    np.testing.assert_allclose(found, [LOGITS[0, 1, 3] - LOGITS[0, 1, 0], LOGITS[1, 2, 4] - LOGITS[1, 2, 0]], rtol=1e-5)


def test_their_numbers_are_data():
    @jax.jit
    @chex.assert_max_traces(1)
    def measured(metric, logits):
        return metric(logits)

    for token in (1, 2, 3):
        np.testing.assert_allclose(measured(interp.LogProb(0, token), LOGITS), LOGP[:, 0, token], rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: interp.LogitDifference(0, 1, 2)(x).sum())(LOGITS)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interp.LogProb(0.5, [1]), "positions must be integers"),
        (lambda: interp.LogProb([0], [1.5]), "tokens must be integers"),
        (lambda: interp.LogProb([-1], [1]), "positions has -1; they count from 0"),
        (lambda: interp.answer([[1, 2], [3]]), "of equal number a row|inhomogeneous"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def moment(tiny):
    sampler = dg.SamplerConfig(max_denoising_steps=2, early_stop=False)
    prompts = [[5, 6], [7, 8, 9]]
    return dg.generate(tiny, prompts, sampler=sampler, max_new_tokens=12).trajectory.moment(0, 1)


def program(of):
    """A step and its metric, compiled."""

    @jax.jit
    def run(metric, model, moment):
        return of(metric, model, denoise_step(model, moment.state, moment.cache, moment.sampler)[1])

    return run


where_read = program(lambda metric, model, view: rows.of_step(metric, model, view, 1))
everywhere = program(lambda metric, model, view: rows.measured(metric, view.logits, 1))


@pytest.mark.parametrize("metric", [
    interp.LogProb([[1, 2], [0, 3]], [[3, 5], [7, 7]]), *(pytest.param(metric, marks=pytest.mark.heavy) for metric in (
        interp.LogProb([1, 2], [3, 5]), interp.LogitDifference([[1], [2]], 3, 4),
        interp.SetLogProb([0, 3], [1, 2], [5, 6]), interp.SetLogProb(0, [1, 2]),
        jax.tree_util.Partial(lambda logits: logits[:, 3].max(-1)),
    )),
])  # fmt: skip
def test_a_step_is_measured_where_it_is_read(tiny, moment, metric):
    found, wanted = (run(metric, tiny, moment) for run in (where_read, everywhere))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    edited = interp.edit(tiny, "logits", interp.Scale(2.0), positions=[2])  # acts on positions of the whole canvas
    found, wanted = (run(metric, edited, moment) for run in (where_read, everywhere))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_more_rows_fit_where_few_logits_are_made(tiny, moment, monkeypatch):
    monkeypatch.setattr(rows, "_free", lambda: 20 << 20)
    run = types.SimpleNamespace(ids=[0, 1], moment=moment)
    whole, few = (rows.that_fit(tiny, run, 2, None, metric=m) for m in (None, interp.LogProb([1, 2], [3, 5])))
    config = tiny.config
    spared = 4 * 3 * (config.canvas_length - 2) * config.vocab_size
    assert (20 << 20) // whole - (20 << 20) // few == pytest.approx(2 * spared, rel=0.1)
    edited = interp.edit(tiny, "logits", interp.Scale(2.0))
    every = [rows.that_fit(edited, run, 2, None, metric=interp.LogProb(1, 3)),
             rows.that_fit(tiny, run, 2, None, metric=lambda logits: logits[:, 3].max(-1))]  # fmt: skip
    assert every == [whole, whole] and few > whole


def test_no_other_logits_are_made(tiny, moment):
    made = [
        run.lower(interp.LogProb(1, 3), tiny, moment).compile().cost_analysis()["flops"]
        for run in (where_read, everywhere)
    ]
    config = tiny.config
    spared = 2 * 2 * (config.canvas_length - 1) * config.embed_dim * config.vocab_size  # of two rows
    assert made[1] - made[0] >= spared
