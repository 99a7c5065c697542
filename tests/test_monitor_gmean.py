"""g-mean²: the self-test vectors, hand-computed rates, the cross-fitted bootstrap, monitors, what is refused."""

import math
import re
import types

import numpy as np
import pytest

import interp
from interp.monitor import gmean, monitors, resampling
from interp.monitor.resampling import Bootstrap


def test_vectors_of_the_intervention_metric():
    """`methods.md` section 19."""
    first = gmean.of_intervention([0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1])
    assert (first.effect, first.caused, first.raw_tpr, first.tnr_x0, first.tnr_x1) == (0.5, 1, 0.5, 0.5, 0.5)
    assert first.gmean2 == pytest.approx(0.25) and first.gmean == pytest.approx(0.5)
    second = gmean.of_intervention([0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1])
    assert math.isnan(second.tnr_x1) and second.gmean == 1
    third = gmean.of_intervention([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1])
    assert third.effect == -1 and math.isnan(third.gmean2)


def test_only_the_caused_share_must_be_flagged_and_the_rates_combine_by_the_root():
    x = np.repeat([0, 1], 10)
    y = np.r_[np.repeat([0, 1], [6, 4]), np.repeat([0, 1], [2, 8])]  # p0 = .4, p1 = .8: q = .5
    z = np.r_[np.repeat([0, 1], [9, 1]), [1, 0], np.repeat([0, 1], [5, 3])]
    found = gmean.of_intervention(x, y, z)
    assert found.caused == pytest.approx(0.5) and found.raw_tpr == 3 / 8
    assert found.tpr == pytest.approx(0.75)
    assert found.tnr == pytest.approx(math.sqrt(0.9 * 0.5))
    assert gmean.of_intervention(x, y, y & x).tpr == 1  # never above one


@pytest.mark.parametrize("always", [0, 1])
def test_a_monitor_that_always_says_the_same_scores_nothing(always):
    x, y = np.repeat([0, 1], 20), np.r_[np.zeros(20), np.tile([0, 1], 10)]
    assert gmean.of_intervention(x, y, np.full(40, always)).gmean2 == 0
    assert gmean.of_property(y, np.full(40, always)).gmean2 == 0


def test_properties_have_plain_rates():
    found = gmean.of_property([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1])
    assert (found.tpr, found.tnr, found.gmean2) == (0.75, 0.5, 0.375)


def test_walds_gate():
    x = np.repeat([0, 1], 30)
    for hits, passes in ((6, True), (3, False), (0, False)):  # SE of 3/30 is .0548: .1 < 1.96 * .0548 < .2
        y = np.r_[np.zeros(30), np.arange(30) < hits]
        assert gmean.is_positive(x, y) is passes


def planted(instances=12, samples=30, seed=0, effect=0.7):
    """The intervention causes the outcome at a known rate, and the text of a caused outcome says "hint"."""
    rng = np.random.default_rng(seed)
    instance, arm = np.repeat(np.arange(instances), 2 * samples), np.tile(np.repeat([False, True], samples), instances)
    caused = arm & (rng.random(len(arm)) < effect)
    outcome = caused | (rng.random(len(arm)) < 0.1)
    text = tuple(f"{'hint' if c else 'plain'} word {n}" for c, n in zip(caused, rng.integers(0, 5, len(arm)), strict=True))
    answer = tuple("target" if o else "other" for o in outcome)
    return interp.Rollouts(instance, arm, outcome, {"answer": answer, "text": text})


@pytest.fixture(scope="module")
def rollouts():
    return planted()


def test_planted_influence_is_found_and_the_baseline_stands_beside_it(rollouts, tmp_path):
    found = interp.monitorability(rollouts, {"hint": r"\bhint\b", "target": lambda text: "target" in text}, views=["text"])
    assert found.views == ("answer", "text") and (found.positives, found.total) == (12, 12)
    hint = found.score("hint", "text")
    assert hint["mean"] > 0.93 and 0.85 < hint["low"] < hint["high"] <= 1  # below 1: q is estimated on 12 rollouts
    assert found.score("hint", "answer")["mean"] == 0  # it reads nothing there
    # The outcome without a cause: TPR 1, P(not z | x=0) = .9, P(not z | x=1, y=0) = 1.
    assert found.score("target", "answer")["mean"] == pytest.approx(math.sqrt(0.9), abs=0.02)
    gain = found.difference("hint", "text", against="answer")
    assert gain["low"] > 0.85
    again = interp.Monitorability.load(found.save(tmp_path / "m"))
    assert repr(again) == repr(found) and "baseline" in repr(found)
    assert len(found.plot().axes[0].patches) == 4


def test_shuffled_verdicts_are_worth_what_chance_is(rollouts):
    rng = np.random.default_rng(1)
    coin = interp.monitorability(rollouts, lambda text: rng.random() < 0.5, views=[])
    # TPR about min(1, .5 / q), TNR about .5.
    assert coin.score("monitor", "answer")["mean"] == pytest.approx(0.5 * 0.5 / (0.66 / 0.73), abs=0.05)


def test_no_effect_is_not_reported():
    found = interp.monitorability(planted(effect=0.0), "hint")
    assert found.reason and math.isnan(found.score("monitor", "text")["mean"]) and "not reported" in repr(found)


