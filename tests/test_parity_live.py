"""Parity with `transformers` as installed: fresh checkpoints and records, the way back, and unseen shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference_cases as cases
import reference_checks as checks

import dgemma_jax as dg

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=cases.CASES, ids=lambda case: case.name)
def live(request, tmp_path_factory):
    """(case, model of `transformers`, its checkpoint loaded here, a fresh record)."""
    torch.set_num_threads(1)  # small products, beside other test processes
    model = cases.build(request.param)
    directory = tmp_path_factory.mktemp(request.param.name)
    model.save_pretrained(directory)
    kept = cases.record(request.param, model)
    # Most of a loss comes from few experts chosen otherwise: of one canvas it differs twofold between processors.
    kept |= cases.prefixed("bfloat16/", cases.bfloat16(model, kept, turns=8))
    return request.param, model, dg.load(directory), kept


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_agrees_with_transformers(live, check):
    _, _, bundle, kept = live
    check(bundle, kept)


def test_weights_hide_nothing(live):
    """No norm, scale or layer scalar is one, and the two passes have scalars of their own."""
    _, model, bundle, _ = live
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if ("norm" in name or "scal" in name) and "vision" not in name and "embed_scale" not in name:
            assert (weight != 1).all(), name
    for layer in bundle.model.layers:
        assert abs(layer.prefill_scalar[0] - layer.denoise_scalar[0]) > 1e-3


def test_the_kept_record_is_what_transformers_computes_today(live):
    case, model, bundle, kept = live
    cases.check_informative(case, kept)
    stored = checks.load_record(checks.DIRECTORY / case.name / "reference.npz")
    # Each step from where the kept one was: on another processor torch's roundings add up over a run.
    run = checks.part(stored, "replay/")
    given = run.logits / run.temperature[:, None, None, None]
    kept = kept | cases.prefixed("replay/", cases.replay(model, checks.prompts_of(kept), case.seed, given))
    assert stored.keys() == kept.keys()
    for name, array in stored.items():
        if array.dtype.kind in "ib":
            checks.equal(kept[name], array, name)
        elif not name.startswith("bfloat16/"):
            checks.close(kept[name], array.astype(np.float32), name)
    same = dg.load(checks.DIRECTORY / case.name)
    assert (same.config, same.sampler) == (bundle.config, bundle.sampler)


def test_left_padded_batch_of_transformers_agrees(live):
    """Its positions count the padding, ours do not; attention sees differences of positions only."""
    case, model, bundle, kept = live
    prompts, canvas = checks.prompts_of(kept), torch.tensor(kept["canvas"])
    longest = max(map(len, prompts))
    tokens, mask = torch.zeros((len(prompts), longest), dtype=torch.long), torch.zeros((len(prompts), longest))
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model.model.encoder(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        seen = torch.nn.functional.pad(mask, (0, case.canvas), value=1).bool()
        theirs = model(
            decoder_input_ids=canvas,
            past_key_values=cache,
            decoder_attention_mask=seen,
            self_conditioning_logits=torch.tensor(kept["given"]),
        )
    soft = dg.soft_embed(bundle, kept["given"])
    ours = dg.denoise(bundle, kept["canvas"], checks.prefilled(bundle, kept)[0].cache, soft)
    checks.close(ours, theirs.logits.numpy(), "logits")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_here_loads_there(live, tmp_path, dtype):
    case, model, bundle, kept = live
    dg.save(bundle, tmp_path / "saved", format="hf", dtype=dtype)
    back, report = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        tmp_path / "saved", dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(report.values()), report
    rounded = {name: weight.to(getattr(torch, dtype)) for name, weight in _text_weights(model).items()}
    found = _text_weights(back)
    assert found.keys() == rounded.keys()
    for name, weight in rounded.items():
        assert torch.equal(found[name], weight), name
    assert back.generation_config.to_dict() == model.generation_config.to_dict() | {
        "max_new_tokens": back.generation_config.max_new_tokens
    }
    if dtype == "float32":
        fresh = cases.passes(back.eval(), kept)
        for name in ("logits_first", "logits_next"):
            checks.close(fresh[name], kept[name], name, 1e-6)
        assert dg.load(tmp_path / "saved").config == bundle.config


def _text_weights(model):
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: w for n, w in every.items() if "vision" not in n and not n.endswith(("inv_freq", "embed_scale"))}


S, F = cases.SLIDING, cases.FULL
VARIANTS = {
    # one key head a query head on sliding layers; windows of three and of more than everything; one expert a token
    "narrow": dict(num_key_value_heads=4, num_global_key_value_heads=2, sliding_window=3, top_k_experts=1),
    "wide": dict(num_key_value_heads=1, num_global_key_value_heads=4, sliding_window=64, top_k_experts=6),
    "full": dict(layer_types=[F, F], head_dim=16, global_head_dim=8),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_shapes_agree(name, tmp_path):
    base = cases.CASES[0]
    sizes = base.sizes | {"layer_types": [S, F, S, F]} | VARIANTS[name]
    case = dataclasses.replace(base, name=name, seed=11, sizes=sizes, prompts=(1, 9))
    model = cases.build(case)
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, sizes["vocab_size"], n) for n in case.prompts]
    shape = (len(case.prompts), case.canvas)
    given = dict(
        prompts=cases.right_padded(tokens),
        prompt_lengths=np.array(case.prompts),
        block=rng.integers(0, sizes["vocab_size"], shape),
        canvas=rng.integers(0, sizes["vocab_size"], shape),
        given=rng.normal(0, 4, (*shape, sizes["vocab_size"])).astype(np.float32),
    )
    kept = given | cases.passes(model, given)
    bundle = dg.load(tmp_path)
    for check in (checks.causal_pass, checks.appended_block, checks.first_denoising_pass, checks.self_conditioned_pass):
        check(bundle, kept)
