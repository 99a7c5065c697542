"""Form and layout of the experts: chosen for a device, changed on a copy, the same model in every one."""

import types

import jax
import numpy as np
import oracles
import pytest
from flax import nnx

import dgemma_jax as dg
from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import moe, placement, quantized, transformer
from dgemma_jax.nn.sites import Site

CONFIG = ModelConfig.tiny(layer_types=("full_attention",), num_experts=20, experts_per_token=3)


def device(platform, capability=None):
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


def test_table():
    hopper, tpu = device("gpu", "9.0"), device("tpu")
    assert placement.best_for([hopper]) == ("mosaic", "efd")
    assert placement.best_for([tpu]) == (None, "edf")
    for devices in ([device("gpu", "8.0")], [device("gpu", "10.0")], [device("cpu")], [hopper] * 2, [tpu] * 2):
        assert placement.best_for(devices) == (None, "efd")  # no kernel where it cannot run


def test_a_layout_is_the_same_model():
    model = oracles.build(CONFIG)
    other = placement.with_experts(model, "ragged", "edf")
    assert (model.moe, model.layers[0].experts.layout) == ("auto", "efd")  # left as it is
    assert other.layers[0].experts.gate_up.shape == (20, 32, 32)
    gate_up = np.asarray(model.layers[0].experts.gate_up[...])
    np.testing.assert_array_equal(other.layers[0].experts.gate_up[...], gate_up.swapaxes(1, 2))
    back = placement.with_experts(other, "auto", "efd")
    jax.tree.map(np.testing.assert_array_equal, back, model)  # structure and values
    canvas = np.arange(20, 20 + CONFIG.canvas_length)[None]
    logits = [dg.denoise(m, canvas, kv.empty(CONFIG, 1, 4, m.dtype)) for m in (model, other)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    abstract = placement.with_experts(transformer.abstract(CONFIG), layout="edf")
    assert jax.tree.structure(abstract) == jax.tree.structure(placement.with_experts(other, "auto"))
    assert [x.shape for x in jax.tree.leaves(abstract)] == [x.shape for x in jax.tree.leaves(other)]


@nnx.dataclass
class Open(Site):
    def __call__(self, x):
        return x


def test_an_edit_sees_the_experts_in_either_layout():
    experts = oracles.build(CONFIG).layers[0].experts
    x, weights = np.random.default_rng(1).standard_normal((1, 4, 32)), np.full((1, 4, 20), 0.05, np.float32)
    expected = experts(x.astype(np.float32), weights, "dense")
    experts.hidden, experts.layout = Open("expert_hidden"), "edf"
    experts.gate_up = nnx.Param(experts.gate_up[...].swapaxes(1, 2))
    np.testing.assert_allclose(experts(x.astype(np.float32), weights), expected, atol=1e-5)


def test_load_places_and_save_writes_the_format(organism, tmp_path, monkeypatch):
    plain = dg.load(organism)
    assert (plain.model.moe, plain.model.layers[0].experts.layout) == ("auto", "efd")
    assert dg.load(organism, experts="scan").model.moe == "scan"
    monkeypatch.setattr(placement, "best_for", lambda devices: (None, "edf"))
    turned = dg.load(organism)
    assert turned.model.layers[-1].experts.layout == "edf"
    jax.tree.map(np.testing.assert_array_equal, plain.model, turned.with_experts(layout="efd").model)
    packed = dg.load(organism, quantize="int8").model
    assert packed.layers[0].experts.layout == "efd" and quantized.packed_form(packed) == "int8"
    jax.tree.map(np.testing.assert_array_equal, packed, turned.quantized("int8").model)
    monkeypatch.undo()
    for format in ("hf", "orbax"):
        dg.save(turned, tmp_path / format, format)
        jax.tree.map(np.testing.assert_array_equal, plain.model, dg.load(tmp_path / format).model)


def test_clear_errors(organism):
    bundle = dg.load(organism)
    with pytest.raises(ValueError, match="experts must be one of auto, dense, .*, mosaic or None, got 'fast'"):
        dg.load(organism, experts="fast")
    with pytest.raises(ValueError, match="experts must be one of .*, got 'fast'"):
        bundle.with_experts("fast")
    with pytest.raises(ValueError, match="layout must be one of efd, edf or None, got 'dfe'"):
        bundle.with_experts(layout="dfe")
    with pytest.raises(ValueError, match="packed weights lie as 'efd' only, got layout 'edf'"):
        bundle.quantized("int8").with_experts(layout="edf")
    assert set(moe.LAYOUTS) == {"efd", "edf"}
