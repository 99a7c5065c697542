"""One denoising step: temperature, entropy, acceptance, sampling, the stop test; with logits written by hand."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import noise, sampler
from dgemma_jax.diffusion.trajectory import StepView, StopReason
from dgemma_jax.nn import cache as kv

accept, entropy_of, categorical = jax.jit(sampler.accept), jax.jit(sampler.token_entropy), jax.jit(sampler.categorical)
ALMOST_ONE = np.float32(1 - 2**-24)


def fits(counts, probs):
    """Chi-square of `counts` against `probs`, rare tokens taken together: within five standard deviations."""
    expected, rare = counts.sum() * probs, counts.sum() * probs < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    free = len(counts) - 1
    return (np.sum((counts - expected) ** 2 / expected) - free) / math.sqrt(2 * free) < 5


# Temperature and noise.


def test_temperature_by_hand():
    steps = np.array([0, 1, 24, 47])
    np.testing.assert_allclose(
        dg.diffusion.temperature(steps, SamplerConfig()), [0.8, 0.791667, 0.6, 0.408333], atol=1e-6
    )
    gentle = SamplerConfig.gentle()
    np.testing.assert_allclose(dg.diffusion.temperature(np.array([0, 95]), gentle), [1.0, 0.505208], atol=1e-6)
    assert float(dg.diffusion.temperature(0, SamplerConfig(max_denoising_steps=1))) == pytest.approx(0.8)


def test_the_first_canvas_is_uniform_over_the_whole_vocabulary():
    keys = noise.row_keys(np.arange(2000))
    canvas = np.asarray(noise.uniform_canvas(keys, 20, 11))
    assert canvas.shape == (2000, 20) and canvas.dtype == np.int32
    assert fits(np.bincount(canvas.ravel(), minlength=11), np.full(11, 1 / 11))  # special tokens too
    assert fits(np.bincount(canvas[:, 0] * 11 + canvas[:, 1], minlength=121), np.full(121, 1 / 121))


def test_keys_differ_by_seed_block_and_moment():
    def key(seed, block, moment):
        return noise.moment_keys(noise.row_keys([seed]), np.array([block]), np.array([moment]))

    all_keys = [key(*where) for where in itertools.product((0, 1, 2**32 - 1), range(3), range(3))]
    assert len({tuple(np.asarray(jax.random.key_data(k)).ravel()) for k in all_keys}) == 27


def test_corruption():
    tokens = np.full((3, 4000), 7, np.int32)
    noisy = np.asarray(dg.diffusion.corrupt(jax.random.key(0), tokens, np.array([0.0, 0.5, 1.0]), 10))
    assert (noisy[0] == 7).all() and noisy.dtype == np.int32
    kept = np.mean(noisy == 7, 1)
    np.testing.assert_allclose(kept[1:], [0.5 + 0.5 / 10, 1 / 10], atol=0.03)  # a uniform token may be the old one
    assert fits(np.bincount(noisy[2], minlength=10), np.full(10, 0.1))


# Entropy.


def test_entropy_against_float64():
    rng = np.random.default_rng(0)
    for scale in (0.01, 1, 30, 1e4):
        logits = (scale * rng.standard_normal((5, 4, 96))).astype(np.float32)
        np.testing.assert_allclose(entropy_of(logits), oracles.entropy(logits), atol=2e-5)


def test_entropy_of_extremes():
    """No number is lost where logits are equal, huge, or ruled out."""
    big = np.float32(3e38)
    rows = {
        "equal": (np.zeros(96), math.log(96)),
        "equal and huge": (np.full(96, big), math.log(96)),
        "one": (np.where(np.arange(96) == 5, 0, sampler.PINNED), 0.0),
        "two": (np.where(np.arange(96) < 2, big, -big), math.log(2)),
        "ruled out": (np.where(np.arange(96) < 3, 1.0, -np.inf), math.log(3)),
    }
    logits = np.stack([row for row, _ in rows.values()]).astype(np.float32)
    with jax.debug_nans(True):
        np.testing.assert_allclose(entropy_of(logits), [wanted for _, wanted in rows.values()], atol=1e-5)
    slope = jax.grad(lambda x: sampler.token_entropy(x).sum())(logits)
    assert np.isfinite(slope).all()


# Acceptance.


def canvases():
    """2,000 canvases of 12 positions; every other one of a few exact values, so that ties and equalities occur."""
    rng = np.random.default_rng(1)
    free = rng.exponential(rng.choice([0.01, 0.1, 1.0], (1000, 1)), (1000, 12)).astype(np.float32)
    exact = (rng.integers(0, 6, (1000, 12)) / 32).astype(np.float32)
    return np.concatenate([free, exact])


@pytest.mark.parametrize("bound", [0.0, 0.125, 0.5, 100.0])
def test_acceptance_is_the_longest_prefix_within_the_bound(bound):
    found = canvases()
    kept = np.asarray(accept(found, bound))
    np.testing.assert_array_equal(kept, [oracles.accept(row.astype(float), bound) for row in found])
    lowest = np.argmin(found, -1)
    assert kept[np.arange(len(found)), lowest].all()  # the lowest entropy is always kept
    if bound == 100:
        assert kept.all()


def test_no_larger_set_is_within_the_bound():
    """Over all subsets: none with more positions has (sum - max) <= bound."""
    found = canvases()[::40, :8].astype(float)
    kept = np.asarray(accept(found, 0.125))
    masks = np.array(list(itertools.product([False, True], repeat=8))[1:])
    for row, chosen in zip(found, kept, strict=True):
        cost = np.sum(masks * row, 1) - np.max(np.where(masks, row, 0), 1)
        assert chosen.sum() == masks.sum(1)[cost <= 0.125].max()


def test_acceptance_follows_a_permutation_and_works_on_any_batch():
    rng = np.random.default_rng(2)
    row = rng.permutation(np.geomspace(1e-3, 1, 12)).astype(np.float32)  # distinct
    order = np.array([rng.permutation(12) for _ in range(6)])
    base = np.asarray(accept(row, 0.3))
    assert 1 < base.sum() < 12
    np.testing.assert_array_equal(accept(row[order], 0.3), base[order])
    np.testing.assert_array_equal(accept(row[order].reshape(2, 3, 12), 0.3), base[order].reshape(2, 3, 12))
    bounds = np.array([0.0, 0.1, 1.0], np.float32)
    each = jax.vmap(sampler.accept, (None, 0))(row, bounds)
    np.testing.assert_array_equal(each, [oracles.accept(row.astype(float), b) for b in bounds])


# Sampling.


@pytest.mark.parametrize("size", [1, 2, 5, 96])
def test_sampling_is_the_inverse_of_the_running_sum(size):
    """Exact: probabilities and uniform numbers are multiples of powers of two."""
    rng = np.random.default_rng(size)
    probs = rng.multinomial(64, rng.dirichlet(np.full(size, 0.5)), size=20) / 64
    uniform = np.arange(256) / 256
    got = categorical(
        np.tile(uniform, (20, 1)).astype(np.float32), np.repeat(probs[:, None], 256, 1).astype(np.float32)
    )
    expected = [np.searchsorted(np.cumsum(row), uniform, side="right") for row in probs]
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.int32


@pytest.mark.parametrize("size", [5, 96, 1000])
def test_sampling_has_the_distribution(size):
    probs = np.random.default_rng(size).dirichlet(np.full(size, 0.3))
    counts = np.zeros(size)
    for key in jax.random.split(jax.random.key(3), 10):
        uniform = np.asarray(jax.random.uniform(key, (2000,)))
        drawn = categorical(uniform, np.tile(probs.astype(np.float32), (2000, 1)))
        counts += np.bincount(drawn, minlength=size)
    assert fits(counts, probs)
    assert not fits(counts, np.full(size, 1 / size))


def test_ends_of_the_unit_interval():
    """At 0 the first token that can be drawn, just below 1 the last; also where rounding makes the sum not one."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(1000, 0.2), 2000).astype(np.float32) * (rng.random((2000, 1000)) < 0.3)
    probs[:, 500] += 1e-3
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    first, last = np.argmax(probs > 0, 1), 999 - np.argmax(probs[:, ::-1] > 0, 1)
    low = np.asarray(categorical(np.zeros(2000, np.float32), probs))
    high = np.asarray(categorical(np.full(2000, ALMOST_ONE), probs))
    np.testing.assert_array_equal(low, first)
    assert (probs[np.arange(2000), high] > 0).all() and (high <= last).all()
    tail = np.array([probs[i, high[i] + 1 :].sum(dtype=float) for i in range(2000)])
    assert tail.max() < 1e-6  # nothing but rounding is left beyond


