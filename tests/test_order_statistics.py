"""Statistics of the order and detectors of phenomena, on trajectories written by hand: every value is known."""

import dataclasses
import warnings

import numpy as np
import pytest
from hand_trajectory import EOS, PAD, trajectory

import interp
from interp.order.rank_order import block_tau, control_tau, pair_shares, tau

SPECIALS = interp.Specials(ends=(EOS,), others=(PAD,))


def still(words, steps=3, **options):
    """A run whose argmax never changes; rows of ids."""
    return trajectory(np.broadcast_to(words, (steps, *np.shape(words))), **options)


def written_at(steps, **options):
    """A run of one row whose position i is accepted at step steps[i]; word 10 + i."""
    return still([np.arange(len(steps)) + 10], max(steps) + 2, accepted=[steps], **options)


def test_tau_is_tie_aware():
    assert tau([0, 1, 2, 3]) == pytest.approx(1) and tau([3, 2, 1, 0]) == pytest.approx(-1)
    # pairs: 6; one tied in commit; 5 concordant: 5 / sqrt(5 * 6)
    assert tau([0, 1, 1, 2]) == pytest.approx(5 / np.sqrt(30))
    assert np.isnan(tau([4])) and np.isnan(tau([2, 2, 2]))
    with pytest.warns(UserWarning, match="tau-a"):
        assert tau([0, 1, 1, 2], ties=False) == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="one for each"):
        tau([1, 2], [1, 2, 3])


