"""Sweeps of patches: every place equals the patch by itself, nothing moves where nothing is put, one compile."""

import dataclasses
import functools
import types

import numpy as np
import pytest
from oracles import build

import dgemma_jax as dg
import interp
from interp import kept_chunks, sweeps
from interp.places import targets
from interp.sweep_inputs import steps_of

C, STEPS, LAYERS = 6, 2, 2
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
CLEAN, CORRUPT = [[7, 8, 9, 10], [11, 12, 13]], [[7, 8, 14, 10], [11, 15, 13]]
LARGE = interp.LogProb(np.arange(C), np.arange(C))
METRIC = interp.LogitDifference([2], [7], [9])
RESID = "layers.*.resid_post"
CLOSE = dict(atol=2e-5, rtol=1e-4)


def tiny():
    kinds = ("sliding_attention", "full_attention")
    sizes = dict(layer_types=kinds, canvas_length=C, embed_dim=16, vocab_size=32, hidden_dim=16, sliding_window=4)
    return dg.ModelConfig.tiny(**sizes)


@pytest.fixture(scope="module")
def model():
    return build(tiny())


@functools.cache
def moments(model, which):
    """Before each step of the run of CLEAN or of CORRUPT, as a sweep makes it."""
    prompts = {"clean": CLEAN, "corrupt": CORRUPT}[which]
    out = dg.generate(model, prompts, seed=5, sampler=SAMPLER, max_new_tokens=C, record=dg.Record.nothing())
    return [out.trajectory.moment(0, step) for step in range(STEPS)]


def swept(model, sites=RESID, clean=CLEAN, corrupt=CORRUPT, metric=METRIC, **options):
    return interp.patch_sweep(model, clean, corrupt, metric, sites, sampler=SAMPLER, seed=5, **options)


def single(model, pattern, step, **where):
    """The patch of one place by itself."""
    return interp.patch(model, moments(model, "corrupt")[step], moments(model, "clean")[step], pattern, **where)


def differing(model, name, step):
    """A position at which the two runs differ."""
    first, second = (np.asarray(getattr(moments(model, which)[step], name)) for which in ("clean", "corrupt"))
    return int(np.argmax(np.abs(first - second).reshape(len(first), C, -1).sum((0, 2)) > 0))


@pytest.fixture(scope="module")
def maps(model):
    return swept(model, [RESID, "soft", "canvas", "cache"])


def test_a_sweep_is_its_single_patches(model, maps):
    assert maps[RESID].shape == (STEPS, LAYERS, C, 2) and maps["canvas"].shape == (STEPS, C, 2)
    assert maps["cache"].shape == (STEPS, LAYERS, 4, 2) and maps.axes["cache"] == "RLPB"
    np.testing.assert_array_equal(maps["cache"][:, :, 3, 1], 0)  # the second prompt has three tokens
    for place in ((0, 0, 2), (1, 1, 2), (1, 0, 5)):
        step, layer, position = place
        alone = single(model, RESID, step, layers=layer, positions=position).effect(METRIC)
        np.testing.assert_allclose(maps[RESID][place], alone, **CLOSE)
    for name in ("soft", "canvas"):
        position = differing(model, name, 1)
        alone = single(model, name, 1, positions=position).effect(METRIC)
        np.testing.assert_allclose(maps[name][1, position], alone, **CLOSE)
    alone = single(model, "cache", 1, positions=2, layers=1).effect(METRIC)
    np.testing.assert_allclose(maps["cache"][1, 1, 2], alone, **CLOSE)
    assert all(np.abs(maps[name]).max() > 1e-3 for name in maps.effects)
    assert not maps["soft"][0].any() and not maps["canvas"][0].any()  # alike before the first step


def test_base_and_donor_are_the_runs(model, maps):
    for name, found in (("corrupt", maps.base), ("clean", maps.donor)):
        plain = [np.asarray(METRIC(interp.patching.step_logits(model, m))) for m in moments(model, name)]
        np.testing.assert_allclose(found, plain, **CLOSE)


@pytest.mark.parametrize("rows", [2, 4])  # of two pairs: one step of the donor in a call, and both
def test_few_rows(model, maps, rows):
    few = swept(model, "canvas", rows_at_once=rows, positions=[2])
    np.testing.assert_allclose(few.donor, maps.donor, **CLOSE)
    np.testing.assert_allclose(few["canvas"][:, 0], maps["canvas"][:, 2], **CLOSE)


def test_sites_of_the_prompt(model):
    found = swept(model, phase="prefill", positions=[0], noise_seeds=[1, 2])
    assert found.axes[RESID] == "RLPB" and found[RESID].shape == (STEPS, LAYERS, 4, 2)
    assert found.noise.shape == (STEPS, 2) and (found.noise > 0).all()
    assert not found[RESID][:, -1].any()  # nothing in the cache comes after the last layer
    for step, position in ((0, 2), (1, 1)):
        alone = single(model, RESID, step, phase="prefill", layers=0, positions=position).effect(METRIC)
        assert np.abs(alone).max() > 1e-3
        np.testing.assert_allclose(found[RESID][step, 0, position], alone, **CLOSE)
    assert np.abs(swept(model, clean=CORRUPT, phase="prefill").flat()).max() <= 1e-6


