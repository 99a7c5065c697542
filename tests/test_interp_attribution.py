"""Attribution: gradients are those of the model, integrals are complete, and estimates agree with real patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import build

import dgemma_jax as dg
import interp
from interp import attribution, paired_runs, surgery
from interp.metrics import LogitDifference
from interp.softmax_patches import key_effects, query_effects

C, STEPS, POINTS = 5, 2, 48
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
CLEAN, CORRUPT = [[7, 8, 9, 10], [11, 12, 13]], [[7, 20, 9, 24], [11, 21, 22]]
METRIC = LogitDifference(positions=[[1], [2]], tokens=[[3], [4]], others=[[5], [6]])
INPUTS = ["cache", "canvas_embed", "soft"]
OWN = ["resid_post", "attn_z", "attn_q", "attn_k", "moe_out", "router_probs"]
ALL = [*(f"layers.*.{name}" for name in OWN), "logits", *INPUTS]
NAMES = [f"layers.{i}.{name}" for i in (0, 1) for name in [*OWN, "attn_pattern"]] + ["canvas_embed"]
SIZES = dict(
    layer_types=("sliding_attention", "full_attention"), canvas_length=C, embed_dim=16, vocab_size=32, hidden_dim=16,
    sliding_window=4, num_global_kv_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """Every expert is always chosen: the metric is smooth, and integrals have a right value."""
    return build(dg.ModelConfig.tiny(**SIZES, num_experts=4, experts_per_token=4))


def attribute(model, sites=ALL, clean=CLEAN, corrupt=CORRUPT, rows_at_once=2, **options):
    """One program for most of the tests; each step by itself."""
    options = dict(points=POINTS, rows_at_once=rows_at_once, sampler=SAMPLER) | options
    over = ("position", "head") if sites is ALL else ("position",)
    return interp.attribution_patching(model, clean, corrupt, METRIC, sites, over=over, **options)


@jax.jit
def stepped(model, side, adds, scale):
    """The metric of a step, and its activations, with some of this added at these sites."""
    adds = jax.tree.map(lambda x: scale * x, adds)
    logits, seen = paired_runs.forward(model, side, adds, NAMES, SAMPLER, "denoise")
    return METRIC(logits), seen | {"logits": logits}


@pytest.fixture(scope="module")
def pairs(model):
    """By step: recipient and donor, and what each computes."""
    runs = paired_runs.run_pairs(model, CLEAN, CORRUPT, METRIC, None, "denoising", 0, SAMPLER)
    shapes = jax.eval_shape(
        lambda side: paired_runs.forward(model, side, {}, NAMES, SAMPLER, "denoise")[1], runs.at([0])[0]
    )
    none = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    found = []
    for step in range(STEPS):
        sides = runs.at([step])
        found.append((sides, [jax.tree.map(np.asarray, stepped(model, side, none, 0.0)[1]) for side in sides]))
    return found


@pytest.fixture(scope="module")
def paired(pairs):
    """The recipient at its second step, what is computed there, and what the donor computes."""
    (recipient, _), seen = pairs[1]
    return recipient, *({name: x for name, x in side.items() if name != "logits"} for side in seen)


# Laws of the nodes.


@pytest.fixture(scope="module")
def whole(model):
    return attribute(model)


@pytest.mark.heavy
def test_a_run_compared_with_itself_has_no_effects(model):
    programs = attribution._estimate._cache_size()
    found = attribute(model, corrupt=CLEAN)
    assert attribution._estimate._cache_size() <= programs + 1  # of all steps
    assert set(found.effects) == {*ALL} and found.size > 200
    for name in found.effects:
        assert np.abs(found[name]).max() == 0, name
    np.testing.assert_array_equal(found.base, found.donor)


def test_shapes_and_numbers(model, whole):
    heads = model.config.num_heads
    shapes = {name: effect.shape for name, effect in whole.effects.items()}
    assert shapes["layers.*.resid_post"] == (STEPS, 2, C, 2) and whole.axes["layers.*.resid_post"] == "RLTB"
    assert shapes["layers.*.attn_z"] == (STEPS, 2, C, heads, 2) and whole.axes["layers.*.attn_z"] == "RLTNB"
    assert shapes["layers.*.router_probs"] == (STEPS, 2, C, 2)  # experts are summed
    assert shapes["canvas_embed"] == shapes["soft"] == (STEPS, C, 2) and shapes["cache"] == (STEPS, 2, 4, 2, 2)
    assert not whole["cache"][:, :, 3, :, 1].any() and whole["cache"][:, 1, 2, :, 1].all()  # three tokens, not four
    sliding = whole["cache"][:, 0, :, :, 0]  # four tokens in a ring of three: the last has the slot of the first
    assert not sliding[:, 0].any() and sliding[:, 3].all()
    some = attribute(model, positions=[0, 3], prompt_positions=[1])
    assert some.index["layers.*.attn_z"]["T"] == [0, 3] and some.index["cache"]["P"] == [1]
    np.testing.assert_array_equal(some["layers.*.attn_z"], whole["layers.*.attn_z"][:, :, [0, 3]])
    np.testing.assert_array_equal(some["cache"], whole["cache"][:, :, [1]])


def test_integrals_are_complete(whole):
    """What all the inputs get is all the difference."""
    wanted = whole.donor - whole.base
    total = sum(whole[name].sum(tuple(range(1, whole[name].ndim - 1))) for name in INPUTS)
    np.testing.assert_allclose(total, wanted, rtol=0.02, atol=0.02)
    gap = np.abs(total - wanted).mean() / np.abs(wanted).mean()
    assert f"gap {gap:.2g}" in whole.method and np.abs(wanted).mean() > 0.5


def test_directions_and_programs(model, whole):
    """Noising is denoising with the prompts exchanged; other prompts, forms and points compile nothing."""
    programs = attribution._estimate._cache_size()
    other = attribute(model, corrupt=[[7, 8, 9, 23], [14, 12, 13]], seed=[5, 6])
    assert np.abs(other.flat() - whole.flat()).max() > 1e-3
    noising = attribute(model, clean=CORRUPT, corrupt=CLEAN, direction="noising")
    np.testing.assert_array_equal(noising.flat(), whole.flat())
    plain, few = attribute(model, form="plain"), attribute(model, points=3)
    assert not np.allclose(plain.flat(), few.flat()) and not np.allclose(few.flat(), whole.flat())
    assert attribution._estimate._cache_size() == programs


@pytest.mark.slow
def test_a_cut_gets_all_the_difference(model):
    """Integrated over the prompt's embeddings alone: at the first step nothing else differs."""
    cut = attribute(model, "token_embed", phase="prefill", path="sites", steps=0)
    np.testing.assert_allclose(cut["token_embed"].sum(1), cut.donor - cut.base, rtol=0.02, atol=0.02)
    assert cut.axes["token_embed"] == "RPB" and cut.index["token_embed"]["P"] == [0, 1, 2, 3]


