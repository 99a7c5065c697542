"""Capture: a captured run is the run, loop and single steps agree, and parts make the whole."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import loop
from dgemma_jax.nn import transformer
from interp import captures
from interp.captures import _fit
from interp.taps import tapped

C, D, STEPS = 6, 16, 4
PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
SITES = ["layers.*.resid_post", "soft_embed", "canvas", "layers.1.attn_pattern"]


@pytest.fixture(scope="module")
def model():
    kinds = ("sliding_attention", "full_attention")
    sizes = dict(layer_types=kinds, canvas_length=C, embed_dim=D, vocab_size=32, hidden_dim=16, sliding_window=4)
    return oracles.build(dg.ModelConfig.tiny(**sizes))


@pytest.fixture(scope="module")
def plain(model):
    """The run without captures."""
    quiet = dg.Record.nothing()
    return dg.generate(model, PROMPTS, seed=[3, 4, 5], sampler=SAMPLER, max_new_tokens=C, record=quiet)


@pytest.fixture(scope="module")
def acts(model):
    return interp.capture(model, PROMPTS, SITES, seed=[3, 4, 5], sampler=SAMPLER)


def test_a_captured_run_is_the_run(plain, acts):
    """The same tokens; and what single steps see, each taken from a moment of the run without captures."""
    np.testing.assert_array_equal(acts.tokens, plain.tokens)
    assert acts["layers.0.resid_post"].shape == (STEPS, 3, C, D) and acts["canvas"].shape == (STEPS, 3, C)
    assert acts.steps == tuple(range(STEPS)) and acts.valid.all() and acts.seeds == (3, 4, 5)
    np.testing.assert_allclose(acts["layers.1.attn_pattern"].sum(-1), 1, atol=1e-5)
    assert plain.trajectory.sites is None


def test_a_model_is_traced_for_its_size_once(model, monkeypatch):
    traced, step = [], captures.denoise_step
    monkeypatch.setattr(captures, "denoise_step", lambda *args: traced.append(1) or step(*args))
    one, other = (
        interp.capture_size(model, PROMPTS, "layers.*.mlp_out", sampler=SAMPLER, positions=chosen)
        for chosen in ([1, 2, 3], [0, 2, 5])
    )
    assert one.by_site == other.by_site and len(traced) == 1


def test_the_loop_captures_what_single_steps_do(model, plain, acts):
    for step in range(STEPS):
        moment = plain.trajectory.moment(0, step)
        if step > 0:
            np.testing.assert_array_equal(acts["canvas"][step - 1], moment.canvas)
            np.testing.assert_allclose(acts["soft_embed"][step - 1], moment.soft, atol=1e-5)
        single = interp.capture_step(model, moment, SITES)
        assert set(single) == set(acts)
        for name, value in single.items():
            np.testing.assert_allclose(value, acts[name][step], atol=1e-5, err_msg=f"{name} {step}")


@pytest.mark.heavy
def test_what_does_not_fit_is_captured_in_parts(model, acts):
    size = interp.capture_size(model, PROMPTS, SITES, sampler=SAMPLER)
    assert size.total == sum(acts[name].nbytes for name in acts) and size.runs == 1
    assert size.by_site["layers.0.resid_post"] == C * D * 4
    one = sum(size.by_site.values())
    limit = 4 * one  # three steps of one row
    assert _fit(size.by_site, STEPS, 3, 1, limit).runs == 6
    programs = loop._while._cache_size()
    parts = interp.capture(model, PROMPTS, SITES, seed=[3, 4, 5], sampler=SAMPLER, memory_limit=limit)
    assert loop._while._cache_size() == programs + 1  # other steps share the program
    np.testing.assert_array_equal(parts.tokens, acts.tokens)
    for name in acts:
        assert parts[name].shape == acts[name].shape
        np.testing.assert_allclose(parts[name], acts[name], atol=2e-3, rtol=1e-3, err_msg=name)
    with pytest.raises(ValueError, match=r"one step of one row takes .* choose fewer sites"):
        interp.capture(model, PROMPTS, SITES, sampler=SAMPLER, memory_limit=one)


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 4), (7, 48), (64, 5)])
def test_parts_fit_and_are_few(rows, steps):
    for limit in (2_000, 5_000, 30_000, 10**6):
        size = _fit({"a": 600, "b": 400}, steps, rows, 1, limit)
        assert size.device <= limit and 1 <= size.rows_at_once <= rows and 1 <= size.steps_at_once <= steps
        if size.steps_at_once < steps:
            assert size.rows_at_once == 1
        assert size.runs >= math.ceil(size.total / limit) and str(size).endswith(f"{size.runs} run(s)")


def test_the_release_is_sized_without_weights():
    model = transformer.abstract(dg.ModelConfig(layer_types=("sliding_attention", "full_attention")))
    size = interp.capture_size(model, [[2, 3]], "layers.*.resid_post", memory_limit=64 << 30)
    assert size.total == 48 * 2 * 256 * 2816 * 2 and "132 MiB on the host" in str(size)


def spread(x):
    return jnp.std(x.astype(jnp.float32), -1)


@pytest.mark.heavy
def test_reductions_positions_blocks_and_edits(model, acts):
    """One run for all: two blocks of an edited model, two positions, reduced on the device."""
    edited = interp.edit(model, "layers.1.resid_post", interp.Patch(jnp.arange(D, dtype=jnp.float32)), positions=4)
    got = interp.capture(
        edited, PROMPTS, "layers.*.resid_post", [0, 2], seed=[3, 4, 5], sampler=SAMPLER, positions=[1, 4], reduce=spread,
        max_new_tokens=2 * C,
    )  # fmt: skip
    blocks = got.tokens.shape[1] // C
    assert blocks == 2 and got["layers.0.resid_post"].shape == (2, 2, 3, 2) and got.axes["layers.0.resid_post"] == "JRB"
    np.testing.assert_allclose(got["layers.1.resid_post"][..., 1], np.arange(D).std(), rtol=1e-5)  # after the edit
    expected = acts["layers.0.resid_post"][0, :, [1, 4]].std(-1).T
    np.testing.assert_allclose(got["layers.0.resid_post"][0, 0], expected, rtol=1e-4)
    values = got["layers.0.resid_post"]
    assert np.abs(values[1] - values[0]).max() > 1e-3 and np.abs(values[:, 1] - values[:, 0]).max() > 1e-3
    assert got.stack("layers.*.resid_post").shape == (2, 2, 2, 3, 2)


def test_the_python_twin_captures_the_same(model, acts):
    model, _ = tapped(model, SITES)
    record = dg.Record(site_steps=(1, 3))
    twin = dg.generate_python(
        model, PROMPTS, seed=[3, 4, 5], sampler=SAMPLER, max_new_tokens=C, record=record
    ).trajectory
    np.testing.assert_array_equal(twin.site_steps, [1, 3])
    for name in acts:
        np.testing.assert_allclose(twin.sites[name][0], acts[name][[1, 3]], atol=1e-5)


def test_prompts(model):
    """Rows of a batch as each alone; the last residual gives the hidden state."""
    got = interp.capture_prompt(model, PROMPTS, ["layers.*.resid_post", "token_embed"])
    assert got.axes["token_embed"] == "BTD" and got.steps == ()
    np.testing.assert_array_equal(got.valid.sum(1), [3, 2, 4])
    hidden = dg.prefill(model, got.tokens, got.valid).hidden
    x = got["layers.1.resid_post"]
    norm = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * model.final_norm.weight[...]
    np.testing.assert_allclose(norm[got.valid], np.asarray(hidden)[got.valid], atol=1e-5)
    alone = interp.capture_prompt(model, PROMPTS[1], "layers.*.resid_post")
    np.testing.assert_allclose(alone["layers.1.resid_post"][0, :2], x[1, :2], atol=1e-5)


def test_saved_and_loaded(model, acts, tmp_path):
    narrow = {"canvas": acts["canvas"], "soft_embed": acts["soft_embed"].astype(ml_dtypes.bfloat16)}
    mixed = interp.Activations(**{**vars(acts), "arrays": narrow})
    loaded = interp.Activations.load(mixed.save(tmp_path / "some.acts"))
    assert list(loaded) == list(mixed) and loaded.steps == acts.steps and loaded.axes == acts.axes
    assert loaded["soft_embed"].dtype == ml_dtypes.bfloat16 and loaded.texts == (None,) * 3
    for name in mixed:
        np.testing.assert_array_equal(loaded[name], mixed[name])
    np.testing.assert_array_equal(loaded.valid, acts.valid)
    with pytest.raises(ValueError, match="holds activations, not edits"):
        interp.load_edits(model, tmp_path / "some.acts")


def test_named_views_and_the_table(acts):
    views = acts.named()
    assert dict(views["layers.0.resid_post"].named_shape) == {"step": STEPS, "row": 3, "position": C, "width": D}
    assert list(views["layers.1.attn_pattern"].named_shape)[-1] == "key"
    assert "layers.0.resid_post  RBCD  float32[4, 3, 6, 16]" in str(acts)
    with pytest.raises(KeyError, match="was not captured; captured are canvas"):
        acts["logits"]
    with pytest.raises(ValueError, match="only equal ones"):
        acts.stack("*")


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ("layers.*.resid_pots", {}, "near it"),
        ("token_embed", {}, "does not exist in denoise"),
        ("canvas", {"steps": STEPS}, "out of range; there are 4"),
        ("canvas", {"steps": []}, "chooses none"),
        ("canvas", {"positions": C}, "positions has 6"),
        ("layers.0.resid_post", {"reduce": jnp.sum}, "first axis must stay the rows"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, monkeypatch, sites, options, message):
    monkeypatch.setattr(dg, "generate", None)
    with pytest.raises(ValueError, match=message):
        interp.capture(model, PROMPTS, sites, **{"sampler": SAMPLER} | options)


def test_captures_of_the_loop_have_limits(model):
    with pytest.raises(ValueError, match="rising order"):
        dg.Record(site_steps=(2, 1))
    with pytest.raises(ValueError, match="max_denoising_steps=4"):
        dg.generate(model, PROMPTS, sampler=SAMPLER, max_new_tokens=C, record=dg.Record(site_steps=(4,)))
    listening, _ = tapped(model, "token_embed", phase="prefill")
    with pytest.raises(ValueError, match="in one piece"):
        dg.prefill(listening, np.full((1, 8), 7), chunk=4)
    with pytest.raises(ValueError, match="canvas_embed does not exist in prefill"):
        interp.capture_prompt(model, PROMPTS, "canvas_embed")
