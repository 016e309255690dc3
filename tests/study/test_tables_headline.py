"""Headlines, sentences and seeds of studies."""

import pytest

from simreg.study.tables import document
from tests.study.fakes import made
from tests.study.tabled import LOSSES, record, rows, write


def test_a_headline_has_intervals_where_there_are_some(tmp_path):
    _, found = made(tmp_path, {"fast": 1.35}, seeds=[0, 1, 2, 3, 4], name="five")
    saved = found["isoloss"]["fast"]
    saved["tokens_saved"] |= {"mean": 0.25, "low": 0.2, "high": 0.3}
    saved["seconds_saved"] |= {"mean": -0.02, "low": -0.05, "high": 0.01}
    gap = found["arms"]["fast"]["budgets"]["1"]["ce_minus_reference"]
    gap |= {"mean": -0.03, "low": -0.04, "high": -0.02}
    write(tmp_path, found)
    assert rows(tmp_path, "headline")[0] == [
        [
            "five",
            "llama-tiny, 1.84 M",
            "1 M",
            "245",
            "5",
            "25.0 % [20.0, 30.0]",
            "−2.0 % [−5.0, 1.0]",
            "1.050 [1.020, 1.080]",
            "−0.0300 [−0.0400, −0.0200]",
        ]
    ]


@pytest.mark.parametrize(
    ("entry", "seeds", "saved"),
    [
        ({"n": 1, "mean": 0.25}, "one of 5, claims nothing", "25.0 %"),
        ({"n": 4, "mean": 0.25}, "4 of 5, a claim takes 5", "25.0 %"),
        ({"n": 5, "mean": 0.4, "status": "at_least"}, "5", "≥ 40.0 % (a bound, no interval)"),
        (
            {"n": 5, "mean": None, "status": "not_reached", "not_reached": 2, "diverged": [3]},
            "5, 1 diverged",
            "not reached (2 of 5)",
        ),
        ({"n": 0, "mean": None, "status": "not_reached"}, "0 of 5", "–"),
    ],
)
def test_a_headline_says_what_it_does_not_know(tmp_path, entry, seeds, saved):
    _, found = made(tmp_path, {"fast": 1.35}, seeds=[0, 1, 2, 3, 4])
    limits = {"low": None, "high": None}
    found["isoloss"]["fast"]["tokens_saved"] |= limits | entry
    write(tmp_path, found)
    assert rows(tmp_path, "headline")[0][0][4:6] == [seeds, saved]


def test_arms_that_start_from_other_weights_are_marked(tmp_path):
    _, found = made(tmp_path, {"fast": 1.35, "wide": 1.5}, seeds=[0, 1], name="five")
    found["arms"]["wide"]["unpaired"] = ["model.layers"]
    write(tmp_path, found)
    (fast, wide), notes = rows(tmp_path, "headline")
    assert (fast[0], wide[0]) == ("five: fast", "five: wide †")
    assert "† Differs from baseline in model.layers, so the same seed" in notes


def test_equal_time_has_a_column_where_a_study_has_it(tmp_path):
    _, plain = made(tmp_path / "plain", {"fast": 1.35}, seeds=[0, 1])
    _, found = made(tmp_path / "timed", {"fast": 1.35}, seeds=[0, 1], name="timed")
    difference = {"mean": -0.02, "low": -0.03, "high": -0.01, "n": 2, "per_seed": []}
    found["equal_time"]["fast"] |= {"status": "ok", "ce_difference": difference}
    write(tmp_path / "plain", plain)
    write(tmp_path / "timed", found)
    names = "plain/results.json timed/results.json"
    drawn = document.draw(f"headline {names}", tmp_path).splitlines()
    cells = [line.strip("| ").split(" | ") for line in drawn]
    assert cells[0][-1] == "minus reference given the same time (nats)"
    assert [row[-1] for row in cells[2:]] == ["–", "−0.0200 [−0.0300, −0.0100]"]


