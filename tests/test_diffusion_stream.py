"""Continuous batching: the same results as alone, in any order and company; few programs; no row waits for another."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_diffusion_generate import CONFIG, SAMPLER, C, J, row, same

import dgemma_jax as dg
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import loop, reading, stream
from dgemma_jax.nn import functional
from dgemma_jax.nn.flattened import Flattened
from interp.taps import tapped

# ---- a random model --------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, 64, n).tolist() for n in (3, 12, 1, 30, 7, 5, 40)]
SEEDS = [11, 12, 13, 14, 15, 16, 17]


def probe(view):
    return {"highest": view.logits.max(-1)}


OPTIONS = dict(sampler=SAMPLER, max_new_tokens=J * C, record=dg.Record(soft=True, fn=probe))


@pytest.fixture(scope="module")
def random():
    return oracles.build(CONFIG, seed=2, sharpness=6)


@pytest.fixture(scope="module")
def in_step(random):
    """All prompts by `generate`."""
    return dg.generate(random, PROMPTS, SEEDS, **OPTIONS)


@pytest.fixture(scope="module")
def streamed(random):
    return dict(dg.stream(random, PROMPTS, SEEDS, rows=3, **OPTIONS))


def test_every_prompt_gives_what_it_gives_in_step(in_step, streamed):
    t = in_step.trajectory
    assert len(np.unique(t.num_steps)) >= 3 and {"eos", "max_new_tokens"} == set(in_step.stop_reason)
    assert len(np.unique((t.num_steps > 0).sum(0))) >= 2
    assert sorted(streamed) == list(range(len(PROMPTS))) and list(streamed) != sorted(streamed)
    for number, one in streamed.items():
        same(row(one, 0), row(in_step, number), atol=5e-3)
        assert one.prompt_tokens == [PROMPTS[number]] and one.seeds == [SEEDS[number]]
        assert one.stop_reason == [in_step.stop_reason[number]]


def test_results_together_are_those_of_generate(in_step, streamed):
    found = dg.collected([streamed[number] for number in range(len(PROMPTS))])
    np.testing.assert_array_equal(found.tokens, in_step.tokens)
    np.testing.assert_array_equal(found.num_steps, in_step.num_steps)
    np.testing.assert_allclose(found.tokens_per_forward, in_step.tokens_per_forward)
    assert found.stop_reason == in_step.stop_reason and found.seeds == SEEDS and found.prompt_tokens == PROMPTS
    ours, theirs = found.trajectory.arrays(), in_step.trajectory.arrays()
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "start":  # of blocks that a row did not run `generate` has a canvas
            ran = in_step.trajectory.num_steps > 0
            assert not ours[name][~ran].any()
            ours[name], theirs[name] = ours[name][ran], theirs[name][ran]
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-3, rtol=1e-4, err_msg=name)


def test_other_prompts_in_another_order_share_the_programs(random, streamed):
    loops = loop._while._cache_size()
    swapped = dict(dg.stream(random, PROMPTS[::-1], SEEDS[::-1], rows=3, **OPTIONS))
    for number, one in swapped.items():
        same(row(one, 0), row(streamed[len(PROMPTS) - 1 - number], 0), atol=5e-3)
    assert loop._while._cache_size() == loops
    sizes = [s for s in reading.piece_sizes(C) if 3 * s <= 4 * max(map(len, PROMPTS))]
    assert reading._read_piece._cache_size() <= len(sizes) * len(reading.group_sizes(3))


@pytest.mark.slow
def test_captured_sites_at_chosen_steps(random):
    """Rows are at steps of their own; what is kept are the chosen steps of each."""
    tap = tapped(random, ["layers.1.resid_post", "layers.0.router_probs"])[0]
    options = OPTIONS | {"record": dg.Record(top_k=0, site_steps=(0, 2))}
    found = dg.generate_many(tap, PROMPTS, SEEDS, rows=3, progress=False, **options).trajectory
    expected = dg.generate(tap, PROMPTS, SEEDS, **options).trajectory
    assert found.site_steps.tolist() == [0, 2] == expected.site_steps.tolist() and len(found.sites) == 2
    for name, array in expected.sites.items():
        assert array[1].any() and array.shape[:3] == (J, 2, len(PROMPTS))
        np.testing.assert_allclose(found.sites[name], array, atol=5e-3, rtol=1e-4, err_msg=name)


# ---- a script: how long a block takes, and in which block it ends, depends on the length of the prompt ----

N, V, KINDS, END = 20, 16, 8, 1
SCRIPTED = ModelConfig.tiny(vocab_size=V, canvas_length=KINDS, embed_dim=4, layer_types=("sliding_attention",))
SETTINGS = SamplerConfig(max_denoising_steps=N, eos_token_ids=(END,), pad_token_id=0)
WHEN = np.array([[2, 18, 1, 7, 15, 3, 1, 10], [16, 1, 5, 4, 0, 12, 2, 19], [9] * 8])  # step from which it is sure
LAST = np.array([0, 1, 2, 0, 2, 1, 0, 1])  # the block that holds an end token; 2 is beyond the limit for some
LENGTHS = RNG.integers(1, 30, 24)
MANY = [RNG.integers(2, V, n).tolist() for n in LENGTHS]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByLength(oracles.Scripted):
    """Blocks are as long as there are kinds, so that the length of a row tells its kind in every block."""

    def denoise(self, canvas, cache, soft):
        return self.script[self.clock.block, self.clock.step, cache.length % KINDS]


@pytest.fixture(scope="module")
def scripted():
    script = np.zeros((3, N, KINDS, KINDS, V))
    for block, kind in itertools.product(range(3), range(KINDS)):
        tokens = 2 + (np.arange(KINDS) + kind + block) % (V - 2)
        tokens[3] = END if LAST[kind] == block else 5
        script[block, WHEN[block, kind] :, kind] = 40 * np.eye(V)[tokens]
    return ByLength.of(script, SCRIPTED)


def needed(steps):
    """Rows times steps that `generate` computes in batches of four."""
    return sum(4 * steps[:, at : at + 4].max(1).sum() for at in range(0, steps.shape[1], 4))


def by_generate(model, limits, seeds):
    """Each prompt alone."""
    return [dg.generate(model, [ids], s, SETTINGS, n) for ids, s, n in zip(MANY, seeds, limits, strict=True)]


@pytest.fixture(scope="module")
def alone(scripted):
    return by_generate(scripted, [3 * KINDS] * 24, range(24))


def alike(one, other):
    """Two generations of one row."""
    assert one.stop_reason == other.stop_reason and one.seeds == other.seeds and one.texts == other.texts
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.num_steps, other.num_steps)
    for name, array in one.trajectory.arrays().items():
        np.testing.assert_allclose(array, other.trajectory.arrays()[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.heavy), 4, pytest.param(40, marks=pytest.mark.heavy)])
def test_any_number_of_rows(scripted, alone, rows):
    capacity = 128 if rows == 40 else None
    found = list(dg.stream(scripted, MANY, range(24), SETTINGS, 3 * KINDS, rows=rows, capacity=capacity))
    assert sorted(number for number, _ in found) == list(range(24))
    for number, one in found:
        alike(one, alone[number])


def test_no_row_waits_for_the_slowest(scripted, monkeypatch):
    """While prompts wait, every step of every row is one that its prompt needs; at the end few are not."""
    used, computed, some = [], [], loop.some

    def watched(*args, **options):
        out = some(*args, **options)
        used.append(int(np.asarray(out[2]["valid"])[: out[0]].sum()))
        computed.append(out[0] * 4)
        return out

    monkeypatch.setattr(loop, "some", watched)
    run = iter(dg.stream(scripted, MANY, 0, SETTINGS, 3 * KINDS, rows=4))
    done = [next(run) for _ in range(20)]  # 24 prompts: all have begun
    assert used == computed
    done = [one.trajectory.num_steps[:, 0] for _, one in sorted([*done, *run])]
    steps = np.stack([np.pad(own, (0, 3 - len(own))) for own in done], 1)
    assert sum(used) == steps.sum()
    assert steps.sum() / sum(computed) > 0.85 > 0.65 > steps.sum() / needed(steps)


def test_results_are_read_while_the_next_steps_run(scripted, monkeypatch):
    """Whenever a result is given, the device has been told what to do next, until nothing is left to do."""
    begun, ended, some, close = [], [], loop.some, stream._Span.close
    monkeypatch.setattr(loop, "some", lambda *args, **options: begun.append(1) or some(*args, **options))
    monkeypatch.setattr(stream._Span, "close", lambda span, sampler: ended.append(1) or close(span, sampler))
    ahead = [len(begun) - len(ended) for _ in dg.stream(scripted, MANY, 0, SETTINGS, 3 * KINDS, rows=4)]
    assert ahead[0] == 1 and ahead[-1] == 0 and sorted(ahead, reverse=True) == ahead and ahead.count(0) <= 4


def test_a_flat_model_is_the_model(random):
    """The same arrays under the same names, and one program for equal structures."""
    model = functional.of(random)
    flat, again = Flattened(model), Flattened(jax.tree.map(jnp.copy, model))
    assert all(a is b for a, b in zip(jax.tree.leaves(flat), jax.tree.leaves(model), strict=True))
    assert jax.tree.structure(functional.of(flat)) == jax.tree.structure(model)
    tokens = np.zeros((1, 3), np.int32)
    embed = jax.jit(lambda model: functional.of(model).embedder.lookup(tokens))
    np.testing.assert_array_equal(embed(flat), embed(model))
    embed(again)
    assert embed._cache_size() == 2


def test_limits_and_seeds_of_its_own(scripted):
    limits, seeds = [KINDS, 3 * KINDS, 2 * KINDS - 1] * 8, [7, *range(23)]
    found = dg.generate_many(scripted, MANY, seeds, SETTINGS, limits, rows=5, progress=False)
    expected = by_generate(scripted, limits, seeds)
    width = found.tokens.shape[1]
    for number, one in enumerate(expected):
        padded = np.pad(one.tokens[0], (0, width - one.tokens.shape[1]))
        np.testing.assert_array_equal(found.tokens[number], padded)
    assert found.num_steps.tolist() == [int(one.num_steps[0]) for one in expected]
    assert found.stop_reason == [one.stop_reason[0] for one in expected] and found.seeds == seeds
    with pytest.raises(ValueError, match="no moments in common"):
        found.trajectory.moment(0, 0)


@pytest.mark.heavy
def test_moments_and_what_comes_after(scripted, alone):
    found = dg.generate_many(scripted, MANY, range(24), SETTINGS, 3 * KINDS, rows=4, progress=False)
    number = int(np.argmax(found.num_steps))
    one = dg.collected([dict(dg.stream(scripted, MANY, range(24), SETTINGS, 3 * KINDS, rows=4))[number]])
    for out, at in ((found, number), (one, 0)):
        moment = out.trajectory.moment(1, 1)
        np.testing.assert_array_equal(moment.canvas[at], out.trajectory.tokens[1, 0, at])
        rest = dg.resume(scripted, moment).tokens[at]
        np.testing.assert_array_equal(rest, found.tokens[number, : len(rest)])


def test_rows_gone_and_rows_kept(scripted, alone, tmp_path, monkeypatch):
    """A job that was left goes on after what it had finished; another job is refused."""
    job = dict(prompts=MANY, seed=range(24), sampler=SETTINGS, max_new_tokens=3 * KINDS, rows=4)
    begun = dg.stream(scripted, directory=tmp_path / "job", **job)
    first = [next(begun)[0] for _ in range(9)]
    begun.close()
    (tmp_path / "job" / "rows" / "000003.77.part.npz").write_bytes(b"half")  # what a kill leaves
    taken = []
    monkeypatch.setattr(stream, "_finished", lambda work, numbers, run=stream._finished: taken.extend(numbers) or run(work, numbers))
    found = list(dg.stream(scripted, directory=tmp_path / "job", **job | {"rows": 7}))
    assert [n for n, _ in found[:9]] == sorted(first) and sorted(taken) == sorted(set(range(24)) - set(first))
    for number, one in found:
        alike(one, alone[number])
    assert found[0][1].trajectory.moment(0, 1).step == 1
    programs = loop._while._cache_size()
    assert [n for n, _ in dg.stream(scripted, directory=tmp_path / "job", **job)] == list(range(24))
    assert loop._while._cache_size() == programs  # nothing was left to run
    with pytest.raises(ValueError, match=r"another job \(seeds differ\); give another directory"):
        dg.stream(scripted, directory=tmp_path / "job", **job | {"seed": 5})
    changed = dataclasses.replace(scripted, script=scripted.script + 1)
    with pytest.raises(ValueError, match=r"another job \(model differ\)"):
        dg.stream(changed, directory=tmp_path / "job", **job)


# ---- pieces, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [6, 64, 256])
def test_prompts_are_cut_into_few_sizes_with_little_padding(canvas):
    sizes = reading.piece_sizes(canvas)
    assert canvas in sizes and len(sizes) <= 5 and reading.group_sizes(8) == [1, 4] and reading.group_sizes(3) == [1, 4]
    for length in [1, canvas - 1, canvas, canvas + 1, *range(3, 5000, 271)]:
        pieces = reading.cut(range(length), sizes)
        assert [*itertools.chain(*pieces)] == list(range(length))
        padded = sum(next(s for s in sizes if s >= len(p)) for p in pieces)
        assert padded <= 4 / 3 * length + sizes[0]


def test_what_is_refused(scripted):
    def refuse(said, prompts=MANY, **options):
        with pytest.raises(ValueError, match=said):
            dg.stream(scripted, prompts, **{"sampler": SETTINGS, "max_new_tokens": 8} | options)

    refuse("rows must be an integer >= 1, got 0", rows=0)
    refuse(r"the largest prompt and its answer take \d+ tokens; .*, got capacity=9", capacity=9)
    refuse("needed is an integer of at least that, got capacity=99.5", capacity=99.5)
    refuse("one integer or 24 of them", max_new_tokens=[8, 8])
    refuse("max_new_tokens must be an integer >= 1, got 0", max_new_tokens=[0] * 24)
    refuse("prompt 1 holds id 99", prompts=[[3], [99]])
    refuse("a prompt of 3 tokens and 64 blocks of 8 make 515; the context", prompts=[[3, 4, 5]], max_new_tokens=512)
    refuse("site_steps has step 20", record=dg.Record(site_steps=(20,)))
    refuse("seed must be one integer or 24 of them", seed=[1])
    with pytest.raises(ValueError, match=r"Record.fn gave an array of shape \(\)"):
        next(dg.stream(scripted, MANY, sampler=SETTINGS, record=dg.Record(fn=lambda view: view.entropy.max())))