def test_a_metric_that_is_linear_in_a_site_is_exact(model, pairs):
    """Logits: the estimate is the patch of each position."""
    found = attribute(model, form="plain")
    for step, (_, (here, there)) in enumerate(pairs):
        own, donor = here["logits"], there["logits"]
        base = np.asarray(METRIC(own))
        exact = [METRIC(np.where((np.arange(C) == at)[:, None], donor, own)) - base for at in range(C)]
        for mine, theirs in ((found["logits"], exact), (found.base, base), (found.donor, METRIC(donor))):
            np.testing.assert_allclose(mine[step], theirs, atol=1e-5)
        assert np.abs(exact).max() > 0.1


def test_plain_is_the_derivative_towards_the_donor(model, paired):
    """Central differences through the same sites, at the second step, where canvas and S differ too."""
    recipient, here, there = paired
    change = paired_runs.minus(there, here)
    found = attribute(model, form="plain", softmax=False, rows_at_once=8)  # both steps in one call
    step, off = 2e-3, jax.tree.map(np.zeros_like, change)
    for site in ALL:
        if site == "logits":  # exact, above
            continue
        own = [name for name in change if surgery.fold(name) == site]
        ahead, behind = (
            stepped(model, recipient, off | {n: change[n] for n in own}, scale)[0] for scale in (step, -step)
        )
        slope = np.asarray(ahead - behind) / (2 * step)
        np.testing.assert_allclose(found[site][1].reshape(-1, 2).sum(0), slope, rtol=0.03, atol=3e-3, err_msg=site)
        assert np.abs(slope).max() > 1e-3, site


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(corrupt=[[7, 8], [11, 12, 13]]), "pair 0 has 4 clean and 2 corrupt tokens"),
        (dict(corrupt=[[7, 8, 9, 10]]), "give them in pairs"),
        (dict(sites="canvas"), "tokens, which have no gradient: name canvas_embed"),
        (dict(sites="soft_embed"), "sweep 'soft'"),
        (dict(sites="layers.*.resid"), "near it: layers"),
        (dict(sites="mlp_out", over=("expert",)), "no site matches"),
        (dict(form="exact"), "form must be one of plain, integrated"),
        (dict(path="weights"), "path must be one of inputs, sites"),
        (dict(points=0), "points must be an integer >= 1"),
        (dict(direction="back"), "direction must be one of"),
        (dict(steps=7), "out of range"),
        (dict(positions=[]), "chooses none"),
        (dict(metric=lambda logits: logits[0, 0]), "one number a pair|makes shape"),
    ],
)
def test_what_is_refused(model, options, message):
    given = dict(clean=CLEAN, corrupt=CORRUPT, metric=METRIC, sites="layers.*.resid_post", sampler=SAMPLER) | options
    with pytest.raises(ValueError, match=message):
        interp.attribution_patching(model, **given)


