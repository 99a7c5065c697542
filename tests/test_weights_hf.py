"""Hugging Face checkpoints: names, exact round trips, and one message that says all that is wrong."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dgemma_jax import bundle as bundles
from dgemma_jax.config import ModelConfig, SamplerConfig, VisionConfig
from dgemma_jax.nn import transformer
from dgemma_jax.weights import finite, hf, hf_keys, publish, settings, tensor_file
from dgemma_jax.weights import tree as trees

CONFIG = ModelConfig.tiny()
DTYPES = [jnp.bfloat16, jnp.float32, jnp.float16]


@functools.cache
def random_model(dtype=jnp.float32, config=CONFIG, seed=1):
    """Every leaf different, norms and scalars too, so that a swapped name is seen."""
    model = transformer.abstract(config, dtype)
    rng = np.random.default_rng(seed)
    drawn = {p: jnp.asarray(rng.normal(size=x.shape), dtype) for p, x in trees.leaves(model).items()}
    return trees.replace(model, drawn)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    others = trees.leaves(other)
    for path, leaf in trees.leaves(one).items():
        assert leaf.dtype == others[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(others[path]).tobytes(), path


def bundle_of(model, config=CONFIG, **fields):
    return bundles.Bundle(config, model, **fields)


@pytest.fixture
def saved(tmp_path):
    bundles.save(bundle_of(random_model()), tmp_path / "m")
    return tmp_path / "m"


def rewrite(directory, change):
    """Apply `change` to the arrays of a single-file checkpoint."""
    arrays = load_file(directory / hf.SINGLE)
    change(arrays)
    save_file(arrays, directory / hf.SINGLE)


# --- names


def released_names():
    rows = json.loads((Path(__file__).parent / "data" / "hf_tensors.json").read_text())
    return {
        row["name"].replace("{L}", str(layer)): tuple(row["shape"]) for row in rows for layer in row.get("layers", [0])
    }


def test_full_size_model_has_exactly_the_names_and_shapes_of_the_release():
    names = released_names()
    text = {key: shape for key, shape in names.items() if not hf_keys.not_used_yet(key)}
    assert (len(names), len(text)) == (1047, 691)
    ours = {}
    for path, leaf in trees.leaves(transformer.abstract(ModelConfig())).items():
        key, layout = hf_keys.key_of(path)
        assert hf_keys.path_of(key) == path
        ours[key] = layout.stored_shape(leaf.shape)
    assert ours == text


@pytest.mark.parametrize("key", ["layers.0.mlp.gate_proj.weight", "model.decoder.layers.00.layer_scalar",
                                 "model.decoder.layers.{L}.layer_scalar", "model.decoder.layers.1.mlp.gate_proj.bias",
                                 "model.encoder.language_model.norm.weight"])  # fmt: skip
def test_other_names_have_no_place(key):
    assert hf_keys.path_of(key) is None


def test_smallest_tower_is_listed_as_vision():
    assert all(hf_keys.not_used_yet(key) for key in hf_keys.smallest_tower(32))


def test_each_stored_array_is_the_weight_that_its_name_says(saved):
    """The file, by hand: a round trip alone would not see two names exchanged."""
    stored, model = load_file(saved / hf.SINGLE), random_model()
    layer, full = model.layers[1], model.layers[2]
    by_hand = {
        "embed_tokens.weight": model.embedder.table,
        "norm.weight": model.final_norm.weight,
        "self_conditioning.pre_norm.weight": model.self_conditioning.pre_norm.weight,
        "self_conditioning.gate_proj.weight": model.self_conditioning.gate,
        "self_conditioning.up_proj.weight": model.self_conditioning.up,
        "layers.1.input_layernorm.weight": layer.input_norm.weight,
        "layers.1.post_attention_layernorm.weight": layer.post_attn_norm.weight,
        "layers.1.pre_feedforward_layernorm.weight": layer.pre_mlp_norm.weight,
        "layers.1.post_feedforward_layernorm_1.weight": layer.post_mlp_norm.weight,
        "layers.1.pre_feedforward_layernorm_2.weight": layer.pre_moe_norm.weight,
        "layers.1.post_feedforward_layernorm_2.weight": layer.post_moe_norm.weight,
        "layers.1.post_feedforward_layernorm.weight": layer.post_ffw_norm.weight,
        "layers.1.self_attn.q_norm.weight": layer.attention.q_norm.weight,
        "layers.1.self_attn.k_norm.weight": layer.attention.k_norm.weight,
        "layers.1.mlp.gate_proj.weight": layer.mlp.gate,
        "layers.1.mlp.up_proj.weight": layer.mlp.up,
        "layers.1.router.scale": layer.router.scale,
        "layers.1.experts.gate_up_proj": layer.experts.gate_up,
        "layers.1.layer_scalar": layer.denoise_scalar,
    }
    for name, param in by_hand.items():
        assert np.array_equal(stored["model.decoder." + name], param[...]), name
    assert stored["model.encoder.language_model.layers.1.layer_scalar"] == layer.prefill_scalar[...]
    heads = np.asarray(layer.attention.q[...])
    assert np.array_equal(stored["model.decoder.layers.1.self_attn.q_proj.weight"][8:16], heads[1])
    assert np.array_equal(stored["model.decoder.layers.1.self_attn.k_proj.weight"][8:16], layer.attention.k[1])
    assert np.array_equal(stored["model.decoder.layers.1.self_attn.v_proj.weight"][8:16], layer.attention.v[1])
    assert np.array_equal(stored["model.decoder.layers.2.self_attn.o_proj.weight"][:, 16:32], full.attention.o[:, 1])
    assert np.array_equal(stored["model.decoder.layers.2.experts.down_proj"][3], np.asarray(full.experts.down[3]).T)


def test_layouts_undo_themselves():
    for layout, shape in [
        (hf_keys.Layout.SAME, (3, 4)),
        (hf_keys.Layout.HEADS_FIRST, (2, 3, 4)),
        (hf_keys.Layout.HEADS_LAST, (2, 3, 4)),
        (hf_keys.Layout.SWAPPED, (2, 3, 4)),
    ]:
        array = np.arange(np.prod(shape)).reshape(shape)
        stored = layout.to_stored(array)
        assert stored.shape == layout.stored_shape(shape)
        assert np.array_equal(layout.from_stored(stored, shape), array)


# --- round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", [5e9, 20_000])
def test_load_after_save_is_bitwise_the_same(tmp_path, dtype, shard):
    model, sampler = random_model(dtype), SamplerConfig.google(entropy_bound=0.25, early_stop=False)
    bundles.save(bundle_of(model, sampler=sampler), tmp_path, max_shard_size=shard)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert (hf.INDEX in files) == (shard < 1e6) and (hf.SINGLE in files) != (shard < 1e6)
    loaded = bundles.load(tmp_path)
    assert_same(model, loaded.model)
    assert (loaded.config, loaded.sampler, loaded.tokenizer) == (CONFIG, sampler, None)


def test_the_loaded_object_has_the_structure_of_an_initialised_one(saved, tiny):
    model = bundles.load(saved).model
    assert type(model) is transformer.Transformer
    assert jax.tree.structure(model) == jax.tree.structure(tiny)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))


def test_safetensors_reads_what_is_written_and_the_shards_respect_the_limit(tmp_path):
    bundles.save(bundle_of(random_model()), tmp_path, max_shard_size=30_000)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "np") as stream:
            assert stream.metadata() == {"format": "pt"}
            arrays = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        assert len(arrays) == 1 or sum(a.nbytes for a in arrays.values()) <= 30_000
        assert all(index["weight_map"][key] == file.name for key in arrays)
        found |= arrays
    assert set(found) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values())
    entries = hf.find(tmp_path)
    assert all(np.array_equal(tensor_file.Reader()(entries[key]), found[key]) for key in found)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("float16"), jnp.float32])
def test_dtype_may_be_chosen_on_load_and_on_save(tmp_path, saved, dtype):
    model = random_model()
    cast = trees.replace(model, {p: x.astype(dtype) for p, x in trees.leaves(model).items()})
    assert_same(bundles.load(saved, dtype).model, cast)
    bundles.save(bundle_of(model), tmp_path / "cast", dtype=dtype)
    assert_same(bundles.load(tmp_path / "cast").model, cast)
    bundles.convert(saved, tmp_path / "converted", dtype=dtype)
    assert_same(bundles.load(tmp_path / "converted").model, cast)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp8", None.__class__])
def test_other_dtypes_are_refused_by_name(saved, dtype):
    with pytest.raises(ValueError, match=r"bfloat16, float16, float32, got"):
        bundles.load(saved, dtype)


def test_large_arrays_are_turned_and_cast_on_the_device_to_the_same_numbers(saved, monkeypatch):
    on_host = bundles.load(saved, "bfloat16")
    monkeypatch.setattr(hf, "_ON_HOST", 0)
    assert_same(on_host.model, bundles.load(saved, "bfloat16").model)
    assert_same(random_model(), bundles.load(saved).model)


def test_loaded_arrays_do_not_lie_in_the_file(saved):
    loaded = bundles.load(saved)
    with (saved / hf.SINGLE).open("r+b") as stream:
        stream.seek(-100_000, os.SEEK_END)
        stream.write(b"\xff" * 100_000)
    assert_same(random_model(), loaded.model)


def test_tokenizer_files_travel_byte_for_byte(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source = tmp_path / "t"
    source.mkdir()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    backend.save(str(source / "tokenizer.json"), pretty=True)
    (source / "tokenizer_config.json").write_text('{ "pad_token" : "<pad>" }\n')
    (source / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
    from dgemma_jax.text.tokenizer import Tokenizer

    for format in bundles.FORMATS:
        tokenizer = Tokenizer.from_directory(source)
        bundles.save(bundle_of(random_model(), tokenizer=tokenizer), tmp_path / format, format)
        for file in source.iterdir():
            assert (tmp_path / format / file.name).read_bytes() == file.read_bytes()
        assert bundles.load(tmp_path / format).tokenizer.encode("a") == [1]


# --- what is accepted beside the exact form


def test_without_encoder_scalars_the_decoders_are_used_and_it_is_said(saved):
    rewrite(saved, lambda a: [a.pop(key) for key in list(a) if "language_model" in key])
    with pytest.warns(UserWarning, match="no layer scalars of the causal pass"):
        loaded = bundles.load(saved)
    for layer in loaded.model.layers:
        assert layer.prefill_scalar[...] == layer.denoise_scalar[...]
    assert loaded.model.layers[1].denoise_scalar[...] == random_model().layers[1].denoise_scalar[...]


def test_some_encoder_scalars_are_too_few(saved):
    rewrite(saved, lambda a: a.pop("model.encoder.language_model.layers.1.layer_scalar"))
    with pytest.raises(ValueError, match=r"missing \(1\): model.encoder.language_model.layers.1.layer_scalar"):
        bundles.load(saved)


def test_repeated_tied_weights_are_ignored_if_equal_and_refused_if_not(saved):
    def repeat(arrays):
        arrays["lm_head.weight"] = arrays["model.decoder.embed_tokens.weight"]
        for name in ("norm.weight", "layers.0.self_attn.q_proj.weight"):
            arrays["model.encoder.language_model." + name] = arrays["model.decoder." + name]

    rewrite(saved, repeat)
    assert_same(random_model(), bundles.load(saved).model)
    rewrite(saved, lambda a: a.update({"lm_head.weight": a["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"tied, yet not equal \(1\): lm_head.weight and model.decoder.embed_tokens"):
        bundles.load(saved)


def test_mixed_storage_types_become_that_of_the_table_with_a_warning(saved):
    rewrite(saved, lambda a: a.update({"model.decoder.norm.weight": a["model.decoder.norm.weight"].astype("float16")}))
    with pytest.warns(UserWarning, match="stored as F32 and F16"):
        loaded = bundles.load(saved)
    assert {x.dtype for x in jax.tree.leaves(loaded.model)} == {jnp.dtype("float32")}
    bundles.load(saved, "float32")  # chosen, so not said


# --- what is wrong is said, all of it


def test_all_misfits_in_one_message(saved):
    def spoil(arrays):
        del arrays["model.decoder.norm.weight"], arrays["model.decoder.layers.2.router.scale"]
        arrays["model.decoder.layers.0.mlp.bias"] = np.zeros(3, np.float32)
        arrays["model.decoder.layers.1.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
        arrays["model.decoder.layers.0.layer_scalar"] = np.ones(1, np.int64)

    rewrite(saved, spoil)
    with pytest.raises(ValueError) as error:
        bundles.load(saved)
    message = str(error.value)
    assert str(saved) in message
    assert "missing (2): " in message and "model.decoder.norm.weight" in message
    assert "model.decoder.layers.2.router.scale" in message
    assert "unexpected (1): model.decoder.layers.0.mlp.bias" in message
    assert "model.decoder.layers.1.mlp.up_proj.weight: got [3, 5], needed [48, 32]" in message
    assert "model.decoder.layers.0.layer_scalar: I64" in message


@pytest.mark.parametrize("value, on_host", [(np.nan, 0), (np.inf, 1 << 20), (-np.inf, 1 << 20)])
def test_non_finite_weights_are_named(saved, monkeypatch, value, on_host):
    monkeypatch.setattr(hf, "_ON_HOST", on_host)

    def spoil(arrays):
        arrays["model.decoder.norm.weight"][7] = value
        arrays["model.decoder.layers.2.experts.down_proj"][5, 31, 15] = value

    rewrite(saved, spoil)
    for dtype in (None, "bfloat16", "float16"):
        with pytest.raises(ValueError, match=r"non-finite .*final_norm.weight, layers.2.experts.down;"):
            bundles.load(saved, dtype)
    spoilt = bundles.load(saved, check_finite=False)
    with pytest.raises(ValueError, match=r"non-finite weights in final_norm.weight, layers.2.experts.down$"):
        spoilt.check_finite()
    with pytest.raises(ValueError, match="not finite as float32"):
        bundles.save(spoilt, saved.parent / "again")
    bundles.save(spoilt, saved.parent / "again", check_finite=False)


@pytest.mark.parametrize("on_host", [0, 1 << 20])
def test_overflow_by_the_cast_is_non_finite_too(saved, monkeypatch, on_host):
    monkeypatch.setattr(hf, "_ON_HOST", on_host)
    rewrite(saved, lambda a: a["model.decoder.embed_tokens.weight"].__setitem__((95, 31), 1e5))
    assert bundles.load(saved).check_finite()
    with pytest.raises(ValueError, match=r"embedder.table"):
        bundles.load(saved, "float16")
    with pytest.raises(ValueError, match=r"embed_tokens.weight has values that are not finite as float16"):
        bundles.save(bundles.load(saved), saved.parent / "half", dtype="float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_looks_for_finite_numbers_agree_with_numpy(dtype):
    finfo = jnp.finfo(dtype)
    for value in (0.0, -0.0, finfo.max, finfo.min, finfo.tiny, finfo.smallest_subnormal, np.inf, -np.inf, np.nan):
        array = np.full((3, 5), 1, dtype)
        array[2, 4] = value
        for view in (array, array.T, array[2:, 4:], array[2, 4]):
            assert finite.on_host(np.asarray(view)) == np.isfinite(float(value)) == finite.on_device(view)


@pytest.mark.parametrize("value", [0.0, np.finfo(np.float64).max, np.inf, -np.inf, np.nan])
def test_the_look_on_the_host_takes_doubles(value):
    array = np.full((3, 5), 1.0)
    array[2, 4] = value
    assert finite.on_host(array) == np.isfinite(value)


def test_check_finite_looks_once_at_each_model(saved, monkeypatch):
    loaded = bundles.load(saved)
    looks = []
    real = bundles._all_finite
    monkeypatch.setattr(bundles, "_all_finite", lambda arrays: looks.append(1) or real(arrays))
    assert loaded.check_finite() is loaded
    loaded.with_sampler(t_max=0.9).check_finite()
    bundle_of(loaded.model).check_finite()
    assert len(looks) == 1
    loaded.with_model(jax.tree.map(lambda x: x + 0, loaded.model)).check_finite()
    assert len(looks) == 2


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files_are_an_error_that_names_the_file(saved, keep):
    content = (saved / hf.SINGLE).read_bytes()
    (saved / hf.SINGLE).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        bundles.load(saved)


def test_damaged_headers(saved):
    content = (saved / hf.SINGLE).read_bytes()
    start = content.index(b'"F32"')
    for bad, message in [
        (content[:8] + b"\x00" + content[9:], "damaged header"),
        (content[:start] + b'"F16"' + content[start + 5 :], "the file is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\xff" * 400, "no safetensors file"),
    ]:
        (saved / hf.SINGLE).write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            bundles.load(saved)


def test_missing_files(tmp_path, saved):
    bundles.save(bundle_of(random_model()), saved, max_shard_size=20_000)
    shards = sorted(saved.glob("*.safetensors"))
    lost = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of the {len(shards)} shards .*{shards[1].name}"):
        bundles.load(saved)
    shards[1].write_bytes(lost)
    index = json.loads((saved / hf.INDEX).read_text())
    key = next(k for k, name in index["weight_map"].items() if name == shards[0].name)
    for place, message in [(shards[1].name, "does not hold"), ("../x.safetensors", "outside of its directory")]:
        changed = index | {"weight_map": index["weight_map"] | {key: place}}
        (saved / hf.INDEX).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            bundles.load(saved)
    (saved / hf.INDEX).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        bundles.load(saved)
    (saved / hf.INDEX).unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*it holds config.json"):
        bundles.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json"):
        bundles.load(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config.json; it holds nothing"):
        bundles.load(tmp_path / "empty")


@pytest.mark.parametrize(
    "fields, scheme",
    [
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}, "nvfp4"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "modelopt NVFP4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx 4-bit"),
    ],
)
def test_quantised_configurations_are_refused_by_scheme(saved, fields, scheme):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=f"quantised weights .*{scheme}"):
        bundles.load(saved)


@pytest.mark.parametrize(
    "ending, scheme",
    [("weight_scale", "FP8"), ("weight_packed", "compressed-tensors"), ("weight_scale_2", "NVFP4"), ("scales", "mlx")],
)
def test_quantised_arrays_are_refused_by_scheme(saved, ending, scheme):
    key = f"model.decoder.layers.0.mlp.up_proj.{ending}"
    rewrite(saved, lambda a: a.update({key: np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=f"quantised weights .*{scheme}"):
        bundles.load(saved)


def test_an_edited_model_is_not_saved(tmp_path):
    model = {"embedder": {"table": jnp.ones(3)}, "layers": [{"edit": {"vector": jnp.ones(3)}}]}
    for format in bundles.FORMATS:
        with pytest.raises(ValueError, match=r"no place for layers.0.edit.vector"):
            bundles.save(bundle_of(model), tmp_path / "m", format)
    assert not (tmp_path / "m").exists()


# --- interrupted saves


class Broken:
    def save(self, directory):
        raise OSError("disk full")


@pytest.mark.parametrize("format", bundles.FORMATS)
def test_a_save_that_fails_leaves_the_old_checkpoint(saved, format):
    with pytest.raises(OSError, match="disk full"):
        bundles.save(bundle_of(random_model(seed=2), tokenizer=Broken()), saved, format)
    assert_same(random_model(), bundles.load(saved).model)
    assert not list(saved.glob(".partial*"))


@pytest.mark.parametrize("format", bundles.FORMATS)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_save_that_stops_between_two_moves_is_no_checkpoint(saved, monkeypatch, format, stop):
    real, moves = os.replace, []

    def replace(source, target):
        if Path(source).parent.name == ".partial":
            moves.append(target.name)
            if len(moves) == stop:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(publish.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        bundles.save(bundle_of(random_model(seed=2)), saved, format)
    assert "config.json" not in moves[:-1]
    with pytest.raises(ValueError, match=r"config\.json"):
        bundles.load(saved)


def test_a_save_replaces_the_old_checkpoint_in_every_form_and_keeps_other_files(saved):
    (saved / "README.md").write_text("mine")
    saves = [(2, "hf", {"max_shard_size": 20_000}), (3, "orbax", {}), (4, "hf", {}), (5, "orbax", {})]
    for seed, format, options in saves:
        bundles.save(bundle_of(random_model(seed=seed)), saved, format, **options)
        assert_same(random_model(seed=seed), bundles.load(saved).model)
    assert (saved / "README.md").read_text() == "mine"
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json", "generation_config.json", "weights"]


# --- settings


def test_configuration_as_transformers_saves_it():
    fields = CONFIG.to_hf()
    text = fields["text_config"]
    del text["global_head_dim"], text["num_global_key_value_heads"]
    text["per_layer_config"] = {"2": {"head_dim": 16, "num_key_value_heads": 1}}
    assert ModelConfig.from_hf(fields) == CONFIG
    text["per_layer_config"]["0"] = {"head_dim": 16}
    with pytest.raises(ValueError, match="per_layer_config"):
        ModelConfig.from_hf(fields)


def test_sampler_without_a_file_has_the_end_tokens_of_the_model(saved):
    (saved / settings.GENERATION).unlink()
    assert bundles.load(saved).sampler == SamplerConfig(eos_token_ids=CONFIG.eos_token_ids)


# --- parity with transformers


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this transformers has no DiffusionGemma")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_back(reference, directory, **options):
    model, report = reference.DiffusionGemmaForBlockDiffusion.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


@pytest.mark.parity
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", [5e9, 20_000])
def test_transformers_loads_it_whole_and_saves_it_back_the_same(tmp_path, reference, dtype, shard):
    ours = bundle_of(random_model(dtype), sampler=SamplerConfig(entropy_bound=0.3, confidence_threshold=1))
    bundles.save(ours, tmp_path / "ours", max_shard_size=shard)
    model = read_back(reference, tmp_path / "ours", dtype="auto")
    assert str(model.dtype) == f"torch.{jnp.dtype(dtype).name}"
    assert model.generation_config.sampler_config.entropy_bound == 0.3
    assert model.generation_config.eos_token_id == list(ours.sampler.eos_token_ids)
    encoder, decoder = model.model.encoder.language_model.layers[1], model.model.decoder.layers[1]
    assert float(encoder.layer_scalar[0]) == float(ours.model.layers[1].prefill_scalar[0])
    assert float(decoder.layer_scalar[0]) == float(ours.model.layers[1].denoise_scalar[0])
    model.save_pretrained(tmp_path / "theirs")
    theirs = bundles.load(tmp_path / "theirs")
    assert_same(ours.model, theirs.model)
    assert (theirs.config, theirs.sampler) == (CONFIG, ours.sampler)


def vision_model(reference, directory):
    fields = CONFIG.to_hf("float32")
    fields["vision_config"] |= {"num_hidden_layers": 1, "hidden_size": 8, "head_dim": 8, "standardize": True}
    model = reference.DiffusionGemmaForBlockDiffusion(reference.DiffusionGemmaConfig.from_dict(fields))
    model.save_pretrained(directory)
    return model


@pytest.mark.parity
def test_the_image_tower_travels_with_a_checkpoint_that_has_one(tmp_path, reference):
    before = vision_model(reference, tmp_path / "a")
    loaded = bundles.load(tmp_path / "a")
    assert loaded.config.vision.fields["num_hidden_layers"] == 1
    bundles.save(loaded, tmp_path / "b", max_shard_size=10_000)
    after = read_back(reference, tmp_path / "b").state_dict()
    for key, value in before.state_dict().items():
        assert (after[key] == value).all(), key
    bundles.convert(tmp_path / "b", tmp_path / "c")
    assert bundles.load(tmp_path / "c").config == loaded.config
    bundles.save(bundles.load(tmp_path / "c"), tmp_path / "c")  # over itself
    read_back(reference, tmp_path / "c")


@pytest.mark.parity
def test_without_its_source_the_tower_is_left_out_and_it_is_said(tmp_path, reference):
    vision_model(reference, tmp_path / "a")
    loaded = dataclasses.replace(bundles.load(tmp_path / "a"), source=None)
    with pytest.warns(UserWarning, match="image tower .* left out"):
        bundles.save(loaded, tmp_path / "b")
    read_back(reference, tmp_path / "b")
    assert bundles.load(tmp_path / "b").config == dataclasses.replace(loaded.config, vision=None)


def test_vision_configuration_is_kept_as_it_is():
    raw = json.dumps({"model_type": "gemma4_vision", "num_hidden_layers": 27, "hidden_size": 1152})
    config = ModelConfig.tiny(vision=VisionConfig(raw=raw))
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert re.search("vision", config.to_hf()["text_config"]["use_bidirectional_attention"])
