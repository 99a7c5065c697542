"""Energies, open slots, circulation and resampling, on denoisers whose distributions are written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Scripted, softmax

import dgemma_jax as dg
import interp

C, V, STEPS = 5, 16, 3
CONFIG = dg.ModelConfig.tiny(canvas_length=C, vocab_size=V, embed_dim=V, eos_token_ids=(1,))
PROMPT = [3, 4]
ROWS = 12
SCRIPT = np.random.default_rng(0).standard_normal((C, V)).astype(np.float32)
RULE = np.random.default_rng(1).standard_normal((V, V)).astype(np.float32) * 2


class Chain(Scripted):
    """Position 2 follows from what stands at position 1; nothing else follows from anything."""

    def denoise(self, canvas, cache, soft):
        logits = super().denoise(canvas, cache, soft)
        return logits.at[:, 2].set(jnp.asarray(RULE)[canvas[:, 1]])


class Echoing(Scripted):
    """Open at the first step; from then on what stands on the canvas stays."""

    def denoise(self, canvas, cache, soft):
        logits = super().denoise(canvas, cache, soft)
        later = (self.clock.step > 0)[:, None, None]
        return jnp.where(later, 30 * jax.nn.one_hot(canvas, V), logits)


for kind in (Chain, Echoing):
    jax.tree_util.register_dataclass(kind)


def made(kind, rows=ROWS):
    plain = Scripted.of(np.broadcast_to(SCRIPT, (1, STEPS, rows, C, V)), CONFIG)
    return kind(plain.script, plain.table, plain.clock, CONFIG)


def test_energy_is_that_of_the_script():
    found = interp.energy(made(Scripted), [PROMPT], [[5, 6], [7, 8, 9]])
    logp = np.log(softmax(SCRIPT.astype(float)))
    np.testing.assert_allclose(found.total[0], -(logp[0, 5] + logp[1, 6] + logp[2, 1]), rtol=1e-4)
    np.testing.assert_allclose(found.per_token[1], -(logp[0, 7] + logp[1, 8] + logp[2, 9] + logp[3, 1]) / 4, rtol=1e-4)
    best = interp.energy(made(Scripted), [PROMPT], [SCRIPT[:3].argmax(-1).tolist()] * 2)
    assert (best.total < found.total[1]).all() and "energy of 2" in repr(best)
    with pytest.raises(ValueError, match="a block holds 5"):
        interp.energy(made(Scripted), [PROMPT], [[5] * 5])
    with pytest.raises(ValueError, match="2 prompts and 1 texts"):
        interp.energy(made(Scripted), [PROMPT, PROMPT], [[5]])
    with pytest.raises(ValueError, match="temperature must be positive"):
        interp.energy(made(Scripted), [PROMPT], [[5]], temperature=0)


def test_open_slots():
    """Slot 2 is the rule's row where slot 1 is set, and its mean over the noise where it is not."""
    frame, options = np.arange(C) + 5, dict(draws=4, seed=3)
    found = interp.cloze(made(Chain), PROMPT, frame, [1, 2], [{}, {1: 9}], **options)
    noise = np.random.default_rng(3).integers(0, V, (4, 2))[:, 0]
    rule = softmax(RULE.astype(float))
    np.testing.assert_allclose(found.probs[0, 1], rule[noise].mean(0), atol=1e-5)
    np.testing.assert_allclose(found.probs[1, 1], rule[9], atol=1e-5)
    np.testing.assert_allclose(found.probs[:, 0], np.tile(softmax(SCRIPT[1].astype(float)), (2, 1)), atol=1e-5)
    by_soft = interp.cloze(made(Chain), PROMPT, frame, [1, 2], [{}, {1: 9}], through="soft", **options)
    np.testing.assert_allclose(by_soft.probs[0], by_soft.probs[1], atol=1e-6)  # this model does not read S
    assert "slot 1" in repr(found) and found.top(2)[0].shape == (2, 2, 2)
    for wrong, said in ((dict(slots=[1, 1]), "different positions"), (dict(settings=[{3: 4}]), "are no slots")):
        with pytest.raises(ValueError, match=said):
            interp.cloze(made(Chain), PROMPT, frame, **{"slots": [1, 2], **wrong})
    with pytest.raises(ValueError, match="'canvas' or 'soft'"):
        interp.cloze(made(Chain), PROMPT, frame, [1], through="cache")


def test_circulation():
    """log p(b|a) - log p(b) where b follows from a; nothing where the slots do not know of each other."""
    frame = np.arange(C) + 5
    found = interp.circulation(made(Chain), PROMPT, frame, (1, 2), k=3, draws=4, seed=3)
    rule = softmax(RULE.astype(float))
    noise = np.random.default_rng(3).integers(0, V, (4, 2))[:, 0]
    wanted = np.log(rule[found.first][:, found.second]) - np.log(rule[noise].mean(0)[found.second])
    np.testing.assert_allclose(found.values, wanted, atol=1e-4)
    assert found.size > 0.1 and "circulation" in repr(found)
    apart = interp.circulation(made(Chain), PROMPT, frame, (0, 3), k=3, draws=4, seed=3)
    np.testing.assert_allclose(apart.values, 0, atol=1e-5)
    with pytest.raises(ValueError, match="two slots"):
        interp.circulation(made(Chain), PROMPT, frame, (1, 2, 3))


@pytest.mark.heavy
def test_anchors_are_where_the_outcome_is_drawn():
    """All is drawn at step 0 and kept: branches from step 0 differ, later ones do not."""
    model = made(Echoing, 9)
    sampler = dg.SamplerConfig(
        max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False, entropy_bound=1e9, commit="canvas",
    )  # fmt: skip
    out = dg.generate(model, [PROMPT], seed=2, sampler=sampler, max_new_tokens=C)
    found = interp.thought_anchors(model, out.trajectory, [0, 1, 2], count=8)
    np.testing.assert_array_equal(found.agreement()[1:], 1)
    assert found.agreement()[0] < 1 and found.importance()[0] > found.null()[0] and found.importance()[1] == 0
    assert found.names[found.plain[0]] == tuple(out.tokens[0].tolist()) and "8 branches" in repr(found)
    np.testing.assert_allclose(found.shares().sum(-1), 1)
    few = interp.thought_anchors(model, out.trajectory, [0, 1, 2], count=8, rows_at_once=4)  # 9 branches: 4, 4, 1
    assert few.names == found.names and np.array_equal(few.outcomes, found.outcomes)
    with pytest.raises(ValueError, match="a branch of this run has 1 rows"):
        interp.thought_anchors(model, out.trajectory, [0], rows_at_once=0)
    with pytest.raises(ValueError, match="steps are 0..2"):
        interp.thought_anchors(model, out.trajectory, [3])