def test_a_probability_of_zero_is_never_drawn():
    """Running sums of XLA rise here and there where a weight is zero: aim at exactly these places."""
    rng = np.random.default_rng(0)
    size, width = 2**17, 512  # the two-level sum has rows of 512
    row = (rng.gamma(0.1, size=(40, width)) * (rng.random((40, width)) < 0.3)).astype(np.float32)
    probs = np.zeros((40, size), np.float32)
    probs[:, 3 * width : 4 * width] = row / row.sum(1, keepdims=True)
    row = probs[:, 3 * width : 4 * width]
    sums = np.asarray(jax.jit(lambda w: jnp.cumsum(w, -1))(row))
    hits = 0
    for shift in range(-2, 3):
        for rank in range(4):
            gap = (row[:, 1:] == 0) & (np.diff(sums) > 0)
            place = np.argsort(~gap, 1, kind="stable")[:, rank]  # the rank-th place where the sum rises for nothing
            target = np.take_along_axis(sums, place[:, None], 1)[:, 0]
            target = target + shift * np.spacing(target)
            drawn = np.asarray(categorical(np.clip(target, 0, ALMOST_ONE).astype(np.float32), probs))
            hits += np.sum(probs[np.arange(40), drawn] == 0)
    assert hits == 0


# One step.

