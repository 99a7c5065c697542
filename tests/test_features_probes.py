"""Probes: they find a planted variable where it is and nothing in shuffled labels; their scores are what they say."""

import dataclasses

import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from interp.features import linear_fits
from interp.features.pooling import CLASSES, Pooled

L, R, N, D = 2, 3, 80, 8


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).permutation(np.arange(N) % 2)


@pytest.fixture(scope="module")
def pooled(labels):
    """Noise, in which layer 1 holds the label from step 1 on, at accepted positions and in the prompt."""
    rng = np.random.default_rng(0)
    canvas, prompt = rng.standard_normal((L, R, 3, N, D)), rng.standard_normal((L, N, D))
    sign = 2.0 * labels - 1
    canvas[1, 1:, 1, :, 2] += 5 * sign
    prompt[1, :, 2] += 5 * sign
    canvas[0, :, :, :, 0] += 6 * np.arange(R)[:, None, None]  # layer 0 holds the step
    valid = np.ones((R, 3, N), bool)
    valid[2, :, ::4] = False  # some had ended
    return Pooled(
        canvas=np.where(valid[None, ..., None], canvas, 0).astype(np.float32), valid=valid, layers=(4, 5),
        prompt=prompt.astype(np.float32), texts=(None,) * N,
    )  # fmt: skip


@pytest.fixture(scope="module")
def probes(pooled, labels):
    return {m: interp.fit_probes(pooled, labels, method=m, controls=4) for m in linear_fits.METHODS}


@pytest.mark.parametrize("method", linear_fits.METHODS)
def test_a_planted_variable_is_found_where_it_is(probes, labels, method):
    found = probes[method]
    assert found.accuracy.shape == (L, R, 3) and found.at_prompt.shape == (L,)
    there = np.zeros((L, R, 3), bool)
    there[1, 1:, 1] = True
    assert (found.accuracy[there] >= 0.9).all() and found.at_prompt[1] >= 0.9
    assert abs(np.nanmean(found.accuracy[~there]) - 0.5) < 0.08 and found.accuracy[~there].max() < 0.85
    assert found.at_prompt[0] < 0.8
    assert abs(found.shuffled.mean() - 0.5) < 0.06  # nothing in shuffled labels
    assert found.random[1, 4] < 0.9 and found.chance == pytest.approx(0.5, abs=0.05)
    assert found.over_steps("accepted")[1] >= 0.95 > found.over_steps("fluid")[1] + 0.1
    np.testing.assert_array_equal(found.truth, labels)
    assert np.abs(found.direction(5, 1, "accepted")).argmax() == 2


def test_scores_are_linear_and_only_training_prompts_count(pooled, probes, labels):
    """Weights and biases give the scores; moving held-out prompts changes no weight. One program for all cells."""
    ridge = probes["ridge"]
    x_CND = np.concatenate([pooled.canvas[1].reshape(-1, N, D), pooled.prompt[1][None]])
    by_hand = np.einsum("cnd,cdk->cnk", x_CND, ridge.weights[1]) + ridge.biases[1][:, None]
    np.testing.assert_allclose(ridge.scores[1], by_hand, atol=1e-4)
    moved = dataclasses.replace(pooled, canvas=np.where(ridge.test[:, None], 9.0, pooled.canvas))
    programs = linear_fits.fit_cells._cache_size()
    again = interp.fit_probes(moved, labels, test=ridge.test, controls=1)
    assert linear_fits.fit_cells._cache_size() == programs
    np.testing.assert_allclose(again.weights, ridge.weights, atol=1e-5)


def test_ridge_is_the_closed_form(pooled, probes, labels):
    ridge = probes["ridge"]
    on = pooled.valid[1, 1] & ~ridge.test
    x = pooled.canvas[1, 1, 1, on].astype(np.float64)
    z, y = (x - x.mean(0)) / x.std(0), np.eye(2)[labels[on]]
    w = np.linalg.solve(z.T @ z / len(z) + 0.1 * np.eye(D), z.T @ (y - y.mean(0)) / len(z)) / x.std(0)[:, None]
    np.testing.assert_allclose(ridge.weights[1, 4], w, atol=1e-4)


def test_logistic_is_at_its_minimum(pooled, probes, labels):
    """The gradient of the penalised loss is zero."""
    logistic = probes["logistic"]
    on = pooled.valid[1, 1] & ~logistic.test
    x = pooled.canvas[1, 1, 1, on].astype(np.float64)
    z = (x - x.mean(0)) / x.std(0)
    w = logistic.weights[1, 4] * x.std(0)[:, None]
    p = oracles.softmax(x @ logistic.weights[1, 4] + logistic.biases[1, 4])
    grad = z.T @ (p - np.eye(2)[labels[on]]) / len(z) + 0.1 * w
    assert np.abs(grad).max() < 2e-3


