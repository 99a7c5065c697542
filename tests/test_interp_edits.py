"""Edits: gates are exact and data, values land where they are told, and a patch reproduces its donor."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import denoise_step, start
from dgemma_jax.nn import transformer
from dgemma_jax.nn.sites import Site
from interp.edits import Chain, orthonormal
from interp.gates import OPEN_SIZES, lookup, table, where_on
from interp.taps import tapped

B, C, D = 2, 6, 16
STEPS = 4
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
LOWEST = float(jnp.finfo(jnp.float32).min)


@pytest.fixture(scope="module")
def model():
    kinds = ("sliding_attention", "full_attention")
    sizes = dict(layer_types=kinds, canvas_length=C, embed_dim=D, vocab_size=32, hidden_dim=16, sliding_window=4)
    return transformer.initialize(dg.ModelConfig.tiny(**sizes))


@pytest.fixture(scope="module")
def caches(model):
    """Of two batches of prompts, of equal length."""
    prompts = np.random.default_rng(0).integers(6, 32, (2, B, 5))
    return [dg.prefill(model, p).cache for p in prompts]


def states(model, seed=0):
    """A state at step 1, with self-conditioning, as arrays."""
    zero = jnp.zeros(B, jnp.int32)
    state = start(jax.random.split(jax.random.key(seed), B), zero, zero > 0, C, model)
    return state.replace(soft=jax.random.normal(jax.random.key(seed + 9), state.soft.shape), step=zero + 1)


@jax.jit
def one_step(model, state, cache):
    after, view = denoise_step(model, state, cache, SAMPLER)
    return after, view


@functools.partial(jax.jit, static_argnames="phase")
def through(site, x, phase, context):
    return site.bind(phase=phase, **context)(x)


def at(model, name, x, phase="denoise", **context):
    """What the site makes of x at one moment."""
    moment = {"step": step(1), "block": step(0), "embedder": model.embedder}
    return np.asarray(through(interp.at(model, name).get(), np.asarray(x), phase, moment | context))


def step(number):
    return np.full(B, number, np.int32)


# Tables


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, [1, 1, 1, 1, 1]),
        (2, [0, 0, 1, 0, 0]),
        ([0, 3], [1, 0, 0, 1, 0]),
        (range(1, 3), [0, 1, 1, 0, 0]),
        (slice(2, None), [0, 0, 1, 1, 1]),
        (slice(0, 4), [1, 1, 1, 1, 0]),
        ([True, False, False, True], [1, 0, 0, 1, 0]),
        ([0.5, 0, 1, 0.25], [0.5, 0, 1, 0.25, 0]),
        ([], [0, 0, 0, 0, 0]),
        (False, [0, 0, 0, 0, 0]),
        (np.int64(3), [0, 0, 0, 1, 0]),
    ],
)
def test_tables_by_hand(spec, expected):
    np.testing.assert_array_equal(table(spec, 4, "steps", more=True), expected)
    if spec != slice(2, None):
        np.testing.assert_array_equal(table(spec, 4, "positions"), expected[:4])


def test_tables_count_from_the_end_and_beyond_it():
    np.testing.assert_array_equal(table(-1, 4, "positions"), [0, 0, 0, 1])
    np.testing.assert_array_equal(table(slice(-2, None), 4, "heads"), [0, 0, 1, 1])
    entries = table(slice(3, None), None, "rows")
    assert len(entries) == OPEN_SIZES["rows"] + 1
    np.testing.assert_array_equal(lookup(entries, jnp.array([-1, 2, 3, 10_000])), [0, 0, 1, 1])
    assert len(table(1000, None, "rows")) == 1024 + 1
    assert lookup(table(None, None, "blocks"), jnp.array(-1)) == 0  # padding is nowhere
    traced = jax.jit(lambda i: table(i, 4, "steps", more=True))(jnp.array([0, 2]))
    np.testing.assert_array_equal(traced, [1, 0, 1, 0, 0])
    words = [where_on(table(s, 4, "steps", more=True), more=True) for s in (None, [0, 1, 3], slice(2, None), [0.5] * 4)]
    assert words == ["all", "0-1,3", "2 on", "4 of 5 in part"] and where_on(table([], 4, "heads")) == "none"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (4, "steps has 4, which is out of range; there are 4: 0..3"),
        (-1, "steps has -1"),
        ([True] * 3, "length 3; there are 4"),
        (slice(0, 9), "out of range"),
        ("all", "integer, a slice"),
        ([[1.0]], "one axis"),
        ([np.nan] * 4, "not finite"),
    ],
)
def test_tables_refuse(spec, message):
    with pytest.raises(ValueError, match=message):
        table(spec, 4, "steps", more=True)


# Edits, by hand

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (interp.Patch(jnp.ones(4)), np.ones_like(X)),
        (interp.Patch(jnp.asarray(X[:, :1] + 1)), np.broadcast_to(X[:, :1] + 1, X.shape)),
        (interp.Add(jnp.asarray(X[0])), X + X[0]),
        (interp.Scale(jnp.float32(3)), 3 * X),
        (interp.Zero(), 0 * X),
        (interp.Mean(), np.broadcast_to(X.mean(1, keepdims=True), X.shape)),
        (interp.Mean(jnp.arange(4.0)), np.broadcast_to(np.arange(4.0), X.shape)),
        (interp.Replace(jnp.square), X**2),
        (interp.Replace(jnp.multiply, (jnp.float32(2),)), 2 * X),
        (interp.ProjectOut(jnp.array([0, 0, 7.0, 0])), X * [1, 1, 0, 1]),
        (interp.ProjectOut(jnp.array([[1.0, 0, 0, 0], [3, 5, 0, 0], [1, 1, 0, 0]])), X * [0, 0, 1, 1]),
        (interp.ProjectOut(jnp.zeros((2, 4))), X),
        (interp.Edit(), X),
    ],
)
def test_edits_by_hand(edit, expected):
    edit.axes = "BTD"
    np.testing.assert_allclose(edit(jnp.asarray(X)), expected, atol=2e-6)


def test_orthonormal_spans_what_it_is_given():
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    units = np.stack(jax.jit(orthonormal)(np.concatenate([rows, rows[:1] + rows[1:2]])))
    np.testing.assert_allclose(units @ units.T, np.diag([1, 1, 1, 0]), atol=1e-5)
    np.testing.assert_allclose(rows @ units.T @ units, rows, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda d: jnp.stack(orthonormal(d)).sum()))(jnp.zeros((1, 8)))
    assert np.isfinite(gradient).all()


def changed(model, name, shape, **context):
    """Where an edit that adds one acts, bool."""
    return at(model, name, np.zeros(shape, np.float32), **context) == 1


def test_each_gate_acts_where_it_is_told(model):
    one = interp.Add(jnp.float32(1))
    place = functools.partial(interp.edit, model)

    resid = "layers.1.resid_post"
    got = changed(place(resid, one, positions=[0, -1], rows=1, units=slice(2, 5)), resid, (B, C, D))
    expected = np.zeros((B, C, D), bool)
    expected[1, [0, 0, 0, -1, -1, -1], [2, 3, 4, 2, 3, 4]] = True
    np.testing.assert_array_equal(got, expected)

    windows = place(resid, one, steps=[1, 3], blocks=slice(1, None), sampler=SAMPLER)
    seen = [
        [changed(windows, resid, (B, 1, 1), step=step(r), block=step(j)).all() for r in range(5)] for j in (0, 1, 99)
    ]
    np.testing.assert_array_equal(seen, [[0] * 5, [0, 1, 0, 1, 0], [0, 1, 0, 1, 0]])
    rows_differ = changed(windows, resid, (B, 1, 1), step=np.array([1, 2]), block=step(1))
    np.testing.assert_array_equal(rows_differ.ravel(), [True, False])  # rows may stand at different steps

    heads = changed(place("layers.0.attn_z", one, heads=[1, 3]), "layers.0.attn_z", (B, C, 4, 8))
    np.testing.assert_array_equal(heads.all((0, 1, 3)), [False, True, False, True])
    experts = changed(place("layers.*.router_weights", one, experts=4, layers=1), "layers.1.router_weights", (B, C, 6))
    np.testing.assert_array_equal(experts.any((0, 1)), np.arange(6) == 4)
    assert not changed(place("layers.*.router_weights", one, layers=1), "layers.0.router_weights", (B, C, 6)).any()

    mask = np.zeros((2, 1, C, 1), bool)
    mask[1, 0, 2] = True
    masked = place("layers.*.resid_mid", one, mask=mask)
    assert not changed(masked, "layers.0.resid_mid", (B, C, D)).any()
    np.testing.assert_array_equal(changed(masked, "layers.1.resid_mid", (B, C, D)).all((0, 2)), np.arange(C) == 2)


def test_keys_of_attention(model):
    """Cached slots of a ring are found by position: with 9 tokens and 3 slots these hold positions 6, 7 and 8."""
    name, slots = "layers.0.attn_scores", 3
    patch = functools.partial(interp.edit, model, name, interp.Add(jnp.float32(1)))
    shape, length = (B, 4, C, slots + C), np.array([9, 2])
    canvas = changed(patch(keys=[0, 5], positions=1, heads=2), name, shape, length=length)
    np.testing.assert_array_equal(canvas[0, 2, 1], [0] * slots + [1, 0, 0, 0, 0, 1])
    assert canvas.sum() == 2 * B
    cached = changed(patch(cached=[1, 7]), name, shape, length=length)
    np.testing.assert_array_equal(cached[:, 0, 0], [[0, 1, 0] + [0] * C, [0, 1, 0] + [0] * C])
    prefill = interp.edit(model, name, interp.Add(jnp.float32(1)), cached=[1, 9], phase="prefill")
    positions = np.array([[9, 10], [2, 3]])
    own = changed(prefill, name, (B, 4, 2, slots + 2), length=length, phase="prefill", positions=positions)
    np.testing.assert_array_equal(own[:, 0, 0], [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])


def test_prefill_values_go_by_position(model):
    """In any order of chunks, with padding anywhere."""
    by_position = jnp.arange(8.0)[:, None] * jnp.ones(D) + 10
    edited = interp.edit(
        model, "layers.0.resid_post", interp.Patch(by_position), phase="prefill", positions=slice(1, 6)
    )
    positions = np.array([[4, 5, -1, 6], [0, -1, 1, 2]])
    got = at(edited, "layers.0.resid_post", np.zeros((B, 4, D), np.float32), phase="prefill", positions=positions)
    np.testing.assert_array_equal(got[..., 0], [[14, 15, 0, 0], [0, 0, 11, 12]])
    assert type(interp.at(edited, "layers.0.resid_post").get().bind(phase="denoise")) is Site  # costs nothing there
    both = interp.edit(model, "layers.0.resid_post", interp.Zero(), phase="both")
    for context in ({"phase": "prefill", "positions": positions}, {"phase": "denoise"}):
        assert not at(both, "layers.0.resid_post", np.ones((B, 4, D), np.float32), **context).any()


def test_values_per_layer_and_per_step(model):
    vectors = np.arange(2 * 3, dtype=np.float32).reshape(2, 3, 1) * np.ones(D, np.float32)  # [L, R, D]
    edited = interp.edit(model, "layers.*.mlp_out", interp.Patch(vectors), per_layer=True, per_step=True)
    x = np.zeros((B, C, D), np.float32)
    got = [[at(edited, f"layers.{i}.mlp_out", x, step=step(r))[0, 0, 0] for r in range(4)] for i in range(2)]
    np.testing.assert_array_equal(got, [[0, 1, 2, 2], [3, 4, 5, 5]])
    full = np.arange(3 * B, dtype=np.float32).reshape(3, B, 1, 1) * np.ones((C, D), np.float32)  # [R, B, C, D]
    rows = at(interp.edit(model, "layers.0.mlp_out", interp.Patch(full), per_step=True), "layers.0.mlp_out", x)
    np.testing.assert_array_equal(rows[:, 0, 0], [2, 3])
    named = {f"layers.{i}.attn_k": np.full((1, C, k, h), i + 1.0) for i, (k, h) in enumerate([(2, 8), (1, 16)])}
    mapped = interp.edit(model, "layers.*.attn_k", interp.Patch(named), heads=0)  # shapes that differ by layer
    for i, (k, h) in enumerate([(2, 8), (1, 16)]):
        got = at(mapped, f"layers.{i}.attn_k", np.zeros((B, C, k, h), np.float32))
        assert (got[:, :, 0] == i + 1).all() and not got[:, :, 1:].any()


def test_draws_are_the_rows_own(model):
    """Noise depends on a row's key, the step and the edit's seed, not on the batch; donors stay for the block."""
    keys = jax.random.split(jax.random.key(3), B)
    edited = interp.edit(model, "canvas", interp.Renoise(seed=1), positions=slice(0, 4))
    canvas = np.full((B, C), 7, np.int32)
    draws = [at(edited, "canvas", canvas, keys=keys, step=step(r)) for r in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any() and (draws[0][:, 4:] == 7).all() and (draws[0][0] != draws[0][1]).any()
    swapped = at(edited, "canvas", canvas, keys=keys[::-1], step=step(0))
    np.testing.assert_array_equal(swapped, draws[0][::-1])
    other = at(interp.edit(model, "canvas", interp.Renoise(seed=2)), "canvas", canvas, keys=keys)
    assert (other != at(edited, "canvas", canvas, keys=keys))[:, :4].any() and other.min() >= 0 and other.max() < 32

    embedded = interp.edit(model, "canvas_embed", interp.Renoise(seed=1))
    rows = at(embedded, "canvas_embed", np.zeros((B, C, D), np.float32), keys=keys, step=step(0))
    table_VD = np.asarray(model.embedder.table[...]) * D**0.5
    assert (np.abs(rows[..., None, :] - table_VD).max(-1).min(-1) < 1e-5).all()  # each is the embedding of some token

    donors = np.arange(5.0)[:, None, None] * np.ones((C, D))
    resampled = interp.edit(model, "layers.*.resid_mid", interp.Resample(donors, seed=4))
    x = np.full((B, C, D), -1, np.float32)
    same = [at(resampled, f"layers.{i}.resid_mid", x, keys=keys, step=step(r))[:, 0, 0] for i in (0, 1) for r in (0, 2)]
    assert (np.stack(same) == same[0]).all() and np.isin(same[0], range(5)).all()
    rolled = interp.edit(model, "layers.0.resid_mid", interp.Resample())
    x[1] = 3
    np.testing.assert_array_equal(at(rolled, "layers.0.resid_mid", x, keys=keys), x[::-1])


# In the model


def all_kinds(model, on, value=1.0):
    """The model with an edit of every kind, several at one site, gated by `on`."""
    gates = dict(steps=on, sampler=SAMPLER)
    model = interp.edit(model, "layers.*.resid_post", interp.Add(jnp.full(D, value)), positions=[1, 2], **gates)
    model = interp.edit(model, "layers.*.resid_post", interp.ProjectOut(jnp.ones((2, D))), **gates)
    model = interp.edit(model, "layers.*.attn_scores", interp.Patch(jnp.float32(LOWEST)), keys=[0], **gates)
    model = interp.edit(model, "layers.0.expert_hidden", interp.Scale(jnp.float32(value)), experts=[0, 1], **gates)
    model = interp.edit(model, "layers.1.router_weights", interp.Mean(), **gates)
    model = interp.edit(model, "layers.1.mlp_post", interp.Replace(jnp.abs), **gates)
    model = interp.edit(model, "soft_embed", interp.Zero(), positions=0, **gates)
    model = interp.edit(model, "canvas_embed", interp.Resample(), **gates)
    return interp.edit(model, "canvas", interp.Renoise(), positions=3, **gates)


def test_gates_at_zero_change_nothing_and_share_the_program(model, caches):
    state = states(model)
    after, view = one_step(model, state, caches[0])
    chex.clear_trace_counter()
    edited_step = jax.jit(chex.assert_max_traces(one_step.__wrapped__, n=1))
    off = edited_step(all_kinds(model, on=False), state, caches[0])
    np.testing.assert_array_equal(off[0].canvas, after.canvas)
    np.testing.assert_array_equal(off[1].argmax, view.argmax)
    for name in ("logits", "entropy", "next_soft"):
        np.testing.assert_allclose(getattr(off[1], name), getattr(view, name), atol=1e-6, rtol=1e-6)
    elsewhere = edited_step(all_kinds(model, on=[0, 2, 3]), state, caches[0])
    chex.assert_trees_all_equal(elsewhere[0].canvas, off[0].canvas)
    outcomes = [
        edited_step(all_kinds(model, on, value), state, caches[0])[1].logits for on, value in ((1, 1.0), (1, 3.0))
    ]
    assert all(np.abs(o - view.logits).max() > 1e-3 for o in outcomes) and (outcomes[0] != outcomes[1]).any()
    assert interp.describe(model) == ()


def test_a_patch_of_all_positions_reproduces_the_donor(model, caches):
    """At the last residual the donor's logits; at an early one too, if the cache is the donor's."""
    mine, donors = states(model), states(model, seed=5)
    captured, _ = tapped(model, "layers.*.resid_post")
    _, donor_view = one_step(captured, donors, caches[1])
    patch = interp.Patch(donor_view.sites)
    chex.clear_trace_counter()
    patched = jax.jit(chex.assert_max_traces(lambda m, s, c: one_step.__wrapped__(m, s, c)[1].logits, n=1))
    last = interp.edit(model, "layers.*.resid_post", patch, layers=1)
    np.testing.assert_allclose(patched(last, mine, caches[0]), donor_view.logits, atol=1e-5)
    first = interp.edit(model, "layers.*.resid_post", patch, layers=0)
    np.testing.assert_allclose(patched(first, mine, caches[1]), donor_view.logits, atol=1e-5)
    assert np.abs(patched(first, mine, caches[0]) - donor_view.logits).max() > 1e-3  # the prompt's keys still count
    # Of one row and position: the others' logits at the last layer stay.
    spot = interp.edit(model, "layers.*.resid_post", patch, layers=1, rows=1, positions=2)
    got, plain = np.asarray(patched(spot, mine, caches[0])), one_step(model, mine, caches[0])[1].logits
    np.testing.assert_allclose(got[1, 2], donor_view.logits[1, 2], atol=1e-5)
    kept = np.ones((B, C), bool)
    kept[1, 2] = False
    np.testing.assert_allclose(got[kept], plain[kept], atol=1e-5)


def test_a_sweep_over_places_compiles_once(model, caches):
    """Surgery inside the sweep: layer x position as a table of one-hot choices."""
    state = states(model)
    values = jnp.zeros((2, B, C, D))
    traces = []

    @jax.jit
    def sweep(model, layers, positions):
        def one(place):
            traces.append(1)
            edited = interp.edit(
                model, "layers.*.resid_post", interp.Patch(values), layers=place[0], positions=place[1]
            )
            return denoise_step(edited, state, caches[0], SAMPLER)[1].logits[:, 2]

        return jax.lax.map(one, (layers, positions))

    layers, positions = np.meshgrid(np.eye(2), np.eye(C))[:0] or (
        np.repeat(np.eye(2), C, 0),
        np.tile(np.eye(C), (2, 1)),
    )
    got = sweep(model, jnp.asarray(layers, jnp.float32), jnp.asarray(positions, jnp.float32))
    count = len(traces)
    sweep(model, jnp.asarray(layers[::-1], jnp.float32), jnp.asarray(positions, jnp.float32))
    assert len(traces) == count and sweep._cache_size() == 1
    plain = one_step(model, state, caches[0])[1].logits[:, 2]
    moved = np.abs(got - plain).max((1, 2)).reshape(2, C) > 1e-4
    assert moved[0].all()  # from layer 0 every position reaches position 2
    np.testing.assert_array_equal(moved[1], np.arange(C) == 2)  # after the last layer only its own does


def test_the_prompt_is_edited_in_prefill_only(model, caches):
    tokens = np.random.default_rng(0).integers(6, 32, (2, B, 5))[0]
    # One structure for all three: what differs is data.
    edited = functools.partial(interp.edit, model, "token_embed", interp.Add(jnp.ones(D)))
    none = dg.prefill(edited(positions=[]), tokens).cache
    chex.assert_trees_all_close(none, caches[0], atol=1e-6)
    third = dg.prefill(edited(positions=3), tokens).cache
    moved = np.abs(third.layers[1].k - none.layers[1].k).max((0, 1, 3)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), [3, 4])  # causal


@pytest.mark.heavy
def test_caches_are_edited_by_layer_and_position(model, caches):
    mine, donor = caches

    def edit_cache(edit, **where):
        return jax.jit(lambda cache: interp.edit_cache(cache, edit, **where))(mine)

    zeroed = edit_cache(interp.Zero(), layers=1, positions=[0, 3], parts=("v",))
    np.testing.assert_array_equal(zeroed.layers[1].k, mine.layers[1].k)
    chex.assert_trees_all_equal(zeroed.layers[0], mine.layers[0])
    empty = np.abs(zeroed.layers[1].v).max((0, 1, 3)) == 0
    assert empty[[0, 3]].all() and not empty[[1, 2, 4]].any()
    ring = edit_cache(interp.Scale(jnp.float32(2)), layers=0, positions=4, rows=1)  # 3 slots: slot 1
    ratio = np.asarray(ring.layers[0].k / mine.layers[0].k)
    np.testing.assert_allclose(ratio[1, :, 1], 2)
    assert (ratio == 2).sum() == ratio[1, :, 1].size
    whole = edit_cache(interp.Patch(donor))
    chex.assert_trees_all_equal(whole.layers, donor.layers)
    head = interp.edit_cache(mine, interp.Patch(donor), layers=0, heads=1)  # layer 1 has one head
    np.testing.assert_array_equal(head.layers[0].v[:, 1], donor.layers[0].v[:, 1])
    np.testing.assert_array_equal(head.layers[0].v[:, 0], mine.layers[0].v[:, 0])
    by_position = edit_cache(interp.Patch(np.arange(9.0)[:, None]), layers=1)  # [P, 1]
    np.testing.assert_array_equal(by_position.layers[1].k[0, 0, :5, 0], range(5))
    chex.assert_trees_all_equal(by_position.layers[1].k[:, :, 5:], mine.layers[1].k[:, :, 5:])  # slots without token
    longer = dg.prefill(model, np.full((B, 6), 8)).cache
    with pytest.raises(ValueError, match="equal length"):
        interp.edit_cache(mine, interp.Patch(longer))
    with pytest.raises(ValueError, match="layers has 2"):
        interp.edit_cache(mine, interp.Zero(), layers=2)
    with pytest.raises(ValueError, match="parts must be"):
        interp.edit_cache(mine, interp.Zero(), parts=("q",))


# In and out


def test_edits_compose_are_listed_and_removed(model):
    before = [id(leaf) for leaf in jax.tree.leaves(model)]
    structure = jax.tree.structure(model)
    one, two = interp.Add(jnp.float32(1)), interp.Scale(jnp.float32(2))
    first = interp.edit(interp.edit(model, "layers.0.mlp_out", one), "layers.0.mlp_out", two, steps=2, sampler=SAMPLER)
    x = np.ones((B, C, D), np.float32)
    assert (
        at(first, "layers.0.mlp_out", x, step=step(2))[0, 0, 0] == 4 and at(first, "layers.0.mlp_out", x)[0, 0, 0] == 2
    )
    other = interp.edit(interp.edit(model, "layers.0.mlp_out", two), "layers.0.mlp_out", one)
    assert at(other, "layers.0.mlp_out", x)[0, 0, 0] == 3
    assert isinstance(interp.at(first, "layers.0.mlp_out").get(), Chain)
    many = interp.token_bottleneck(interp.edit(first, "layers.*.resid_post", one, heads=None, positions=[0, 1]), k=2)
    lines = interp.describe(many)
    assert [(line.site, line.kind) for line in lines] == [
        ("layers.0.mlp_out", "Add"), ("layers.0.mlp_out", "Scale"), ("layers.0.resid_post", "Add"),
        ("layers.1.resid_post", "Add"), ("soft_embedding", "Bottleneck"),
    ]  # fmt: skip
    assert lines[1].where == "steps 2" and lines[2].where == "positions 0-1" and "factor=2.0" in lines[1].values
    text, page = str(lines), lines._repr_html_()
    assert text.startswith("5 edits") and "layers.*.resid_post" in text and "0-1" in text and page.count("<tr>") == 5
    left = interp.remove(many, "layers.*.mlp_out")
    assert [line.kind for line in interp.describe(left)] == ["Add", "Add", "Bottleneck"]
    assert [line.kind for line in interp.describe(interp.remove(left, "soft_embedding"))] == ["Add", "Add"]
    assert jax.tree.structure(interp.remove(many)) == structure
    assert [id(leaf) for leaf in jax.tree.leaves(model)] == before and jax.tree.structure(model) == structure


def test_bundles_and_models_without_weights(model):
    bundle = dg.Bundle(model.config, model, None, SAMPLER)
    edited = interp.edit(bundle, "logits", interp.Zero(), steps=STEPS - 1)
    assert isinstance(edited, dg.Bundle) and interp.describe(bundle) == () and len(interp.describe(edited)) == 1
    with pytest.raises(ValueError, match=f"steps has {STEPS}"):
        interp.edit(bundle, "logits", interp.Zero(), steps=STEPS)
    assert len(interp.describe(interp.remove(edited))) == 0
    release = transformer.abstract(dg.ModelConfig())
    huge = interp.edit(release, "layers.*.resid_post", interp.Add(np.zeros(2816, np.float32)), layers=[3, 17])
    assert [line.where for line in interp.describe(huge)].count("off") == 28


def halve(x):
    return x / 2


def test_edits_are_saved_and_loaded_with_their_sites(model, tmp_path):
    edited = all_kinds(model, on=[1, 2])
    edited = interp.edit(edited, "layers.1.moe_out", interp.Replace(halve), units=3)
    edited = interp.edit(edited, "token_embed", interp.Patch(jnp.ones((3, D), jnp.bfloat16)), positions=[0, 2])
    edited = interp.token_bottleneck(edited, p=0.1, steps=slice(1, None), sampler=SAMPLER)
    path = interp.save_edits(edited, tmp_path / "mine")
    assert path.name == "mine.npz"
    loaded = interp.load_edits(model, path)
    assert jax.tree.structure(loaded) == jax.tree.structure(edited)
    chex.assert_trees_all_equal(jax.tree.leaves(loaded), jax.tree.leaves(edited))
    assert interp.describe(loaded) == interp.describe(edited)

    with pytest.raises(ValueError, match=r"layers\.0\.moe_out holds .*lambda.*top of a module"):
        interp.save_edits(interp.edit(model, "layers.0.moe_out", interp.Replace(lambda x: x)), tmp_path / "no")
    single = transformer.abstract(dg.ModelConfig.tiny(layer_types=("full_attention",), embed_dim=D), jnp.float32)
    with pytest.raises(ValueError, match="which the model lacks"):
        interp.load_edits(single, path)
    wide = transformer.abstract(dg.ModelConfig.tiny(layer_types=("sliding_attention", "full_attention")), jnp.float32)
    with pytest.raises(ValueError, match="has width 32"):
        interp.load_edits(wide, path)
    with pytest.raises(ValueError, match="not activations"):
        interp.Activations.load(path)


def shorter(x):
    return x[:, :-1]


@pytest.mark.parametrize(
    ("pattern", "edit", "options", "message"),
    [
        ("layers.0.resid_pots", interp.Zero(), {}, r"near it: layers\.\*\.resid_post"),
        ("layers.7.resid_post", interp.Zero(), {}, "2 layers"),
        ("layers.0.resid_post", interp.Add(np.ones(D + 1)), {}, r"B, T=6, D=16\]; value has shape \(17,\)"),
        ("layers.0.resid_post", interp.Patch(np.ones((B, C + 1, D))), {}, "does not broadcast"),
        ("layers.*.resid_post", interp.Patch(np.ones((3, B, C, D))), {}, "first axis over the 2 sites"),
        ("layers.*.resid_post", interp.Add(np.ones((3, D))), {"per_layer": True}, "first axis over the 2 sites"),
        ("layers.0.resid_post", interp.ProjectOut(np.ones((2, 8))), {}, "its width must be 16"),
        ("layers.0.resid_post", interp.Replace(shorter), {}, "must keep the shape"),
        ("layers.0.resid_post", interp.Replace(jnp.linalg.inv), {}, "Replace does not fit layers.0.resid_post"),
        ("layers.0.resid_post", interp.Renoise(), {}, "acts at canvas, canvas_embed, token_embed"),
        ("layers.0.resid_post", interp.Zero(), {"heads": 0}, "no heads to choose from"),
        ("layers.0.resid_post", interp.Zero(), {"keys": 0}, "no keys to choose from"),
        ("layers.0.attn_z", interp.Zero(), {"heads": 4}, "heads has 4"),
        ("layers.0.router_weights", interp.Zero(), {"units": 0}, "choose by experts"),
        ("layers.0.resid_post", interp.Zero(), {"steps": 48}, r"steps has 48, which is out of range; there are 48"),
        ("layers.0.resid_post", interp.Zero(), {"positions": C}, "positions has 6"),
        ("layers.0.resid_post", interp.Zero(), {"layers": 1}, r"matches layers \[0\]"),
        ("logits", interp.Zero(), {"layers": 1}, "not in a layer"),
        ("logits", interp.Zero(), {"phase": "prefill"}, "exists in denoise only"),
        ("layers.0.resid_post", interp.Zero(), {"phase": "later"}, "phase must be one of"),
        ("layers.0.resid_post", interp.Zero(), {"phase": "both", "positions": 0}, "one phase after the other"),
        ("layers.0.resid_post", interp.Zero(), {"per_step": True}, "has no values"),
        ("layers.*.resid_post", interp.Patch({"layers.0.resid_post": 1.0}), {}, "nothing for layers.1.resid_post"),
        ("layers.0.resid_post", jnp.ones(D), {}, "must be an edit"),
        ("layers.0.resid_post", interp.Zero(), {"mask": np.ones((3, B, C, D))}, "first axis over the 1 sites"),
        ("layers.0.resid_post", interp.Zero(), {"mask": np.ones(D - 1)}, "mask has shape"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, pattern, edit, options, message):
    with pytest.raises(ValueError, match=message):
        interp.edit(model, pattern, edit, **options)
