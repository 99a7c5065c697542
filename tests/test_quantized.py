"""Weights in few bits: the products are those of the unpacked weights, and files give back what was saved."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import dgemma_jax as dg
import interp
from dgemma_jax import memory
from dgemma_jax.cli import common
from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import quantized, transformer
from dgemma_jax.nn.packed import FORMS, contract, group_size, pack


def unpacked(model):
    """The model with the numbers that its packed weights stand for, as plain parameters."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for path in quantized.paths(model):
        owner, weight = copy, model
        for key in path[:-1]:
            owner = owner[key] if isinstance(key, int) else getattr(owner, key)
        for key in path:
            weight = weight[key] if isinstance(key, int) else getattr(weight, key)
        setattr(owner, path[-1], nnx.Param(weight[...]))
    return copy


@jax.jit
def forward(model):
    tokens = jnp.arange(1, 13)[None] % model.config.vocab_size
    cache = kv.empty(model.config, 1, 24, model.dtype)
    cache = model.prefill(tokens, jnp.ones(tokens.shape, bool), cache).cache
    canvas = tokens[:, : model.config.canvas_length]
    soft = 0.1 * jnp.ones((1, canvas.shape[1], model.config.embed_dim))
    logits = model.unembed(model.denoise(canvas, cache, soft))
    return logits, model.soft_embed(jax.nn.softmax(logits, -1))


@pytest.mark.parametrize("form", FORMS)
def test_values_are_within_half_a_unit(form):
    weight = jax.random.normal(jax.random.key(0), (6, 40, 256)) * jnp.linspace(0, 3, 40)[:, None]
    packed = pack(weight, form, (2,))
    error = jnp.abs(packed[...] - weight)
    if form == "int4":
        peak = jnp.abs(weight).reshape(6, 40, 2, 128).max(-1)
        assert (error.reshape(6, 40, 2, 128) <= 0.5001 / 7 * peak[..., None]).all()
    else:
        peak = jnp.abs(weight).max(2, keepdims=True)
        unit = peak / 127 if form == "int8" else jnp.maximum(jnp.abs(weight) / 8, peak / 448 / 256)  # three bits
        assert (error <= 0.5001 * unit).all()
    assert error.max() > 1e-4
    np.testing.assert_array_equal(packed[jnp.array([3, 0])], packed[...][jnp.array([3, 0])])
    assert packed.shape == weight.shape and packed.dtype == weight.dtype


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule, shared", [("btd,nhd->btnh", (2,)), ("btnh,dnh->btd", (1, 2)), ("tef,efd->td", (2,))])
def test_products_are_those_of_the_unpacked_weight(rule, shared, form):
    left, right = rule.split("->")[0].split(",")
    sizes = dict(b=2, t=3, n=4, h=256, d=256, e=5, f=6)  # two groups of int4
    x, w = (jax.random.normal(jax.random.key(i), [sizes[c] for c in s]) for i, s in enumerate((left, right)))
    packed = pack(w, form, shared)
    np.testing.assert_allclose(contract(rule, x, packed), jnp.einsum(rule, x, packed[...]), atol=2e-4)
    assert packed.grouped == (form == "int4")
    assert (contract(rule, x, nnx.Param(w)) == jnp.einsum(rule, x, w)).all()
    assert contract(rule, x.astype(jnp.bfloat16), pack(w, form, shared, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("form, moe", [
    pytest.param("int8", "dense", marks=pytest.mark.heavy), ("int4", "scan"), pytest.param("fp8", "blocks", marks=pytest.mark.heavy),
    pytest.param("int8", "capacity", marks=pytest.mark.heavy),
])  # fmt: skip
def test_a_packed_model_is_the_model_of_its_numbers(form, moe):
    """Whichever way the experts run; the plain model runs them all."""
    plain = oracles.build(ModelConfig.tiny(layer_types=("sliding_attention", "full_attention")))
    model = quantized.quantized(plain, form)
    assert quantized.packed_form(model) == form and quantized.packed_form(plain) is None
    other = unpacked(model)
    model.moe, other.moe = moe, "dense"
    chex.assert_trees_all_close(forward(model), forward(other), atol=5e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_a_release_needs():
    config = ModelConfig()
    sizes = {form: memory.weight_bytes(config, form) / 1e9 for form in FORMS}
    assert 25.2 < sizes["int8"] < 25.4 and 25.2 < sizes["fp8"] < 25.4 and 13 < sizes["int4"] < 14
    assert tuple(FORMS) == common.FORMS
    model = quantized.quantized(transformer.abstract(config), "int4")
    assert quantized.nbytes(model) / 1e9 == sizes["int4"]
    assert model.embedder.table.values.dtype == jnp.int8 and model.layers[5].experts.down.values.dtype == jnp.int4
    assert model.layers[0].router.proj.dtype == model.dtype == jnp.bfloat16
    assert [group_size(n) for n in (2816, 704, 48, 7)] == [128, 64, 16, 1]


@pytest.mark.parametrize("form", FORMS)
def test_files_give_back_what_was_saved(organism, tmp_path, form):
    plain = dg.load(organism)
    loaded = dg.load(organism, quantize=form)
    chex.assert_trees_all_equal(loaded.model, plain.quantized(form).model)
    dg.save(loaded, tmp_path / "packed", format="orbax")
    back = dg.load(tmp_path / "packed")
    chex.assert_trees_all_equal(back.model, loaded.model)
    assert back.model.dtype == loaded.model.dtype and back.sampler == loaded.sampler
    assert json.loads((tmp_path / "packed" / "dgemma_packed.json").read_text()) == {"form": form, "dtype": "float32"}


def test_clear_errors(organism, tmp_path):
    with pytest.raises(ValueError, match="quantize must be one of int8, int4, fp8 or None, got 'int3'"):
        dg.load(organism, quantize="int3")
    bundle = dg.load(organism, quantize="int8")
    with pytest.raises(ValueError, match="in int8 already and cannot be packed again"):
        bundle.quantized("int4")
    with pytest.raises(ValueError, match="use format='orbax'"):
        dg.save(bundle, tmp_path / "x")
    dg.save(bundle, tmp_path / "packed", format="orbax")
    with pytest.raises(ValueError, match="holds weights in int8"):
        dg.load(tmp_path / "packed", quantize="int4")
    with pytest.raises(ValueError, match="format 'orbax' only"):
        dg.bundle.convert(organism, tmp_path / "y", quantize="int8")


@pytest.mark.heavy
def test_edits_and_captures_take_it(organism):
    """A packed model goes wherever the model goes."""
    bundle = dg.load(organism, quantize="int8").with_sampler(max_denoising_steps=2)
    options = dict(seed=3, max_new_tokens=bundle.config.canvas_length)
    site = "layers.0.resid_post"
    once, twice = (
        interp.capture(interp.edit(bundle, site, interp.Scale(by)), "sort 3 1 2", site, steps=[0], **options)[site]
        for by in (1.0, 2.0)
    )
    assert once.shape[-1] == bundle.config.embed_dim and np.abs(once).max() > 0.1
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-5)
    assert len(interp.sites(bundle).names) == len(interp.sites(dg.load(organism)).names)


@pytest.mark.slow
def test_an_edit_that_does_nothing_changes_no_token(organism):
    bundle = dg.load(organism, quantize="int8")
    edited = interp.edit(bundle, "layers.0.resid_post", interp.Scale(1.0))
    found, plain = (dg.generate(one, "sort 3 1 2", seed=3).tokens for one in (edited, bundle))
    np.testing.assert_array_equal(found, plain)
