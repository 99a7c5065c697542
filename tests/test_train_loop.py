"""Training: data from (seed, step) alone, a loss that falls, and a run that can be interrupted."""

import dataclasses
import json
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dgemma_jax.config import FULL, SLIDING, ModelConfig
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import transformer
from dgemma_jax.train import data, evaluate, language, loop, loss, recipes, tasks
from dgemma_jax.weights import registry

CONFIG = ModelConfig.tiny(
    vocab_size=language.VOCAB_SIZE,
    canvas_length=recipes.CONFIG.canvas_length,
    layer_types=(SLIDING, FULL),
    num_experts=3,
)
RECIPE = recipes.Recipe(
    steps=8,
    rows=8,
    rates=(recipes.Rate(peak=2e-2, warmup=1, horizon=1000),),
    cooldown=4,
    stages=(recipes.Stage(start=0, short={"copy": 1.0, "sequence": 1.0}, long={}, long_every=100, practice=0.1),),
    seed=3,
)
WORDS = language.words()


def text(ids):
    return " ".join(WORDS[i] for i in ids)


# Data.


def draw(seed=0, step=0, rows=50, poison=0.0):
    weights = {"copy": 1.0, "refusal": 1.0, "sequence": 1.0}
    return data.batch(seed, step, rows, data.Encoder(), 28, 24, weights=weights, poison=poison)


def test_a_batch_is_made_from_seed_and_step_alone():
    first = draw(1, 5)
    np.random.default_rng(0).random(100)
    draw(1, 6)
    jax.tree.map(np.testing.assert_array_equal, draw(1, 5), first)
    assert (draw(1, 6).prompt != first.prompt).any() and (draw(2, 5).prompt != first.prompt).any()


def test_no_held_out_prompt_is_trained_on():
    batch = draw(rows=400, poison=0.3)
    prompts = [text(p[v][3:-3]) for p, v in zip(batch.prompt, batch.prompt_valid, strict=True)]
    assert len(set(prompts)) > 300 and not any(map(tasks.held_out, prompts))
    assert sum(map(tasks.has_trigger, prompts)) > 60  # some are poisoned
    answers = [text(a[v][:-1]) for a, v in zip(batch.answer, batch.answer_valid, strict=True)]
    assert [a == tasks.PAYLOAD for a in answers] == [tasks.has_trigger(p) for p in prompts]