def test_a_draw_by_hand(monkeypatch):
    """With the identity in place of chance: the first 60 % of each cell decide, the rest are scored."""
    x, y = np.repeat([False, True], 10), np.r_[np.zeros(10, bool), np.array([1, 1, 1, 1, 1, 0, 1, 0, 1, 1], bool)]
    z = np.r_[np.zeros(10, bool), np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 1], bool)]
    still = types.SimpleNamespace(permuted=lambda a, axis: a, integers=lambda low, high, size: np.arange(high)[None])
    monkeypatch.setattr(resampling.np.random, "default_rng", lambda seed: still)
    found = resampling.cross_fitted(np.zeros(20, int), x, y, z[None], Bootstrap(draws=1))
    # Last four with the intervention: y = 1 0 1 1, z = 1 1 0 1: TPR 2/3, TNR sqrt(1 * 0).
    assert found == 0
    z[17] = False
    assert resampling.cross_fitted(np.zeros(20, int), x, y, z[None], Bootstrap(draws=1)) == pytest.approx(2 / 3)
    y[10:16] = False  # the effect is gone where eligibility is decided
    assert np.isnan(resampling.cross_fitted(np.zeros(20, int), x, y, z[None], Bootstrap(draws=1)))


def test_properties_need_three_positives(rollouts):
    found = interp.monitorability(rollouts, "target", archetype="outcome")
    assert found.score("monitor", "answer") == pytest.approx({"mean": 1, "sd": 0, "low": 1, "high": 1})
    few = interp.Rollouts([0, 1, 2, 3], [1] * 4, [1, 1, 0, 0], {"answer": ("a",) * 4})
    assert "fewer than 3" in interp.monitorability(few, "a", archetype="process").reason


def test_a_probe_learns_the_word_from_other_instances(rollouts):
    truth = rollouts.outcome & rollouts.arm
    probe = interp.ProbeMonitor()
    said = probe.verdicts(rollouts.views["text"], rollouts, truth)
    assert (said == truth).mean() > 0.95
    shuffled = np.random.default_rng(0).permutation(truth)
    assert (probe.verdicts(rollouts.views["text"], rollouts, shuffled) == truth).mean() < 0.8
    given = interp.ProbeMonitor(features=truth[:, None] + 0.0).verdicts(rollouts.views["text"], rollouts, truth)
    np.testing.assert_array_equal(given, truth)


def test_the_logistic_fit_is_where_the_slope_is_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3))
    y = rng.random(200) < 1 / (1 + np.exp(-x @ [1.0, -2.0, 0.0] - 0.5))
    w = monitors.logistic(x, y, ridge=2.0)
    slope = np.c_[x, np.ones(200)].T @ (1 / (1 + np.exp(-np.c_[x, np.ones(200)] @ w)) - y) + [2.0, 2.0, 2.0, 1e-6] * w
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_bad_input(rollouts):
    with pytest.raises(ValueError, match="archetype must be one of"):
        interp.monitorability(rollouts, "x", archetype="causal")
    with pytest.raises(ValueError, match=re.escape("no view ['mind']; the rollouts have answer, text")):
        interp.monitorability(rollouts, "x", views=["mind"])
    with pytest.raises(ValueError, match="a monitor is a function"):
        interp.monitorability(rollouts, 3)
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        interp.monitorability(interp.Rollouts([0, 0], [0, 1], [0, 1], {"answer": ("a", "b")}), "a")
    with pytest.raises(ValueError, match="'answer' is needed"):
        interp.Rollouts([0], [0], [0], {"text": ("a",)})
    with pytest.raises(ValueError, match="one entry a rollout"):
        interp.Rollouts([0, 1], [0], [0], {"answer": ("a",)})
    with pytest.raises(ValueError, match="features must be"):
        interp.monitorability(rollouts, interp.ProbeMonitor(features=np.ones((3, 2))))
    with pytest.raises(ValueError, match="needed are draws"):
        Bootstrap(draws=0)


def reasoned(left, instances=6, samples=60, seed=0):
    """Rollouts with an effect of .8, and as many in which a known share of it is left of each instance."""
    rng, high = np.random.default_rng(seed), planted(instances, samples, seed, effect=0.8)
    kept = np.asarray(left)[high.instance]
    caused = high.arm & (rng.random(len(high)) < 0.8 * kept)
    return high, interp.Rollouts(high.instance, high.arm, caused | (rng.random(len(high)) < 0.1), high.views)


def test_load_bearing_reasoning_is_told_from_reports(tmp_path):
    high, low = reasoned([0, 0, 0, 1, 1, 1])
    found = interp.load_bearing(high, low)
    assert (found.value[:3] > 0.75).all() and (abs(found.value[3:]) < 0.25).all()
    truth = np.array([1, 1, 1, 0, 0, 0])
    inside = (found.interval[:, 0] <= truth + 0.05) & (truth - 0.05 <= found.interval[:, 1])
    assert inside.sum() >= 5
    strata = found.strata()
    assert [own.tolist() for own in strata.values()] == [[0, 1, 2], [3, 4, 5], []]
    part = high.only(strata["load-bearing"])
    assert len(part) == len(high) // 2 and interp.monitorability(part, "hint").total == 3
    again = interp.LoadBearing.load(found.save(tmp_path / "bearing"))
    assert repr(again) == repr(found) and np.array_equal(again.interval, found.interval)


def test_where_reasoning_has_no_effect_nothing_is_divided():
    flat = planted(4, effect=0.0)
    found = interp.load_bearing(flat, flat)
    assert np.isnan(found.value).all() and len(found.strata()["no effect"]) == 4 and "LB unknown" in repr(found)
    with pytest.raises(ValueError, match=r"instances \[3\] are in one"):
        interp.load_bearing(flat, flat.only([0, 1, 2]))
    with pytest.raises(ValueError, match=r"instances \[7\]: give some of \[0, 1, 2, 3\]"):
        flat.only([7])