@pytest.mark.heavy
def test_heads_and_windows(model):
    site, name = "layers.1.attn_z", "layers.*.attn_z"
    found = swept(model, site, over="head", positions=[2, 4], steps=1)
    assert found.axes == {name: "RLNB"} and found.index[name] == {"R": [1], "L": [1], "N": [0, 1, 2, 3]}
    assert found[name].shape == (1, 1, model.config.num_heads, 2)
    alone = single(model, site, 1, positions=[2, 4], heads=1).effect(METRIC)
    np.testing.assert_allclose(found[name][0, 0, 1], alone, **CLOSE)
    assert np.abs(alone).max() > 1e-3


def test_a_run_patched_with_itself_is_itself(model, maps):
    found = swept(model, [RESID, "soft", "canvas", "cache"], clean=CORRUPT)
    assert np.abs(found.flat()).max() <= 1e-6 < np.abs(maps.flat()).max()


@pytest.mark.heavy
@pytest.mark.parametrize("site", ["layers.*.attn_pattern", "layers.*.expert_out"])
def test_so_it_is_at_every_kind_of_site(model, site, monkeypatch):
    """Whether the donor is read a step at a time or at all steps at once."""
    first, same = swept(model, site, metric=LARGE), swept(model, site, clean=CORRUPT, metric=LARGE)
    monkeypatch.setattr(sweeps, "READ", 1)
    np.testing.assert_allclose(swept(model, site, metric=LARGE).flat(), first.flat(), **CLOSE)
    assert np.abs(same.flat()).max() <= 1e-6 * np.abs(same.base).min() and np.abs(first.flat()).max() > 1e-3


@pytest.mark.parametrize(
    ("site", "phase"), [
        ("canvas_embed", "denoise"), pytest.param("token_embed", "prefill", marks=pytest.mark.heavy),
        pytest.param("layers.*.attn_pattern", "prefill", marks=pytest.mark.heavy),
    ],
)  # fmt: skip
def test_so_it_is_where_a_product_goes_into_a_sum(site, phase):
    """Compiled into one operation, which rounds once; sqrt(D) is no power of two, with which nothing is rounded."""
    model = build(dataclasses.replace(tiny(), embed_dim=24))
    same = swept(model, site, clean=CORRUPT, metric=LARGE, phase=phase)
    assert np.abs(same.base).min() > 10 and not same.flat().any()
    assert np.abs(swept(model, site, metric=LARGE, phase=phase, source="zero").flat()).max() > 1e-3


def weighed(tokens):
    """A metric of texts that shows any other token."""
    return np.asarray(tokens)[:, :C] @ 3.0 ** np.arange(C)


@pytest.mark.heavy
def test_texts_go_on_under_the_same_keys(model):
    options = dict(sites=["canvas", RESID], metric=weighed, effect="text", steps=1, rows_at_once=14)
    found = swept(model, **options)
    canvas = differing(model, "canvas", 1)
    for name, place, where in (("canvas", (canvas,), {}), (RESID, (0, 2), {"layers": 0})):
        alone = single(model, name, 1, positions=place[-1], **where).text_effect(weighed)
        np.testing.assert_allclose(found[name][(0, *place)], alone)
    assert found[RESID].any()
    finished = dg.resume(model, moments(model, "clean")[0]).tokens
    np.testing.assert_allclose(found.donor[0], weighed(finished))
    assert not swept(model, clean=CORRUPT, **options).flat().any()


def test_other_prompts_and_metrics_compile_nothing(model):
    programs, count = sweeps._metric._cache_size(), 0
    for position in range(4):
        metric = interp.LogitDifference([position], [3], [4])
        found = swept(model, [RESID, "canvas"], CLEAN[::-1], CORRUPT[::-1], metric, rows_at_once=10)
        count += found.size
    assert count == 4 * STEPS * (LAYERS * C + C) * 2 and sweeps._metric._cache_size() == programs + 2


@pytest.mark.parametrize("source", ["zero", "mean", "resample"])
def test_sources(model, source):
    found = swept(model, [RESID, "cache"], source=source, direction="noising", steps=1)
    recipient, donor = (moments(model, name)[1] for name in ("clean", "corrupt"))
    made = {}
    for name, seen in interp.capture_step(model, donor, RESID).items():
        value = np.asarray(seen)
        changed = {"zero": 0 * value, "mean": value.mean((0, 1), keepdims=True), "resample": value[::-1]}[source]
        made[name] = np.broadcast_to(changed, value.shape)
    edited = interp.edit(model, RESID, interp.Patch(made), layers=1, positions=2, steps=1, blocks=0, sampler=SAMPLER)
    expected = METRIC(interp.patching.step_logits(edited, recipient))
    expected -= METRIC(interp.patching.step_logits(model, recipient))
    np.testing.assert_allclose(found[RESID][0, 1, 2], expected, **CLOSE)
    assert np.abs(found["cache"]).max() > 1e-3