V, C = 8, 4
CONFIG = ModelConfig.tiny(vocab_size=V, canvas_length=C, embed_dim=4, layer_types=("full_attention",))
PEAK = np.where(np.arange(V) == 3, 40.0, 0.0)


@functools.partial(jax.jit, static_argnums=5)
def step(model, state, settings, pinned, length, batch):
    cache = kv.KVCache([], jnp.full((batch,), length))
    return sampler.denoise_step(model, state, cache, settings, pinned)


def take(logits, rows=3, pinned=None, settings=SamplerConfig(), **changes):  # noqa: B008
    """One step of `rows` rows from fresh canvases, with logits [C, V] or [rows, C, V]."""
    script = np.broadcast_to(logits, (1, 1, rows, C, V))
    model = oracles.Scripted.of(script, CONFIG)
    zero = np.zeros(rows, np.int32)
    state = sampler.start(noise.row_keys(np.arange(rows)), zero, zero > 0, C, model)
    state = state.replace(**{name: jnp.asarray(value) for name, value in changes.items()})
    after, view = step(model, state, settings, pinned, 0, rows)
    return jax.device_get(
        (dataclasses.replace(state, keys=None), dataclasses.replace(after, keys=None), view, model.table)
    )


ROWS = 3000
MIXED = np.stack([np.where(np.arange(V) == 2, 40.0, 0.0), np.zeros(V), PEAK, np.log(np.arange(1, V + 1))])


@pytest.fixture(scope="module")
def mixed():
    """Two certain positions (0 and 2), an even one (1), and a skewed one (3)."""
    return take(MIXED, ROWS)


def test_the_view_is_what_the_step_computed(mixed):
    before, after, view, table = mixed
    shaped = np.float32(MIXED) / np.float32(0.8)
    np.testing.assert_array_equal(view.canvas, before.canvas)
    np.testing.assert_allclose(view.logits[7], MIXED, rtol=1e-6)
    np.testing.assert_allclose(view.shaped_logits[7], shaped, rtol=1e-6)  # the first temperature
    np.testing.assert_allclose(view.entropy[7], oracles.entropy(shaped), atol=1e-5)
    np.testing.assert_array_equal(view.argmax[:, [0, 2, 3]], [[2, 3, 7]] * ROWS)
    np.testing.assert_allclose(view.next_soft[7], oracles.softmax(shaped) @ table, atol=1e-5)
    for name in ("canvas", "soft", "argmax"):
        wanted = {"canvas": view.next_canvas, "soft": view.next_soft, "argmax": view.argmax}[name]
        np.testing.assert_array_equal(getattr(after, name), wanted)
    assert (after.step == 1).all() and (after.unchanged == 0).all() and not after.done.any()
    assert (before.argmax == -1).all() and (before.soft == 0).all() and (after.block == 0).all()


