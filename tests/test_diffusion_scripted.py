"""The loop over steps and blocks with logits written by hand: every number of a run is known beforehand."""

import functools
import types

import jax
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import loop, prompts
from dgemma_jax.nn import functional

V, C, N, J = 16, 6, 5, 3
PAD, END = 0, 1
CONFIG = ModelConfig.tiny(vocab_size=V, canvas_length=C, embed_dim=4, layer_types=("sliding_attention",))
SAMPLER = SamplerConfig(max_denoising_steps=N, eos_token_ids=(END, 9), pad_token_id=PAD)
PROMPTS = [[3], [4, 5], [6, 7, 8]]

DRAFT, WORDS = [2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2]
ENDING = [8, 8, END, 5, 9, 5]
SOON = [9, 3, 3, 3, 3, 3]
OPEN = [10, 11, 12, 13, 14, 15]


close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6)


def sure(tokens):
    return 40.0 * np.eye(V)[tokens]


def script():
    """[J, R, B, C, V]: row 0 ends in its second block, row 1 at once, row 2 never."""
    logits = np.zeros((J, N, 3, C, V))
    logits[0, :, 0] = sure(WORDS)
    logits[0, 0, 0] = sure(DRAFT)  # changes its mind once: stable from step 1 to step 2
    logits[1, :, 0] = sure(ENDING)
    logits[0, :, 1] = sure(SOON)
    logits[:2, :, 2] = 0.5 * np.eye(V)[OPEN]  # the argmax stands, the entropy stays
    logits[2, :, 2] = sure(WORDS)
    return logits


STEPS = np.array([[3, 2, 5], [2, 0, 5], [0, 0, 2]])
STOP = np.array([[1, 1, 2], [1, 0, 2], [0, 0, 1]])
TOKENS = np.array([
    [*WORDS, 8, 8, END, *[PAD] * 9],
    [9, *[PAD] * 17],
    [*OPEN, *OPEN, *WORDS],
])  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return oracles.Scripted.of(script(), CONFIG)


@pytest.fixture(scope="module")
def out(model):
    return dg.generate(model, PROMPTS, seed=[5, 6, 7], sampler=SAMPLER, max_new_tokens=2 * C + 1)


def test_tokens_steps_and_reasons(out):
    np.testing.assert_array_equal(out.tokens, TOKENS)
    np.testing.assert_array_equal(out.trajectory.num_steps, STEPS)
    np.testing.assert_array_equal(out.trajectory.stop, STOP)
    np.testing.assert_array_equal(out.num_steps, STEPS.sum(0))
    assert out.stop_reason == ["eos", "eos", "max_new_tokens"]
    np.testing.assert_allclose(out.tokens_per_forward, [9 / 5, 1 / 2, 18 / 12])
    assert (
        out.texts == [None] * 3 and out.seeds == [5, 6, 7] and out.prompt_tokens == PROMPTS and out.sampler == SAMPLER
    )


def test_the_trajectory(out):
    """Shapes, values and zeros of every array, recomputed from the script."""
    t = out.trajectory
    ran = np.arange(N)[None, :, None] < STEPS[:, None]
    np.testing.assert_array_equal(t.valid, ran)
    tau = 0.8 - 0.4 * np.arange(N) / N
    np.testing.assert_allclose(t.temperature, np.where(ran, tau[:, None], 0), rtol=1e-6)
    shaped = script() / tau[:, None, None, None]
    probs = oracles.softmax(shaped)
    on = ran[..., None]
    np.testing.assert_allclose(t.entropy, np.where(on, oracles.entropy(shaped), 0), atol=1e-5)
    np.testing.assert_array_equal(t.argmax, np.where(on, shaped.argmax(-1), 0))
    accepted = [[[oracles.accept(row.astype(float), 0.1) for row in step] for step in block] for block in t.entropy]
    np.testing.assert_array_equal(t.accepted, np.array(accepted) & on)
    assert t.top_ids.shape == t.top_probs.shape == (J, N, 3, C, 4)
    np.testing.assert_allclose(t.top_probs, np.where(on[..., None], -np.sort(-probs)[..., :4], 0), atol=1e-6)
    np.testing.assert_array_equal(t.top_ids[..., 0], t.argmax)
    np.testing.assert_allclose(np.take_along_axis(probs, t.top_ids, -1)[ran], t.top_probs[ran], atol=1e-6)
    assert t.start.shape == t.committed.shape == (J, 3, C) and t.tokens.shape == (J, N, 3, C)
    certain = t.accepted & (t.entropy < 1e-6) & on
    np.testing.assert_array_equal(t.tokens[certain], t.argmax[certain])
    assert (t.tokens[~ran] == 0).all() and t.soft is None and t.fn is None
    assert len(np.unique(t.start[0], axis=0)) == 3 and (t.start >= 0).all() and (t.start < V).all()


