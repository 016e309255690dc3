from pathlib import Path

import pytest

from simreg.evaluation import summary
from simreg.evaluation.outcome import Outcome
from simreg.recipe.trained import Trained


def results(seeds, low, tasks=2):
    gap = {"mean": 0.012, "low": low, "high": 0.03, "bootstrap": [-0.5, 0.5]}
    gap |= {"seeds": seeds, "items": 5000, "clusters": 5000}
    arm = {"average": {"tasks": tasks}, "tasks": {"bits": {"metric": "bits_per_byte"}}}
    arm["tasks"]["piqa"] = {"metric": "acc"}
    return {
        "reference": "plain",
        "arms": {"ours": arm},
        "differences": {"ours": {"average": {"score": gap, "normalised": None}}},
    }


@pytest.mark.parametrize(
    ("seeds", "low", "says", "unsaid"),
    [
        (1, 0.001, "One seed, 5,000 items: the interval says nothing of other seeds.", "includes"),
        (5, -0.01, "5 seeds, 5,000 items.", "One seed"),
    ],
)
def test_a_sentence_says_what_its_interval_is_worth(seeds, low, says, unsaid):
    (text,) = summary.sentences(results(seeds, low))
    interval = f"95 % interval {100 * low:+.1f} to +3.0"  # of the t limits, not the bootstrap's
    assert text.startswith(f"ours on average over tasks: accuracy +1.2 points ({interval}")
    assert "against plain" in text
    assert says in text
    assert unsaid not in text
    assert ("which includes no difference" in text) == (low <= 0)


def test_without_accuracies_the_first_task_is_said():
    gap = {"mean": 0.59, "low": 0.54, "high": 0.64, "seeds": 1, "items": 3}
    own = {"tasks": {"bits": {"metric": "bits_per_byte"}}, "average": None}
    results = {"reference": "base", "arms": {"arm": own}}
    results["differences"] = {"arm": {"bits": {"score": gap, "normalised": None}}}
    assert summary.sentences(results) == [
        "arm on bits: bits per byte +0.5900 (95 % interval +0.5400 to +0.6400) against base. One "
        "seed, 3 items: the interval says nothing of other seeds."
    ]
    results["differences"]["arm"]["bits"]["score"] = None
    assert summary.sentences(results) == ["arm shares no seed with base: not compared."]


def test_one_accuracy_is_named_and_arms_without_common_seeds_are_not_compared():
    found = results(5, 0.001, tasks=1)
    assert summary.sentences(found)[0].startswith("ours on piqa: accuracy")
    found["differences"]["ours"]["average"]["score"] = None
    assert summary.sentences(found) == ["ours shares no seed with plain: not compared."]


def test_tasks_without_a_normalised_score_count_by_their_plain_one():
    tasks = [
        {"metric": "acc", "score": 0.5, "normalised": 0.75},
        {"metric": "acc", "score": 0.25, "normalised": None},
        {"metric": "bits_per_byte", "score": 2.0, "normalised": None},
    ]
    assert summary.average(tasks) == {"score": 0.375, "normalised": 0.5, "tasks": 2}


def scored(*arms):
    """Two models of each arm (of the last but one, and no run), on three tasks."""
    found, outcomes = [], {}
    for arm, seeds, piqa in arms:
        for seed, right in zip(seeds, piqa, strict=True):
            name = f"{arm}-{seed}"
            found.append(Trained(name, Path(name), arm, seed))
            values = [1.0] * right + [0.0] * (4 - right)
            halves = [1.0, 1.0, 0.0, 0.0] if arm == "ours" else [1.0, 0.0, 0.0, 0.0]
            outcomes[name, "piqa"] = Outcome("acc", values, halves)
            outcomes[name, "sciq"] = Outcome("acc", [0.0, 1.0, 1.0, 1.0])
            bits = [6.0, 4.0] if arm == "ours" else [6.0, 8.0]
            outcomes[name, "bits"] = Outcome("bits_per_byte", bits, weights=[2.0, 2.0])
    return found, outcomes


def shown(tasks, *arms):
    found, outcomes = scored(*arms)
    results = summary.build(found, tasks, outcomes)
    return results | {"tasks": {task: {"note": "", "source": ""} for task in tasks}}


BOTH = ("plain", [1, 2], [2, 3]), ("ours", [1, 2], [4, 3])


def test_the_table_by_hand():
    found = shown(["piqa", "bits"], *BOTH)
    plain, ours, bits, fewer = summary.rows(found)  # one accuracy is no average
    assert plain == ["piqa", "4", "plain", "62.5 ± 17.7", "25.0", "", ""]
    gap = found["differences"]["ours"]["piqa"]
    low, high = (100 * gap["score"][end] for end in ("low", "high"))
    assert ours[:6] == ["", "", "ours", "87.5 ± 17.7", "50.0", f"+25.0 [{low:+.1f}, {high:+.1f}]"]
    assert ours[6].startswith("+25.0 [")
    assert bits == ["bits (bits per byte)", "2", "plain", "3.5000 ± 0.0000", "–", "", ""]
    assert fewer[3] == "2.5000 ± 0.0000"
    assert fewer[5].startswith("-1.0000 [")
    *_, plain, ours = summary.rows(shown(["piqa", "bits", "sciq"], *BOTH))
    assert plain == ["average", "", "plain", "68.8", "50.0", "", ""]  # without the bits
    assert ours[:5] == ["", "", "ours", "81.2", "62.5"]
    assert ours[5].startswith("+12.5 [")


def test_what_stands_behind_a_score_is_said():
    one, two = ("model", [None], [2]), BOTH[0]
    for arms, says in (
        ([two, BOTH[1]], "±: standard deviation over seeds; brackets: 95 % intervals of paired"),
        ([two], "±: standard deviation over seeds"),
        ([one], "±: standard error over items"),
        ([two, one], "±: standard deviation over seeds (of one model standard error over items)"),
    ):
        found = shown(["piqa"], *arms)
        legend = summary._legend(found, summary.rows(found))
        assert legend.startswith(says)
        assert ("brackets" in legend) == ("brackets" in says)
    assert summary.rows(found)[1][2:4] == ["model", "50.0 ± 28.9"]
    assert found["arms"]["model"]["tasks"]["piqa"]["seeds"] == []


def test_a_line_for_each_model_and_task():
    model = Trained("m", Path("m"), "m")
    piqa = Outcome("acc", [1, 0, 0, 1], [1, 1, 1, 0], extra={"perplexity": 12.346})
    assert summary.line(model, "piqa", piqa) == (
        "m  piqa  n 4  accuracy 50.0 % ± 28.9 (standard error)  normalised 75.0  perplexity 12.35"
    )
    bits = Outcome("bits_per_byte", [3.0], weights=[2.0])
    assert summary.line(model, "bits", bits) == "m  bits  n 1  bits per byte 1.5000"


def test_a_sentence_has_the_normalised_difference_and_the_seeds_that_are_lost():
    found = results(4, 0.001)
    gap = found["differences"]["ours"]["average"]
    gap["normalised"] = {**gap["score"], "mean": -0.02, "low": -0.03, "high": 0.0}
    found["diverged"] = {"ours": [2, 3], "other": [9]}
    [text] = summary.sentences(found)
    assert "; normalised, -2.0 points (95 % interval -3.0 to +0.0, which includes no" in text
    assert text.endswith("4 seeds, 5,000 items. Without seeds 2, 3: a run diverged.")
