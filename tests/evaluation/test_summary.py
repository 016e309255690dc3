import pytest

from simreg.evaluation import summary


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
