"""Orbax: our own layout, and Google's tree mapped to the same model as the Hugging Face route."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_weights_hf import CONFIG, assert_same, bundle_of, random_model

from dgemma_jax import bundle as bundles
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.nn import transformer
from dgemma_jax.weights import google, orbax
from dgemma_jax.weights import tree as trees


@pytest.mark.parametrize("dtype", [
    jnp.bfloat16, *(pytest.param(d, marks=pytest.mark.heavy) for d in (jnp.float32, jnp.float16)),
])  # fmt: skip
def test_load_after_save_is_bitwise_the_same(tmp_path, dtype):
    model, sampler = random_model(dtype), SamplerConfig.gentle(commit="canvas")
    bundles.save(bundle_of(model, sampler=sampler), tmp_path, "orbax")
    loaded = bundles.load(tmp_path)
    assert_same(model, loaded.model)
    assert (loaded.config, loaded.sampler) == (CONFIG, sampler)
    cast = trees.replace(model, {p: x.astype("float16") for p, x in trees.leaves(model).items()})
    assert_same(cast, bundles.load(tmp_path, "float16").model)


def test_conversion_there_and_back(tmp_path):
    bundles.save(bundle_of(random_model()), tmp_path / "hf")
    bundles.convert(tmp_path / "hf", tmp_path / "orbax", format="orbax", dtype="bfloat16")
    bundles.convert(tmp_path / "orbax", tmp_path / "back")
    assert_same(bundles.load(tmp_path / "hf", "bfloat16").model, bundles.load(tmp_path / "back").model)


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of hf, orbax, got 'torch'"):
        bundles.save(bundle_of(random_model()), tmp_path, "torch")


# --- Google's tree, written out by hand from the released layout


def googles(model, bare=False):
    """The arrays of the model as Google's checkpoint nests them. `bare` leaves out `/w` where modules share a scope."""

    def box(x):
        return x if bare else {"w": x}

    def scale(norm):
        return {"scale": np.asarray(norm.weight[...])}

    def gated(mlp):
        gate, up = np.asarray(mlp.gate[...]), np.asarray(mlp.up[...])
        return {"gating_einsum": box(np.stack([gate, up])), "linear": box(np.asarray(mlp.down[...]).T)}

    tree = {
        "embedder": {"input_embedding": np.asarray(model.embedder.table[...])},
        "final_norm": scale(model.final_norm),
        "self_conditioner": {
            "pre_norm": scale(model.self_conditioning.pre_norm),
            "ffw": gated(model.self_conditioning),
        },
        "vision_encoder": {"entry": {"pos_emb": np.ones((3, 2, 4), np.float32)}},
    }
    tree["embedder"]["mm_input_projection"] = {"w": np.ones((4, 5), np.float32)}
    for i, layer in enumerate(model.layers):
        attention, experts, router = layer.attention, layer.experts, layer.router
        q, k, o = (np.asarray(getattr(attention, n)[...]) for n in "qko")
        attn = {
            "q_einsum": {"w": q.transpose(0, 2, 1)},
            "attn_vec_einsum": {"w": o.transpose(1, 2, 0)},
            "query_norm": scale(attention.q_norm),
            "key_norm": scale(attention.k_norm),
        }
        if attention.v is None:
            attn["k_einsum"] = {"w": k.transpose(0, 2, 1)}
        else:
            v = np.asarray(attention.v[...])
            attn["kv_einsum"] = {"w": np.stack([k.transpose(0, 2, 1), v.transpose(0, 2, 1)])}
        gate_up = np.asarray(experts.gate_up[...])
        count, width2, width = gate_up.shape
        tree[f"layer_{i}"] = {
            "attn": attn,
            "mlp": {
                "gating_einsum": box(gate_up.reshape(count, 2, width2 // 2, width)),
                "linear": box(np.asarray(experts.down[...])),
                "router_logits": {"w": np.asarray(router.proj[...]).T},
                "router_scale": np.asarray(router.scale[...]),
                "per_expert_scale": np.asarray(router.per_expert_scale[...]),
            },
            "mlp2": gated(layer.mlp),
            "pre_attention_norm": scale(layer.input_norm),
            "post_attention_norm": scale(layer.post_attn_norm),
            "pre_ffw_norm": scale(layer.pre_moe_norm),
            "post_ffw1_norm": scale(layer.post_moe_norm),
            "pre_ffw2_norm": scale(layer.pre_mlp_norm),
            "post_ffw2_norm": scale(layer.post_mlp_norm),
            "post_ffw_norm": scale(layer.post_ffw_norm),
            "skip_scale": np.asarray(layer.denoise_scalar[...]),
        }
    return tree


def one_scalar(model):
    """The model with the scalar of the denoising pass in both places: Google's tree has one."""
    values = trees.leaves(model)
    return trees.replace(
        model, {p: values[(*p[:-1], "denoise_scalar")] if p[-1] == "prefill_scalar" else x for p, x in values.items()}
    )


def write(directory, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), tree)


@pytest.mark.parametrize("bare, wrapped", [(True, None), (False, None), (False, "params"), (True, "flat")])
def test_googles_tree_gives_the_same_model_as_the_hugging_face_route(tmp_path, bare, wrapped):
    model = one_scalar(random_model(jnp.bfloat16))
    tree = googles(model, bare)
    if wrapped == "params":
        tree = {"params": tree}
    if wrapped == "flat":
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        tree = {"transformer/" + "/".join(k.key for k in path[:-1]): {} for path, _ in flat}
        for path, x in flat:
            tree["transformer/" + "/".join(k.key for k in path[:-1])][path[-1].key] = x
    write(tmp_path / "g", tree)
    bundles.save(bundle_of(model), tmp_path / "hf")
    assert_same(bundles.load(tmp_path / "hf").model, bundles.load(tmp_path / "g", config=CONFIG).model)
    assert_same(model, bundles.load(tmp_path / "g", config=CONFIG).model)
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "g")
    assert_same(bundles.load(tmp_path / "hf", "float32").model, bundles.load(tmp_path / "g", "float32").model)


