"""Generation with a real (tiny, random) model: rows, loops, seeds, moments and the one compile."""

import dataclasses
import json

import jax
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
from dgemma_jax.config import FULL, SLIDING, ModelConfig, SamplerConfig
from dgemma_jax.diffusion import loop, noise

C, N, J = 6, 4, 3
CONFIG = ModelConfig.tiny(layer_types=(SLIDING, FULL), sliding_window=5, canvas_length=C, vocab_size=64, num_experts=4)
# Bounds under which a random model accepts several tokens a step and stops now and then before the cap.
SAMPLER = SamplerConfig(
    max_denoising_steps=N, entropy_bound=1.0, confidence_threshold=0.3, stability_threshold=0, eos_token_ids=(1, 5, 7)
)
PROMPTS = [[3, 4, 5], list(range(20, 32)), [9] * 7]
SEEDS = [11, 12, 13]


def probe(view):
    """All that goes into a step, and its logits."""
    return {"canvas": view.canvas, "soft": view.soft, "logits": view.logits}


RECORD = dg.Record(soft=True, fn=probe)


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG, seed=2, sharpness=6)


def run(model, prompts=PROMPTS, seeds=SEEDS, sampler=SAMPLER, tokens=J * C, how=dg.generate, **options):
    return how(model, prompts, seeds, sampler, tokens, RECORD, **options)


@pytest.fixture(scope="module")
def out(model):
    return run(model)


def row(out, b):
    """All that the run says of row `b`, by name; only what was run."""
    t = out.trajectory
    ran = t.valid[:, :, b]
    by_step = {n: x[:, :, b][ran] for n, x in t.arrays().items() if x.ndim > 2 and x.shape[:3] == t.valid.shape}
    took = t.num_steps[:, b] > 0
    by_block = {n: getattr(t, n)[took, b] for n in ("start", "committed", "num_steps", "stop")}
    return by_step | by_block | {"all tokens": out.tokens[b, : took.sum() * C], "all steps": out.num_steps[b]}


def same(a, b, atol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=1e-4, err_msg=name)


def test_the_run_is_worth_testing(out):
    """Rows differ in steps and blocks; both stop rules, end tokens, part and whole canvases accepted all occur."""
    t = out.trajectory
    assert len(np.unique(t.num_steps)) >= 3 and {(t.num_steps[:, b] > 0).sum() for b in range(3)} >= {1, J}
    assert {"eos", "max_new_tokens"} == set(out.stop_reason) and set(np.unique(t.stop)) >= {1, 2}
    counts = t.accepted[t.valid].sum(-1)
    assert counts.min() < C == counts.max()
    dropped = t.accepted[:, :-1] & ~t.accepted[:, 1:] & (t.valid[:, :-1] & t.valid[:, 1:])[..., None]
    assert dropped.any()  # an accepted position is given up again


def test_one_compile_for_all_data(model, out):
    """Other prompts, lengths, seeds, weights, settings of the sampler and blocks share the programs of the loop."""
    before = loop._while._cache_size()
    other = oracles.build(CONFIG, seed=3, sharpness=6)
    gentle = SAMPLER.replace(entropy_bound=0.2, t_max=0.9, confidence_threshold=0.01)
    for new, prompts, sampler in ((model, [[8, 9], [3] * 11, [4]], SAMPLER), (other, PROMPTS, gentle)):
        assert run(new, prompts, [5, 6, 7], sampler).tokens.shape[0] == 3
    assert loop._while._cache_size() == before > 0


