"""Attribution against real patches in a trained model: where the answer to a recall question comes from."""

import jax
import numpy as np
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.train import tasks
from interp.metrics import LogitDifference

pytestmark = pytest.mark.slow

SITE, OPTIONS = "layers.*.resid_post", dict(phase="prefill", steps=0)


@pytest.fixture(scope="module")
def bundle():
    return dg.load("nano")


@pytest.fixture(scope="module")
def pairs(bundle):
    """Two questions of equal length, each with another value of the asked key; and the token in which each differs."""
    clean, corrupt, tokens, others, where = [], [], [], [], []
    for example in tasks.examples(3, 60, ("recall",), "test"):
        words, at = example.prompt.split(), example.facts["value_at"]
        other = next(v for v in ("7", "12", "3", "14", "5", "9") if v not in words)
        changed = " ".join([*words[:at], other, *words[at + 1 :]])
        ids = [bundle.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in (example.prompt, changed)]
        if len(words) != 18 or len(clean) == 2:
            continue
        clean.append(ids[0])
        corrupt.append(ids[1])
        tokens.append([bundle.tokenizer.id(example.facts["value"])])
        others.append([bundle.tokenizer.id(other)])
        where += [i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b]
    answer_at = [2]  # "b is 7"
    return (clean, corrupt, LogitDifference(answer_at, tokens, others)), where


def test_the_integrated_form_agrees_with_real_patches(bundle, pairs, capsys):
    """Over all layers and positions of the prompt; without the trained weights nothing of it is left."""
    given, where = pairs
    exact = interp.patch_sweep(bundle, *given, SITE, **OPTIONS)
    answered = (exact.base[0] < 0) & (exact.donor[0] > 0)
    wanted = exact[SITE][..., answered]
    places = wanted[..., 0].size
    assert answered.any() and places >= 100 and np.abs(wanted).max() > 5  # logits
    rng = np.random.default_rng(0)
    shuffled = bundle.with_model(
        jax.tree.map(lambda x: rng.permutation(np.ravel(x)).reshape(x.shape).astype(x.dtype), bundle.model)
    )
    reached, lost = {}, {}
    for form in ("plain", "integrated"):
        found, null = (interp.attribution_patching(b, *given, SITE, form=form, **OPTIONS) for b in (bundle, shuffled))
        assert found.axes == exact.axes and found.index == exact.index and found.labels == exact.labels
        np.testing.assert_allclose(found.base, exact.base, atol=1e-4)
        np.testing.assert_allclose(found.donor, exact.donor, atol=1e-4)
        reached[form], lost[form] = (
            round(float(np.corrcoef(x[SITE][..., answered].ravel(), wanted.ravel())[0, 1]), 3) for x in (found, null)
        )
        assert np.abs(null[SITE]).max() < 0.2 * np.abs(wanted).max()
    with capsys.disabled():
        print(f"\n{places} places, correlation with real patches: {reached}; with shuffled weights: {lost}")
    assert reached["integrated"] >= 0.9 and max(lost.values()) < 0.6 and lost["integrated"] < 0.3
    after_one_layer = np.abs(found[SITE][0, 0])  # the value still stands at its place
    assert (after_one_layer.argmax(0) == where)[answered].all()
