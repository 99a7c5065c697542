"""Sets of activations, autoencoders and directions in a model: what they hold is what the run had."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import loop
from interp.features import lifetimes, projection
from interp.features.activation_sets import CANVAS, PROMPT
from interp.taps import tapped

C, D, R, F = 4, 16, 3, 2 * 16
CONFIG = dg.ModelConfig.tiny(
    layer_types=("full_attention",), canvas_length=C, embed_dim=D, vocab_size=32, hidden_dim=16, sliding_window=4
)
SAMPLER = dg.SamplerConfig(max_denoising_steps=R, eos_token_ids=(1,), early_stop=False, entropy_bound=1.0)
PROMPTS = [[5, 6], [7, 8, 9], [3, 4]]
SITE = "layers.0.resid_post"


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG)


def run_of(model, seeds=(1, 2, 3)):
    """The run of all prompts, with the site, what was accepted and the canvases."""
    record = dataclasses.replace(dg.Record.nothing(), tokens=True, accepted=True)
    return dg.generate(tapped(model, SITE)[0], PROMPTS, list(seeds), SAMPLER, C, record)


@pytest.fixture(scope="module")
def perfect():
    """An autoencoder that misses nothing: a feature for each direction and its opposite."""
    both = jnp.concatenate([jnp.eye(D), -jnp.eye(D)], 1)
    zeros = jnp.zeros
    return interp.SAE(
        w_enc=both, b_enc=zeros(F), w_dec=both.T, b_dec=zeros(D), threshold=zeros(F), kind="jumprelu", k=0
    )


# Sets of activations.

COLLECT = dict(sampler=SAMPLER, batch=2, samples=5, seed=3, places=("canvas", "prompt"))


@pytest.fixture(scope="module")
def collected(model, tmp_path_factory):
    return interp.collect_activations(model, PROMPTS, SITE, tmp_path_factory.mktemp("set") / "a", **COLLECT)


def test_a_set_holds_what_the_run_had(model, collected):
    """Every sample is found again in a capture of its prompt under its seed, with its step, position and token."""
    from interp.features.collecting import _mixed

    seeds = [_mixed(3, row, 0) for row in range(3)]
    out = run_of(model, seeds)
    acts = out.trajectory.sites[SITE][0]
    prompt = interp.capture_prompt(model, PROMPTS, SITE)[SITE]
    run, column = out.trajectory, collected.columns
    values = collected.values(SITE)
    assert len(collected) == 3 * 5 + 7 and values.dtype == np.float32  # prompts have 2, 3 and 2 tokens
    for n in range(len(collected)):
        row, step, at = column["row"][n], column["step"][n], column["position"][n]
        if column["place"][n] == PROMPT:
            np.testing.assert_allclose(values[n], prompt[row, at], atol=1e-6)
            assert step == -1 and column["token"][n] == PROMPTS[row][at]
            continue
        np.testing.assert_allclose(values[n], acts[step, row, at], atol=1e-6)
        fed = run.tokens[0, step - 1] if step else run.start[0]
        noise = 1 - run.accepted[0, step - 1, row].mean() if step else 1.0
        assert column["token"][n] == fed[row, at] and column["noise"][n] == pytest.approx(noise)
        assert column["accepted"][n] == run.accepted[0, step, row, at]
        assert column["answer"][n] == out.tokens[row, at]
    assert len(set(zip(*(column[c] for c in ("row", "step", "position", "place")), strict=True))) == len(collected)
    np.testing.assert_array_equal(collected.noise_by_step()[0], 1)


def test_a_set_goes_on_after_a_kill(model, collected, tmp_path):
    """Without its last shard and with half a one, it becomes the same set; other settings are refused."""
    shutil.copytree(collected.directory, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "shard-00001")
    (tmp_path / "a" / "shard-00001.part").mkdir()
    half = interp.ActivationSet.load(tmp_path / "a")
    assert not half.is_whole and collected.is_whole and len(half) < len(collected)
    programs = loop._while._cache_size()
    again = interp.collect_activations(model, PROMPTS, SITE, tmp_path / "a", **COLLECT)
    assert loop._while._cache_size() == programs
    np.testing.assert_array_equal(again.values(SITE), collected.values(SITE))
    for name in again.columns:
        np.testing.assert_array_equal(again.columns[name], collected.columns[name])
    with pytest.raises(ValueError, match="holds another set"):
        interp.collect_activations(model, PROMPTS, SITE, tmp_path / "a", **COLLECT | {"seed": 4})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no set"):
        interp.collect_activations(model, PROMPTS, SITE, tmp_path / "b", **COLLECT)
    with pytest.raises(ValueError, match="has no manifest.json"):
        interp.ActivationSet.load(tmp_path)


def test_batches_and_choices(collected):
    canvas = collected.where(place=CANVAS, step=[0, 1])
    assert set(collected.columns["step"][canvas]) <= {0, 1} and len(canvas)
    drawn = collected.batches(SITE, 4, seed=1, which=np.arange(8))
    passes = [next(drawn) for _ in range(4)]
    assert sorted(np.concatenate([n for _, n in passes[:2]])) == list(range(8))
    np.testing.assert_array_equal(passes[0][0], collected.values(SITE, passes[0][1]))
    assert isinstance(collected.mapped(SITE, 0), np.memmap) and "1 sites" in repr(collected)
    for call, message in (
        (lambda: collected.where(colour=1), "there is no column 'colour'"),
        (lambda: collected.values("layers.0.resid_pre"), "was not collected"),
        (lambda: collected.values(SITE, [99]), "samples go from 0 to 21"),
        (lambda: next(collected.batches(SITE, 99)), "a batch of 99 is asked for, 22 samples are there"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_mixes():
    """Balanced: as many of the rare class as of the frequent one. Natural: as they occur."""
    from interp.features.activation_sets import COLUMNS
    from interp.features.collecting import _draw

    shape = (1, 1, 1000)
    accepted = (np.arange(1000) < 100).reshape(shape)
    part = {name: np.zeros(shape, kind) for name, kind in COLUMNS.items()}
    part |= {"accepted": accepted, "is": np.ones(shape, bool), "values": {"x": np.zeros((*shape, 2))}, "draw": 0}
    share = {mix: _draw(part, 100, mix, 0)["accepted"].mean() for mix in ("balanced", "natural")}
    assert abs(share["balanced"] - 0.5) < 0.12 and abs(share["natural"] - 0.1) < 0.08


def test_chosen_noise_levels(model, tmp_path):
    """Answers corrupted at a level are what one step reads: at level 0 nothing is noise, at 1 nearly all."""
    answers = np.asarray([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    found = interp.collect_activations(
        model, PROMPTS, SITE, tmp_path / "n", levels=[0.0, 1.0], answers=answers, samples=9, batch=2, sampler=SAMPLER
    )
    assert len(found) == 2 * 3 * C
    clean = found.where(accepted=True)
    assert set(found.columns["noise"]) >= {0.0} and found.columns["noise"].max() > 0.7
    np.testing.assert_array_equal(found.columns["token"][clean], found.columns["answer"][clean])
    row1 = found.where(row=1, noise=0.0)
    np.testing.assert_array_equal(found.columns["token"][row1], answers[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mix="even"), "mix must be one of balanced, natural"),
        (dict(places="canvas"), "places must be a list of canvas, prompt"),
        (dict(samples=0), "samples must be an integer of at least 1"),
        (dict(levels=[1.5]), "levels must be shares of noise in 0..1"),
        (dict(answers=[[1, 2]]), r"answers has shape \(1, 2\); needed is \(3, 4\)"),
    ],
)
def test_bad_input_of_sets(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        interp.collect_activations(model, PROMPTS, SITE, tmp_path, **options)
    with pytest.raises(ValueError, match="a set holds values of positions"):
        interp.collect_activations(model, PROMPTS, "layers.0.attn_pattern", tmp_path)


# Autoencoders in the model.


@pytest.fixture(scope="module")
def plain(model):
    """[R, B, C, D] residuals of the run, and the run."""
    run = run_of(model)
    return run.trajectory.sites[SITE][0], run


def residuals(model):
    return run_of(model).trajectory.sites[SITE][0]


def test_features_taken_out_and_turned_up(model, perfect, plain):
    """Factor 1 changes nothing; a feature out is its direction gone; the schedule opens the steps it names."""
    x, run = plain
    nothing = interp.steer_features(model, perfect, SITE, [3], 0.0, schedule="constant", sampler=SAMPLER)
    same = run_of(nothing)
    np.testing.assert_array_equal(same.tokens, run.tokens)
    np.testing.assert_allclose(same.trajectory.sites[SITE][0], x, atol=1e-6)
    programs = loop._while._cache_size()
    steered = interp.steer_features(model, perfect, SITE, [3], 2.0, schedule=[1.0, 0.0, 0.0], sampler=SAMPLER)
    got = residuals(steered)
    assert loop._while._cache_size() == programs  # feature, strength and schedule are data
    strongest = np.abs(x[0]).max(-1, keepdims=True)
    np.testing.assert_allclose(got[0], x[0] + 2 * strongest * np.eye(D)[3], atol=1e-4)
    late = interp.steer_features(model, perfect, SITE, [3], 2.0, schedule=[0.0, 0.0, 1.0], sampler=SAMPLER)
    np.testing.assert_allclose(residuals(late)[:2], x[:2], atol=1e-6)
    gone = interp.ablate_features(model, perfect, SITE, [3, D + 3], steps=[0], sampler=SAMPLER)
    np.testing.assert_allclose(residuals(gone)[0], x[0] * (np.arange(D) != 3), atol=1e-5)
    assert loop._while._cache_size() == programs


@pytest.mark.slow
def test_spliced_in(model, perfect, plain):
    """A perfect autoencoder changes nothing; one that knows nothing is zero ablation; the loss says so by level."""
    answers = plain[1].tokens[:, :C]
    options = dict(answers=answers, levels=[0.2, 0.8], batch=2, settings=SAMPLER)
    found = interp.spliced_loss(model, perfect, SITE, PROMPTS, **options)
    np.testing.assert_allclose(found.spliced, found.plain, atol=1e-5)
    np.testing.assert_allclose(found.recovered, 1, atol=1e-3)
    empty = dataclasses.replace(perfect, w_dec=jnp.zeros((F, D)))
    none = interp.spliced_loss(model, empty, SITE, PROMPTS, **options)
    np.testing.assert_allclose(none.spliced, none.zeroed, atol=1e-5)
    np.testing.assert_allclose(none.plain, found.plain, atol=1e-6)
    assert np.abs(none.zeroed - none.plain).max() > 1e-3 and "recovered" in repr(found)
    shifted = dataclasses.replace(perfect, shift=jnp.zeros((2, F)), edges=jnp.asarray([0.5]))
    by_step = interp.splice_sae(model, shifted, SITE, noise=[1.0, 0.4, 0.1], sampler=SAMPLER)
    np.testing.assert_allclose(residuals(by_step), plain[0], atol=1e-5)
    with pytest.raises(ValueError, match="needs noise, the level of each step"):
        interp.splice_sae(model, shifted, SITE)
    with pytest.raises(ValueError, match="it must read and write the site's width"):
        interp.splice_sae(model, perfect, "logits")
    with pytest.raises(ValueError, match=r"features must be in 0..31, got \[32\]"):
        interp.ablate_features(model, perfect, SITE, [32])
    with pytest.raises(ValueError, match="give either schedule or steps"):
        interp.ablate_features(model, perfect, SITE, [3], schedule="late", steps=[0])


@pytest.mark.heavy
def test_life_over_steps(model, perfect, plain):
    found = interp.feature_life(model, perfect, SITE, PROMPTS, k=3, batch=2, seed=1, sampler=SAMPLER)
    x, run = plain
    z = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
    np.testing.assert_allclose(found.activation, z.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.active, (z > 0).mean((1, 2)), atol=1e-6)
    accepted = run.trajectory.accepted[0]
    sets = np.argsort(-z, -1, kind="stable")[..., :3]
    fluid = ~accepted[0]
    pairs = lifetimes.jaccard(sets[1], sets[0])
    np.testing.assert_allclose(found.stability[1], pairs[fluid].mean(), atol=1e-6)
    np.testing.assert_allclose(found.drift[1], 1 - pairs[accepted[0]].mean(), atol=1e-6)
    most = found.activation.max(0)
    assert all(found.activation[found.rise[f], f] >= most[f] / 2 for f in range(F) if most[f] > 0)
    assert list(found.prompts) == [3] * R and np.isnan(found.stability[0]) and len(found.plot().axes) == 2


def test_jaccard_by_hand():
    left = np.asarray([[1, 2, 3], [1, -1, -1], [-1, -1, -1], [-1, -1, -1]])
    right = np.asarray([[3, 4, 1], [2, -1, -1], [-1, -1, -1], [5, -1, -1]])
    np.testing.assert_allclose(lifetimes.jaccard(left, right), [0.5, 0, 1, 0])


def test_top_contexts(perfect, collected):
    found = interp.top_contexts(perfect, collected, SITE, [2, D + 2], 4, at_once=8)
    values = collected.values(SITE)[:, 2]
    order = np.argsort(-values)[:4]
    assert [c.activation for c in found[2]] == pytest.approx(values[order])
    assert [c.token for c in found[2]] == collected.columns["token"][order].tolist()
    assert all(c.activation > 0 for c in found[D + 2]) and len(found[D + 2]) <= 4


# Directions.


@pytest.mark.slow
def test_a_direction_removed_from_the_stream(model, plain):
    """Each row of a batch has its own direction; what is left along it is the target, at every step."""
    u, v = np.random.default_rng(0).standard_normal((2, D))
    rows, targets = np.stack([u, v, u])[:, None], np.asarray([[0.0], [0.0], [0.7]])
    got = residuals(interp.ablate_directions(model, rows, targets=targets, sampler=SAMPLER))
    np.testing.assert_allclose(got[:, 0] @ u, 0, atol=1e-4)
    np.testing.assert_allclose(got[:, 1] @ v, 0, atol=1e-4)
    np.testing.assert_allclose(got[:, 2] @ u / np.linalg.norm(u), 0.7, atol=1e-4)
    assert np.abs(got[:, 1] @ u).max() > 0.1 and np.abs(got[:, 0] - plain[0][:, 0]).max() > 0.1
    basis = projection.orthonormal_rows(model, np.stack([u, v, u + v]))[0]
    np.testing.assert_allclose(basis @ basis.T, np.diag([1, 1, 0]), atol=1e-5)  # u + v adds nothing to the span
    np.testing.assert_allclose(basis.T @ (basis @ v), v, atol=1e-4)
    rest = interp.resting_components(model, u, PROMPTS, SITE, sampler=SAMPLER)
    assert set(rest) == {"prefill", "denoise"} and rest["prefill"][SITE].shape == (1,)
    edited = interp.ablate_directions(model, u, SITE, targets=rest, sampler=SAMPLER)
    assert len(interp.describe(edited)) == 2
    for bad, message in ((np.zeros(D), "zero or not finite"), (np.ones(3), r"needed is \[16\], \[n, 16\]")):
        with pytest.raises(ValueError, match=message):
            interp.ablate_directions(model, bad)


@pytest.mark.heavy
def test_projected_weights_are_ablated_writes(model):
    """The same logits; nothing that a layer writes lies along the direction; the model given stays as it was."""
    u = np.random.default_rng(1).standard_normal(D)
    projected, edited = interp.orthogonalized(model, u), interp.ablate_writes(model, u)

    @jax.jit
    def both(model):
        """Logits, and the prompt's residuals."""
        prompt = dg.prefill(tapped(model, "layers.0.resid_*", phase="prefill")[0], jnp.asarray([[7, 8, 9]]))
        return dg.denoise(model, jnp.asarray([[5, 9, 2, 30]]), prompt.cache, jnp.ones((1, C, D))), prompt.sites

    (logits, acts), (wanted, _), (plain, _) = (jax.tree.map(np.asarray, both(m)) for m in (projected, edited, model))
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    assert np.abs(logits - plain).max() > 1e-2
    pre, mid, post = (acts[f"layers.0.resid_{at}"][0] for at in ("pre", "mid", "post"))
    np.testing.assert_allclose((mid - pre) @ u, 0, atol=1e-4)
    np.testing.assert_allclose((post / float(model.layers[0].prefill_scalar[0]) - mid) @ u, 0, atol=1e-4)
    for left, right in zip(jax.tree.leaves(model), jax.tree.leaves(oracles.build(CONFIG)), strict=True):
        np.testing.assert_array_equal(left, right)
    with pytest.raises(ValueError, match="no weights to project"):
        interp.orthogonalized(dg.nn.transformer.abstract(CONFIG), u)