def test_knock_outs_need_no_other_prompt(model):
    found = swept(model, "canvas", corrupt=None, source="renoise", steps=0, source_seed=3)
    assert found.donor is None and found["canvas"].shape == (1, C, 2) and found["canvas"].any()
    again = swept(model, "canvas", corrupt=None, source="renoise", steps=0, source_seed=3)
    np.testing.assert_array_equal(found.flat(), again.flat())
    assert (swept(model, "canvas", corrupt=None, source="renoise", steps=0, source_seed=4).flat() != found.flat()).any()


def test_finished_chunks_are_not_run_again(model, tmp_path, monkeypatch):
    options = dict(sites=[RESID, "canvas"], directory=tmp_path, rows_at_once=10)
    first = swept(model, **options)
    files = sorted(tmp_path.glob("*.npz"))
    files[0].unlink()
    calls, step = [], sweeps._Work._step
    monkeypatch.setattr(sweeps._Work, "_step", lambda *args: calls.append(args) or step(*args))
    again = swept(model, **options)
    assert len(calls) == 2  # the chunk that is gone, and the donor at all steps
    np.testing.assert_allclose(again.flat(), first.flat(), atol=1e-6)
    with pytest.raises(ValueError, match="holds chunks of another sweep"):
        swept(model, metric=interp.LogitDifference([2], [7], [8]), **options)
    assert kept_chunks.words(weighed) != kept_chunks.words(METRIC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clean=[[7, 8, 9]], corrupt=[[7, 8]]), "pair 0 has 3 clean and 2 corrupt tokens"),
        (dict(clean=[[7, 8, 9]]), "1 clean and 2 corrupt prompts"),
        (dict(corrupt=None), "corrupt is None"),
        (dict(sites="layers.*.resid_pots"), "near it: layers.*.resid_post"),
        (dict(sites=[]), "no sites are given"),
        (dict(sites="soft_embed"), "sweep 'soft'"),
        (dict(sites="canvas_embed", phase="prefill"), "does not exist in prefill"),
        (dict(sites="token_embed"), "does not exist in denoise"),
        (dict(phase="both"), "phase must be"),
        (dict(over="layer"), "over has layer"),
        (dict(over="expert"), "has an axis of experts"),
        (dict(direction="forward"), "direction must be one of denoising, noising"),
        (dict(effect="both"), "effect must be one of step, text"),
        (dict(source="median"), "source must be one of donor"),
        (dict(source="renoise"), "random tokens can stand at"),
        (dict(sites="canvas", source="mean"), "the canvas holds tokens"),
        (dict(clean=[7, 8], corrupt=[7, 9], source="resample"), "two pairs or more"),
        (dict(positions=C), "positions has 6"),
        (dict(steps=STEPS), "steps has 2"),
        (dict(positions=[]), "chooses none"),
        (dict(prompt_positions=4, sites="cache"), "prompt positions has 4"),
        (dict(metric=lambda x: x), "one number a pair is needed"),
        (dict(metric=3), "metric must be a function"),
        (dict(metric=interp.Says([0], [4])), "one number a pair|metric fails"),
        (dict(rows_at_once=1), "rows_at_once"),
        (dict(sites="layers.*.attn_k", over="head"), "key heads; sweep those that are alike"),
    ],
)
def test_bad_input_is_refused(model, options, message, monkeypatch):
    if "rows_at_once" not in options:
        monkeypatch.setattr(dg, "generate", lambda *a, **k: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=message):
        swept(model, **options)


def test_steps_are_those_that_all_runs_took():
    first, second = (types.SimpleNamespace(num_steps=np.array(n)) for n in ([3, 5], [4, 4]))
    assert steps_of(None, dg.SamplerConfig(), first, second) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"shortest run took 3: choose among 0..2, .* early_stop=False"):
        steps_of(3, dg.SamplerConfig(), first, second)


def test_targets_need_no_weights():
    sites, over = ["layers.*.attn_z", "layers.*.expert_out", "soft"], ("position", "head", "expert")
    found = targets(dg.nn.transformer.abstract(tiny()), sites, "denoise", over)
    shown = [(target.name, target.swept, target.layers) for target in found]
    heads = [("layers.*.attn_z", "LTN", (0,)), ("layers.*.attn_z", "LTN", (1,))]  # of other widths
    assert sorted(shown) == sorted([("soft", "T", ()), ("layers.*.expert_out", "LTE", (0, 1)), *heads])