def test_configuration_beside_the_tree_is_found(tmp_path):
    model = one_scalar(random_model())
    bundles.save(bundle_of(model), tmp_path)
    write(tmp_path / "params", googles(model))
    for directory in (tmp_path, tmp_path / "params"):
        assert orbax.root(directory) == tmp_path / "params"
        assert bundles.load(directory).config == CONFIG


def test_without_a_configuration_the_sizes_of_the_release_are_meant(tmp_path):
    write(tmp_path / "g", googles(random_model()))
    assert orbax.read_config(tmp_path / "g") == ModelConfig()
    with pytest.raises(ValueError) as error:
        bundles.load(tmp_path / "g")
    assert "embedder/input_embedding: got [96, 32], needed [262144, 2816]" in str(error.value)
    assert "give its sizes with `config=`" in str(error.value)


def test_all_misfits_in_one_message(tmp_path):
    tree = googles(random_model())
    del tree["layer_1"]["attn"]["kv_einsum"], tree["final_norm"]
    tree["layer_0"]["mlp2"]["bias"] = np.zeros(3)
    tree["layer_2"]["mlp"]["linear"]["w"] = np.zeros((6, 17, 32))
    write(tmp_path / "g", tree)
    with pytest.raises(ValueError) as error:
        bundles.load(tmp_path / "g", config=CONFIG)
    message = str(error.value)
    assert "missing (3): final_norm.weight; layers.1.attention.k; layers.1.attention.v" in message
    assert "unexpected (1): layer_0/mlp2/bias" in message
    assert "of the wrong shape (1): layer_2/mlp/linear: got [6, 17, 32], needed [6, 16, 32]" in message


def test_misfits_and_non_finite_values_of_our_own_layout(tmp_path):
    model = random_model()
    spoilt = trees.replace(model, trees.leaves(model) | {("final_norm", "weight"): jnp.full((32,), jnp.nan)})
    bundles.save(bundle_of(spoilt), tmp_path, "orbax")
    with pytest.raises(ValueError, match=r"non-finite values in final_norm.weight;"):
        bundles.load(tmp_path)
    assert bundles.load(tmp_path, check_finite=False)
    with pytest.raises(ValueError, match=r"missing .*layers.3"):
        bundles.load(tmp_path, config=dataclasses.replace(CONFIG, layer_types=(*CONFIG.layer_types, "full_attention")))


def test_every_array_of_the_full_tree_has_a_rule_and_makes_every_leaf():
    leaves = trees.leaves(transformer.abstract(ModelConfig()))
    per_layer = {"attn/attn_vec_einsum": (16, 256, 2816), "mlp/gating_einsum": (128, 2, 704, 2816)}
    for name, shape in per_layer.items():
        assert google.rule_of(f"layer_0/{name}").shape(leaves) == shape
    assert google.rule_of("layer_0/attn/kv_einsum").shape(leaves) == (2, 8, 2816, 256)
    assert google.rule_of("layer_5/attn/k_einsum").shape(leaves) == (2, 2816, 512)
    assert google.rule_of("self_conditioner/ffw/gating_einsum").shape(leaves) == (2, 2112, 2816)
    assert google.rule_of("layer_0/mlp/router_logits").shape(leaves) == (2816, 128)
    assert google.rule_of("layer_00/skip_scale") is None and google.rule_of("layer_0/attn/x") is None