SETS = PROMPTS[:2], [[11, 12], [13, 14, 15]]


def test_candidates_are_differences_of_means(model):
    found = interp.find_directions(model, *SETS, steps=2, batch=2, sampler=SAMPLER)
    assert found.places == (("prompt", -1, 0), ("canvas", 0, 0), ("canvas", 1, 0))
    pooled = [interp.pool_residuals(model, p, steps=2, batch=2, sampler=SAMPLER) for p in SETS]
    x = [p.canvas[0, 1, 0].mean(0) for p in pooled]
    np.testing.assert_allclose(found.vectors[2], x[0] - x[1], atol=1e-5)
    np.testing.assert_allclose(found.vectors[0], pooled[0].prompt[0].mean(0) - pooled[1].prompt[0].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="no direction is chosen yet"):
        _ = found.best
    with pytest.raises(ValueError, match="texts are judged, so a tokenizer is needed"):
        interp.select_directions(model, found, *SETS, str.isalpha)


@pytest.mark.slow
def test_the_denoising_field_is_the_derivative_of_the_step(model):
    """The response equals a finite difference of real steered steps; at level 1 the field is that of noise."""
    u = np.random.default_rng(2).standard_normal(D)
    answers = np.asarray([[5, 6, 7, 8], [9, 10, 11, 12]])
    options = dict(levels=[0.0, 1.0], settings=SAMPLER)
    found = interp.denoising_field(model, u, 0, PROMPTS[:2], answers, **options)
    one_step = SAMPLER.replace(max_denoising_steps=1)
    vector = interp.SteeringVector(
        difference=u[None].astype(np.float32), norms=np.ones(1), layers=(0,), place="canvas", counts=(1, 1)
    )

    def soft(strength):
        pushed = interp.steer(model, vector, strength, sampler=one_step)
        record = dataclasses.replace(dg.Record.nothing(), soft=True)
        run = dg.generate(pushed, PROMPTS[:2], [0, 1], one_step, C, record, canvas=answers).trajectory
        return run.soft[0, 0].astype(np.float64).mean((0, 1))

    by_hand = (soft(2e-3) - soft(-2e-3)) / 4e-3
    np.testing.assert_allclose(found.soft[0], by_hand, atol=2e-2 * np.abs(by_hand).max())
    embedded = np.asarray(model.embedder.lookup(jnp.asarray(answers))).mean((0, 1))
    np.testing.assert_allclose(found.field[0], soft(0.0) - embedded, atol=1e-4)
    assert found.logits.shape == (2, 32) and (np.abs(found.cosine) <= 1).all() and (found.strength > 0).all()
    flipped = interp.denoising_field(model, -u, 0, PROMPTS[:2], answers, **options)
    np.testing.assert_allclose(flipped.soft, -found.soft, atol=1e-5)
    with pytest.raises(ValueError, match="layer must be in 0..0"):
        interp.denoising_field(model, u, 1, PROMPTS[:2], answers)


