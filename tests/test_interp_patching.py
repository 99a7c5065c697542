"""Single patches: nothing from itself, everything from a donor's all, and one step or all later ones."""

import numpy as np
import pytest
from oracles import build

import dgemma_jax as dg
import interp
from interp.patching import step_logits

C, STEPS = 6, 4
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
RECIPIENTS, DONORS = [[7, 8, 9, 10], [11, 12, 13]], [[7, 8, 14, 10], [11, 15, 13]]
LAST = "layers.1.resid_post"


@pytest.fixture(scope="module")
def model():
    kinds = ("sliding_attention", "full_attention")
    sizes = dict(layer_types=kinds, canvas_length=C, embed_dim=16, vocab_size=32, hidden_dim=16, sliding_window=4)
    return build(dg.ModelConfig.tiny(**sizes))


@pytest.fixture(scope="module")
def runs(model):
    quiet = dg.Record.nothing()
    made = [
        dg.generate(model, prompts, seed=seed, sampler=SAMPLER, max_new_tokens=C, record=quiet)
        for prompts, seed in ((RECIPIENTS, 5), (DONORS, 6))
    ]
    assert (made[0].tokens != made[1].tokens).any()
    return made


@pytest.fixture(scope="module")
def pair(runs):
    """The recipient and the donor before step 1."""
    return [run.trajectory.moment(0, 1) for run in runs]


