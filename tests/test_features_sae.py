"""Autoencoders: they find a planted dictionary and nothing in shuffled data; SAELens' files; transcoders; noise bins."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import interp
from interp.features import sae as saes
from interp.features import sae_lens_files, sae_training

D, TRUE, F, N = 16, 24, 32, 4096
TRAINING = dict(k=3, updates=1200, batch=256, rate=4e-3, seed=1, sparsity=0.07)


@pytest.fixture(scope="module")
def planted():
    """[N, D] sums of two of `TRUE` directions, [TRUE, D] these directions, and the same data without its sums."""
    rng = np.random.default_rng(0)
    true = rng.standard_normal((TRUE, D))
    true /= np.linalg.norm(true, axis=-1, keepdims=True)
    use = rng.random((N, TRUE)).argsort(-1) < 2
    x = (use * rng.uniform(1, 2, (N, TRUE))) @ true
    shuffled = np.stack([rng.permutation(column) for column in x.T], -1)
    return x.astype(np.float32), true, shuffled.astype(np.float32)


@pytest.fixture(scope="module")
def trained(planted):
    return {kind: interp.train_sae(planted[0], F, kind=kind, **TRAINING) for kind in saes.KINDS}


@pytest.mark.parametrize("kind", saes.KINDS)
@pytest.mark.slow
def test_a_planted_dictionary_is_found(planted, trained, kind):
    x, true, _ = planted
    found = trained[kind]
    z = np.asarray(found.sae.encode(x))
    print(found, saes.max_cosine(found.sae.w_dec, true), (z > 0).sum(1).mean())
    assert saes.max_cosine(found.sae.w_dec, true) >= 0.95
    assert interp.explained_variance(found.sae, x) >= 0.9
    assert 1 <= (z > 0).sum(1).mean() <= 5 and found.dead <= 0.5
    np.testing.assert_allclose(np.linalg.norm(found.sae.w_dec, axis=-1), 1, atol=1e-4)


@pytest.mark.slow
def test_in_shuffled_data_it_is_near_chance(planted, trained):
    _, true, shuffled = planted
    programs = sae_training._updates._cache_size()
    null = interp.train_sae(shuffled, F, kind="topk", **TRAINING)
    assert sae_training._updates._cache_size() == programs  # the same program
    rng = np.random.default_rng(3)
    chance = np.mean([saes.max_cosine(rng.standard_normal((F, D)), true) for _ in range(20)])
    assert saes.max_cosine(null.sae.w_dec, true) <= chance + 0.15 < 0.8


@pytest.mark.slow
def test_units_do_not_matter(planted, trained):
    """Ten times the input: ten times the features, the same directions."""
    wide = interp.train_sae(10 * planted[0], F, kind="topk", **TRAINING).sae
    np.testing.assert_allclose(wide.w_dec, trained["topk"].sae.w_dec, atol=2e-2)
    np.testing.assert_allclose(wide.encode(10 * planted[0][:9]), 10 * trained["topk"].sae.encode(planted[0][:9]), atol=0.5)


def test_what_is_kept():
    before = jnp.asarray([[3.0, 1, 2, -1], [5, 4, -2, -3]])
    np.testing.assert_array_equal(saes.top(before, 2), [[3, 0, 2, 0], [5, 4, 0, 0]])
    np.testing.assert_array_equal(saes.top(before, 4), [[3, 1, 2, 0], [5, 4, 0, 0]])
    np.testing.assert_array_equal(saes.batch_top(before, 1), [[0, 0, 0, 0], [5, 4, 0, 0]])
    threshold = jnp.asarray([1.0, 1, 2.01, -1])
    np.testing.assert_array_equal(saes.jump(before, threshold), [[3, 0, 0, 0], [5, 4, 0, 0]])
    np.testing.assert_array_equal(saes.count(before, threshold), [1, 2])
    grad = jax.grad(lambda t: saes.count(before, t).sum())(threshold)
    np.testing.assert_allclose(grad, [0, -1 / saes.BANDWIDTH, -1 / saes.BANDWIDTH, -1 / saes.BANDWIDTH])
    grad = jax.grad(lambda b: saes.jump(b, threshold).sum())(before)
    np.testing.assert_array_equal(grad, [[1, 0, 0, 0], [1, 1, 0, 0]])


def test_a_transcoder_reads_one_site_and_writes_another(planted):
    x, true, _ = planted
    rng = np.random.default_rng(5)
    y = np.maximum(x @ true.T - 0.8, 0) @ rng.standard_normal((TRUE, 8)) + 2
    settings = TRAINING | dict(kind="batchtopk", updates=600)
    found = interp.train_sae(x, F, target=y.astype(np.float32), **settings).sae
    null = interp.train_sae(x, F, target=rng.permutation(y).astype(np.float32), **settings).sae
    assert not found.centred and found.w_dec.shape == (F, 8)
    assert interp.explained_variance(found, x, y) >= 0.8 and interp.explained_variance(null, x, y) <= 0.2
    assert repr(found).startswith("jumprelu transcoder, 16 to 32 features to 8, k 3")


def test_conditioned_on_noise(trained):
    """A bias for each bin of the noise level; taken at one level it is the plain form."""
    plain = trained["topk"].sae
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((6, D)), jnp.float32)
    neutral = dataclasses.replace(plain, shift=jnp.zeros((2, F)), edges=jnp.asarray([0.5]))
    np.testing.assert_array_equal(neutral.encode(x, 0.3), plain.encode(x))
    shifted = dataclasses.replace(neutral, shift=jnp.asarray(rng.standard_normal((2, F)), jnp.float32))
    levels = jnp.asarray([0.1, 0.49, 0.5, 0.9, 1.0, 0.0])
    by_hand = [shifted.at_level(float(level)).encode(row) for row, level in zip(x, levels, strict=True)]
    np.testing.assert_allclose(shifted.encode(x, levels), by_hand, atol=1e-6)
    assert float(jnp.abs(shifted.encode(x, 0.1) - shifted.encode(x, 0.9)).max()) > 0.1
    with pytest.raises(ValueError, match="conditioned on the noise level: give it"):
        shifted.encode(x)


@pytest.mark.heavy
def test_what_differs_by_the_noise_is_learned_as_a_bias():
    rng = np.random.default_rng(7)
    noise = rng.integers(2, size=512).astype(np.float32)
    data = rng.standard_normal((512, D)).astype(np.float32)
    found = interp.train_sae(data, F, k=3, noise=noise, edges=[0.5], updates=50, batch=256, seed=1).sae
    assert found.shift.shape == (2, F) and float(jnp.abs(found.shift).max()) > 0
    np.testing.assert_array_equal(found.edges, [0.5])


@pytest.mark.parametrize("kind", saes.KINDS)
def test_files_of_saelens(tmp_path, planted, trained, kind):
    """The formulas of SAELens on the tensors of the file give what we give, and reading gives it back."""
    sae, x = trained[kind].sae, planted[0][:50]
    interp.save_sae(sae, tmp_path, model="nano", site="layers.3.resid_post")
    config, t = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert config["architecture"] == ("topk" if kind == "topk" else "jumprelu")
    assert (config["d_in"], config["d_sae"]) == (D, F) == t["W_enc"].shape and t["W_dec"].shape == (F, D)
    assert config["metadata"]["hook_name"] == "layers.3.resid_post" and config["apply_b_dec_to_input"] is True
    before = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if kind == "topk":
        order = np.argsort(-before, -1)[:, : config["k"]]
        z = np.zeros_like(before)
        np.put_along_axis(z, order, np.maximum(np.take_along_axis(before, order, -1), 0), -1)
    else:
        z = np.maximum(before, 0) * (before > t["threshold"])
    np.testing.assert_allclose(z @ t["W_dec"] + t["b_dec"], sae(x), atol=1e-4)
    again = interp.load_sae(tmp_path)
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(sae), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (again.kind, again.k, again.centred) == (sae.kind, sae.k, sae.centred)


def test_files_of_saelens_that_differ(tmp_path, planted, trained):
    """Features in units of the decoder's norm are read as the same function; what has no counterpart is refused."""
    sae, x = trained["topk"].sae, planted[0][:50]
    interp.save_sae(sae, tmp_path)
    path, weights = tmp_path / "cfg.json", tmp_path / "sae_weights.safetensors"
    config, t = json.loads(path.read_text()), load_file(weights)
    norm = np.linspace(0.5, 2, F, dtype=np.float32)
    save_file(t | {"W_dec": t["W_dec"] * norm[:, None], "W_enc": t["W_enc"] / norm, "b_enc": t["b_enc"] / norm}, weights)
    path.write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    np.testing.assert_allclose(interp.load_sae(tmp_path)(x), sae(x), atol=1e-4)
    for change, message in (
        ({"architecture": "gated"}, "holds the architecture 'gated'; those read are standard, topk"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'; fold it"),
        ({"d_sae": 7}, r"has \(16, 32\) as W_enc; cfg.json says \(16, 7\)"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            interp.load_sae(tmp_path)
    with pytest.raises(ValueError, match="has no cfg.json"):
        interp.load_sae(tmp_path / "none")
    with pytest.raises(ValueError, match="no place for a bias by noise level"):
        interp.save_sae(dataclasses.replace(sae, shift=jnp.zeros((2, F)), edges=jnp.asarray([0.5])), tmp_path)
    with pytest.raises(ValueError, match="no TopK transcoder"):
        interp.save_sae(dataclasses.replace(sae, centred=False), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="relu"), "kind must be one of topk, jumprelu, batchtopk, got 'relu'"),
        (dict(k=0), "k must be in 1..32, the number of features; got 0"),
        (dict(edges=[0.5]), r"edges are given, so noise must be \[4096\]; got \(\)"),
        (dict(target=np.zeros((3, 2))), r"needed are \[n, D\] and a target \[n, O\]"),
    ],
)
def test_bad_input(planted, options, message):
    with pytest.raises(ValueError, match=message):
        interp.train_sae(planted[0], F, **options)


def test_module_of_files_is_not_a_function():
    assert sae_lens_files.save_sae is interp.save_sae
