"""What a sweep finds in a trained model: the value asked for travels from its place in the prompt to the answer."""

import jax
import numpy as np
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.train import tasks
from interp import sweeps

pytestmark = pytest.mark.slow

ANSWER, STEPS = 2, 2  # "b is 7": the value stands at canvas position 2
RESID = "layers.*.resid_post"
PROMPTS = "recall a 4 , b {} , c 2 ? b", "recall a 11 , b {} , c 8 ? b"
VALUES = ("7", "9"), ("5", "3")  # clean and corrupt of each


@pytest.fixture(scope="module")
def nano():
    return dg.load("nano")


@pytest.fixture(scope="module")
def asked(nano):
    """Clean prompts, corrupt prompts, ids of the right values, ids of the others, the value's prompt position."""
    clean, corrupt = ([p.format(v[i]) for p, v in zip(PROMPTS, VALUES, strict=True)] for i in (0, 1))
    ids = {nano.tokenizer.token(i): i for i in range(nano.config.vocab_size)}
    right, wrong = ([[ids[v[i]]] for v in VALUES] for i in (0, 1))
    rows = [nano.tokenizer.chat([{"role": "user", "content": p}]) for p in clean]
    (at,) = {row.index(own[0]) for row, own in zip(rows, right, strict=True)}
    return clean, corrupt, right, wrong, at


def swept(bundle, asked, sites, effect="step", **options):
    clean, corrupt, right, wrong, _ = asked
    metric = interp.Says([ANSWER], right) if effect == "text" else interp.LogitDifference([ANSWER], right, wrong)
    sampler = bundle.sampler.replace(max_denoising_steps=STEPS, early_stop=False)
    return interp.patch_sweep(bundle, clean, corrupt, metric, sites, sampler=sampler, effect=effect, **options)


@pytest.fixture(scope="module")
def canvas(nano, asked):
    return swept(nano, asked, RESID)


@pytest.fixture(scope="module")
def prompt(nano, asked):
    return swept(nano, asked, "layers.0.resid_post", phase="prefill")


def test_the_facts_say_the_same():
    """The prompts above are of the task, and their values where it says."""
    rng = np.random.default_rng(0)
    example = next(e for e in iter(lambda: tasks.recall(rng), None) if e.prompt.split()[1] == "a")
    words = example.prompt.split()
    assert example.answer.split()[ANSWER] == words[example.facts["value_at"]] == example.facts["value"]


def test_the_value_comes_from_its_place_in_the_prompt(prompt, asked):
    assert (prompt.base < -3).all() and (prompt.donor > 3).all()
    share = prompt.recovery(RESID)[0, 0]  # of the first step, by prompt position and pair
    assert (share[asked[-1]] >= 0.9).all()
    assert np.abs(np.delete(share, asked[-1], 0)).max() <= 0.1


def test_it_arrives_late_and_at_the_answer(canvas):
    share = canvas.recovery(RESID)[0]  # layers, canvas positions, pairs
    assert (share[-1, ANSWER] >= 0.9).all() and np.abs(share[0, ANSWER]).max() <= 0.1
    assert np.abs(np.delete(share, ANSWER, 1)).max() <= 0.1
    later = canvas.recovery(RESID)[1]
    assert (later[-1, ANSWER] >= 0.9).all()
    assert (later[0, ANSWER] >= share[0, ANSWER] + 0.02).any()  # by now the canvas itself says something
    (name, place, _), *_ = canvas.top(1)
    assert name == RESID and place["position"] == ANSWER and place["layer"] == canvas.index[RESID]["L"][-1]


def test_hundreds_of_places_are_one_program(nano, asked, canvas):
    programs = sweeps._metric._cache_size()
    again = swept(nano, asked, RESID, direction="noising", seed=3)
    assert again.size == canvas.size == STEPS * 6 * 24 * 2 >= 480
    assert sweeps._metric._cache_size() == programs
    assert (again.recovery(RESID)[0, -1, ANSWER] >= 0.9).all()


def test_patched_with_itself_it_stays_as_it_is(nano, asked):
    clean, _, *same = asked
    found = swept(nano, (clean, clean, *same), ["layers.*.mlp_out", RESID])
    assert np.abs(found.flat()).max() <= 1e-6 and np.abs(found.base).min() > 1  # another program is off by 4e-6


def test_the_text_says_the_donors_value(nano, asked):
    """Its cached keys and values, in the layers that read them, make the whole answer the donor's."""
    place = asked[-1]
    found = swept(nano, asked, "cache", "text", over=(), prompt_positions=[place], steps=0)
    other = swept(nano, asked, "cache", "text", over=(), prompt_positions=[place - 3], steps=0)
    np.testing.assert_array_equal(found.base, 0)
    np.testing.assert_array_equal(found.donor, 1)
    np.testing.assert_array_equal(found["cache"].max(1), 1)
    np.testing.assert_array_equal(other["cache"], 0)


def test_shuffled_weights_lose_it(nano, asked, canvas, prompt):
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: rng.permuted(np.asarray(x).ravel()).reshape(x.shape), nano.model)
    shuffled = nano.with_model(jax.tree.map(jax.numpy.asarray, model))
    for whole, options in ((canvas, {"sites": RESID}), (prompt, {"sites": "layers.0.resid_post", "phase": "prefill"})):
        lost = swept(shuffled, asked, steps=0, **options)
        assert np.abs(lost.flat()).max() <= 0.1 * np.abs(whole[RESID][0]).max()
