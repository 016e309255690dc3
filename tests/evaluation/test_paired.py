import numpy as np
import pytest

from simreg.evaluation import paired
from simreg.evaluation.outcome import Outcome, ratio


def outcome(values, weights=None, normalised=None, clusters=None):
    return Outcome("acc", list(values), normalised, weights, clusters)


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
    assert found["bootstrap"] == pytest.approx([low, high], abs=0.06 * (high - low))
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
    assert (found["mean"], found["bootstrap"]) == (0.5, [0.0, 1.0])
    # Seeds are all that varies: a t interval of 0, 1, 0, 1 with 3 degrees of freedom.
    half = 3.182446 * np.sqrt(1 / 3 / 4)
    assert (found["low"], found["high"]) == pytest.approx((0.5 - half, 0.5 + half))


def loops(arm, reference, seeds, clusters):
    """V_seed, V_item and V_both of one task by their definitions, a term at a time."""
    w = arm[seeds[0]].weights or [1.0] * arm[seeds[0]].n
    gaps = {s: np.subtract(arm[s].values, reference[s].values) for s in seeds}
    whole = sum(gaps[s].sum() for s in seeds) / (len(seeds) * sum(w))
    residuals = {(s, i): gaps[s][i] - whole * w[i] for s in seeds for i in range(len(w))}

    def variance(key):
        sums = {}
        for (s, i), residual in residuals.items():
            sums[key(s, i)] = sums.get(key(s, i), 0.0) + residual
        n = len(sums)
        return n / (n - 1) * sum(x**2 for x in sums.values()) / (len(seeds) * sum(w)) ** 2

    return (
        variance(lambda s, i: s),
        variance(lambda s, i: clusters[i]),
        variance(lambda s, i: (s, clusters[i])),
    )


def crossed(
    seeds, n, rng, *, of_seeds, of_items, weights=None, clusters=None, documents=0.0, told=True
):
    """An arm and a reference: the gap of a seed on an item is their effects' sum, and noise.

    Without `told`, the outcomes do not say which items share a document.
    """
    w = np.ones(n) if weights is None else np.array(weights)
    items = rng.normal(0, of_items, n)
    if clusters is not None:
        items = items + rng.normal(0, documents, max(clusters) + 1)[clusters]
    common = rng.normal(0, 1, n)
    facts = {"weights": weights, "clusters": clusters if told else None}
    gaps = {s: rng.normal(0, of_seeds) + items + rng.normal(0, 1, n) for s in seeds}
    arm = {s: outcome(w * (common + gap), **facts) for s, gap in gaps.items()}
    return arm, {s: outcome(w * common, **facts) for s in seeds}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clustered", [False, True])
def test_the_variance_is_that_of_two_way_clusters(weighted, clustered):
    rng = np.random.default_rng(3)
    weights = rng.uniform(1, 9, 40).tolist() if weighted else None
    clusters = rng.integers(0, 12, 40).tolist() if clustered else None
    sizes = {"of_seeds": 1.5, "of_items": 1.0, "documents": 1.0}
    arm, reference = crossed(range(4), 40, rng, weights=weights, clusters=clusters, **sizes)
    v_seed, v_item, v_both = loops(arm, reference, range(4), clusters or list(range(40)))
    assert v_seed + v_item - v_both > max(v_seed, v_item)
    found = paired.difference({"t": arm}, {"t": reference})
    half = 3.182446 * np.sqrt(v_seed + v_item - v_both)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half)
    assert (found["high"] + found["low"]) / 2 == pytest.approx(found["mean"])
    assert found["clusters"] == len(set(clusters or range(40)))
    assert found["items"] == 40