def test_accepted_positions_get_their_sample_the_others_noise(mixed):
    _, _, view, _ = mixed
    # Entropies 0, 0, skewed, even: the third costs nothing yet (sum - max), the fourth would cost the third.
    np.testing.assert_array_equal(view.accepted, [[True, False, True, True]] * ROWS)
    np.testing.assert_array_equal(
        np.where(view.accepted, view.next_canvas, -1), np.where(view.accepted, view.sample, -1)
    )
    assert (view.sample[:, [0, 2]] == [2, 3]).all()
    counts = [np.bincount(view.next_canvas[:, i], minlength=V) for i in range(C)]
    shaped = np.arange(1.0, V + 1) ** (1 / 0.8)
    assert fits(counts[3], shaped / shaped.sum()) and not fits(counts[3], np.full(V, 1 / V))
    assert fits(counts[1], np.full(V, 1 / V))
    assert np.mean(view.next_canvas[:, 1] == view.sample[:, 1]) < 0.2  # new noise, not the sample
    joint = np.bincount(view.next_canvas[:, 1] * V + view.sample[:, 1], minlength=V * V)
    assert fits(joint, np.full(V * V, V**-2.0))  # and independent of it


def test_everything_and_almost_nothing_accepted():
    all_of_it = take(MIXED, ROWS, settings=SamplerConfig(entropy_bound=100))[2]
    assert all_of_it.accepted.all()
    np.testing.assert_array_equal(all_of_it.next_canvas, all_of_it.sample)
    assert fits(np.bincount(all_of_it.sample[:, 1], minlength=V), np.full(V, 1 / V))
    even = take(np.zeros((C, V)), ROWS, settings=SamplerConfig(entropy_bound=0))[2]
    assert (even.accepted.sum(1) == 1).all()


def test_draws_depend_on_key_block_and_step_only(mixed):
    again = take(MIXED, ROWS, canvas=np.full((ROWS, C), 5, np.int32))[2]
    np.testing.assert_array_equal(again.next_canvas, mixed[2].next_canvas)  # the canvas has no say here
    keys = noise.row_keys(np.zeros(ROWS, int))
    same = take(MIXED, ROWS, keys=keys)[2].next_canvas
    np.testing.assert_array_equal(same, np.broadcast_to(mixed[2].next_canvas[0], (ROWS, C)))
    later = take(MIXED, ROWS, step=np.arange(ROWS, dtype=np.int32) % 40, keys=keys)[2].next_canvas
    assert len(np.unique(later, axis=0)) > 20
    blocks = take(MIXED, ROWS, block=np.arange(ROWS, dtype=np.int32) % 40, keys=keys)[2].next_canvas
    assert len(np.unique(blocks, axis=0)) > 20


def test_pinned_positions_are_certain_and_stay():
    pinned = np.zeros((ROWS, C), bool)
    pinned[::2, 1] = pinned[::3, 2] = True  # an even position, and one that is certain of another token
    before, after, view, table = take(MIXED, ROWS, pinned=pinned)
    for array in (after.canvas, after.argmax, view.sample):
        np.testing.assert_array_equal(array[pinned], before.canvas[pinned])
    assert (view.entropy[pinned] == 0).all() and view.accepted[pinned].all()
    np.testing.assert_allclose(after.soft[pinned], table[before.canvas[pinned]], atol=1e-5)
    np.testing.assert_allclose(view.logits[0], MIXED, rtol=1e-6)  # logits are the model's own
    free = take(MIXED, ROWS)[2]
    np.testing.assert_allclose(view.entropy[~pinned], free.entropy[~pinned], atol=1e-6)


def test_rows_that_are_done_are_frozen():
    done, soft = np.array([True, False, True]), np.ones((3, C, 4), np.float32)
    changes = dict(done=done, soft=soft, argmax=np.full((3, C), 6, np.int32), unchanged=np.array([4, 4, 4], np.int32),
                   step=np.array([2, 0, 0], np.int32), stop=np.array([1, 0, 0], np.int32))  # fmt: skip
    script = np.broadcast_to(MIXED, (1, 3, 3, C, V))
    model = oracles.Scripted.of(script, CONFIG)
    zero = np.zeros(3, np.int32)
    state = sampler.start(noise.row_keys(np.arange(3)), zero, zero > 0, C, model).replace(**changes)
    after, _ = step(model, state, SamplerConfig(), None, 0, 3)
    for field in dataclasses.fields(state):
        if field.name != "keys":
            old, new = (np.asarray(getattr(s, field.name)) for s in (state, after))
            np.testing.assert_array_equal(new[done], old[done], err_msg=field.name)
    assert after.step[1] == 1 and (np.asarray(after.argmax)[1] != 6).any() and after.unchanged[1] == 0