# Queries and keys.


def test_queries_and_keys_go_through_the_exact_softmax():
    """Every query and key patched alone, the pattern recomputed; one key slot is masked."""
    rng = np.random.default_rng(0)
    B, T, N, K, H, S = 2, 3, 4, 2, 5, 7
    q, dq = rng.standard_normal((2, B, T, N, H)).astype(np.float32)
    k, dk = rng.standard_normal((2, B, S, K, H)).astype(np.float32) * 2
    gradient = rng.standard_normal((B, N, T, S)).astype(np.float32)
    visible = np.ones((B, 1, 1, S), bool)
    visible[0, ..., 1] = False

    def scores(q, k):
        found = np.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k).reshape(B, N, T, S)
        return np.where(visible, found, np.finfo(np.float32).min)

    def pattern(q, k):
        return np.asarray(jax.nn.softmax(scores(q, k), -1))

    before = pattern(q, k)
    queries = query_effects(dq, jnp.asarray(k.swapaxes(1, 2)), jnp.asarray(scores(q, k)), gradient)
    keys = key_effects(dk[:, -T:], q, before, gradient)
    for t in range(T):
        for n in range(N):
            one = np.zeros_like(q)
            one[:, t, n] = dq[:, t, n]
            exact = ((pattern(q + one, k) - before) * gradient).sum((1, 2, 3))
            np.testing.assert_allclose(queries[:, t, n], exact, atol=1e-5, rtol=1e-4)
        for n in range(K):
            one = np.zeros_like(k)
            one[:, S - T + t, n] = dk[:, S - T + t, n]
            exact = ((pattern(q, k + one) - before) * gradient).sum((1, 2, 3))
            np.testing.assert_allclose(keys[:, t, n], exact, atol=1e-5, rtol=1e-4)


def test_a_patched_query_or_key_changes_the_pattern_as_assumed(model, paired):
    """The real patch of one query and one key in layer 1: the change of its pattern times the gradient there."""
    recipient, here, there = paired
    none = jax.tree.map(np.zeros_like, here)
    pattern = "layers.1.attn_pattern"
    gradient = jax.jit(jax.grad(lambda x: stepped(model, recipient, none | {pattern: x}, 1.0)[0].sum()))(none[pattern])
    found = attribute(model, form="plain")
    for name in ("attn_q", "attn_k"):
        full = f"layers.1.{name}"
        one = none[full].copy()
        one[:, 2, 1] = (there[full] - here[full])[:, 2, 1]
        after = stepped(model, recipient, none | {full: one}, 1.0)[1][pattern]
        exact = ((after - here[pattern]) * gradient).sum((1, 2, 3))
        np.testing.assert_allclose(found[f"layers.*.{name}"][1, 1, 2, 1], exact, atol=1e-5, rtol=1e-3)
        assert np.abs(exact).max() > 1e-3
