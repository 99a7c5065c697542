"""Configurations: what they accept, what they refuse and in which words, and how they travel."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dgemma_jax
from dgemma_jax.config import FULL, NO_VISION, SLIDING, ModelConfig, SamplerConfig, VisionConfig

PACKAGE = Path(dgemma_jax.__file__).parent


def draw(rng):
    """A random valid configuration that ends, as released ones do, with a full layer."""
    heads = int(rng.choice([2, 4, 8]))
    kinds = (*rng.choice([SLIDING, FULL], rng.integers(0, 7)), FULL)
    top = int(rng.integers(1, 5))
    return ModelConfig(
        vocab_size=int(rng.integers(10, 500)), embed_dim=int(rng.integers(1, 64)), hidden_dim=int(rng.integers(1, 64)),
        num_heads=heads, num_kv_heads=heads // 2, num_global_kv_heads=1, head_dim=2 * int(rng.integers(1, 9)),
        global_head_dim=2 * int(rng.integers(1, 9)), layer_types=tuple(map(str, kinds)),
        sliding_window=int(rng.integers(2, 50)), num_experts=int(rng.integers(top, 20)), experts_per_token=top,
        expert_dim=int(rng.integers(1, 64)), canvas_length=int(rng.integers(1, 64)),
        max_position_embeddings=int(rng.integers(100, 1000)), rope_theta=float(rng.integers(10, 1000)),
        rope_fraction=float(rng.choice([0.5, 1.0])), global_rope_theta=float(rng.integers(10, 1000)),
        global_rope_fraction=float(rng.choice([0.25, 0.5, 1.0])), global_rope_proportional=bool(rng.integers(2)),
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])), final_logit_softcap=float(rng.integers(1, 60)),
        pad_token_id=int(rng.integers(0, 9)), bos_token_id=int(rng.integers(0, 9)),
        eos_token_ids=tuple(map(int, rng.integers(0, 9, rng.integers(1, 4)))),
        vision=VisionConfig(raw=json.dumps({"num_hidden_layers": 27, "hidden_size": 8})) if rng.integers(2) else None,
    )  # fmt: skip


def test_defaults_are_the_release():
    config = ModelConfig()
    assert (config.num_layers, config.embed_dim, config.vocab_size) == (30, 2816, 262_144)
    assert [i for i in range(30) if not config.is_sliding(i)] == [5, 11, 17, 23, 29]
    assert [(config.kv_heads(i), config.head_size(i)) for i in (4, 5)] == [(8, 256), (2, 512)]
    assert config.num_parameters == 25_250_986_812
    sampler = SamplerConfig()
    assert (sampler.max_denoising_steps, sampler.entropy_bound, sampler.t_max, sampler.t_min) == (48, 0.1, 0.8, 0.4)
    assert (sampler.stability_threshold, sampler.confidence_threshold, sampler.early_stop) == (1, 0.005, True)
    assert (sampler.commit, sampler.stability) == ("argmax", "argmax")


def test_presets_say_what_they_change():
    plain, google, gentle = (
        dataclasses.asdict(s) for s in (SamplerConfig(), SamplerConfig.google(), SamplerConfig.gentle())
    )
    assert {k: v for k, v in google.items() if v != plain[k]} == {"commit": "canvas", "stability": "canvas"}
    assert {k: v for k, v in gentle.items() if v != plain[k]} == {
        "max_denoising_steps": 96, "t_max": 1.0, "t_min": 0.5, "entropy_bound": 0.02,
    }  # fmt: skip
    assert SamplerConfig.google(commit="argmax", t_max=0.9).t_max == 0.9
    assert SamplerConfig.gentle(max_denoising_steps=5).max_denoising_steps == 5
    tiny = ModelConfig.tiny(num_experts=9)
    assert tiny.num_experts == 9 and {SLIDING, FULL} == set(tiny.layer_types)
    assert all(isinstance(hash(c), int) for c in (tiny, SamplerConfig(), ModelConfig()))


def test_every_field_is_read_somewhere():
    """A setting that no code reads is a promise not kept. Files of formats alone do not count as reading."""
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("config.py", "settings.py"):
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    helpers = {"head_dim": "head_size", "global_head_dim": "head_size", "num_kv_heads": "kv_heads",
               "num_global_kv_heads": "kv_heads"}  # fmt: skip
    unread = {
        f.name
        for cls in (ModelConfig, SamplerConfig)
        for f in dataclasses.fields(cls)
        if f.name not in read and helpers.get(f.name) not in read
    }
    assert unread == {"bos_token_id"}  # the tokenizer brings its own; kept for the format


def test_from_hf_inverts_to_hf():
    rng = np.random.default_rng(0)
    for config in [ModelConfig(), ModelConfig.tiny(), *(draw(rng) for _ in range(50))]:
        fields = json.loads(json.dumps(config.to_hf()))
        assert ModelConfig.from_hf(fields) == config
    assert ModelConfig().to_hf("float32")["text_config"]["dtype"] == "float32"


def test_a_sparse_file_means_what_transformers_takes_it_for():
    fields = ModelConfig.tiny(layer_types=(SLIDING,) * 5 + (FULL,) + (SLIDING, FULL)).to_hf()
    text = fields["text_config"]
    for key in ("layer_types", "rope_parameters", "final_logit_softcapping", "rms_norm_eps", "global_head_dim"):
        del text[key]
    config = ModelConfig.from_hf(fields)
    assert config.layer_types == (SLIDING,) * 5 + (FULL, SLIDING, FULL)  # every sixth, and the last
    assert (config.rope_theta, config.global_rope_theta, config.global_rope_fraction) == (1e4, 1e6, 0.25)
    assert (config.final_logit_softcap, config.rms_norm_eps, config.global_head_dim) == (30.0, 1e-6, 512)
    assert config.vision is None and fields["vision_config"] == NO_VISION
    assert ModelConfig.from_hf(fields | {"eos_token_id": 7}).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=0), "vocab_size must be a positive integer, got 0"),
        (dict(embed_dim=2.5), "embed_dim must be a positive integer, got 2.5"),
        (dict(layer_types=()), "layer_types is empty: name one attention type for each layer"),
        (
            dict(layer_types=("full",)),
            r"layer_types has \['full'\]; each must be 'sliding_attention' or 'full_attention'",
        ),
        (dict(sliding_window=1), "sliding_window must be at least 2, got 1"),
        (dict(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4; choose a divisor"),
        (dict(num_global_kv_heads=8), "num_global_kv_heads=8 does not divide num_heads=4"),
        (dict(head_dim=7), r"head_dim must be even \(rotary pairs\), got 7"),
        (dict(experts_per_token=7), "experts_per_token=7 exceeds num_experts=6"),
        (dict(rope_fraction=0.0), r"rope_fraction must be in \(0, 1\], got 0.0"),
        (dict(global_rope_fraction=1.5), r"global_rope_fraction must be in \(0, 1\], got 1.5"),
        (dict(final_logit_softcap=0.0), "final_logit_softcap must be positive"),
        (dict(pad_token_id=96), "pad_token_id=96 is outside the vocabulary of 96"),
        (dict(bos_token_id=-1), "bos_token_id=-1 is outside"),
    ],
)
def test_a_wrong_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.tiny(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gemma3"), "has model_type 'gemma3'; this package reads 'diffusion_gemma' checkpoints only"),
        (dict(text_config=None), "config.json has no text_config object"),
        (dict(text=dict(hidden_size=None)), r"lacks \['hidden_size'\]; the class defaults are not the release"),
        (
            dict(text=dict(hidden_activation="relu")),
            "hidden_activation is 'relu'; only 'gelu_pytorch_tanh' is supported",
        ),
        (dict(text=dict(num_hidden_layers=2)), "layer_types has 3 entries, num_hidden_layers says 2"),
        (dict(text=dict(use_bidirectional_attention="all")), "is 'all'; only 'vision' or null is supported"),
        (dict(text=dict(rope_parameters={FULL: {"rope_type": "yarn"}})), "has a rope_type that is not supported"),
        (dict(text=dict(per_layer_config={"0": {"head_dim": 4}})), "per_layer_config .* is not supported"),
    ],
)
def test_a_wrong_file_is_refused(change, message):
    fields = ModelConfig.tiny().to_hf()
    fields["text_config"] = fields["text_config"] | change.pop("text", {})
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(fields | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_denoising_steps=0), "max_denoising_steps must be an integer >= 1, got 0"),
        (dict(max_denoising_steps=4.0), "max_denoising_steps must be an integer >= 1, got 4.0"),
        (dict(stability_threshold=-1), "stability_threshold must be an integer >= 0, got -1"),
        (dict(t_max=math.nan), "t_max must be a finite number, got nan"),
        (dict(entropy_bound="0.1"), "entropy_bound must be a finite number, got '0.1'"),
        (dict(entropy_bound=-0.1), "entropy_bound must be >= 0 nats, got -0.1"),
        (dict(t_min=-0.1), "t_min must be >= 0, got -0.1"),
        (dict(t_max=0.4), "t_max must exceed t_min, got t_max=0.4, t_min=0.4"),
        (dict(confidence_threshold=0), "confidence_threshold must be > 0, got 0"),
        (dict(commit="sample"), "commit must be 'argmax' or 'canvas', got 'sample'"),
        (dict(stability="both"), "stability must be 'argmax' or 'canvas', got 'both'"),
        (dict(entropy=0.1), r"unknown sampler option \['entropy'\]; known are \['commit', .*'t_min'\]"),
    ],
)
def test_a_wrong_sampler_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig().replace(**change)


def test_the_sampler_file_keeps_what_it_has_names_for():
    sampler = SamplerConfig(max_denoising_steps=9, entropy_bound=0.2, t_max=0.9, t_min=0.3, stability_threshold=2,
                            confidence_threshold=1, eos_token_ids=(4, 5), pad_token_id=3)  # fmt: skip
    written = json.loads(json.dumps(sampler.to_hf()))
    assert SamplerConfig.from_hf(written) == sampler
    assert type(written["confidence_threshold"]) is float  # `transformers` refuses an integer
    assert SamplerConfig.from_hf({}) == SamplerConfig()
    assert SamplerConfig.from_hf({}, ModelConfig.tiny()).eos_token_ids == (1, 5)
    assert SamplerConfig.from_hf({"eos_token_id": 8}, ModelConfig.tiny()).eos_token_ids == (8,)


def test_sampler_floats_are_data():
    """Only the real-valued settings are leaves: a sweep of them compiles once, also where an integer is given."""
    leaves = jax.tree.leaves(SamplerConfig(t_max=1, t_min=0, entropy_bound=0, confidence_threshold=3))
    assert leaves == [0.0, 1.0, 0.0, 3.0] and all(type(x) is float for x in leaves)

    @jax.jit
    @chex.assert_max_traces(n=2)
    def spread(sampler):
        return sampler.t_max - sampler.t_min + sampler.max_denoising_steps

    for settings in (dict(), dict(t_max=1), dict(t_min=0), dict(entropy_bound=5), dict(t_max=0.5, t_min=0.25)):
        sampler = SamplerConfig(**settings)
        np.testing.assert_allclose(spread(sampler), sampler.t_max - sampler.t_min + 48, rtol=1e-6)
    assert spread(SamplerConfig(max_denoising_steps=2)) == pytest.approx(2.4)  # a static one: the second trace


def test_a_sampler_survives_the_transforms():
    sampler = SamplerConfig(commit="canvas", eos_token_ids=(7,))
    out = jax.jit(lambda s: s)(sampler)
    assert isinstance(out, SamplerConfig) and (out.commit, out.eos_token_ids) == ("canvas", (7,))
    np.testing.assert_allclose([out.t_max, out.t_min, out.entropy_bound], [0.8, 0.4, 0.1], rtol=1e-6)
    assert jax.tree.structure(out) == jax.tree.structure(sampler)
    many = jax.tree.map(lambda x: jnp.asarray(np.array([x, 2 * x], np.float32)), sampler)
    np.testing.assert_allclose(jax.vmap(lambda s: s.t_max * s.max_denoising_steps)(many), [38.4, 76.8], rtol=1e-6)
    assert sampler.replace(t_max=0.9).t_max == 0.9 and sampler.t_max == 0.8
