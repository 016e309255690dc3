import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from simreg import intervals
from simreg.study import stats
from simreg.study.stats import Crossing


def test_crossing_by_hand():
    # Linear in log tokens: halfway in loss between 4 and 16 tokens is at 8.
    assert stats.crossing([4, 16], [3.0, 1.0], 2.0) == Crossing("ok", pytest.approx(8.0), True)
    assert stats.crossing([4, 16], [3.0, 1.0], 2.5) == Crossing("ok", pytest.approx(4**1.25), True)


@pytest.mark.parametrize(
    ("ce", "target", "status", "tokens"),
    [
        ([3.0, 2.0, 1.0], 3.5, "at_least", 10.0),
        ([3.0, 2.0, 1.0], 0.5, "not_reached", None),
        ([3.0, 2.0, 1.0], 3.0, "ok", 10.0),
        ([3.0, 2.0, 1.0], 2.0, "ok", 20.0),
        ([3.0, 2.0, 1.0], 1.0, "ok", 40.0),
    ],
)
def test_crossing_at_the_edges_never_extrapolates(ce, target, status, tokens):
    found = stats.crossing([10, 20, 40], ce, target)
    assert found.status == status
    assert found.tokens == (None if tokens is None else pytest.approx(tokens))


def test_several_crossings_take_the_one_from_which_it_stays():
    found = stats.crossing([10, 20, 40, 80], [1.5, 3.0, 2.5, 1.0], 2.0)
    assert found.status == "ok"
    assert 40 < found.tokens < 80
    assert not found.monotone
    # Better at a small budget only, and worse again at the largest: nothing is claimed.
    assert stats.crossing([10, 20], [1.0, 3.0], 2.0).status == "not_reached"


def test_mid_run_takes_the_first_passing():
    found = stats.first_passing([10, 20, 40, 80], [4.0, 2.0, 5.0, 1.0], 3.0)
    assert found.tokens == pytest.approx(math.sqrt(200))
    assert stats.first_passing([10, 20], [2.0, 1.0], 3.0).status == "at_least"
    assert stats.first_passing([10, 20], [2.0, 1.0], 0.5).status == "not_reached"


@pytest.mark.parametrize(
    ("tokens", "ce"),
    [([], []), ([1, 2], [1.0]), ([2, 1], [1.0, 2.0]), ([0, 1], [1.0, 2.0]), ([1], [math.nan])],
)
def test_crossing_refuses_what_is_not_a_curve(tokens, ce):
    with pytest.raises(ValueError, match="tokens"):
        stats.crossing(tokens, ce, 1.0)


