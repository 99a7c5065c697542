"""Programs that were traced ahead give what `generate` gives, never trace the model, and refuse what they do not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracles
import pytest

import dgemma_jax as dg
from dgemma_jax import exported
from dgemma_jax.config import FULL, SLIDING
from dgemma_jax.nn import sites, transformer

pytest.importorskip("flatbuffers", reason="programs are written with flatbuffers, a dependency of this package")

CONFIG = dg.ModelConfig.tiny(layer_types=(SLIDING, FULL), sliding_window=6, canvas_length=8)
SAMPLER = dg.SamplerConfig(max_denoising_steps=3, eos_token_ids=())
PROMPTS = [[*range(5, 30)], [7, 8]]  # two chunks of a prompt and one block for the rest of it
SIZES = dict(batch=2, context=48, chunk=12)


@pytest.fixture(scope="module")
def bundle():
    return dg.Bundle(CONFIG, oracles.build(CONFIG, seed=1), sampler=SAMPLER)


@pytest.fixture(scope="module")
def directory(bundle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    made = dg.export(bundle, directory, platforms=exported.PLATFORMS, record=dg.Record(top_k=2, soft=True), **SIZES)
    assert made.manifest == dg.load_exported(directory).manifest
    return directory


@pytest.mark.heavy
def test_the_same_generation_without_tracing_the_model(bundle, directory, monkeypatch):
    expected = dg.generate(bundle, PROMPTS, [3, 4], max_new_tokens=16, record=dg.Record(top_k=2, soft=True))
    for entry in ("prefill", "denoise"):
        monkeypatch.setattr(transformer.Transformer, entry, lambda *_: pytest.fail("the model was traced"))
    drafts = []
    programs = dg.load_exported(directory)
    out = programs.generate(bundle, PROMPTS, [3, 4], max_new_tokens=16, callback=drafts.append)
    assert len(drafts) == 2 * SAMPLER.max_denoising_steps
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.num_steps.tolist() == expected.num_steps.tolist() and out.stop_reason == expected.stop_reason
    for name in ("tokens", "accepted", "top_ids", "valid", "committed", "stop"):
        np.testing.assert_array_equal(getattr(out.trajectory, name), getattr(expected.trajectory, name), err_msg=name)
    for name in ("entropy", "soft", "temperature", "top_probs"):
        np.testing.assert_allclose(
            getattr(out.trajectory, name), getattr(expected.trajectory, name), atol=1e-4, err_msg=name
        )
    warmer = programs.generate(bundle, PROMPTS, [3, 4], SAMPLER.replace(t_max=3.0), max_new_tokens=8)
    assert (warmer.trajectory.temperature[0, 0] == 3.0).all()  # temperatures are data


def test_what_does_not_fit_is_named(bundle, directory):
    programs = dg.load_exported(directory)
    wide = dg.ModelConfig.tiny(layer_types=(SLIDING, FULL), sliding_window=6, canvas_length=8, expert_dim=8)
    other = bundle.with_model(oracles.build(wide))
    half = bundle.with_model(oracles.build(CONFIG, dtype="bfloat16"))
    cases = [
        (bundle, PROMPTS[:1], {}, "exported for 2 prompts a call, got 1"),
        (bundle, PROMPTS, dict(max_new_tokens=24), "25 tokens and 3 blocks of 8 exceed the exported context of 48"),
        (bundle, PROMPTS, dict(sampler=SAMPLER.replace(max_denoising_steps=4)), "max_denoising_steps=3, got 4"),
        (bundle, PROMPTS, dict(sampler=SAMPLER.replace(early_stop=False)), "early_stop=True, got False"),
        (other, PROMPTS, {}, "expert_dim 16, this one has 8"),
        (half, PROMPTS, {}, r"float32\[.*this one has bfloat16"),
    ]
    for given, prompts, options, message in cases:
        with pytest.raises(ValueError, match=message):
            programs.generate(given, prompts, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=0), "has format 0, this version reads 1"),
        (dict(platforms=["tpu"]), "exported for tpu; this process runs on cpu"),
    ],
)
def test_other_versions_and_platforms_are_refused(directory, tmp_path, change, message):
    copy = shutil.copytree(directory, tmp_path / "copy")
    manifest = json.loads((copy / exported.MANIFEST).read_text())
    (copy / exported.MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=message):
        dg.load_exported(copy)


def test_damaged_directories_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="holds no manifest.json"):
        dg.load_exported(tmp_path)
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "append.jax").write_bytes(b"0123456789" * 10)
    with pytest.raises(ValueError, match=r"append.jax cannot be read by jax .*export it again"):
        dg.load_exported(copy)
    (copy / exported.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        dg.load_exported(copy)


def test_mistakes_in_what_is_exported(bundle, tmp_path):
    class Loud(sites.Site):
        pass

    model = transformer.abstract(CONFIG)
    model.layers[0].resid_post = Loud("resid_post")
    cases = [
        (model, {}, r"edits in place \(Loud\)"),
        (bundle, dict(context=8), "context=8 must hold a canvas of 8 and a prompt"),
        (bundle, dict(context=513), "at most 512"),
        (bundle, dict(batch=0), "batch must be an integer >= 1"),
        (bundle, dict(platforms=("metal",)), r"unknown platform \['metal'\]"),
        (bundle, dict(record=dg.Record(fn=lambda view: view.canvas)), "record.fn is a Python function"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            dg.export(given, tmp_path / "never", **{"context": 48, **options})
    assert not (tmp_path / "never").exists()
