"""Steering: strength 0 is the identity, the schedule is followed, and on the trained model it decides refusals."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import loop
from dgemma_jax.train import tasks
from interp import steering

C, D, STEPS = 4, 16, 4
KINDS = ("sliding_attention", "full_attention")
CONFIG = dg.ModelConfig.tiny(
    layer_types=KINDS, canvas_length=C, embed_dim=D, vocab_size=32, hidden_dim=16, sliding_window=4
)
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
POSITIVE, NEGATIVE = [[7, 8, 9], [10, 11]], [[12, 13], [14, 15, 16], [17, 18, 19, 20]]


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG)


@pytest.fixture(scope="module")
def vector(model):
    return interp.steering_vector(model, POSITIVE, NEGATIVE, batch=2)


def test_the_vector_is_the_difference_of_means_at_the_last_token(model, vector):
    acts = interp.capture_prompt(model, POSITIVE + NEGATIVE, "layers.*.resid_post")
    for layer in range(2):
        last = [acts[f"layers.{layer}.resid_post"][b, int(acts.valid[b].sum()) - 1] for b in range(5)]
        means = [np.mean(last[:2], 0), np.mean(last[2:], 0)]
        np.testing.assert_allclose(vector.difference[layer], means[0] - means[1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vector.unit, axis=-1), 1, atol=1e-6)
    assert vector.counts == (2, 3) and vector.layers == (0, 1) and vector.place == "prompt"


@pytest.mark.heavy
def test_on_the_canvas_it_is_a_mean_over_positions_and_steps(model):
    found = interp.steering_vector(
        model, POSITIVE, NEGATIVE[:2], [1], place="canvas", positions=[1, 2], steps=[0, 3], sampler=SAMPLER
    )
    means = [
        residuals(model, prompts, [0, 0])["layers.1.resid_post"][[0, 3], :, 1:3] for prompts in (POSITIVE, NEGATIVE[:2])
    ]
    np.testing.assert_allclose(found.difference[0], means[0].mean((0, 1, 2)) - means[1].mean((0, 1, 2)), atol=1e-5)
    norms = np.mean([np.linalg.norm(x, axis=-1).mean() for x in means])
    np.testing.assert_allclose(found.norms, [norms], rtol=1e-5)
    assert interp.SteeringVector(**{**vars(found), "difference": 0 * found.difference}).unit.any() == 0


def residuals(model, prompts=((5, 6), (7, 8)), seed=(1, 2)):
    prompts = [list(prompt) for prompt in prompts]
    return interp.capture(model, prompts, "layers.*.resid_post", sampler=SAMPLER, seed=list(seed))


@pytest.mark.heavy
def test_strength_by_step_row_and_layer_is_data(model, vector):
    """Strength 0 is the identity; a schedule, strengths a row, layers and positions act there alone; one program."""
    plain = residuals(model)
    zero = residuals(interp.steer(model, vector, 0.0, sampler=SAMPLER, layers=[0]))
    np.testing.assert_array_equal(zero.tokens, plain.tokens)
    for name in plain:
        np.testing.assert_allclose(zero[name], plain[name], atol=1e-6)
    programs = loop._while._cache_size()
    steered = interp.steer(
        model, vector, [0.0, 2.0], [0.0, 0.0, 0.5, 1.0], layers=[0], positions=[3], sampler=SAMPLER
    )
    got = residuals(steered)["layers.0.resid_post"]
    base = plain["layers.0.resid_post"]
    np.testing.assert_allclose(got[:, 0], base[:, 0], atol=1e-6)  # strength 0
    np.testing.assert_allclose(got[:2, 1], base[:2, 1], atol=1e-6)  # not yet
    np.testing.assert_allclose(got[2, 1, :3], base[2, 1, :3], atol=1e-5)  # other positions
    push = 2.0 * 0.5 * np.linalg.norm(base[2, 1, 3]) * vector.unit[0]
    np.testing.assert_allclose(got[2, 1, 3] - base[2, 1, 3], push, atol=1e-4)
    again = interp.steer(model, vector, [1.0, 0.5], "falling", layers=[1], positions=slice(0, 2), sampler=SAMPLER)
    other = residuals(again)
    assert loop._while._cache_size() == programs
    np.testing.assert_allclose(other["layers.0.resid_post"][0], base[0], atol=1e-6)
    one = plain["layers.1.resid_post"][0, 0, 0]
    np.testing.assert_allclose(
        other["layers.1.resid_post"][0, 0, 0], one + np.linalg.norm(one) * vector.unit[1], atol=1e-4
    )


def test_the_difference_itself_in_the_prompt(model, vector):
    """relative=False adds the difference of means, here to the causal pass and nowhere else."""
    steered = interp.steer(model, vector, 1.5, layers=[1], place="prompt", relative=False)
    before, after = (interp.capture_prompt(m, POSITIVE + NEGATIVE, "layers.*.resid_post") for m in (model, steered))
    moved = after["layers.1.resid_post"] - before["layers.1.resid_post"]
    np.testing.assert_allclose(moved[0, :3], np.tile(1.5 * vector.difference[1], (3, 1)), atol=1e-5)
    assert "prefill" in repr(interp.describe(steered))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("constant", [1, 1, 1, 1, 1]), ("rising", [0, 0.25, 0.5, 0.75, 1]), ("falling", [1, 0.75, 0.5, 0.25, 0]),
     ("early", [1, 1, 1, 0, 0]), ("late", [0, 0, 0, 1, 1])],
)  # fmt: skip
def test_schedules_by_name(kind, wanted):
    np.testing.assert_allclose(steering.schedule(kind, 5), wanted)


def test_saved_and_loaded(model, vector, tmp_path):
    loaded = interp.SteeringVector.load(vector.save(tmp_path / "some.vector"))
    for name in vector.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(vector, name))
    assert repr(loaded).startswith("steering vector from the prompt of 2 and 3 prompts; length in residual norms")
    steered = interp.steer(model, vector, 0.5)
    interp.save_edits(steered, tmp_path / "edits")
    assert repr(interp.describe(interp.load_edits(model, tmp_path / "edits"))) == repr(interp.describe(steered))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(place="both"), "place must be one of prompt, canvas"),
        (dict(positions=[0]), "in the prompt there is one position and no step"),
        (dict(steps=[0]), "in the prompt there is one position and no step"),
        (dict(positions=-3), "a prompt has 2 tokens: no position -3"),
        (dict(layers=2), "layers has 2"),
        (dict(batch=0), "batch must be an integer of at least 1"),
    ],
)
def test_bad_input_of_the_vector(model, options, message):
    with pytest.raises(ValueError, match=message):
        interp.steering_vector(model, POSITIVE, NEGATIVE, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(place="hall"), "place must be one of prompt, canvas, both"),
        (dict(schedule="sudden"), "no schedule is named 'sudden'; there are constant, rising"),
        (dict(schedule=np.ones(3)), "strengths of length 3; there are 4"),
        (dict(layers=[0]), r"the vector has no layer 0; it has \[1\]"),
        (dict(strength=jnp.nan), "strength must be finite"),
        (dict(strength=[[1.0]]), "a number or one a row"),
    ],
)
def test_bad_input_of_steering(model, vector, options, message):
    one = interp.SteeringVector(
        difference=vector.difference[1:], norms=vector.norms[1:], layers=(1,), place="prompt", counts=(2, 3)
    )
    with pytest.raises(ValueError, match=message):
        interp.steer(model, one, **{"strength": 1.0, "sampler": SAMPLER} | options)
    with pytest.raises(ValueError, match="the vector has width 16 and layers up to 1, the model 32 and 3 layers"):
        interp.steer(dg.nn.transformer.abstract(dg.ModelConfig.tiny()), vector, 1.0)


@pytest.mark.slow
def test_a_refusal_direction_decides_refusals():
    """From the prompts of the trained model: added it makes it refuse, taken away comply; a random one does neither."""
    nano = dg.load("nano")
    sampler = nano.sampler.replace(max_denoising_steps=16)
    train, test = tasks.examples(1, 200, ["refusal"]), tasks.examples(2, 100, ["refusal"], split="test")
    harmful, harmless = (
        [[e.prompt for e in side if e.facts["refused"] == wanted and (wanted or not e.facts["harmful"])][:16]
         for side in (train, test)]
        for wanted in (True, False)
    )  # fmt: skip
    vector = interp.steering_vector(nano, harmful[0], harmless[0])
    rng = np.random.default_rng(0)
    noise = interp.SteeringVector(**{**vars(vector), "difference": rng.standard_normal((6, 128)).astype(np.float32)})
    prompts = harmless[1][:6] + harmful[1][:6]

    def refuses_and_complies(one, strength, layers):
        steered = interp.steer(nano, one, strength, layers=layers, place="prompt", sampler=sampler)
        out = dg.generate(steered, prompts, sampler=sampler, max_new_tokens=24, record=dg.Record.nothing())
        says = [text.split()[:1] for text in out.texts]
        print(strength, out.texts[0], "|", out.texts[6])
        return np.mean([w == ["i"] for w in says[:6]]), np.mean([w == ["sure"] for w in says[6:]])

    assert refuses_and_complies(vector, 0.0, [2, 3]) == (0, 0)
    assert refuses_and_complies(vector, 0.7, [2, 3])[0] >= 0.6
    assert refuses_and_complies(vector, -0.35, [1, 2, 3])[1] >= 0.6
    assert refuses_and_complies(noise, 0.7, [2, 3])[0] <= 0.2 and refuses_and_complies(noise, -0.35, [1, 2, 3])[1] <= 0.2
