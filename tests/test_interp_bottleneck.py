"""Token bottlenecks and the other carriers: closed forms, the identity at k = V, windows as data."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import denoise_step, start
from dgemma_jax.nn import transformer
from dgemma_jax.nn.embedder import SoftEmbed
from interp.bottleneck import Bottleneck
from interp.carriers import ranks

B, C, D, V = 2, 6, 16, 32
SAMPLER = dg.SamplerConfig(max_denoising_steps=4, eos_token_ids=(1,), early_stop=False)


@pytest.fixture(scope="module")
def model():
    sizes = dict(layer_types=("full_attention",), canvas_length=C, embed_dim=D, vocab_size=V, hidden_dim=16)
    return oracles.build(dg.ModelConfig.tiny(**sizes))


def random_probs(vocab, rows=3, seed=0):
    return oracles.softmax(2 * np.random.default_rng(seed).standard_normal((1, rows, vocab))).astype(np.float32)


def table_of(vocab, width=8):
    """Something with the face of an embedder, and the sum of its table."""
    table = (np.random.default_rng(1).standard_normal((vocab, width)) / width**0.5).astype(np.float32)
    return types.SimpleNamespace(table=jnp.asarray(table), scale=jnp.float32(width**0.5)), jnp.asarray(table.sum(0))


@jax.jit
def applied(module, probs, table, scale):
    return module(probs, types.SimpleNamespace(table=table, scale=scale))


def by_definition(probs, k=None, p=None):
    """f_k and f_p of the papers in float64: the distribution itself."""
    probs = probs.astype(np.float64)
    kept = probs >= p if p is not None else np.argsort(np.argsort(-probs, -1), -1) < k
    rest = 1 - np.where(kept, probs, 0).sum(-1, keepdims=True)
    others = probs.shape[-1] - kept.sum(-1, keepdims=True)
    return np.where(kept, probs, np.where(others > 0, rest / np.maximum(others, 1), 0)), kept


def bottleneck(k=10**6, p=0.0, count=1, mode="uniform", table_sum=None):
    spread = jnp.asarray(mode == "uniform")
    return Bottleneck(k=jnp.asarray(k), p=jnp.asarray(p), spread=spread, count=count, table_sum=table_sum)


def as_distribution(module, probs):
    """What the module embeds, read off with the unit table."""
    vocab = probs.shape[-1]
    module.table_sum = jnp.asarray(np.ones(vocab, np.float32))
    return np.asarray(applied(module, probs, np.eye(vocab, dtype=np.float32), np.float32(1)))


@pytest.mark.parametrize(
    ("vocab", "setting", "count"),
    [
        (1000, dict(p=0.03), 33),
        (1000, dict(k=8), 8),
        (1000, dict(k=8), 20),
        (50, dict(p=0.05), 20),
        (50, dict(k=50), 50),
    ],
)
def test_f_k_and_f_p_by_definition(vocab, setting, count):
    """Retained probabilities unchanged, tail mass preserved; gathered and dense forms agree with the definition."""
    probs = random_probs(vocab)
    expected, kept = by_definition(probs, **setting)
    assert kept.any() and (setting.get("k", 0) == vocab or not kept.all())
    got = as_distribution(bottleneck(**setting, count=count), probs)
    np.testing.assert_allclose(got[kept], probs[kept], atol=1e-7)
    np.testing.assert_allclose(got.sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(got, expected, atol=5e-7)
    embedder, table_sum = table_of(vocab)
    soft = bottleneck(**setting, count=count, table_sum=table_sum)
    soft = applied(soft, probs, embedder.table, embedder.scale)
    table = np.asarray(embedder.table, np.float64)
    np.testing.assert_allclose(soft, expected @ table * 8**0.5, atol=5e-6)


def test_modes_by_hand():
    probs = np.array([[[0.5, 0.2, 0.2, 0.1, 0], [0.3, 0.3, 0.2, 0.1, 0.1], [0, 0, 0, 0, 0]]], np.float32)
    cases = [
        (dict(k=2, count=2), [[0.5, 0.2, 0.1, 0.1, 0.1], [0.3, 0.3, 0.4 / 3, 0.4 / 3, 0.4 / 3]]),
        (dict(p=0.4, count=2), [[0.5, 0.125, 0.125, 0.125, 0.125], [0.2] * 5]),  # no token: uniform
        (dict(k=2, count=2, mode="renormalize"), [[5 / 7, 2 / 7, 0, 0, 0], [0.5, 0.5, 0, 0, 0]]),
        (dict(p=0.4, count=2, mode="renormalize"), [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]),  # the first stays
        (dict(k=1, mode="renormalize"), [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]),  # hard
    ]
    for setting, expected in cases:
        got = as_distribution(bottleneck(**setting), probs)
        np.testing.assert_allclose(got[0, :2], expected, atol=1e-6, err_msg=str(setting))
        assert not got[0, 2].any()  # a signal of zeros stays zero


def test_one_setting_a_row():
    """Rows of a batch may differ in k and in p: a ladder in one pass."""
    probs = np.repeat(random_probs(50), 3, 0)
    for setting in (dict(k=[1, 7, 50]), dict(p=[0.5, 0.03, 0.02])):
        got = as_distribution(bottleneck(**setting, count=50), probs)
        ((name, values),) = setting.items()
        for row, value in enumerate(values):
            np.testing.assert_allclose(got[row], by_definition(probs[row], **{name: value})[0], atol=5e-7)


@pytest.mark.parametrize("count", [4, 300])
def test_bfloat16_tables_lose_nothing_but_the_last_rounding(count):
    """Gathered and dense forms: sums in float32, one rounding to bfloat16 at the end."""
    probs = random_probs(1000)
    embedder, _ = table_of(1000)
    embedder.table, embedder.scale = embedder.table.astype(jnp.bfloat16), jnp.bfloat16(8**0.5)
    table, scale = np.asarray(embedder.table, np.float64), float(embedder.scale)
    exact = (by_definition(probs, k=count)[0] @ table) * scale
    table_sum = jnp.asarray(np.asarray(embedder.table, np.float32).sum(0))
    module = bottleneck(k=count, count=count, table_sum=table_sum)
    soft = applied(module, probs, embedder.table, embedder.scale)
    assert soft.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(soft, np.float64), exact, rtol=2**-8, atol=1e-5)


@jax.jit
def one_step(model, state, cache):
    return denoise_step(model, state, cache, SAMPLER)


@pytest.fixture(scope="module")
def moment(model):
    """The arguments of `one_step`."""
    zero = jnp.zeros(B, jnp.int32)
    state = start(jax.random.split(jax.random.key(0), B), zero, zero > 0, C, model)
    return state, dg.prefill(model, [[7, 8, 9], [10, 11, 12]]).cache


def test_all_tokens_are_the_identity(model, moment):
    whole = interp.token_bottleneck(model, k=V)
    less = interp.token_bottleneck(model, k=V - 2)
    probs = oracles.softmax(3 * np.random.default_rng(4).standard_normal((B, C, V))).astype(np.float32)
    soft = jax.jit(lambda model: model.soft_embed(jnp.asarray(probs)))
    assert np.abs(soft(whole) - soft(model)).max() <= 1e-6
    assert np.abs(soft(less) - soft(model)).max() > 1e-6
    state, cache = moment
    other = state
    for _ in range(SAMPLER.max_denoising_steps):
        (state, view), (other, seen) = one_step(model, state, cache), one_step(whole, other, cache)
        np.testing.assert_array_equal(view.argmax, seen.argmax)
        np.testing.assert_array_equal(state.canvas, other.canvas)


def test_windows_and_sizes_are_data_and_only_soft_changes(model, moment):
    state, cache = moment
    step = jax.jit(chex.assert_max_traces(one_step.__wrapped__, n=1))
    chex.clear_trace_counter()

    def view(at=1, **options):
        narrow = interp.token_bottleneck(model, **{"k": 3, "count": 8, "sampler": SAMPLER} | options)
        return step(narrow, state.replace(step=state.step + at), cache)[1]

    def soft(at=1, **options):
        return np.asarray(view(at, **options).next_soft)

    plain, narrow = one_step(model, state.replace(step=state.step + 1), cache)[1], view(steps=1)
    for name in ("sample", "accepted", "next_canvas"):  # sampling keeps the full distribution
        np.testing.assert_array_equal(getattr(plain, name), getattr(narrow, name))
    np.testing.assert_allclose(plain.entropy, narrow.entropy, atol=1e-5)
    expected, _ = by_definition(np.asarray(jax.nn.softmax(plain.shaped_logits, -1)), k=3)
    table = np.asarray(model.embedder.table[...], np.float64)
    np.testing.assert_allclose(narrow.next_soft, expected @ table * D**0.5, atol=1e-5)

    full, on = soft(steps=0), soft(steps=1)
    np.testing.assert_allclose(full, plain.next_soft, atol=1e-6)
    assert (np.abs(on - full).max((0, 2)) > 1e-4).all()
    assert np.abs(soft(at=2, steps=2) - soft(at=2, steps=3)).max() > 1e-4
    some = soft(steps=slice(1, None), positions=[0, 5])
    np.testing.assert_array_equal(some[:, [0, 5]], on[:, [0, 5]])
    np.testing.assert_array_equal(some[:, 1:5], full[:, 1:5])
    row = soft(steps=1, rows=1)
    np.testing.assert_array_equal(row[0], full[0])
    np.testing.assert_array_equal(row[1], on[1])
    ladder = [np.abs(soft(steps=1, k=k) - full).max() for k in (1, 4, 8)]
    assert ladder[0] > ladder[1] > ladder[2] > 0
    np.testing.assert_allclose(soft(steps=[0, 0.5, 0, 0]), (full + on) / 2, atol=1e-6)


# Other carriers

P = np.array([[[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]], np.float32)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (interp.Flat(), np.full_like(P, 0.25)),
        (interp.SwapRanks(), [[[0.3, 0.1, 0.4, 0.2], [0.1, 0.2, 0.4, 0.3], [0.25] * 4]]),
        (interp.SwapRanks(0, 3), [[[0.1, 0.4, 0.3, 0.2], [0.4, 0.2, 0.3, 0.1], [0.25] * 4]]),
        (interp.DropRank(0), [[[0, 1 / 6, 0.5, 1 / 3], [1 / 6, 1 / 3, 0.5, 0], [0, 1 / 3, 1 / 3, 1 / 3]]]),
        (interp.Kill([0, 2, -1]), [[[0, 1 / 3, 0, 2 / 3], [0, 1 / 3, 0, 2 / 3], [0, 0.5, 0, 0.5]]]),
        (interp.Kill(range(4)), np.zeros_like(P)),
        (interp.Inject([1, 3], 0.2), 0.6 * P + 0.2 * np.array([0, 1, 0, 1])),
        (
            interp.Bump(1, np.log(6)),
            [[[0.8 / 3, 0.4, 0.2, 0.4 / 3], [0.05, 0.6, 0.15, 0.2], [1 / 9, 6 / 9, 1 / 9, 1 / 9]]],
        ),
        (interp.Bump(2, 100.0), np.broadcast_to(np.eye(4)[2], P.shape)),
        (interp.Mix(jnp.asarray(P[:, ::-1]), 0.25), 0.75 * P + 0.25 * P[:, ::-1]),
        (interp.Mix(jnp.asarray(P[:, ::-1]), 1.0, logits=True), P[:, ::-1]),
        (interp.Mix(jnp.asarray(P[:, ::-1]), 0.5, logits=True), None),
    ],
)
def test_carriers_by_hand(edit, expected):
    if expected is None:
        mean = np.sqrt(P * P[:, ::-1])
        expected = mean / mean.sum(-1, keepdims=True)
    edit.axes = "BTV"
    np.testing.assert_allclose(edit(jnp.asarray(P)), expected, atol=1e-6)


def test_ranks_and_the_echo():
    np.testing.assert_array_equal(ranks(jnp.asarray(P))[0], [[0, 3, 1, 2], [3, 2, 1, 0], [0, 1, 2, 3]])
    echo = interp.Echo().bind(phase="denoise", step=jnp.zeros(1, jnp.int32), block=jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="canvas of a denoising step"):
        echo(jnp.asarray(P))
    np.testing.assert_array_equal(
        echo.bind(next_canvas=jnp.array([[2, 0, 1]]))(jnp.asarray(P))[0], np.eye(4)[[2, 0, 1]]
    )


@pytest.mark.heavy
def test_carriers_in_a_run(model):
    """One program with all of them; each has its window. The canvas, S and their record agree."""
    gates = dict(sampler=SAMPLER)
    edited = interp.edit(model, "soft_probs", interp.Echo(), steps=0, **gates)
    edited = interp.edit(
        edited, "soft_probs", interp.Kill([5, 6]), steps=slice(2, None), positions=slice(0, 3), **gates
    )
    edited = interp.edit(edited, "soft_embed", interp.Zero(), steps=1, positions=4, **gates)
    edited = interp.edit(edited, "soft_embed", interp.Smooth(0.5), steps=1, rows=1, **gates)
    edited = interp.edit(edited, "canvas", interp.Patch(jnp.int32(9)), positions=5, **gates)
    prompts = [[7, 8, 9], [10, 11, 12]]
    acts = interp.capture(edited, prompts, ["soft_*", "canvas", "shaped_logits"], seed=[1, 2], sampler=SAMPLER)
    probs, soft, canvas = acts["soft_probs"], acts["soft_embed"], acts["canvas"]
    own = np.asarray(jax.nn.softmax(acts["shaped_logits"], -1))
    assert (canvas[..., 5] == 9).all()
    np.testing.assert_allclose(soft[0], model.embedder.lookup(jnp.asarray(canvas[0])), atol=1e-5)  # echo
    assert probs[2:, :, :3, 5:7].max() == 0 and probs[2:, :, 3:, 5:7].min() > 0
    np.testing.assert_allclose(probs[1], own[1], atol=1e-6)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
    plain = np.asarray(SoftEmbed()(jnp.asarray(probs[1]), model.embedder))
    assert not soft[1, 0, 4].any() and not np.abs(soft[1, 0, :4] - plain[0, :4]).max() > 1e-5
    np.testing.assert_allclose(soft[1, 1, :4], (soft[0, 1] + plain[1])[:4] / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of k, p and hard"),
        ({"k": 2, "hard": True}, "give one of"),
        ({"k": 0}, "k must be an integer from 1 to 32"),
        ({"k": V + 1}, "from 1 to 32"),
        ({"k": 1.5}, "k must be an integer"),
        ({"p": 0.0}, r"p must be in \(0, 1\]"),
        ({"k": 2, "mode": "zero"}, "mode must be one of uniform, renormalize"),
        ({"k": 4, "count": 3}, "count must be from 4"),
        ({"p": 0.1, "count": 3}, "count must be from 10"),
        ({"hard": True, "count": V + 1}, "count must be from 1"),
        ({"k": [[2]]}, "one number or one a row"),
        ({"k": [2, 40]}, "from 1 to 32"),
        ({"k": 4, "steps": 4}, "steps has 4"),
        ({"k": 4, "positions": C}, "positions has 6"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        interp.token_bottleneck(model, **{"sampler": SAMPLER} | options)


@pytest.mark.heavy
def test_without_weights_and_twice(model):
    release = interp.token_bottleneck(transformer.abstract(dg.ModelConfig()), p=0.03)
    assert release.soft_embedding.count == 33 and release.soft_embedding.table_sum.shape == (2816,)
    twice = interp.token_bottleneck(interp.token_bottleneck(model, k=2), hard=True)
    assert interp.describe(twice)[0].values.startswith("k=1, p=0.0, spread=False, count=1")
    for pattern, edit in (("logits", interp.Flat()), ("soft_embed", interp.Kill(3)), ("soft_probs", interp.Smooth())):
        with pytest.raises(ValueError, match="acts at"):
            interp.edit(model, pattern, edit)
    with pytest.raises(ValueError, match="3 tokens cannot have the mass 0.4.* each; give 0 to 0.333"):
        interp.Inject([1, 2, 3, 3, -1], 0.45)
    with pytest.raises(ValueError, match="no logits to mix"):
        interp.edit(model, "soft_embed", interp.Mix(jnp.ones(D), 0.5, logits=True))