def test_the_compiled_loop_is_the_python_loop(model, out):
    twin = run(model, how=dg.generate_python)
    np.testing.assert_array_equal(twin.tokens, out.tokens)
    arrays, expected = twin.trajectory.arrays(), out.trajectory.arrays()
    assert arrays.keys() == expected.keys()
    for name in arrays:
        np.testing.assert_allclose(arrays[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
        assert arrays[name].dtype == expected[name].dtype


def test_steps_are_what_the_oracle_computes(model, out):
    """The whole chain, of the row that ran longest: prompt, committed blocks, noisy canvas and S to logits."""
    b = int(np.argmax((out.trajectory.num_steps > 0).sum(0)))
    numbers, t = oracles.Numbers(CONFIG, model), out.trajectory
    known = list(PROMPTS[b])
    for block in range(2):
        _, memory = numbers.causal(known)
        canvas, soft = t.start[block, b], np.zeros((C, 32))
        for step in range(t.num_steps[block, b]):
            np.testing.assert_array_equal(t.fn["canvas"][block, step, b], canvas)
            np.testing.assert_allclose(t.fn["soft"][block, step, b], soft, atol=1e-3)
            logits = numbers.logits(numbers.canvas(canvas, soft, memory))
            np.testing.assert_allclose(t.fn["logits"][block, step, b], logits, atol=2e-2)
            shaped = t.fn["logits"][block, step, b].astype(float) / t.temperature[block, step, b]
            np.testing.assert_allclose(t.entropy[block, step, b], oracles.entropy(shaped), atol=1e-4)
            soft = 32**0.5 * oracles.softmax(shaped) @ np.asarray(model.embedder.table[...], float)
            np.testing.assert_allclose(t.soft[block, step, b], soft, atol=1e-3)
            canvas = t.tokens[block, step, b]
        known += list(t.committed[block, b])


def test_a_row_depends_on_its_prompt_and_seed_alone(model, out):
    """Other company, another order: the same row. An equal prompt with an equal seed is the same text."""
    moved = run(model, [PROMPTS[i] for i in (2, 0, 0)], [SEEDS[i] for i in (2, 0, 0)])
    for here, there in enumerate((2, 0, 0)):
        same(row(moved, here), row(out, there))


def test_a_row_alone_is_the_row_in_the_batch(model, out):
    b = int(np.argmax((out.trajectory.num_steps > 0).sum(0)))
    alone = run(model, [PROMPTS[b]], SEEDS[b])
    same(row(alone, 0), row(out, b), atol=1e-3)


def test_seeds(model):
    found = run(model, [PROMPTS[0]] * 3, [0, 1, 2**32 - 1])
    assert len(np.unique(found.trajectory.start[0], axis=0)) == 3
    assert len(np.unique(found.trajectory.tokens[0, 0], axis=0)) == 3
    one_for_all = run(model, [PROMPTS[0]] * 3, 1)
    for b in range(3):
        same(row(one_for_all, b), row(found, 1))


def test_a_given_canvas_and_S_are_what_the_first_step_sees(model, out):
    canvas = np.arange(3 * C).reshape(3, C) + 30
    soft = np.random.default_rng(0).standard_normal((3, C, 32)).astype(np.float32)
    given = run(model, canvas=canvas, soft=soft)
    t = given.trajectory
    for found in (t.start[0], t.fn["canvas"][0, 0], t.moment(0, 0).canvas):
        np.testing.assert_array_equal(found, canvas)
    for found in (t.fn["soft"][0, 0], t.moment(0, 0).soft):
        np.testing.assert_array_equal(found, soft)
    only_soft = run(model, soft=soft[0])
    np.testing.assert_array_equal(only_soft.trajectory.start[0], out.trajectory.start[0])
    assert np.abs(only_soft.trajectory.fn["logits"][0, 0] - out.trajectory.fn["logits"][0, 0]).max() > 0.1
    assert (t.start[1] != canvas).any() and (t.fn["soft"][1, 0] == 0).all()  # of the first block only


# Moments.


def places(out):
    """Some (block, step), the first, the ends of blocks, and the last of all among them."""
    longest = out.trajectory.valid.any(-1).sum(1)
    last = len(longest) - 1
    return [
        (0, 0),
        (0, 2),
        (0, int(longest[0])),
        (1, 0),
        (1, 1),
        (last, int(longest[last]) - 1),
        (last, int(longest[last])),
    ]


def test_moments_are_the_recorded_states(model, out):
    t = out.trajectory
    for block, step in places(out):
        moment = t.moment(block, step)
        assert (moment.block, moment.step) == (block, step) or step == 0
        rows = t.num_steps[block] >= max(step, 1)
        canvas = t.start[block] if step == 0 else t.tokens[block, step - 1]
        soft = np.zeros_like(t.soft[0, 0]) if step == 0 else t.soft[block, step - 1]
        np.testing.assert_array_equal(np.asarray(moment.canvas)[rows], canvas[rows])
        np.testing.assert_allclose(np.asarray(moment.soft)[rows], soft[rows], atol=1e-5)
        np.testing.assert_array_equal(moment.history, out.tokens[:, : block * C])
        np.testing.assert_array_equal(moment.spent, t.num_steps[:block].sum(0))
        appended = np.array([sum(t.num_steps[j + 1, b] > 0 for j in range(block)) for b in range(3)])
        np.testing.assert_array_equal(moment.cache.length, [len(p) for p in PROMPTS] + C * appended)
        np.testing.assert_array_equal(jax.random.key_data(moment.keys), jax.random.key_data(t.moment(0, 0).keys))


def test_a_moment_is_reached_from_the_one_before(out):
    t = out.trajectory
    for block, step in places(out):
        if step:
            reached, whole = t.replay.onward(t.moment(block, step - 1), step), t.moment(block, step)
            for name in ("canvas", "argmax", "soft", "step", "done", "stop"):
                np.testing.assert_array_equal(getattr(reached.state, name), getattr(whole.state, name))


def test_resuming_any_moment_is_the_run(model, out):
    t = out.trajectory
    for block, step in places(out):
        again = dg.resume(model, t.moment(block, step), record=RECORD)
        np.testing.assert_array_equal(again.tokens, out.tokens)
        np.testing.assert_array_equal(again.num_steps, out.num_steps)
        assert again.stop_reason == out.stop_reason and again.prompt_tokens == out.prompt_tokens
        np.testing.assert_array_equal(again.trajectory.committed[block:], t.committed[block:])
        r, later = again.trajectory, np.zeros_like(t.valid)
        later[block, step:], later[block + 1 :] = True, True
        np.testing.assert_array_equal(r.valid, t.valid & later)  # what came before is there, not valid
        for name, array in r.arrays().items():
            if array.shape[:3] == r.valid.shape:
                np.testing.assert_allclose(
                    array[r.valid], t.arrays()[name][r.valid], atol=1e-5, rtol=1e-5, err_msg=name
                )


def test_a_moment_of_a_resumed_run(model, out):
    again = dg.resume(model, out.trajectory.moment(0, 1), record=RECORD)
    a, b = again.trajectory.moment(1, 1), out.trajectory.moment(1, 1)
    np.testing.assert_array_equal(a.canvas, b.canvas)
    np.testing.assert_allclose(a.soft, b.soft, atol=1e-5)
    np.testing.assert_array_equal(a.spent, b.spent)
    with pytest.raises(ValueError, match="step 0 of block 0 was not run; steps there: 1.."):
        again.trajectory.moment(0, 0)


def test_branching(model, out):
    """What a moment is changed in is what the next step sees; rows that were not changed go on as before."""
    t = out.trajectory
    moment = t.moment(0, 1)
    canvas = np.array(moment.canvas)
    canvas[1] = (canvas[1] + 7) % 64
    branch = dg.resume(model, moment.replace(canvas=canvas), record=RECORD)
    seen = branch.trajectory.fn
    np.testing.assert_array_equal(seen["canvas"][0, 1, 1], canvas[1])
    assert np.abs(seen["logits"][0, 1, 1] - t.fn["logits"][0, 1, 1]).max() > 0.1
    for b in (0, 2):
        np.testing.assert_array_equal(branch.tokens[b], out.tokens[b])
    again = dg.resume(model, moment.replace(canvas=canvas), record=RECORD)
    np.testing.assert_array_equal(again.tokens, branch.tokens)

    seeded = dg.resume(model, moment.replace(keys=noise.row_keys(np.array([51, 52, 53]))), record=RECORD)
    np.testing.assert_allclose(seeded.trajectory.fn["logits"][0, 1], t.fn["logits"][0, 1], atol=1e-5)  # the same state
    assert (seeded.trajectory.tokens[0, 1] != t.tokens[0, 1]).any(-1).all()  # other draws


def test_moments_that_do_not_exist(model, out):
    t, moment = out.trajectory, out.trajectory.moment(0, 1)
    blocks = len(t.num_steps)
    longest = int(t.valid[0].any(-1).sum())
    cases = [
        (lambda: t.moment(blocks, 0), f"block {blocks} was not run; blocks are 0..{blocks - 1}"),
        (lambda: t.moment(-1, 0), "block -1 was not run"),
        (lambda: t.moment(0, longest + 1), f"step {longest + 1} of block 0 was not run; steps there: 0..{longest}"),
        (lambda: dataclasses.replace(t, replay=None).moment(0, 0), "loaded from a file holds no model; generate again"),
        (lambda: moment.replace(canvas=np.zeros((3, 2))), r"canvas has shape \(3, 2\); the moment needs \(3, 6\)"),
        (lambda: moment.replace(pinned=np.zeros((3, 2), bool)), r"pinned has shape \(3, 2\); the moment needs \(3, 6\)"),
        (lambda: moment.replace(history=np.zeros((2, 0))), r"history has shape \(2, 0\); the moment needs \(3, 0\)"),
        (lambda: moment.replace(tokens=1), r"a moment has no field \['tokens'\]; it has \['argmax', .*'unchanged'\]"),
        (lambda: dg.resume(model, moment, SAMPLER.replace(max_denoising_steps=1)),
         "the moment is at step 1; max_denoising_steps=1 ends before"),
        (lambda: dg.resume(oracles.build(ModelConfig.tiny(embed_dim=16)), moment),
         r"S has shape \(3, 6, 32\), this model needs \(3, 6, 16\): is it of another model\?"),
        (lambda: dg.resume(model, moment, callback_every=0), "callback_every must be an integer >= 1, got 0"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


# Files.


def test_what_is_saved_comes_back(out, tmp_path):
    path = out.save(tmp_path / "run-t0.8")
    assert path.name == "run-t0.8.npz"  # the dot is no suffix: runs of a sweep do not overwrite one another
    for found in (dg.Generation.load(path), dg.Generation.load(tmp_path / "run-t0.8")):
        for name in ("texts", "prompt_tokens", "stop_reason", "seeds", "sampler"):
            assert getattr(found, name) == getattr(out, name)
        for name in ("tokens", "num_steps", "tokens_per_forward"):
            np.testing.assert_array_equal(getattr(found, name), getattr(out, name))
        a, b = found.trajectory.arrays(), out.trajectory.arrays()
        assert a.keys() == b.keys() and set(found.trajectory.fn) == {"canvas", "soft", "logits"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype
    with np.load(path) as file:
        assert json.loads(str(file["about"]))["seeds"] == SEEDS


@pytest.mark.parametrize("wrong", [(np.zeros(2), np.zeros(2)), {"deep": {"er": np.zeros(2)}}, [1.0]])
def test_results_that_a_file_cannot_hold_are_refused(out, tmp_path, wrong):
    broken = dataclasses.replace(out, trajectory=dataclasses.replace(out.trajectory, fn=wrong))
    with pytest.raises(ValueError, match=r"Record\.fn must be arrays or dictionaries of arrays"):
        broken.save(tmp_path / "broken")
    assert not list(tmp_path.iterdir())


def test_one_array_from_the_record_function(out, tmp_path):
    single = dataclasses.replace(out, trajectory=dataclasses.replace(out.trajectory, fn=out.trajectory.fn["soft"]))
    np.testing.assert_array_equal(
        dg.Generation.load(single.save(tmp_path / "a.npz")).trajectory.fn, single.trajectory.fn
    )