def test_transfer_between_steps_and_from_the_prompt(pooled, probes):
    found = interp.probe_transfer(probes["ridge"], pooled, "accepted")
    assert found.shape == (L, R + 1, R + 1)
    diagonal = np.diagonal(found, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal[:, :R], probes["ridge"].accuracy[:, :, 1])
    np.testing.assert_allclose(diagonal[:, R], probes["ridge"].at_prompt)
    assert (found[1][np.ix_([1, 2, 3], [1, 2, 3])] >= 0.9).all()  # the same code at steps 1, 2 and in the prompt
    assert (found[1][:, 0] <= 0.8).all() and (found[0] <= 0.85).all()
    with pytest.raises(ValueError, match="other prompts or layers than the probes"):
        interp.probe_transfer(probes["ridge"], dataclasses.replace(pooled, layers=(1, 2)))


def test_time_probes(pooled):
    found = interp.fit_time_probes(pooled)
    assert found.accuracy[0, 0, 0] >= 0.9 and found.accuracy[1, 0, 0] <= 0.6
    held = found.test.reshape(R, N)
    assert (held == held[0]).all()  # split by prompt


def test_calibration(probes):
    """Where nothing is known, a calibrated probe claims little; the bins hold every held-out answer."""
    logistic = probes["logistic"]
    claimed, true, count = logistic.reliability(5, 4)
    assert count.sum() == logistic.test[logistic.valid[4]].sum() and logistic.calibration_error(5, 4) < 0.2
    sure = dataclasses.replace(logistic, scores=logistic.scores * 100)
    assert sure.calibration_error(4, 0) > 0.3  # sure of itself, and right half of the time
    rows = logistic.rows()
    assert len(rows) == L * (3 * R + 1) and rows[13]["low"] <= rows[13]["accuracy"] <= rows[13]["high"]


def test_saved_shown_and_printed(tmp_path, probes, pooled):
    found = probes["logistic"]
    again = interp.Probes.load(found.save(tmp_path / "probes"))
    np.testing.assert_array_equal(again.scores, found.scores)
    assert repr(again) == repr(found) and "held out" in repr(found) and "layer 5" in repr(found)
    assert found.table(3).count("\n") == 3 and len(found.plot().axes) == 4
    same = Pooled.load(pooled.save(tmp_path / "pooled"))
    np.testing.assert_array_equal(same.canvas, pooled.canvas)
    assert "residuals of 80 prompts, 2 layers, 3 steps" in repr(same)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (np.zeros(N), {}, "a probe needs two kinds of prompts"),
        (np.arange(N) == 3, {}, "prompts labelled True to train on; 4 are needed"),
        (np.zeros(3), {}, "labels has 3 entries, there are 80 prompts"),
        (np.arange(N) % 2, dict(method="svm"), "method must be one of"),
        (np.arange(N) % 2, dict(test=2.0), "test must be a share between 0 and 1"),
    ],
)
def test_bad_input(pooled, given, options, message):
    with pytest.raises(ValueError, match=message):
        interp.fit_probes(pooled, given, **options)


@pytest.mark.heavy
def test_residuals_are_means_over_classes_of_positions():
    """Pooled inside the compiled loop, they are the means of what `capture` gives."""
    config = dg.ModelConfig.tiny(
        layer_types=("full_attention",), canvas_length=4, embed_dim=16, vocab_size=32,
        hidden_dim=16, sliding_window=4,
    )  # fmt: skip
    model = oracles.build(config)
    sampler = dg.SamplerConfig(max_denoising_steps=3, eos_token_ids=(1,), early_stop=False, entropy_bound=1.0)
    prompts = [[5, 6], [7, 8, 9], [3]]
    found = interp.pool_residuals(model, prompts, [0], batch=2, seed=4, sampler=sampler)
    acts = interp.capture(model, prompts, "layers.0.resid_post", seed=[4, 5, 6], sampler=sampler)
    out = dg.generate(model, prompts, [4, 5, 6], sampler, max_new_tokens=4)
    accepted = out.trajectory.accepted[0]
    for at, kind in enumerate(CLASSES):
        on = {"all": np.ones_like(accepted), "accepted": accepted, "fluid": ~accepted}[kind]
        x = acts["layers.0.resid_post"] * on[..., None]
        mean = x.sum(2) / np.maximum(on.sum(2), 1)[..., None]
        np.testing.assert_allclose(found.canvas[0, :, at], mean, atol=1e-5)
        np.testing.assert_array_equal(found.valid[:, at], on.any(2))
    prompt = interp.capture_prompt(model, prompts, "layers.0.resid_post")["layers.0.resid_post"]
    np.testing.assert_allclose(found.prompt[0], [prompt[0, 1], prompt[1, 2], prompt[2, 0]], atol=1e-5)
