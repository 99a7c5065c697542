"""What flows between steps, on trajectories written by hand."""

import dataclasses

import numpy as np
import pytest
from hand_trajectory import EOS, PAD, trajectory

import dgemma_jax as dg
import interp
from interp.flow.recorded import at_last, last_steps, of_rows

SPECIALS = interp.Specials(ends=(EOS,), others=(PAD,))


def run(steps=4, rows=2, length=6, seed=0, **options):
    rng = np.random.default_rng(seed)
    argmax = rng.integers(3, 9, (steps, rows, length))
    return trajectory(argmax, rng.random(argmax.shape) < 0.5, rng.random(argmax.shape), **options)


def test_transitions_sum_to_the_canvas():
    found = interp.transitions(run(ends=[4, 2]))
    total = sum(found[name] for name in found.values)
    np.testing.assert_array_equal(total[0], [[6, 6], [6, 6], [6, np.nan], [6, np.nan]])
    on = np.array([[0, 1, 1], [1, 1, 0]], bool)[:, None]
    by_hand = interp.transitions(trajectory(np.ones((2, 1, 3), int), on))
    assert [by_hand[name][0, 0, 0] for name in by_hand.values] == [0, 1, 2, 0]
    assert [by_hand[name][0, 1, 0] for name in by_hand.values] == [1, 1, 1, 0]


def test_settled_fraction():
    argmax = np.array([[[5, 6, 7, 8]], [[5, 6, 9, 9]], [[5, 6, 9, 8]]])
    found = interp.settled_fraction(trajectory(argmax))["settled"]
    np.testing.assert_allclose(found[0, :, 0], [0.75, 0.75, 1])
    some = np.array([[[False, False, True, True]]])
    np.testing.assert_allclose(interp.settled_fraction(trajectory(argmax), some)["settled"][0, :, 0], [0.5, 0.5, 1])


def test_rows_that_stop_early():
    made = run(ends=[4, 2])
    assert last_steps(made).tolist() == [[3, 1]]
    np.testing.assert_array_equal(at_last(made, made.argmax)[0, 1], made.argmax[0, 1, 1])
    curve = interp.settled_fraction(made)
    with pytest.warns(UserWarning, match="different steps"):
        curve.mean("settled")
    even = curve.aligned(5)
    assert np.isfinite(even["settled"]).all() and (even["settled"][:, -1] == 1).all()
    assert even.mean("settled").shape == (1, 5) and len(even.plot().axes) == 1


def test_some_rows_alone():
    made = run(ends=[4, 2])
    one = of_rows(made, [1])
    assert one.num_steps.tolist() == [[2]] and one.replay is None
    np.testing.assert_array_equal(one.argmax, made.argmax[:, :, 1:])
    np.testing.assert_array_equal(one.committed, made.committed[:, 1:])


def test_curves_are_kept(tmp_path):
    made = interp.transitions(run())
    again = interp.StepCurves.load(made.save(tmp_path / "curves"))
    assert repr(again) == repr(made) and set(again.values) == set(made.values)
    with pytest.raises(KeyError, match="no curve"):
        made["speed"]


def table(size=40, width=8, seed=1):
    """Words in pairs: 2n and 2n + 1 are nearly parallel."""
    rng = np.random.default_rng(seed)
    base = np.repeat(rng.standard_normal((size // 2, width)), 2, 0)
    return (base + 0.01 * rng.standard_normal((size, width))).astype(np.float32)


def test_nearest_tokens_are_those_of_the_whole_table():
    words = table()
    unit = words / np.linalg.norm(words, axis=1, keepdims=True)
    scores = unit @ unit.T - 2 * np.eye(len(words))
    wanted = np.argsort(-scores, 1)[:, :3]
    for block in (7, 40, 64):
        np.testing.assert_array_equal(np.sort(interp.nearest_tokens(words, np.arange(40), 3, block)), np.sort(wanted))
    with pytest.raises(ValueError, match="count must be"):
        interp.nearest_tokens(words, [1], 40)


@pytest.fixture(scope="module")
def named():
    """A run of one row in which each class occurs, and a stand-in for its bundle."""
    final = np.array([[10, 20, 30, EOS, PAD, PAD]])
    ids = np.zeros((1, 1, 6, 2), int)
    ids[0, 0, :, 0] = final[0]
    ids[0, 0, :, 1] = [20, 21, 37, 5, 5, 5]  # adjacent by one; similar to the final 20; nothing
    ids[0, 0, 2] = [37, 11]  # position 2: nothing, and similar to 10, two away
    probs = np.full((1, 1, 6, 2), [0.9, 0.05])
    made = trajectory(final[None], top_ids=ids, top_probs=probs, committed=final)
    return made, dg.nn.transformer.abstract(dg.ModelConfig.tiny(vocab_size=40))


def test_each_class_of_token_identity(named, tmp_path):
    made, model = named
    options = dict(window=2, neighbors=1, specials=SPECIALS, table=table())
    found = interp.token_identity(model, made, k=2, **options)
    # final: 10, 20; adjacent: 20 beside 10... at position 0; similar: 21; to adjacent: 11; other: 37
    assert found.counts[0, 0, 0].tolist() == [2, 1, 1, 1, 1] and found.distances[0, 0, 0].tolist() == [1, 0]
    np.testing.assert_allclose(found.shares().sum(-1), 1)
    with pytest.raises(ValueError, match="top_k=33"):
        interp.token_identity(model, made, p=0.03, **options)
    with pytest.raises(ValueError, match="top_k=8"):
        interp.token_identity(model, made, k=8, **options)
    with pytest.raises(ValueError, match="one of k and p"):
        interp.token_identity(model, made, k=1, p=0.1, **options)
    top = interp.token_identity(model, made, p=0.5, **options)
    assert top.counts.sum() == 3 and top.counts[0, 0, 0].tolist() == [2, 0, 0, 0, 1]
    narrow = interp.token_identity(model, made, k=2, **{**options, "window": 1})
    assert narrow.counts[0, 0, 0].tolist() == [2, 1, 1, 0, 2]
    again = interp.TokenIdentity.load(found.save(tmp_path / "identity"))
    assert repr(again) == repr(found) and found.plot().axes


def test_identity_with_texts_of_other_rows_is_chance(named):
    """The null: random words are final in one of so many, whatever the step."""
    rng = np.random.default_rng(0)
    final = rng.integers(3, 40, (40, 12))
    made = trajectory(final[None])
    options = dict(k=1, window=2, neighbors=1, specials=SPECIALS, table=table())
    assert interp.token_identity(named[1], made, **options).shares()[0, 0] == 1
    other = interp.token_identity(named[1], made, final=np.roll(made.committed, 1, 1), **options)
    assert other.shares()[0, 0] < 0.1


def test_what_the_record_lacks_is_named():
    made = run()
    with pytest.raises(ValueError, match=r"record=dg.Record\(soft=True\)"):
        interp.carrier_split(None, made)
    with pytest.raises(ValueError, match="accepted=True"):
        interp.transitions(dataclasses.replace(made, accepted=None))
    with pytest.raises(ValueError, match="needed is a trajectory"):
        interp.transitions("run")
    with pytest.raises(ValueError, match="at least one id"):
        interp.TokenWatch.of(end=[])
    assert interp.TokenWatch.of(a=[2, 1]) == interp.TokenWatch.of(a=(1, 2, 2))