def test_results_are_saved(tmp_path, model, perfect):
    life = interp.FeatureLife(
        activation=np.ones((2, 3)), active=np.ones((2, 3)), stability=np.ones(2), drift=np.ones(2), prompts=np.ones(2)
    )
    loss = interp.SplicedLoss(levels=(0.1,), plain=np.ones((1, 2)), spliced=np.ones((1, 2)), zeroed=np.ones((1, 2)))
    field = interp.DenoisingField(
        levels=(0.1,), field=np.ones((1, D)), soft=np.ones((1, D)), logits=np.ones((1, 5)), strength=np.ones(1),
        cosine=np.ones(1),
    )  # fmt: skip
    found = interp.Directions(
        vectors=np.eye(2, D, dtype=np.float32), places=(("prompt", -1, 0), ("canvas", 1, 1)), norms=np.ones(2),
        still=np.asarray([1, 0.0]), changed=np.zeros(2), chosen=(1,),
    )  # fmt: skip
    for result in (life, loss, field, found):
        again = type(result).load(result.save(tmp_path / "one"))
        assert repr(again) == repr(result)
    assert "canvas 1, layer 1" in repr(found) and found.table().splitlines()[1].endswith("*")
    np.testing.assert_array_equal(found.best, found.vectors[1:])
    assert len(found.plot().axes) == 1 and len(field.plot().axes) == 2
    assert json.dumps(found.places) and projection.STREAM[0] == "layers.0.resid_pre"