# The stop test.

N = 6
advance = jax.jit(sampler.advance)


def drive(settings, argmax, entropy, canvas):
    """(steps, stop) of every row when the steps give argmax, entropy [N, B, C] and the canvases canvas[1:]."""
    rows = argmax.shape[1]
    model = oracles.Scripted.of(np.zeros((1, 1, rows, C, V)), CONFIG)
    zero = np.zeros(rows, np.int32)
    state = sampler.start(noise.row_keys(zero), zero, zero > 0, C, model).replace(canvas=jnp.asarray(canvas[0]))
    nothing = np.zeros((rows, C, 4), np.float32)
    for i in range(N):
        view = StepView(state.step, state.block, state.canvas, state.soft, 0, 0, argmax[i], argmax[i], entropy[i],
                        entropy[i] < 0, canvas[i + 1], nothing)  # fmt: skip
        state = advance(state, view, settings)
    return np.asarray(state.step), np.asarray(state.stop)


def reference(settings, argmax, entropy, canvas):
    """The stop test of one row in plain Python."""
    unchanged, previous = 0, None
    for i in range(N):
        google = settings.stability == "canvas"
        compared = list(canvas[i]) if google else previous
        unchanged = unchanged + 1 if list(argmax[i]) == compared else 0
        previous = list(argmax[i])
        mean = sum(map(float, entropy[i])) / C
        confident = mean <= settings.confidence_threshold if google else mean < settings.confidence_threshold
        if settings.early_stop and confident and unchanged >= settings.stability_threshold:
            return i + 1, StopReason.CONVERGED
    return N, StopReason.MAX_STEPS


SETTINGS = {
    "threshold 0": SamplerConfig(stability_threshold=0, max_denoising_steps=N, confidence_threshold=0.25),
    "threshold 1": SamplerConfig(stability_threshold=1, max_denoising_steps=N, confidence_threshold=0.25),
    "threshold 2": SamplerConfig(stability_threshold=2, max_denoising_steps=N, confidence_threshold=0.25),
    "google": SamplerConfig.google(max_denoising_steps=N, confidence_threshold=0.25),
    "no early stop": SamplerConfig(early_stop=False, max_denoising_steps=N, confidence_threshold=0.25),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_stop_test_against_plain_python(name):
    """Random rows of two tokens, so that everything coincides often; means at, below and above the threshold."""
    rng, rows, settings = np.random.default_rng(5), 400, SETTINGS[name]
    argmax, canvas = rng.integers(0, 2, (N, rows, C)), rng.integers(0, 2, (N + 1, rows, C))
    argmax[:, :, 1:], canvas[:, :, 1:] = 1, 1
    entropy = rng.choice(np.float32([0.125, 0.25, 0.375]), (N, rows, 1), p=[0.5, 0.25, 0.25]).repeat(C, 2)
    steps, stop = drive(settings, argmax.astype(np.int32), entropy, canvas.astype(np.int32))
    expected = [reference(settings, argmax[:, b], entropy[:, b], canvas[:, b]) for b in range(rows)]
    np.testing.assert_array_equal(np.stack([steps, stop], 1), expected)
    if name != "no early stop":
        assert {StopReason.CONVERGED, StopReason.MAX_STEPS} == set(stop)


def test_the_stop_test_by_hand():
    """Constant and certain from the start: the threshold alone decides. The mean counts, not every position."""
    still = np.ones((N, 2, C), np.int32)
    low = np.full((N, 2, C), 0.125, np.float32)
    low[:, 1] = [0.9, 0, 0, 0]  # mean 0.225
    other = np.zeros((N + 1, 2, C), np.int32)
    taken = {name: drive(s, still, low, other)[0].tolist() for name, s in SETTINGS.items()}
    assert taken == {
        "threshold 0": [1, 1],
        "threshold 1": [2, 2],
        "threshold 2": [3, 3],
        "google": [6, 6],
        "no early stop": [6, 6],
    }
    assert drive(SETTINGS["google"], still, low, np.ones_like(other))[0].tolist() == [1, 1]  # Google's may stop at once


def test_stop_codes_have_sentences():
    assert [int(r) for r in StopReason] == [0, 1, 2]
    assert len({r.sentence for r in StopReason}) == 3 and "max_denoising_steps" in StopReason.MAX_STEPS.sentence