@pytest.mark.parametrize("find", [stats.crossing, stats.first_passing])
@pytest.mark.parametrize("target", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_no_number_saves_nothing(find, target):
    with pytest.raises(ValueError, match="target"):
        find([10, 20], [2.0, 1.0], target)


@settings(max_examples=60, deadline=None)
@given(
    speed=st.floats(1.02, 1.6),
    alpha=st.floats(0.05, 0.5),
    floor=st.floats(0.5, 3.0),
    n=st.floats(1e6, 1e10),
)
def test_a_known_saving_of_power_laws_is_recovered(speed, alpha, floor, n):
    budgets = n * np.array([0.6, 0.7, 0.8, 0.9, 1.0])

    def loss(tokens, speed):
        return floor + 5 * (speed * tokens / n) ** -alpha

    found = stats.crossing(budgets, loss(budgets, speed), loss(n, 1.0))
    saved = stats.saving({0: found}, {0: n})
    assert saved["status"] == "ok"
    assert saved["mean"] == pytest.approx(1 - 1 / speed, abs=2e-3)


def test_t_interval_by_hand_and_by_scipy():
    values = [0.1, 0.3, 0.2, 0.6]
    found = intervals.t_interval(values)
    low, high = reference.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    # n = 2: t(0.975, 1 degree of freedom) = 12.706, standard error = half the distance.
    two = intervals.t_interval([1.0, 3.0])
    assert two.high - two.mean == pytest.approx(12.7062, rel=1e-5)


def test_no_interval_from_one_seed_or_none():
    assert intervals.t_interval([2.0]) == intervals.Interval(2.0, None, None, 1)
    assert intervals.t_interval([]) == intervals.Interval(None, None, None, 0)
    assert stats.bootstrap_interval([2.0]) is None
    assert stats.mean_sd([2.0]) == {"mean": 2.0, "sd": None, "n": 1}
    assert stats.mean_sd([1.0, 3.0])["sd"] == pytest.approx(math.sqrt(2))


def test_the_interval_of_the_saving_covers_the_truth_95_percent_of_the_time(monkeypatch):
    monkeypatch.setattr(stats, "bootstrap_interval", lambda values: None)  # slow, not looked at
    rng = np.random.default_rng(0)
    truth, trials, covered, n = 0.25, 2000, 0, dict.fromkeys(range(5), 100.0)
    draws = 100 * np.exp(rng.normal(np.log(1 - truth), 0.05, size=(trials, 5)))
    for tokens in draws:
        saved = stats.saving({s: ok(t) for s, t in enumerate(tokens)}, n)
        covered += saved["low"] <= truth <= saved["high"]
    assert covered / trials == pytest.approx(0.95, abs=0.015)


def test_bootstrap_is_seeded_and_brackets_the_mean():
    values = [0.1, 0.3, 0.2, 0.6, 0.4]
    low, high = stats.bootstrap_interval(values)
    assert (low, high) == stats.bootstrap_interval(values)
    assert min(values) < low < np.mean(values) < high < max(values)
    # Narrower than the t interval at this size: why it is not the first figure.
    t = intervals.t_interval(values)
    assert t.low < low < high < t.high


def ok(tokens):
    return Crossing("ok", tokens, True)


def test_saving_by_hand():
    saved = stats.saving({0: ok(50.0), 1: ok(80.0)}, {0: 100.0, 1: 100.0})
    # Geometric mean of 0.5 and 0.8.
    assert saved["mean"] == pytest.approx(1 - math.sqrt(0.4))
    half = 12.7062 * math.log(0.8 / 0.5) / 2
    assert saved["low"] == pytest.approx(1 - math.sqrt(0.4) * math.exp(half), rel=1e-4)
    assert saved["high"] == pytest.approx(1 - math.sqrt(0.4) * math.exp(-half), rel=1e-4)
    assert saved["low"] < saved["mean"] < saved["high"]
    assert saved["bootstrap"]["low"] <= saved["mean"] <= saved["bootstrap"]["high"]
    assert [s["saved"] for s in saved["per_seed"]] == [pytest.approx(0.5), pytest.approx(0.2)]


def test_seconds_pay_for_slower_steps():
    saved = stats.saving({0: ok(70.0)}, {0: 100.0}, 1.1)
    assert saved["mean"] == pytest.approx(1 - 0.7 * 1.1)
    unknown = stats.saving({0: ok(70.0)}, {0: 100.0}, None)
    assert unknown["mean"] is None
    assert unknown["status"] == "ok"


def test_mixed_statuses_are_never_averaged_away():
    bound, none = Crossing("at_least", 60.0, True), Crossing("not_reached", None, True)
    n = dict.fromkeys(range(3), 100.0)
    some = stats.saving({0: ok(80.0), 1: bound, 2: ok(80.0)}, n)
    assert (some["status"], some["at_least"], some["n"]) == ("at_least", 1, 3)
    assert some["mean"] == pytest.approx(1 - (0.8 * 0.6 * 0.8) ** (1 / 3))
    assert some["low"] is some["high"] is some["bootstrap"] is None
    worst = stats.saving({0: ok(80.0), 1: bound, 2: none}, n)
    assert (worst["status"], worst["not_reached"], worst["n"]) == ("not_reached", 1, 3)
    assert worst["mean"] is worst["low"] is worst["high"] is None
    assert worst["per_seed"][2]["saved"] is None


def test_paired_difference_uses_the_seeds_that_both_have():
    found = intervals.paired_difference({0: 4.0, 1: 4.5, 7: 1.0}, {0: 4.1, 1: 4.4, 9: 0.0})
    assert found["mean"] == pytest.approx(0.0)
    assert found["n"] == 2
    assert [d["seed"] for d in found["per_seed"]] == [0, 1]
    assert found["per_seed"][0]["difference"] == pytest.approx(-0.1)


def test_interpolate_stays_inside():
    assert stats.interpolate([4, 16], [3.0, 1.0], 8) == pytest.approx(2.0)
    assert stats.interpolate([4, 16], [3.0, 1.0], 3.9) is None
    assert stats.interpolate([4, 16], [3.0, 1.0], 16.1) is None


def test_a_loss_on_the_target_is_reached_at_its_own_tokens():
    """Without a rounding that would be a difference, as of an arm that is the reference."""
    third = stats.crossing([50, 1e6 / 3], [3.0, 1.7], 1.7)
    assert third == Crossing("ok", 1e6 / 3, True)
    assert stats.first_passing([7, 1e6 / 3], [3.0, 1.7], 1.7).tokens == 1e6 / 3
    same = stats.saving(dict.fromkeys(range(3), third), dict.fromkeys(range(3), 1e6 / 3))
    assert same["mean"] == same["low"] == same["high"] == 0


def test_a_plateau_is_not_monotone():
    assert stats.crossing([1, 2, 4], [3.0, 3.0, 2.0], 2.5).monotone is False