@pytest.mark.parametrize("count, steps", [(2, 2), (24, 5), (24, 40), (256, 20)])
def test_tau_is_that_of_scipy(count, steps):
    from scipy import stats

    rng = np.random.default_rng(count + steps)
    for _ in range(10):
        commit, position = rng.integers(0, steps, count), rng.permutation(300)[:count]
        expected = stats.kendalltau(commit, position).statistic
        np.testing.assert_allclose(tau(commit, position), expected, atol=1e-14)
        blocks = block_tau(commit, position, (4, 16))
        for size, found in blocks.items():
            bins = np.unique(position // size)
            first = [commit[position // size == one].min() for one in bins]
            np.testing.assert_allclose(found, stats.kendalltau(first, bins).statistic, atol=1e-14)


@pytest.mark.parametrize("length, expected", [(16, 0), (20, 0.580), (50, 0.840), (100, 0.924), (200, 0.962), (256, 0.970)])
def test_control_of_blocks_in_order(length, expected):
    assert control_tau(np.arange(length)) == pytest.approx(expected, abs=6e-4)


def test_block_tau_finds_the_blocks():
    """Blocks of 8 in order, random within: bins of 8 are in order; bins of 4 are not so."""
    commit = np.concatenate([8 * b + np.random.default_rng(b).permutation(8) for b in range(8)])
    found = block_tau(commit, np.arange(64), (4, 8, 16))
    assert found[8] == pytest.approx(1) and found[16] == pytest.approx(1) and found[4] < 0.999
    with pytest.warns(UserWarning, match="one bin size"):
        block_tau(commit, np.arange(64), (16,))
    assert pair_shares([0, 0, 2, 1], np.arange(4)) == (pytest.approx(1 / 6), pytest.approx(1 / 6))


def test_commits_locks_and_what_was_given_up():
    on = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)[:, None]
    argmax = np.array([[5, 6, 7], [5, 8, 7], [5, 6, 7]])[:, None]
    entropy = np.arange(9.0).reshape(3, 1, 3)
    found = interp.commits(trajectory(argmax, on, entropy))
    assert found.first.tolist() == [[[0, 1, -1]]] and found.stays.tolist() == [[[2, 1, -1]]]
    assert found.lock.tolist() == [[[0, 2, 0]]] and found.given_up.tolist() == [[1]] and not found.is_monotone[0, 0]
    np.testing.assert_array_equal(found.entropy[0, 0], [0, 4, np.nan])


@pytest.mark.parametrize("direction", [1, -1])
def test_planted_orders_are_recovered(direction):
    """Positions written one by one, forwards or backwards, in spite of the end and its padding; not when shuffled."""
    steps = np.arange(24)[::direction]
    words = np.r_[np.arange(24) + 10, EOS, np.full(15, PAD)][None]
    accepted = np.r_[steps, np.zeros(16, int)][None]
    run = still(words, 26, accepted=accepted)
    order = interp.commit_order(run, SPECIALS)
    assert abs(order["tau"][0, 0]) >= 0.95 and np.sign(order["tau"][0, 0]) == direction
    assert order["out of order"][0, 0] == (direction < 0) and order["tokens per call"][0, 0] == 24 / 26
    assert order["given up"][0, 0] == 0 and order["monotone tau"][0, 0] == order["tau"][0, 0]
    with pytest.warns(UserWarning, match="end tokens"):
        padded = interp.commit_order(run, None)["tau"][0, 0]
    assert padded < 0.95
    taus = []
    for seed in range(40):
        mixed = np.r_[np.random.default_rng(seed).permutation(steps), np.zeros(16, int)][None]
        taus.append(interp.commit_order(still(words, 26, accepted=mixed), SPECIALS)["tau"][0, 0])
    assert abs(np.mean(taus)) < 0.1


def test_nothing_counts_after_the_end():
    run = still([[10, 11, EOS, 12, 13]])
    assert interp.content(run, SPECIALS).tolist() == [[[True, True, False, False, False]]]
    assert interp.content(run, SPECIALS, skip=1).sum() == 1


def test_summary_by_regime_and_prompt():
    """Regimes of opposite order cancel when pooled; seeds of a prompt are one cluster."""
    forward, back = np.arange(6), np.arange(6)[::-1]
    run = still(np.tile(np.arange(6) + 10, (6, 1)), 8, accepted=np.array([forward] * 3 + [back] * 3))
    order = interp.commit_order(run, SPECIALS)
    groups = ["a"] * 3 + ["b"] * 3
    found = order.summary(groups, [0, 0, 1, 2, 2, 3])
    assert found["a"]["tau"] == pytest.approx((1, 1, 1)) and found["b"]["tau"] == pytest.approx((-1, -1, -1))
    with pytest.raises(ValueError, match="give groups"):
        order.summary()
    with pytest.warns(UserWarning, match="pooled over regimes"):
        assert order.summary(pooled=True)["all"]["tau"][0] == pytest.approx(0)
    assert "regime" in order.table(groups) and "tau" in repr(order) and order.plot(groups).axes
    weights = order.summary(["a"] * 6, [0, 0, 0, 0, 0, 1])["a"]["tau"]
    assert weights[0] == pytest.approx((1 / 5 - 1) / 2)  # prompt 0: three forward, two back; prompt 1: back


def test_guards_and_files(tmp_path):
    order = interp.commit_order(written_at([0, 2, 1]), SPECIALS)
    with pytest.warns(UserWarning, match="un-accepts"):
        off = interp.commit_order(written_at([0, 2, 1]), SPECIALS, monotone=False)
    assert np.isnan(off["monotone tau"]).all() and np.isfinite(order["monotone tau"]).all()
    again = interp.CommitOrder.load(order.save(tmp_path / "order"))
    np.testing.assert_array_equal(again["tau"], order["tau"])
    with pytest.raises(KeyError, match="no measure"):
        order["speed"]
    with pytest.raises(ValueError, match="dg.Record\\(accepted=True\\)"):
        interp.commit_order(dataclasses.replace(written_at([0, 1]), accepted=None), SPECIALS)


def test_confidence_within_regimes():
    """Within each regime confidence says nothing, or everything; pooled it would say something else."""
    score, right = np.array([1.0, 2, 3, 4, 5, 6]), np.array([0, 0, 0, 1, 1, 1], bool)
    found = interp.confidence(score, right, ["a"] * 6)["a"]
    assert found.auroc == 1 and found.tertiles == (1, 0.5, 0) and found.accuracy == 0.5
    assert interp.confidence(-score, right, ["a"] * 6)["a"].auroc == 0
    easy = interp.confidence(np.r_[score, score + 10], np.r_[right, np.ones(6, bool)], ["a"] * 6 + ["b"] * 6)
    assert np.isnan(easy["b"].auroc) and easy["a"].auroc == 1
    rng = np.random.default_rng(0)
    chance = interp.confidence(rng.normal(size=200), rng.random(200) < 0.5, ["a"] * 200, np.arange(200) // 2)["a"]
    assert chance.low < 0.5 < chance.high and abs(chance.auroc - 0.5) < 0.12
    with pytest.warns(UserWarning, match="Simpson"):
        interp.confidence(score, right, pooled=True)
    with pytest.raises(ValueError, match="give groups"):
        interp.confidence(score, right)


def test_length_estimate():
    """Padding certain from position 50 on: 50. Then three rows whose length is known from step 1 on."""
    pad = np.zeros((2, 1, 60))
    pad[..., 50:] = 1
    run = still([np.full(60, 9)], 2, fn={"end": pad})
    np.testing.assert_allclose(interp.length_estimate(run)["length"], 50)
    lengths = np.array([2, 5, 9, 4, 7])
    late = (np.arange(12) >= lengths[:, None]).astype(float)
    mass = np.stack([np.full_like(late, 0.5), late])
    found = interp.length_foresight(still(np.full((5, 12), 9), 2, fn={"end": mass}), lengths)
    assert np.isnan(found.correlation[0]) and found.correlation[1] == pytest.approx(1) and found.error[1] == 0
    assert found.null[1] <= 1 and "step 1" in repr(found)
    with pytest.raises(ValueError, match="watched no 'end'"):
        interp.length_estimate(still([[9, 9]]))
    with pytest.raises(ValueError, match="not all equal"):
        interp.length_foresight(still(np.full((5, 12), 9), 2, fn={"end": mass}), [3] * 5)


def test_answers_corrected_and_locked_in():
    """Row 0 changes its answer after the reasoning; row 1 has it before."""
    answer, reasoning = np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 1], bool)
    argmax = np.full((5, 2, 4), 7)
    argmax[:2, :, 1:] = 8  # reasoning locks at step 2
    argmax[:4, 0, 0] = 9  # this answer at step 4
    found = interp.answer_lock(trajectory(argmax), answer, reasoning)
    assert found.corrected.tolist() == [True, False] and found.before.tolist() == [False, True] and found.null == 0
    assert found.locked_in([False, False]).tolist() == [False, True] and not found.locked_in([True, True]).any()
    with pytest.raises(ValueError, match="both answer and reasoning"):
        interp.answer_lock(trajectory(argmax), answer, ~reasoning | reasoning)
    with pytest.raises(ValueError, match="rows \\[0, 1\\] have no answer"):
        interp.answer_lock(trajectory(argmax), ~answer & False, reasoning)


def test_token_smear():
    """Half the mass at each of two places, one in the end: two positions wide, smear 1, then 0."""
    mass = np.zeros((2, 1, 6))
    mass[0, 0, [2, 3]] = 0.5
    mass[1, 0, 3] = 1
    run = still([[9, 9, 9, 30, 9, 9]], 2, fn={"comma": mass})
    found = interp.token_smear(run, "comma", 30)
    np.testing.assert_allclose(found["smear"][0, :, 0], [1, 0], atol=1e-9)
    np.testing.assert_allclose(found["least"][0, :, 0], [0, 0])
    gone = interp.token_smear(still([[9] * 6], 2, fn={"comma": mass * 0}), "comma", 30)
    assert np.isnan(gone["smear"]).all()
    ids = np.array([[[[9, 30], [30, 9], [30, 9], [9, 8]]]])
    probs = np.array([[[[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]]])
    words = [[9, 9, 30, 9]]
    assert interp.smeared_tokens(trajectory([words], top_ids=ids, top_probs=probs, committed=words))[0][3:] == (1, 30)
    sure = trajectory([words], top_ids=ids, top_probs=np.array([[[[1, 0.0]] * 4]]), committed=[[9, 30, 30, 9]])
    assert interp.smeared_tokens(sure) == []


def test_sequence_smear():
    """The final text and its copy one position later, half each; or another text beside it."""
    text = np.arange(6) + 10
    final = np.r_[text, EOS, PAD][None]
    shifted = np.r_[99, final[0, :-1]][None]
    other = np.r_[np.full(6, 50), EOS, PAD][None]
    for rival, spacing, meaning in ((shifted, True, False), (other, False, True), (final, False, False)):
        ids, probs = np.stack([final, rival], -1)[None], np.full((1, 1, 8, 2), 0.5)
        if rival is final:
            ids[..., 1], probs[..., 0], probs[..., 1] = 200, 1, 0
        run = trajectory([final], top_ids=ids, top_probs=probs, committed=final)
        found = interp.sequence_smear(run, SPECIALS)
        assert (found.is_smeared.any(), found.is_split.any()) == (spacing, meaning)
        assert found.null.max() <= 0.5 and found.spacing[0, 0, 3] == pytest.approx(1 if rival is final else 0.5)


def test_intermediate_tokens():
    """A word that stands for two steps and is replaced; not one that only moves a little."""
    argmax = np.array([[[10, 13, 12]], [[10, 13, 12]], [[10, 40, 12]]])
    (found,) = interp.intermediate_tokens(trajectory(argmax))
    assert (found.position, found.token, found.first, found.last, found.peak) == (1, 13, 0, 1, 1)
    moved = np.array([[[13, 10, 12]], [[10, 13, 12]]])
    assert interp.intermediate_tokens(trajectory(moved)) == []
    assert len(interp.intermediate_tokens(trajectory(moved), window=0)) == 2
    weak = trajectory(argmax, top_probs=np.full((3, 1, 3, 1), 0.4))
    assert interp.intermediate_tokens(weak) == []


def test_loops_of_text_and_run():
    words = np.stack([np.full(100, 9), np.arange(100) + 9])
    found = interp.find_loops(still(words), SPECIALS)
    np.testing.assert_allclose(found.dup8, [0.989, 0], atol=5e-4)
    assert found.is_loop.tolist() == [True, False] and found.null[0] > 0.9 and not found.period.any()
    again = trajectory(np.array([5, 6, 5, 6, 6])[:, None, None] * np.ones((1, 1, 3), int))
    assert interp.find_loops(again, SPECIALS).period.tolist() == [[2]]


def test_results_are_kept(tmp_path):
    """Arrays, numbers, tuples and tokens come back; the file of another result is refused."""
    found = interp.commits(written_at([0, 2, 1]))
    again = interp.Commits.load(found.save(tmp_path / "commits"))
    np.testing.assert_array_equal(again.first, found.first)
    token = interp.Intermediate(0, 0, 1, 13, first=0, last=1, peak=1.0)
    needed = interp.Necessity(np.ones(1), np.zeros((1, 4)), (token,))
    again = interp.Necessity.load(needed.save(tmp_path / "needed"))
    assert again.found == (token,) and again.found[0].peak == 1 and again.p_value.tolist() == [0.2]
    with pytest.raises(ValueError, match="not Commits"):
        interp.Commits.load(tmp_path / "needed")


def test_no_warning_by_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interp.commit_order(written_at([0, 1, 2, 2]), SPECIALS).summary(["a"])