def test_one_seed_claims_nothing(tmp_path):
    _, found = made(tmp_path, {"fast": 1.35}, seeds=[0])
    write(tmp_path, found)
    (row,) = rows(tmp_path, "headline")[0]
    assert row[4] == "one seed, claims nothing"
    assert all("[" not in cell for cell in (row[5], row[6], row[8]))


def test_a_row_for_each_study_or_arm(tmp_path):
    found = record(tmp_path)
    write(tmp_path / "b", {**found, "study": {**found["study"], "name": "t"}})
    drawn = document.draw("headline b/results.json results.json arms=good", tmp_path)
    lines = [line.strip("| ").split(" | ") for line in drawn.splitlines()[2:]]
    assert [line[0] for line in lines] == ["t", "s"]
    # No budgets below N: no saving, but a difference of seeds 1 and 2.
    assert lines[0][1:6] == ["llama-tiny, 2 M, 1 M active", "1 M", "244", "2, a claim takes 5", "–"]
    assert lines[0][8].startswith("−0.0300 [")
    assert [row[0] for row in rows(tmp_path, "headline", "arms=good,best")[0]] == [
        "s: good",
        "s: best",
    ]


def test_seeds_one_by_one(tmp_path):
    _, found = made(tmp_path, {"fast": 1.35, "far": 1.9}, seeds=[0, 1])
    for run in found["runs"]:
        if run["budget"] == 1.0 and run["seed"] == 1:
            run["final_ce"] = {"baseline": 4.5, "fast": 4.4321, "far": 4.3}[run["arm"]]
    first, second = found["isoloss"]["fast"]["tokens_saved"]["per_seed"]
    first |= {"status": "not_reached", "saved": None}
    second |= {"saved": 0.123}
    write(tmp_path, found)
    table, _ = rows(tmp_path, "seeds", "arms=fast")
    assert table[1] == ["1", "4.5000", "4.4321", "−0.0679", "12.3 %"]
    assert (table[0][0], table[0][4]) == ("0", "not reached")
    both, _ = rows(tmp_path, "seeds")
    assert both[3] == ["far", "1", "4.5000", "4.3000", "−0.2000", "≥ 40.0 %"]


def test_sentences_have_real_minus_signs_and_names_keep_their_hyphens(tmp_path):
    arms = {"lr1e-3": {"optim": {"lr": 0.001}}}
    record(tmp_path, {"baseline": LOSSES["baseline"], "lr1e-3": LOSSES["good"]}, arms)
    assert document.draw("sentences results.json", tmp_path) == (
        "lr1e-3 ended 0.0300 nats per token below baseline at equal tokens (2 seeds, 95 % interval "
        "−0.1571 to +0.0971, which includes no difference; a claim takes at least 5 seeds)."
    )


def test_a_diverged_run_is_told_from_one_that_has_not_ended(tmp_path):
    losses = {"baseline": dict.fromkeys(range(5), 5.0), "simreg": dict.fromkeys(range(4), 4.5)}
    for failures, said in (
        ({}, "4 of 5, a claim takes 5"),
        ({"simreg/1/seed-4": "NaN"}, "1 diverged"),
    ):
        record(tmp_path, losses, {"simreg": {}}, failures=failures, seeds=[*range(5)])
        [row] = rows(tmp_path, "headline")[0]
        seeds = row[4]
        assert said in seeds
        assert ("diverged" in seeds) == bool(failures)


def test_equal_time_over_some_of_the_seeds_says_so(tmp_path):
    _, found = made(tmp_path, {"fast": 1.35}, seeds=[0, 1, 2, 3, 4], name="five")
    gap = {"mean": -0.01, "low": -0.03, "high": 0.01, "n": 3}
    found["equal_time"]["fast"] |= {"status": "ok", "ce_difference": gap}
    write(tmp_path, found)
    assert rows(tmp_path, "headline")[0][0][-1] == "−0.0100 [−0.0300, +0.0100] (3 of 5 seeds)"
