import numpy as np
import pytest

from simreg.evaluation import paired
from simreg.evaluation.outcome import Outcome, ratio


def outcome(values, weights=None, normalised=None):
    return Outcome("acc", list(values), normalised, weights)


def drawn(seeds, n, shift, rng):
    return {
        seed: outcome((rng.random(n) < 0.4 + shift + 0.05 * rng.standard_normal()).astype(float))
        for seed in seeds
    }


def brute(tasks_arm, tasks_reference, seeds, resamples, rng):
    """Draw seeds and items with replacement, one resample at a time."""
    found = []
    for _ in range(resamples):
        picked = rng.choice(seeds, len(seeds))
        each = []
        for task in tasks_arm:
            n = tasks_arm[task][seeds[0]].n
            items = rng.integers(0, n, n)
            w = np.array(tasks_arm[task][seeds[0]].weights or np.ones(n))[items]
            gaps = [
                np.subtract(tasks_arm[task][s].values, tasks_reference[task][s].values)[items].sum()
                for s in picked
            ]
            each.append(np.mean(gaps) / w.sum())
        found.append(np.mean(each))
    return np.quantile(found, [0.025, 0.975])


def test_against_a_bootstrap_one_resample_at_a_time():
    rng = np.random.default_rng(1)
    seeds = [1, 2, 3]
    arm = {"a": drawn(seeds, 60, 0.1, rng), "b": drawn(seeds, 200, 0.0, rng)}
    reference = {"a": drawn(seeds, 60, 0.0, rng), "b": drawn(seeds, 200, 0.0, rng)}
    weights = rng.uniform(1, 9, 30).tolist()
    for side in (arm, reference):
        side["c"] = {s: outcome(rng.normal(0, 1, 30) * weights, weights) for s in seeds}
    found = paired.difference(arm, reference)
    low, high = brute(arm, reference, seeds, 4000, rng)
    width = high - low
    assert found["low"] == pytest.approx(low, abs=0.06 * width)
    assert found["high"] == pytest.approx(high, abs=0.06 * width)
    means = [
        np.mean([arm[t][s].score - reference[t][s].score for s in seeds]) for t in ("a", "b", "c")
    ]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert (found["seeds"], found["items"]) == (3, 290)


def test_pairing_removes_what_items_have_in_common():
    rng = np.random.default_rng(0)
    values = (rng.random(400) < 0.5).astype(float)
    better = values.copy()
    better[:8] = 1 - better[:8]
    found = paired.difference({"t": {0: outcome(better)}}, {"t": {0: outcome(values)}})
    assert found["high"] - found["low"] < 0.04  # unpaired it would be about 0.14


def test_seeds_that_disagree_widen_the_interval():
    items = np.ones(500)
    zero = {s: outcome(0 * items) for s in (1, 2, 3, 4)}
    split = {s: outcome(items * (s % 2)) for s in (1, 2, 3, 4)}
    found = paired.difference({"t": split}, {"t": zero})
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0.0, 1.0)


def test_a_ratio_is_resampled_above_and_below_the_line():
    weights = [1.0, 50.0, 3.0, 900.0, 7.0]
    arm = {"t": {0: outcome([3 * w for w in weights], weights)}}
    reference = {"t": {0: outcome([2 * w for w in weights], weights)}}
    found = paired.difference(arm, reference)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((1.0, 1.0, 1.0))


def test_only_common_seeds_count():
    one = {s: outcome([1.0, 0.0]) for s in (1, 2)}
    other = {s: outcome([0.0, 0.0]) for s in (2, 3)}
    assert paired.difference({"t": one}, {"t": other})["seeds"] == 1
    assert paired.difference({"t": one}, {"t": {7: outcome([0.0, 0.0])}}) is None


def test_normalised_where_a_task_has_it():
    arm = {"a": {0: outcome([1, 1], normalised=[0.0, 0.0])}, "b": {0: outcome([1, 1])}}
    reference = {"a": {0: outcome([0, 0], normalised=[1.0, 1.0])}, "b": {0: outcome([0, 0])}}
    assert paired.difference(arm, reference)["mean"] == 1.0
    assert paired.difference(arm, reference, normalised=True)["mean"] == 0.0  # (-1 + 1) / 2


def test_one_seed_and_one_item_give_no_interval():
    found = paired.difference({"t": {0: outcome([1.0])}}, {"t": {0: outcome([0.0])}})
    assert (found["mean"], found["low"], found["high"]) == (1.0, None, None)


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="other items"):
        paired.difference({"t": {0: outcome([1, 0])}}, {"t": {0: outcome([1])}})


def test_a_score_and_its_standard_error():
    assert ratio([1, 0, 1, 1], None) == pytest.approx((0.75, 0.25))  # sd 0.5 over √4
    assert ratio([3.0], [2.0]) == (1.5, None)
    metrics = pytest.importorskip("lm_eval.api.metrics")
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert ratio(values, None)[1] == pytest.approx(metrics.mean_stderr(values))


def test_the_standard_error_of_a_ratio_is_that_of_resampling():
    rng = np.random.default_rng(0)
    weights = rng.uniform(1, 5, 400)
    values = weights * 2 + rng.normal(0, 1, 400)
    score, stderr = ratio(values.tolist(), weights.tolist())
    picks = rng.integers(0, 400, (4000, 400))
    resampled = values[picks].sum(1) / weights[picks].sum(1)
    assert score == pytest.approx(values.sum() / weights.sum())
    assert stderr == pytest.approx(resampled.std(), rel=0.1)


def test_an_arm_over_its_seeds():
    scores = {1: outcome([1, 1, 0, 0], normalised=[1, 1, 1, 0]), 2: outcome([1, 1, 1, 0])}
    found = paired.over_seeds(scores)
    assert found["score"] == pytest.approx(0.625)
    assert found["sd"] == pytest.approx(0.125 * 2**0.5)
    assert found["stderr"] == pytest.approx(ratio([1, 1, 0.5, 0], None)[1])
    assert found["normalised"] is None  # not of all seeds
    assert found["seeds"] == [1, 2]