def test_a_run_patched_with_itself_is_itself(model, runs, pair):
    recipient, _ = pair
    for name, options in (("soft", {}), ("canvas", {}), ("cache", {}), (LAST, {}), (LAST, {"phase": "prefill"})):
        patched = interp.patch(model, recipient, recipient, name, **options)
        np.testing.assert_allclose(patched.logits, patched.plain_logits, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(patched.finished.tokens, runs[0].tokens)


@pytest.mark.parametrize(("site", "phase"), [("canvas_embed", "denoise"), ("token_embed", "prefill")])
def test_so_it_is_where_a_product_goes_into_a_sum(site, phase):
    """sqrt(D) is no power of two here, with which nothing would be rounded."""
    model = build(dg.ModelConfig.tiny(canvas_length=C, embed_dim=24, layer_types=("full_attention",)), sharpness=20)
    out = dg.generate(model, RECIPIENTS, sampler=SAMPLER, max_new_tokens=C, record=dg.Record.nothing())
    moment = out.trajectory.moment(0, 1)
    same = interp.patch(model, moment, moment, site, phase=phase)
    np.testing.assert_array_equal(same.logits, same.plain_logits)
    assert np.abs(same.logits).max() > 10


def test_all_carriers_together_are_the_donor(model, pair):
    """One on top of the other; each alone is not enough."""
    recipient, donor = pair
    patched = interp.patch(model, recipient, donor, "cache")
    for name in ("soft", "canvas"):
        assert np.abs(np.asarray(patched.logits) - np.asarray(step_logits(model, donor))).max() > 1e-3
        patched = interp.patch(patched.bundle, patched.moment, donor, name)
    np.testing.assert_allclose(patched.logits, step_logits(model, donor), atol=1e-6)


def test_sites_of_the_prompt_make_the_donors_cache(model, pair):
    patched = interp.patch(model, *pair, "token_embed", phase="prefill")
    for own, wanted in zip(patched.moment.cache.layers, pair[1].cache.layers, strict=True):
        np.testing.assert_allclose(own.k, wanted.k, atol=1e-5)
        np.testing.assert_allclose(own.v, wanted.v, atol=1e-5)
    none = interp.patch(model, *pair, "token_embed", phase="prefill", positions=[])
    np.testing.assert_allclose(none.logits, none.plain_logits, atol=1e-6)


def test_the_last_layer_decides_the_step(model, pair):
    whole = interp.patch(model, *pair, LAST)
    np.testing.assert_allclose(whole.logits, step_logits(model, pair[1]), atol=1e-5)
    part = interp.patch(model, *pair, LAST, positions=[2], rows=1)
    changed = np.abs(np.asarray(part.logits - part.plain_logits)).max(-1) > 1e-4
    assert changed[1, 2] and changed.sum() == 1
    metric = interp.LogitDifference([2], [3], [4])
    effect = np.asarray(metric(part.logits)) - np.asarray(metric(part.plain_logits))
    np.testing.assert_allclose(part.effect(metric), effect)
    assert part.effect(metric)[0] == 0 and repr(part).startswith("a patch at step 1 of block 0, 2 row(s)")


@pytest.mark.heavy
@pytest.mark.parametrize("layer", [0, 1])  # a ring of the last keys, and all of them
def test_patterns_of_attention_fit_as_they_were_captured(model, pair, layer):
    name = f"layers.{layer}.attn_pattern"
    found = interp.patch(model, *pair, name)
    np.testing.assert_allclose(interp.patch(model, pair[0], pair[0], name).logits, found.plain_logits, atol=1e-6)
    assert np.abs(np.asarray(found.logits) - found.plain_logits).max() > 1e-4
    few = interp.capture_step(model, pair[1], name)[name][..., :-1]
    with pytest.raises(ValueError, match=r"attn_pattern has \d+ keys here, the value \d+"):
        interp.patching.step_logits(interp.edit(model, name, interp.Patch(few)), pair[0])


@pytest.mark.heavy
def test_one_step_or_all_that_follow(model, runs, pair):
    """With the donor's keys the recipient becomes the donor's run, if the donor is followed to the end."""
    recipient, donor = pair
    recipient = recipient.replace(keys=donor.keys)
    followed = interp.patch(model, recipient, donor, LAST, persistent=True)
    np.testing.assert_array_equal(followed.finished.tokens, runs[1].tokens)
    once = interp.patch(model, recipient, donor, LAST)
    assert (once.finished.tokens != runs[1].tokens).any()
    after = once.finished.trajectory.moment(0, 2)
    np.testing.assert_array_equal(once.finished.tokens, dg.resume(model, after).tokens)

    def equal(tokens):
        return (tokens == runs[1].tokens).mean(-1)

    np.testing.assert_array_equal(once.text_effect(equal), equal(once.finished.tokens) - equal(once.plain_finished.tokens))


@pytest.mark.heavy
def test_carriers_are_followed(model, runs, pair):
    """What every later step is given is what the donor's step was given."""
    patched = interp.patch(model, *pair, "soft", positions=[0, 4], persistent=True)
    patched = interp.patch(
        patched.bundle, patched.moment, pair[1], "canvas", positions=[1, 3], persistent=True, donor_bundle=model
    )
    out = dg.resume(patched.bundle, patched.moment, record=dg.Record.nothing())
    for step in range(1, STEPS):
        own, wanted, plain = (run.trajectory.moment(0, step) for run in (out, runs[1], runs[0]))
        np.testing.assert_allclose(own.soft[:, [0, 4]], wanted.soft[:, [0, 4]], atol=1e-5)
        np.testing.assert_array_equal(own.canvas[:, [1, 3]], wanted.canvas[:, [1, 3]])
        assert np.abs(plain.soft[:, [0, 4]] - wanted.soft[:, [0, 4]]).max() > 1e-3
        assert (plain.canvas[:, [1, 3]] != wanted.canvas[:, [1, 3]]).any()


def test_a_donor_may_stand_at_another_step(model, runs, pair):
    later = runs[1].trajectory.moment(0, 3)
    patched = interp.patch(model, pair[0], later, LAST)
    np.testing.assert_allclose(patched.logits, step_logits(model, later), atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("layers.9.resid_post", {}, "near it"),
        (LAST, {"positions": C}, "positions has 6"),
        (LAST, {"steps": 2}, "steps cannot be chosen"),
        (LAST, {"phase": "both"}, "phase must be"),
        ("canvas_embed", {"phase": "prefill"}, "does not exist in prefill"),
    ],
)
def test_bad_choices_are_refused(model, pair, pattern, options, message):
    with pytest.raises(ValueError, match=message):
        interp.patch(model, *pair, pattern, **options)


def test_moments_that_do_not_fit_are_refused(model, runs, pair):
    recipient, donor = pair
    with pytest.raises(ValueError, match="the donor must be a moment"):
        interp.patch(model, recipient, donor.cache, "cache")
    with pytest.raises(ValueError, match="has ended before step 4"):
        interp.patch(model, recipient, runs[1].trajectory.moment(0, STEPS), "soft")
    other = dg.generate(model, [[7, 8], [9]], seed=5, sampler=SAMPLER, max_new_tokens=C, record=dg.Record.nothing())
    for pattern, options in (("cache", {}), (LAST, {"phase": "prefill"})):
        with pytest.raises(ValueError, match="equal length"):
            interp.patch(model, recipient, other.trajectory.moment(0, 1), pattern, **options)