def test_tasks_share_their_seeds_and_not_their_items():
    rng = np.random.default_rng(5)
    seeds, clusters = [1, 2, 3, 4], rng.integers(0, 20, 60).tolist()
    sizes = {"of_seeds": 0.5, "of_items": 1.0}
    a, no_a = crossed(seeds, 60, rng, **sizes)
    b, no_b = crossed(seeds, 60, rng, clusters=clusters, documents=1.0, **sizes)
    found = paired.difference({"a": a, "b": b}, {"a": no_a, "b": no_b})
    own = [
        loops(a, no_a, seeds, list(range(60))),
        loops(b, no_b, seeds, clusters),
    ]
    by_seed = [np.mean([x[s].score - y[s].score for x, y in ((a, no_a), (b, no_b))]) for s in seeds]
    v_seed = np.var(by_seed, ddof=1) / 4
    assert v_seed != pytest.approx(sum(v[0] for v in own) / 4, rel=0.1)
    variance = v_seed + sum(v[1] - v[2] for v in own) / 4
    assert found["high"] - found["mean"] == pytest.approx(3.182446 * np.sqrt(variance))
    assert (found["items"], found["clusters"]) == (120, 60 + len(set(clusters)))


def coverage(monkeypatch, studies, tasks=1, resamples=400, **settings):
    """Shares of simulated studies whose t and bootstrap limits hold the true difference, 0."""
    monkeypatch.setattr(paired, "RESAMPLES", resamples)
    rng, held = np.random.default_rng(11), np.zeros(2)
    for _ in range(studies):
        made = [crossed(rng=rng, **settings) for _ in range(tasks)]
        found = paired.difference(
            {str(i): arm for i, (arm, _) in enumerate(made)},
            {str(i): reference for i, (_, reference) in enumerate(made)},
        )
        low, high = found["bootstrap"]
        held += found["low"] <= 0 <= found["high"], low <= 0 <= high
    return held / studies


def test_five_seeds_that_differ_are_covered(monkeypatch):
    t, bootstrap = coverage(
        monkeypatch, 1000, seeds=range(5), n=40, of_seeds=1.0, of_items=1.0
    )  # fmt: skip
    assert 0.92 <= t <= 0.98
    assert bootstrap < 0.9


def test_items_that_differ_are_covered(monkeypatch):
    settings = {"n": 60, "of_seeds": 0.02, "of_items": 2.0}
    t, _ = coverage(monkeypatch, 400, seeds=range(5), resamples=10, **settings)
    assert t >= 0.95  # more, as 4 degrees of freedom are too few for 60 items
    t, _ = coverage(monkeypatch, 1000, seeds=[0], resamples=10, **settings)
    assert 0.93 <= t <= 0.97  # one seed without an effect: the items are all there is


def test_items_of_one_document_count_as_one(monkeypatch):
    clusters = np.repeat(np.arange(20), 5).tolist()
    settings = {"seeds": [0], "n": 100, "of_seeds": 0.0, "of_items": 0.3, "documents": 1.0}
    t, bootstrap = coverage(monkeypatch, 1000, clusters=clusters, **settings)
    assert 0.93 <= t <= 0.97
    assert 0.88 <= bootstrap <= 0.97
    t, bootstrap = coverage(monkeypatch, 300, clusters=clusters, told=False, **settings)
    assert max(t, bootstrap) < 0.8


def test_identical_seeds_leave_the_items_variance():
    rng = np.random.default_rng(2)
    gaps = rng.normal(0, 1, 50)
    five = {s: outcome(gaps) for s in range(5)}
    found = paired.difference({"t": five}, {"t": {s: outcome(0 * gaps) for s in range(5)}})
    half = 2.776445 * gaps.std(ddof=1) / np.sqrt(50)
    assert found["high"] - found["mean"] == pytest.approx(half)


def test_fewer_documents_than_seeds_leave_fewer_degrees_of_freedom():
    rng = np.random.default_rng(2)
    clusters = [0, 0, 0, 1, 1, 2]
    arm, reference = crossed(range(6), 6, rng, of_seeds=0.1, of_items=1.0, clusters=clusters)
    found = paired.difference({"t": arm}, {"t": reference})
    v_seed, v_item, v_both = loops(arm, reference, range(6), clusters)
    variance = max(v_seed, v_item, v_seed + v_item - v_both)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * np.sqrt(variance))


def test_a_ratio_is_resampled_above_and_below_the_line():
    weights = [1.0, 50.0, 3.0, 900.0, 7.0]
    arm = {"t": {0: outcome([3 * w + 1e-6 * w**0.5 for w in weights], weights)}}
    reference = {"t": {0: outcome([2 * w for w in weights], weights)}}
    found = paired.difference(arm, reference)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert found["bootstrap"] == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("seeds", [1, 3])