def test_what_a_block_left(out):
    """`committed` is the argmax, not cut at the end token; zeros for rows that had ended."""
    expected = [[WORDS, SOON, OPEN], [ENDING, [0] * C, OPEN], [[0] * C, [0] * C, WORDS]]
    np.testing.assert_array_equal(out.trajectory.committed, expected)


def test_the_cache_grows_by_whole_blocks(out):
    for block in range(J):
        moment = out.trajectory.moment(block, 0)
        running = np.array([block <= 1, block == 0, True])
        np.testing.assert_array_equal(~moment.ended, running)
        blocks = np.array([min(block, 1), 0, block])  # a row that ended is not appended
        np.testing.assert_array_equal(moment.cache.length, np.array([1, 2, 3]) + C * blocks)
        np.testing.assert_array_equal(moment.history, TOKENS[:, : block * C])
        np.testing.assert_array_equal(moment.spent, STEPS[:block].sum(0))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_drafts_are_the_trajectory(model, out, every):
    """Called after every k steps and after the last of a block; in both loops, and without another compile."""
    before, drafts = loop._while._cache_size(), {}
    for run in (dg.generate, dg.generate_python):
        drafts[run] = []
        same = run(model, PROMPTS, [5, 6, 7], SAMPLER, 2 * C + 1, callback=drafts[run].append, callback_every=every)
        np.testing.assert_array_equal(same.tokens, out.tokens)
        jax.tree.map(close, same.trajectory.arrays(), out.trajectory.arrays())
    assert loop._while._cache_size() == before
    t, taken = out.trajectory, STEPS.max(1)
    expected = [(j, i) for j in range(J) for i in range(taken[j]) if (i + 1) % every == 0 or i + 1 == taken[j]]
    for found in drafts.values():
        assert [(d.block, d.step) for d in found] == expected
        for d in found:
            ran = t.valid[d.block, d.step]
            for name in ("tokens", "argmax", "accepted", "entropy"):
                close(getattr(d, name)[ran], getattr(t, name)[d.block, d.step][ran])
            np.testing.assert_array_equal(d.done, STEPS[d.block] <= d.step + 1)


def test_records(model, out):
    nothing = dg.generate(model, PROMPTS, [5, 6, 7], SAMPLER, 2 * C + 1, dg.Record.nothing())
    t = nothing.trajectory
    assert all(x is None for x in (t.tokens, t.argmax, t.accepted, t.entropy, t.top_ids, t.top_probs, t.soft, t.fn))
    np.testing.assert_array_equal(nothing.tokens, out.tokens)
    np.testing.assert_array_equal(t.valid, out.trajectory.valid)
    np.testing.assert_array_equal(t.stop, STOP)
    assert set(t.arrays()) == {"start", "temperature", "valid", "committed", "num_steps", "stop"}
    with pytest.raises(ValueError, match="top_k must be an integer >= 0, got -1"):
        dg.Record(top_k=-1)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (C, 1), (C + 1, 2)])
def test_max_new_tokens_is_rounded_up_to_blocks(model, tokens, blocks):
    out = dg.generate(model, PROMPTS, 0, SAMPLER, tokens, dg.Record.nothing())
    assert out.tokens.shape == (3, blocks * C) and len(out.trajectory.num_steps) == blocks


def test_a_run_ends_when_all_rows_have_ended(model):
    out = dg.generate(model, PROMPTS[:1], 0, SAMPLER, 10 * C, dg.Record.nothing())
    np.testing.assert_array_equal(out.tokens, TOKENS[:1, : 2 * C])
    assert out.stop_reason == ["eos"] and len(out.trajectory.num_steps) == 2


