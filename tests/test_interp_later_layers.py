"""A step that begins at a layer is the step, and what lies before is not run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import build

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion.sampler import denoise_step
from interp import patching, sweeps
from interp.later_layers import Beginning, begun
from interp.sweep_inputs import Run

KINDS = ("sliding_attention", "full_attention")
SIZES = dict(canvas_length=6, embed_dim=16, vocab_size=32, hidden_dim=16, sliding_window=4)
CONFIG = dg.ModelConfig.tiny(**SIZES, layer_types=KINDS)
SAMPLER = dg.SamplerConfig(max_denoising_steps=2, eos_token_ids=(1,), early_stop=False)
PROMPTS, LAYERS, COPIES = [[7, 8, 9, 10], [11, 12, 13]], CONFIG.num_layers, 3
CLOSE = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def moment(model):
    """Before the second step."""
    return Run.of(model, PROMPTS, [5, 6], sampler=SAMPLER, max_new_tokens=6).at(1)


@jax.jit
def step(model, rows, beginning):
    """Logits, and what the layers hand on."""
    model, left = begun(model, beginning, lambda layer, x: x)
    view = denoise_step(model, rows.state, rows.cache, rows.sampler, rows.pinned)[1]
    return view.logits, [left[layer] for layer in range(LAYERS)]


def test_a_step_from_any_layer_is_the_step_and_no_layer_before_is_run(model, moment):
    rows, plain = sweeps.rows_of(moment, COPIES), patching.step_logits(model, moment)
    logits, handed = step(model, rows, Beginning.anew(model, len(PROMPTS)))
    np.testing.assert_allclose(logits, np.tile(plain, (COPIES, 1, 1)), **CLOSE)
    for layer, seen in enumerate(interp.capture_step(model, moment, "layers.*.resid_post").values()):
        np.testing.assert_allclose(handed[layer], seen, **CLOSE)
    for first in range(LAYERS + 1):
        broken = jax.tree.map(lambda x: x, model)
        for layer in range(first):
            broken.layers[layer] = jax.tree.map(lambda x: x * np.nan, broken.layers[layer])
        again, _ = step(broken, rows, Beginning(jnp.int32(first), handed))
        np.testing.assert_allclose(again, logits, **CLOSE)
        if first:  # a layer that runs is seen
            assert np.isnan(step(broken, rows, Beginning(jnp.int32(first - 1), handed))[0]).all()
    assert step._cache_size() == 1


@pytest.mark.parametrize(("site", "begins"), [
    ("layers.*.resid_post", [0, 2]), pytest.param("layers.*.mlp_out", [0, 1], marks=pytest.mark.heavy),
])  # fmt: skip
def test_a_sweep_runs_what_is_changed(model, monkeypatch, site, begins):
    """By layers, by chunks across layers, and all at once: the same effects, in one program each."""
    clean, corrupt = PROMPTS, [[7, 8, 14, 10], [11, 15, 13]]
    asked = (model, clean, corrupt, interp.LogitDifference([2], [7], [9]), site)
    whole = interp.patch_sweep(*asked, sampler=SAMPLER)
    seen, run = [], sweeps._Work._step

    def watched(self, moment, goal, own, begin):
        seen.append(int(begin.layer))
        return run(self, moment, goal, own, begin)

    monkeypatch.setattr(sweeps._Work, "_step", watched)
    across = interp.patch_sweep(*asked, sampler=SAMPLER, rows_at_once=6)
    assert seen[0] == 0 and max(seen) > 0
    monkeypatch.setattr(sweeps, "BUSY", 4)
    seen.clear()
    programs = sweeps._metric._cache_size()
    by_layer = interp.patch_sweep(*asked, sampler=SAMPLER)
    assert seen == [0, *2 * begins]  # the donor at both steps, which is read, then each step
    assert sweeps._metric._cache_size() <= programs + 1
    assert np.abs(whole[site]).max() > 1e-3
    for found in (across, by_layer):
        np.testing.assert_allclose(found[site], whole[site], **CLOSE)
    nothing = interp.patch_sweep(model, corrupt, *asked[2:], sampler=SAMPLER)
    np.testing.assert_allclose(nothing.flat(), 0, atol=CLOSE["atol"])