def test_items_that_all_agree_bound_nothing(seeds):
    """Of 20 that both got right the next may differ."""
    arm = {"t": {seed: outcome([1.0] * 20) for seed in range(seeds)}}
    found = paired.difference(arm, arm)
    assert (found["mean"], found["low"], found["high"]) == (0.0, None, None)
    assert found["bootstrap"] is None
    one_else = {"t": {seed: outcome([1.0] * 19 + [0.0]) for seed in range(seeds)}}
    assert paired.difference(arm, one_else)["low"] < 0.05


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
    reference["a"] = {0: outcome([0, 0])}  # of one arm alone they tell nothing
    assert paired.difference(arm, reference, normalised=True)["mean"] == 1.0


def test_one_seed_and_one_item_give_no_interval():
    found = paired.difference({"t": {0: outcome([1.0])}}, {"t": {0: outcome([0.0])}})
    assert (found["mean"], found["low"], found["high"]) == (1.0, None, None)
    assert found["bootstrap"] is None
    one_document = {0: outcome([1.0, 0.0], clusters=[4, 4])}
    found = paired.difference({"t": one_document}, {"t": {0: outcome([0, 0], clusters=[4, 4])}})
    assert (found["mean"], found["low"], found["items"]) == (0.5, None, 2)


def test_several_seeds_and_one_item_give_the_interval_of_the_seeds():
    arm = {s: outcome([float(s)]) for s in (1, 2, 3)}
    found = paired.difference({"t": arm}, {"t": {s: outcome([0.0]) for s in arm}})
    assert found["high"] - found["mean"] == pytest.approx(4.302653 / np.sqrt(3))
    # Beside a task of many items, its one item takes nothing away.
    many, no_many = crossed([1, 2, 3], 30, np.random.default_rng(0), of_seeds=1, of_items=1)
    zero = {s: outcome([0.0]) for s in arm}
    found = paired.difference({"t": arm, "u": many}, {"t": zero, "u": no_many})
    by_seed = [(s + many[s].score - no_many[s].score) / 2 for s in arm]
    _, v_item, v_both = loops(many, no_many, [1, 2, 3], range(30))
    variance = np.var(by_seed, ddof=1) / 3 + (v_item - v_both) / 4
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * np.sqrt(variance))


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="other items"):
        paired.difference({"t": {0: outcome([1, 0])}}, {"t": {0: outcome([1])}})
    with pytest.raises(ValueError, match="other items"):
        paired.difference({"t": {0: outcome([1, 0], clusters=[0, 1])}}, {"t": {0: outcome([1, 0])}})
    with pytest.raises(ValueError, match="other items"):
        paired.difference({"t": {0: outcome([1, 0], [1.0, 2.0])}}, {"t": {0: outcome([1, 0])}})


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


def test_the_standard_error_of_clusters_is_that_of_their_sums():
    values, clusters = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0], [7, 7, 3, 3, 9, 9]
    # residuals from 1/2: cluster sums 1, 0, -1; √(3/2 · 2) / 6
    assert ratio(values, None, clusters) == pytest.approx((0.5, np.sqrt(3) / 6))
    assert Outcome("acc", values, values, clusters=clusters).summary() == {
        "metric": "acc", "n": 6, "score": 0.5, "stderr": pytest.approx(np.sqrt(3) / 6),
        "normalised": 0.5, "normalised_stderr": pytest.approx(np.sqrt(3) / 6), "extra": {},
    }  # fmt: skip
    assert ratio(values, None, [5] * 6) == (0.5, None)
    assert paired.over_seeds({0: outcome(values, clusters=clusters)})["stderr"] == pytest.approx(
        np.sqrt(3) / 6
    )


def test_an_arm_over_its_seeds():
    scores = {1: outcome([1, 1, 0, 0], normalised=[1, 1, 1, 0]), 2: outcome([1, 1, 1, 0])}
    found = paired.over_seeds(scores)
    assert found["score"] == pytest.approx(0.625)
    assert found["sd"] == pytest.approx(0.125 * 2**0.5)
    assert found["stderr"] == pytest.approx(ratio([1, 1, 0.5, 0], None)[1])
    assert found["normalised"] is None  # not of all seeds
    assert found["seeds"] == [1, 2]