def test_googles_variant_commits_the_canvas(model):
    sampler = SamplerConfig.google(max_denoising_steps=N, early_stop=False, eos_token_ids=SAMPLER.eos_token_ids)
    out = dg.generate(model, PROMPTS, 3, sampler, C)
    assert (out.num_steps == N).all() and (out.trajectory.stop == 2).all()
    np.testing.assert_array_equal(out.trajectory.committed[0], out.trajectory.tokens[0, -1])
    assert (out.tokens[2] != OPEN).any()  # what was not accepted is noise, and is given back


def test_infill(model, out):
    """Pinned tokens stay through the first block, have no entropy, and the next block is free."""
    canvas, pinned = np.full((3, C), 13), np.zeros(C, bool)
    pinned[[1, 4]] = True
    got = dg.generate(model, PROMPTS, [5, 6, 7], SAMPLER, 2 * C, canvas=canvas, pinned=pinned)
    t = got.trajectory
    np.testing.assert_array_equal(t.start[0], canvas)
    first = t.valid[0]
    for array in (t.tokens, t.argmax):
        assert (array[0][first][:, pinned] == 13).all()
    assert (t.entropy[0][first][:, pinned] == 0).all() and t.accepted[0][first][:, pinned].all()
    np.testing.assert_array_equal(got.tokens[0, :C], [7, 13, 5, 4, 13, 2])
    np.testing.assert_array_equal(got.tokens[0, C:], TOKENS[0, C : 2 * C])
    assert (t.start[1] != canvas).any()
    again = dg.generate(
        model, PROMPTS, [5, 6, 7], SAMPLER, 2 * C, canvas=canvas[0], pinned=np.broadcast_to(pinned, (3, C))
    )
    np.testing.assert_array_equal(again.tokens, got.tokens)
    resumed = dg.resume(model, t.moment(0, 1))
    np.testing.assert_array_equal(resumed.tokens, got.tokens)
    certain = dg.generate(model, PROMPTS, 0, SAMPLER, C, canvas=canvas, pinned=np.ones(C, bool))
    assert (certain.tokens == 13).all()


# Prompts, text and mistakes.


class Words:
    """A tokenizer of numbers that notes how it was asked."""

    def __init__(self):
        self.asked = []

    def chat(self, messages, thinking=False):
        self.asked.append((messages, thinking))
        return [2, *(int(w) for m in messages for w in m["content"].split())]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_texts(model, out):
    bundle = types.SimpleNamespace(model=model, tokenizer=Words(), sampler=SAMPLER)
    got = dg.generate(bundle, ["3", "4 5", "6 7 8"], max_new_tokens=2 * C, thinking=True, record=dg.Record.nothing())
    assert got.texts == ["7 6 5 4 3 2 8 8", "", "10 11 12 13 14 15 10 11 12 13 14 15"]  # up to the end token
    assert got.prompt_tokens == [[2, 3], [2, 4, 5], [2, 6, 7, 8]]
    assert bundle.tokenizer.asked[1] == ([{"role": "user", "content": "4 5"}], True)