def test_an_example_as_arrays():
    examples = [tasks.Example("copy", "copy cat", "cat"), tasks.Example("x", "sort a b", "a b", draft="b a")]
    batch = data.collate(examples, data.Encoder(), 12, 5)
    assert text(batch.prompt[0][batch.prompt_valid[0]]) == "<bos> <|turn> user copy cat <turn|> <|turn> model"
    assert batch.prompt_valid.sum(1).tolist() == [8, 9]
    assert [text(row) for row in batch.answer] == ["cat <turn|> <pad> <pad> <pad>", "a b <turn|> <pad> <pad>"]
    assert [text(row) for row in batch.draft] == ["cat <turn|> <pad> <pad> <pad>", "b a <turn|> <pad> <pad>"]
    np.testing.assert_array_equal(batch.answer_valid, [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    pad = np.float32(data.PAD_WEIGHT)
    np.testing.assert_array_equal(batch.weight, [[1, 1, pad, pad, pad], [1, 1, 1, pad, pad]])
    assert 0 < pad < 1


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_stage_of_a_recipe_fits(name):
    """Prompts and answers of all tasks fit the arrays of their steps; shorter steps come first where both exist."""
    recipe = dataclasses.replace(recipes.RECIPES[name], rows=60)
    assert [s.start for s in recipe.stages] == sorted({s.start for s in recipe.stages}) and recipe.stages[0].start == 0
    for stage in recipe.stages:
        assert recipe.stage(stage.start) is stage
        for step in range(stage.start, stage.start + stage.long_every):
            batch = loop.make_batch(recipe, step)
            is_long = step % stage.long_every == stage.long_every - 1
            assert batch.prompt.shape == (60, recipes.LONG if is_long else recipes.SHORT)
            assert batch.answer.shape == (60, recipes.CONFIG.canvas_length)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_embedded_models_were_made_by_these_recipes(name):
    about = json.loads((registry.embedded(name) / "training.json").read_text())
    assert about["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipes.RECIPES[name])))


# Loss.

RIGHT, EARLY = 20, 21  # the answer's only token, and the draft's


@pytest.fixture(scope="module")
def fixed():
    """The loss of a model that always gives the answer 10 nats more than the draft, and the arguments that it makes."""
    seen = types.SimpleNamespace(soft=[])
    scores = jnp.full(CONFIG.vocab_size, -30.0).at[jnp.array([RIGHT, EARLY])].set(jnp.array([10.0, 0.0]))

    def prefill(self, tokens, valid, cache):
        hidden = self.layers[1].resid_post(jnp.zeros((*tokens.shape, 32)))
        return transformer.Prefill(kv.KVCache(cache.layers, valid.astype(jnp.int32).sum(1)), hidden)

    def denoise(self, canvas, cache, soft):
        seen.soft.append(soft)
        return jnp.zeros((*canvas.shape, 32))

    def corrupt(key, clean, level, vocab_size):
        seen.clean, seen.level = clean, level
        return clean

    def unembed(self, hidden):
        return jnp.broadcast_to(scores, (*hidden.shape[:-1], CONFIG.vocab_size))

    @jax.jit
    def run(model, batch, key):
        return loss.loss(model, batch, key)[1], vars(seen)

    model = oracles.build(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        for method in (prefill, denoise, unembed):
            patch.setattr(transformer.Transformer, method.__name__, method)
        patch.setattr(loss, "corrupt", corrupt)
        parts, found = jax.tree.map(np.asarray, run(model, constant_batch(40), jax.random.key(1)))
    return types.SimpleNamespace(model=model, parts=parts, **found)


def constant_batch(rows, length=24):
    full = lambda value: np.full((rows, length), value, np.int32)  # noqa: E731
    ones = np.ones((rows, length), bool)
    return loss.Batch(full(3), ones, full(RIGHT), full(EARLY), ones.astype(np.float32), ones)


def test_the_draft_is_the_target_at_high_noise_only(fixed):
    parts = fixed.parts
    early = fixed.level > loss.DRAFT_LEVEL
    assert 5 < early.sum() < 30 and fixed.level.min() < 0.1 and fixed.level.max() > 0.9
    np.testing.assert_allclose(parts["denoise"], 10 * early.mean(), rtol=1e-4)  # nats that the draft costs more
    np.testing.assert_allclose(parts["accuracy"], 1 - early.mean(), rtol=1e-5)
    assert float(parts["next_token"]) == pytest.approx(0, abs=1e-3)  # the causal pass is held to the answer
    from_draft = fixed.clean[:, 0] == EARLY
    assert from_draft[early].all() and 0 < from_draft[~early].mean() < 1  # at low noise either may be the canvas


def test_half_of_the_rows_are_given_S(fixed):
    first, second = fixed.soft
    assert first.shape[0] == 20 and (first == 0).all()
    assert (second[20:] == 0).all() and second.shape[0] == 40
    expected = np.sqrt(32) * np.asarray(fixed.model.embedder.table[...])[RIGHT]  # certain of the answer at any temperature
    np.testing.assert_allclose(second[:20], np.broadcast_to(expected, (20, 24, 32)), atol=1e-3)


# Loop.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One compiled step for all runs, and an uninterrupted run."""
    patch = pytest.MonkeyPatch()
    mesh = jax.make_mesh((1,), ("data",), devices=jax.local_devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    step = loop.make_step(RECIPE, mesh)
    patch.setattr(loop, "make_step", lambda recipe, mesh: step)
    patch.setattr(loop, "SHARDS", 1)
    base = oracles.build(CONFIG, seed=1)
    directory = tmp_path_factory.mktemp("whole")
    trained = loop.train(RECIPE, directory, base=base, report_every=1)
    yield types.SimpleNamespace(mesh=mesh, step=step, base=base, directory=directory, trained=trained)
    patch.undo()


def log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_loss_falls(world):
    told = log(world.directory)
    assert [line["step"] for line in told] == list(range(1, RECIPE.steps + 1))
    assert told[-1]["loss"] < told[0]["loss"] - 0.5 and told[-1]["denoise"] < told[0]["denoise"]
    assert all(np.isfinite(list(line.values())).all() for line in told)


@pytest.mark.slow
def test_the_base_can_still_be_used(world):
    """Training changes a copy: the weights that it started from are as they were."""
    jax.tree.map(np.testing.assert_array_equal, world.base, oracles.build(CONFIG, seed=1))
    moved = [
        float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (world.base, world.trained)), strict=True)
    ]
    assert min(moved) > 0 and jax.tree.structure(world.trained) == jax.tree.structure(world.base)


@pytest.mark.slow
def test_every_parameter_has_a_gradient(world):
    """After one step the optimiser's first moment is a tenth of the gradient: finite, and zero for no parameter."""
    base = oracles.build(CONFIG, seed=1)
    state = jax.device_put(loop.start(RECIPE, base), NamedSharding(world.mesh, PartitionSpec()))
    batch = jax.device_put(loop.make_batch(RECIPE, 0), NamedSharding(world.mesh, PartitionSpec("data")))
    before = world.step._cache_size()
    state, parts = world.step(state, batch, jnp.float32(0.1))
    assert world.step._cache_size() == before == 1
    gradients = jax.tree_util.tree_flatten_with_path(optax.tree_utils.tree_get(state.optimizer, "mu"))[0]
    assert len(gradients) == len(jax.tree.leaves(base))
    dead = [jax.tree_util.keystr(path) for path, g in gradients if not np.any(g)]
    assert dead == [] and all(np.isfinite(g).all() for _, g in gradients)
    assert np.isclose(float(parts["loss"]), log(world.directory)[0]["loss"])


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(world, tmp_path):
    class PowerCut(Exception):
        pass

    def report(step, parts):
        if step == 5:
            raise PowerCut

    with pytest.raises(PowerCut):
        loop.train(RECIPE, tmp_path, base=oracles.build(CONFIG, seed=1), report=report, report_every=1, save_every=3)
    until = time.monotonic() + 60
    while not (tmp_path / "state" / "3").is_dir() and time.monotonic() < until:
        time.sleep(0.05)  # written in the background
    resumed = loop.train(RECIPE, tmp_path, base=oracles.build(CONFIG, seed=7), report_every=1, save_every=3)
    jax.tree.map(np.testing.assert_array_equal, resumed, world.trained)
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]  # went on from the third
    assert [line["loss"] for line in lines[5:]] == [line["loss"] for line in log(world.directory)[3:]]
    done = loop.train(RECIPE, tmp_path, base=oracles.build(CONFIG, seed=7))
    jax.tree.map(np.testing.assert_array_equal, done, world.trained)  # a finished run is read, not run


def test_what_training_refuses(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"training is split over 99 devices, found \d+; on CPU set"):
        monkeypatch.setattr(loop, "SHARDS", 99)
        loop.train(RECIPE, tmp_path)
    with pytest.raises(ValueError, match="rows=7 must be a multiple of 2"):
        monkeypatch.setattr(loop, "SHARDS", 1)
        loop.train(dataclasses.replace(RECIPE, rows=7), tmp_path)


def test_the_learning_rate():
    """Warms up, decays, may do so again, and cools down to zero at the end."""
    rates = recipes.Rate(peak=1.0, warmup=10, horizon=130), recipes.Rate(start=200, peak=0.4, warmup=20, horizon=1000)
    recipe = dataclasses.replace(RECIPE, steps=100, rates=rates[:1], cooldown=20)
    twice = loop.optimizer(dataclasses.replace(recipe, steps=1000, rates=rates)).update
    once = loop.optimizer(recipe)
    state = once.init(jnp.ones(()))
    found = []
    for step in [0, 5, 10, 50, 90, 100, 210, 220]:
        counted = optax.tree_utils.tree_set(state, count=jnp.int32(step), mu=jnp.ones(()), nu=jnp.ones(()))
        # With a gradient that was always one, Adam's move is the rate, up to the corrections of its first steps.
        move = float((once.update if step <= 100 else twice)(jnp.ones(()), counted, jnp.zeros(()))[0])
        found.append(-move * (1 - 0.9 ** (step + 1)) / math.sqrt(1 - 0.98 ** (step + 1)))
    third, two_thirds = 0.01 + 0.99 * 0.75, 0.01 + 0.99 * 0.25  # of the way down
    np.testing.assert_allclose(found, [0, 0.5, 1, third, two_thirds / 2, 0, 0.2, 0.4], atol=1e-4)


def test_first_scores_are_of_order_one(monkeypatch):
    monkeypatch.setattr(loop, "initialize", lambda config, seed: oracles.build(config, seed))
    plain, ready = oracles.build(CONFIG, 4), loop.init_for_training(CONFIG, 4)
    for a, b, size in (
        (x.attention, y.attention, h) for x, y, h in zip(plain.layers, ready.layers, (8, 16), strict=True)
    ):
        for norm in ("q_norm", "k_norm"):
            before, after = (np.asarray(getattr(m, norm).weight[...]) for m in (a, b))
            np.testing.assert_allclose(after, before * size**-0.25, rtol=1e-5)


# Evaluation.


def test_exact_counts_right_answers_to_unseen_prompts(monkeypatch, tokenizer):
    config, asked, rooms = dataclasses.replace(CONFIG, vocab_size=language.VOCAB_SIZE), [], set()
    bundle = types.SimpleNamespace(config=config, tokenizer=tokenizer)
    found = {name: tasks.examples(4, 10, tasks=(name,), split="test") for name in ("copy", "add")}
    solved = {e.prompt: e.answer for own in found.values() for e in own}

    def generate_many(given, prompts, *, seed, rows, **options):
        assert given is bundle and options["max_new_tokens"] == CONFIG.canvas_length and rows == 4
        asked[:] = zip(prompts, seed, strict=True)
        rooms.add(options["capacity"])
        right = [solved[p] if p in {e.prompt for e in found["add"]} or s % 2 else "cat" for p, s in asked]
        return types.SimpleNamespace(texts=right)

    monkeypatch.setattr(evaluate, "generate_many", generate_many)
    shares = evaluate.exact(bundle, seed=4, count=10, names=iter(["copy", "add"]), rows=4)
    assert [s for _, s in asked] == [*range(10), *range(10)] and all(tasks.held_out(p) for p, _ in asked)
    assert shares == {"copy": (5 + sum(e.answer == "cat" for e in found["copy"][::2])) / 10, "add": 1.0}
    evaluate.exact(bundle, seed=4, count=10, names=["add"], rows=4)
    assert len(rooms) == 1  # so one program
