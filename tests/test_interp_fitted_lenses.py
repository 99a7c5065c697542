"""Tuned and Jacobian lenses: untrained they are the plain lens, trained they are nearer the end; J is the Jacobian."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.train import tasks
from interp import jacobian_lens, lenses, tuned_lens
from interp.affine_lens import identity_lens
from interp.taps import tapped

pytestmark = pytest.mark.slow

C, D, V, L = 4, 16, 32, 2
SAMPLER = dg.SamplerConfig(max_denoising_steps=3, eos_token_ids=(1,), early_stop=False)
CONFIG = dg.ModelConfig.tiny(
    layer_types=("sliding_attention", "full_attention"), canvas_length=C, embed_dim=D, vocab_size=V, hidden_dim=16,
    sliding_window=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG)


def run(model):
    quiet = dg.Record.nothing()
    return dg.generate(model, [[7, 8], [9, 10, 11]], seed=[1, 2], sampler=SAMPLER, max_new_tokens=C, record=quiet)


@pytest.fixture(scope="module")
def moment(model):
    return run(model).trajectory.moment(0, 1)


@pytest.fixture(scope="module")
def lens(model, moment):
    """Of all layers, by parts that do not divide the width."""
    return interp.fit_jacobian_lens(model, moment, chunk=6)


@jax.jit
def jacobian(model, state, cache, sampler):
    """d h_last[b, t] / d h_0[b, s] of the step, [B, T, D, B, S, D], by forward differentiation."""
    last = f"layers.{L - 1}.resid_post"

    def end(delta):
        moved = interp.edit(model, "layers.0.resid_post", interp.Replace(jnp.add, (delta,)))
        return denoise_step(tapped(moved, last)[0], state, cache, sampler)[1].sites[last]

    return jax.jacfwd(end)(jnp.zeros(state.soft.shape))


def test_the_jacobian_lens_is_the_jacobian(model, moment, lens):
    """A sum over targets and a mean over sources, of the chosen positions and of rows; 1 at the last layer."""
    full = np.asarray(jacobian(model, moment.state, moment.cache, moment.sampler))
    own = np.stack([full[b, :, :, b] for b in range(2)])  # [B, T, D, S, D]
    others = full[0, :, :, 1]
    assert np.abs(others).max() == 0 and np.abs(own).max() > 0.1
    np.testing.assert_allclose(lens.matrix[0], own.sum(1).mean((0, 2)), atol=1e-5)
    np.testing.assert_allclose(lens.matrix[1], np.eye(D), atol=1e-6)
    chosen = [0, 2]
    part = interp.fit_jacobian_lens(model, [moment, moment], positions=chosen, chunk=6)
    wanted = own[:, chosen][:, :, :, chosen].sum(1).mean((0, 2))
    np.testing.assert_allclose(part.matrix[0], wanted, atol=1e-5)
    assert np.abs(wanted - np.asarray(lens.matrix[0])).max() > 0.05
    assert repr(part) == "Jacobian (4 rows) lens of 2 layers, width 16"


def test_other_moments_dimensions_and_positions_share_the_program(model, moment, lens):
    programs = jacobian_lens._gradients._cache_size()
    later = run(model).trajectory.moment(0, 2)
    interp.fit_jacobian_lens(model, [moment, later], positions=[0, 1, 2], chunk=6)
    interp.fit_jacobian_lens(model, later, positions=[3], chunk=6)
    assert jacobian_lens._gradients._cache_size() == programs > 0


def test_of_a_linear_model_it_is_the_product_of_the_scalars(model):
    """Layers that add nothing multiply the residual by their scalar: J = s_1 s_2 ..., from every layer."""

    def silent(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf * 0 if "post_attn_norm" in name or "post_ffw_norm" in name else leaf

    linear = jax.tree_util.tree_map_with_path(silent, model)
    moment = run(linear).trajectory.moment(0, 1)
    lens = interp.fit_jacobian_lens(linear, moment, [0])
    scalar = float(model.layers[1].denoise_scalar[...][0])
    assert abs(scalar - 1) > 0.01
    np.testing.assert_allclose(lens.matrix, [scalar * np.eye(D)], atol=1e-6)
    assert repr(lens) == "Jacobian (2 rows) lens of 1 layers, width 16"


def test_what_a_lens_reads_can_be_removed(model, lens):
    """With J_l^T w_v projected out of a layer, the lens gives these tokens a logit of 0 there; one layer, two tokens."""
    tokens = [4, 9]
    directions = lens.directions(model, tokens)
    assert directions.shape == (L, 2, D)
    bare = lens.directions(model, tokens, norm=False)
    np.testing.assert_allclose(bare[1], np.asarray(model.embedder.table[...])[tokens], atol=1e-6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, C, D)), jnp.float32)
    norm, eps = model.final_norm.weight[...], CONFIG.rms_norm_eps
    removed = interp.ProjectOut(directions[0]).apply(x)
    before = lenses.lens_logits(x, lens[0], norm, eps, model.embedder)
    after = lenses.lens_logits(removed, lens[0], norm, eps, model.embedder)
    np.testing.assert_allclose(after[..., tokens], 0, atol=1e-5)
    assert np.abs(before[..., tokens]).min() > 1e-3
    edited = interp.edit(model, "layers.*.resid_post", interp.ProjectOut(directions))
    np.testing.assert_allclose(edited.layers[0].resid_post.directions, directions[0])


def test_an_untrained_tuned_lens_is_the_plain_one(model):
    lens = interp.fit_tuned_lens(model, [[7, 8]], updates=0)
    np.testing.assert_array_equal(lens.matrix, np.broadcast_to(np.eye(D), (L, D, D)))
    assert not np.asarray(lens.bias).any() and lens.layers == (0, 1)
    assert interp.fit_tuned_lens(model, [[7, 8]], [1], updates=5).matrix.shape == (1, D, D)  # the last learns nothing


def test_training_finds_a_planted_map():
    """Residuals that are a fixed affine map away from those of the last layer: the divergence falls to nearly nothing."""
    rng = np.random.default_rng(0)
    model = oracles.build(CONFIG)
    last_ND = rng.standard_normal((512, D)).astype(np.float32)
    turn, _ = np.linalg.qr(np.eye(D) + 0.3 * rng.standard_normal((D, D)))
    x_LND = np.stack([5 * (last_ND @ turn + 1.5), last_ND]).astype(np.float32)
    lens = identity_lens(model, [0])
    given = (model.embedder, model.final_norm.weight[...], CONFIG.rms_norm_eps)

    def divergence(lens):
        target, own = (
            jax.nn.log_softmax(lenses.lens_logits(x[None], one, *given[1:], given[0])[0], -1)
            for x, one in zip(x_LND[::-1], (None, lens), strict=True)
        )
        return float(lenses.divergence(target, own).mean())

    before = divergence(lens[0])
    fit = tuned_lens._begin(lens, x_LND)
    tuned_lens._update.clear_cache()
    for update in range(300):
        fit = tuned_lens._update(fit, x_LND, *given, jnp.float32(0.03 * (1 - update / 300)))
    assert tuned_lens._update._cache_size() == 1
    bias_LD = fit.shift * fit.unit[:, None]
    after, without = (divergence(interp.AffineLens(fit.matrix[0], bias_LD[0] * keep, ())) for keep in (1, 0))
    assert after < 0.02 * before and after < 0.1 * without, (before, after, without)


def test_training_is_seeded_goes_on_and_is_saved(model, tmp_path):
    options = dict(sampler=SAMPLER, updates=4, updates_a_run=2, batch=2, steps=2, places=8)
    first, again = (interp.fit_tuned_lens(model, [[7, 8], [9, 10]], **options) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    assert np.abs(first.matrix[0] - np.eye(D)).max() > 1e-3 and np.asarray(first.bias[0]).any()
    np.testing.assert_array_equal(first.matrix[1], np.eye(D))
    chex.assert_trees_all_equal(interp.fit_tuned_lens(model, [[7, 8]], start=first, updates=0, sampler=SAMPLER).matrix,
                                first.matrix)  # fmt: skip
    loaded = interp.AffineLens.load(first.save(tmp_path / "tuned"))
    chex.assert_trees_all_equal(loaded, first)
    assert repr(loaded) == "tuned (4 updates) lens of 2 layers, width 16"
    assert interp.fit_tuned_lens(model, [[7, 8]], **options | {"seed": 1}).bias[0].tolist() != first.bias[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(updates=-1), "updates must be an integer of at least 0"),
        (dict(places=0), "places must be an integer of at least 1"),
        (dict(layers=2), "layers has 2, which is out of range"),
        (dict(start=interp.AffineLens(jnp.eye(4)[None], jnp.zeros((1, 4)), (0,))), "the lens has width 4, the model 16"),
    ],
)
def test_bad_input_of_training_is_refused_before_anything_runs(model, monkeypatch, options, message):
    monkeypatch.setattr(dg, "generate", None)
    with pytest.raises(ValueError, match=message):
        interp.fit_tuned_lens(model, [[7, 8]], **options)


@pytest.mark.parametrize(
    ("moments", "options", "message"),
    [
        ([], {}, "one or several moments"),
        ([1], {}, "one or several moments"),
        (None, dict(positions=[]), "at least one of the 4"),
        (None, dict(positions=[0.5] * C), "none in part"),
        (None, dict(chunk=0), r"chunk must be an integer in 1\.\.16"),
        (None, dict(layers=5), "layers has 5"),
    ],
)
def test_bad_input_of_the_jacobian_is_refused(model, moment, moments, options, message):
    with pytest.raises(ValueError, match=message):
        interp.fit_jacobian_lens(model, moment if moments is None else moments, **options)


def test_a_moment_of_another_model_is_refused(moment):
    with pytest.raises(ValueError, match=r"S of shape \(2, 4, 16\); this model needs \[B, 12, 32\]"):
        interp.fit_jacobian_lens(dg.nn.transformer.abstract(dg.ModelConfig.tiny()), moment)


def test_a_tuned_lens_is_nearer_the_end_on_prompts_it_has_not_seen():
    """On the trained model, at every layer but the last, by a margin; 60 updates are enough for that."""
    nano = dg.load("nano").with_sampler(max_denoising_steps=8)
    seen = [e.prompt for e in tasks.examples(1, 200, ["copy", "sort", "form", "sequence", "refusal"])]
    new = [e.prompt for e in tasks.examples(2, 8, ["copy", "sort", "form", "sequence", "refusal"], split="test")]
    tuned = interp.fit_tuned_lens(nano, seen, updates=60, updates_a_run=6, batch=16, max_new_tokens=24)
    out = dg.generate(nano, new, record=dg.Record.nothing(), max_new_tokens=24)
    eye = identity_lens(nano, range(6))
    plain, trained = (interp.logit_lens(nano, out, steps=[0, 1], lens=lens).mean_kl() for lens in (eye, tuned))
    print("KL to the end by layer, plain:", plain.round(3).tolist(), "tuned:", trained.round(3).tolist())
    assert (trained[:-1] < 0.85 * plain[:-1]).all() and abs(trained[-1]) < 1e-6