def test_what_counts_as_prompts():
    words, chat = Words(), [{"role": "user", "content": "3"}, {"role": "model", "content": "4"}]
    cases = {
        "a text": ("3 4", [[2, 3, 4]]),
        "texts": (["3", "4"], [[2, 3], [2, 4]]),
        "a chat": (chat, [[2, 3, 4]]),
        "chats": ([chat, chat[:1]], [[2, 3, 4], [2, 3]]),
        "ids": ([3, 4], [[3, 4]]),
        "numpy ids": ([np.int64(3), np.int64(4)], [[3, 4]]),
        "lists of ids": ([[3], [4, 5]], [[3], [4, 5]]),
        "arrays of ids": ([np.array([3]), np.array([4, 5])], [[3], [4, 5]]),
        "a row": (np.array([3, 4]), [[3, 4]]),
        "a matrix": (np.array([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
        "some of each": (["3", [4, 5], chat], [[2, 3], [4, 5], [2, 3, 4]]),
    }
    assert {name: prompts.to_ids(given, words, V) for name, (given, _) in cases.items()} == {
        name: wanted for name, (_, wanted) in cases.items()
    }
    assert prompts.to_seeds(3, 2) == [3, 3] and prompts.to_seeds([4, 2**32 - 1], 2) == [4, 2**32 - 1]


def test_mistakes_are_found_before_any_work(model, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(functional, "prefill", work)
    bundle = types.SimpleNamespace(model=model, tokenizer=Words(), sampler=SAMPLER)
    ids, canvas, even = [[3], [4]], np.zeros((2, C), int), np.ones(C, bool)
    cases = [
        (dict(prompts=[]), "prompts is empty; give at least one prompt"),
        (dict(prompts=["3", "  "]), "prompt 1 is empty; give at least one word"),
        (dict(prompts=[[3], []]), r"prompt 1 is empty or not a list of ids: shape \(0,\)"),
        (dict(prompts=[[3], [4.5]]), "prompt 1 holds float64 values; token ids must be integers"),
        (dict(prompts=[[3], [4, 16]]), "prompt 1 holds id 16; ids must be in 0..15"),
        (dict(prompts=[[-1]]), "prompt 0 holds id -1; ids must be in 0..15"),
        (dict(prompts=np.zeros((1, 1, 1), int)), r"prompts has shape \(1, 1, 1\); give ids of shape \[T\] or \[B, T\]"),
        (dict(prompts=7), "prompts must be text, a chat, ids or a list of these, got int"),
        (dict(bundle=model, prompts="3"), "prompt 0 is text, but there is no tokenizer; give token ids, or a bundle"),
        (dict(seed=0.5), r"seed must be one integer or 2 of them \(one a prompt\), got 0.5"),
        (dict(seed=[1, 2, 3]), "seed must be one integer or 2 of them"),
        (dict(seed=-1), r"seeds must be in 0..2\*\*32-1, got -1"),
        (dict(max_new_tokens=0), "max_new_tokens must be an integer >= 1, got 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens must be an integer >= 1, got 2.0"),
        (dict(prompts=[[3] * 507]), r"a prompt of 507 tokens and 1 blocks of 6 make 513; the context is 512: shorten the prompt or lower"),
        (dict(max_new_tokens=600), "a prompt of 1 tokens and 100 blocks of 6 make 601; the context is 512"),
        (dict(record=dg.Record(top_k=17)), "top_k=17 exceeds the vocabulary of 16"),
        (dict(canvas=canvas[:, 1:]), r"canvas has shape \(2, 5\); needed is \(2, 6\) or \(6,\)"),
        (dict(canvas=canvas + 16), "canvas holds id 16; ids must be in 0..15"),
        (dict(canvas=canvas / 2), "canvas holds float64 values; token ids must be integers"),
        (dict(canvas=canvas, pinned=even[1:]), r"pinned has shape \(5,\); needed is \(2, 6\) or \(6,\)"),
        (dict(canvas=canvas, pinned=canvas), "pinned must be bool, got int64"),
        (dict(pinned=even), "pinned says which positions of canvas stay; give canvas too"),
        (dict(soft=np.zeros((C, 5))), r"soft has shape \(6, 5\); needed is \(2, 6, 4\) or \(6, 4\)"),
        (dict(callback=print, callback_every=0), "callback_every must be an integer >= 1, got 0"),
    ]  # fmt: skip
    for changes, message in cases:
        for run in (dg.generate, dg.generate_python):
            with pytest.raises(ValueError, match=message):
                run(**dict(bundle=bundle, prompts=ids, max_new_tokens=C) | changes)
    with pytest.raises(AssertionError, match="the model was run"):  # the same call without a mistake does begin
        dg.generate(bundle, ids, max_new_tokens=C)


def test_weights_that_are_no_numbers_are_refused(monkeypatch):
    config = ModelConfig.tiny(layer_types=("full_attention",))
    model = oracles.build(config)
    weight = model.layers[0].mlp.up
    weight[...] = weight[...].at[0, 0].set(np.nan)
    monkeypatch.setattr(functional, "prefill", None)
    with pytest.raises(ValueError, match=r"the model has non-finite weights in .*layers\.0\.mlp\.up"):
        dg.generate(dg.Bundle(config, model), [[3]])
