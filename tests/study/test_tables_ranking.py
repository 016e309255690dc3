"""Ranking and looks, against figures worked out by hand."""

import json

import pytest

from simreg.recipe.errors import UserError
from simreg.study.tables import document
from tests.study.fakes import made
from tests.study.tabled import LOSSES, head, record, rows, write

BRACKETS = (
    "Brackets: 95 % Student-t intervals of differences paired by seed, not corrected for the "
    "number of arms."
)
T = 12.706204736432095
"""Of Student, two sides, 95 %, one degree of freedom."""


def test_arms_are_ranked_by_their_paired_difference(tmp_path):
    record(tmp_path, failures={"fails/1/seed-1": "NaN", "fails/1/seed-2": "NaN"})
    found, below = rows(tmp_path, "ranking")
    # Seeds of `good` gain 0.02 and 0.04: standard deviation 0.01 √2, over √2 is 0.01.
    low, high = -0.03 - T * 0.01, -0.03 + T * 0.01
    assert found == [
        [
            "best",
            "auxiliary z-loss: weight 0.0001",
            "4.4500",
            "−0.1000 [−0.1000, −0.1000]",
            "2",
            "25.0 %",
            "1 (same cost)",
        ],
        [
            "good",
            "simreg.weight 1.0",
            "4.5200",
            f"−0.0300 [−{-low:.4f}, +{high:.4f}]",
            "2",
            "25.0 %",
            "1.050 [1.020, 1.080]",
        ],
        ["baseline", "simreg.weight 0; optim.warmup 0.5", "4.5500", "0", "2", "25.0 %", "1"],
        [
            "tied †",
            "model.tie_embeddings true",
            "4.6000",
            "+0.0500 [+0.0500, +0.0500]",
            "2",
            "25.0 %",
            "–",
        ],
        ["fails", "optim.lr 0.1", "–", "–", "0 of 2, 2 diverged", "–", "–"],
    ]
    assert below == (
        f"{BRACKETS} † Differs from baseline in model.tie_embeddings, so the same seed starts from "
        "other weights or sees other batches."
    )


def test_any_arm_can_be_the_one_to_compare_with(tmp_path):
    record(tmp_path)
    found, _ = rows(tmp_path, "ranking", "against=tied arms=good,baseline")
    assert [(row[0], row[3].split(" ")[0]) for row in found] == [
        ("good †", "−0.0800"),
        ("baseline †", "−0.0500"),
        ("tied", "0"),
    ]
    titles = head(tmp_path, "ranking", "against=tied arms=good,baseline")
    assert (titles[3], titles[6]) == ("minus tied (nats)", "step time over baseline")


def test_changes_are_told_by_section(tmp_path):
    changed = {
        "simreg": {"weight": 0.3, "depths": [0.5], "schedule": "decay"},
        "optim": {"lr": 0.01},
        "auxiliary": {"name": "simreg-variant", "options": {"weight": 1.0, "shuffle": True}},
    }
    arms = {"none": {"auxiliary": {"name": None}}, "changed": changed}
    record(tmp_path, {"baseline": {1: 4.5}, "none": {1: 4.6}, "changed": {1: 4.4}}, arms)
    assert [row[1] for row in rows(tmp_path, "ranking")[0]] == [
        "simreg.weight 0.3, depths [0.5], schedule decay; optim.lr 0.01; "
        "auxiliary simreg-variant: weight 1.0, shuffle true",
        "simreg.weight 0",
        "auxiliary null",
    ]


def test_step_times_are_left_out_where_none_was_measured(tmp_path):
    record(tmp_path)
    assert head(tmp_path, "ranking", "arms=good")[-1] == "step time over baseline"
    assert head(tmp_path, "ranking", "arms=best,tied")[-1] == "clipped steps"


def test_other_batches_are_marked_and_the_base_written_out_is_not(tmp_path):
    arms = {
        "rows": {"train": {"batch_rows": 8}},
        "same": {"train": {"batch_rows": 16}, "model": {"tie_embeddings": False}},
    }
    record(tmp_path, {"baseline": {1: 4.5}, "rows": {1: 4.6}, "same": {1: 4.7}}, arms)
    assert [row[0] for row in rows(tmp_path, "ranking")[0]] == ["baseline", "rows †", "same"]


def test_one_value_written_in_two_ways_is_one(tmp_path):
    base = {"model": {"embedding_std": 0.1}}
    arms = {"baseline": {}, "same": {"model": {"embedding_std": "1e-1"}}}
    record(tmp_path, {"baseline": {1: 4.5}, "same": {1: 4.4}}, arms, base=base, seeds=[1])
    assert [row[0] for row in rows(tmp_path, "ranking")[0]] == ["same", "baseline"]


def test_the_best_arms_and_how_many_there_were(tmp_path):
    record(tmp_path)
    found, below = rows(tmp_path, "ranking", "top=1 against=tied")
    assert [row[0] for row in found] == ["best †", "tied"]
    assert below.startswith("The best 1 of 4. Brackets")
    assert "The best" not in rows(tmp_path, "ranking", "top=4")[1]


def test_seeds_pair_only_with_themselves(tmp_path):
    record(tmp_path, {**LOSSES, "good": {2: 4.56}}, failures={"good/1/seed-1": "NaN"})
    good = next(row for row in rows(tmp_path, "ranking")[0] if row[0] == "good")
    assert good[2:5] == ["4.5600", "−0.0400", "1 of 2, 1 diverged"]


def test_seeds_that_did_not_diverge_are_no_sample_of_all(tmp_path):
    losses = {**LOSSES, "good": {1: 4.48, 2: 4.56}, "best": {1: 4.4, 2: 4.5}}
    losses = {arm: {**found, 3: 4.6} for arm, found in losses.items()} | {"good": losses["good"]}
    record(tmp_path, losses, failures={"good/1/seed-3": "NaN"}, seeds=[1, 2, 3])
    good = next(row for row in rows(tmp_path, "ranking")[0] if row[0] == "good")
    assert good[3:5] == ["−0.0300", "2 of 3, 1 diverged"]
    pair = rows(tmp_path, "pairs", "pairs=good:baseline,best:baseline")[0]
    assert pair[0][3:5] == ["−0.0300", "2, 1 diverged"]
    assert pair[1][3].startswith("−0.0667 [")
    assert rows(tmp_path, "sweep", "arms=good,best")[0][0][2:] == [
        "−0.0300, 1 diverged",
        "−0.0667",
    ]


def test_a_pair_is_one_of_two_survivors(tmp_path):
    record(tmp_path, failures={"baseline/1/seed-3": "NaN"}, seeds=[1, 2, 3])
    [row] = rows(tmp_path, "pairs", "pairs=good:best")[0]
    assert row[4] == "2"
    [row] = rows(tmp_path, "pairs", "pairs=good:baseline")[0]
    assert row[3:5] == ["−0.0300", "2, 1 diverged"]


def test_other_budgets_than_the_full_one_do_not_count(tmp_path):
    found = record(tmp_path)
    found["runs"].insert(0, {**found["runs"][0], "arm": "good", "budget": 1.5, "final_ce": 1.0})
    found["runs"].append({**found["runs"][0], "budget": 0.5})
    write(tmp_path, found)
    assert rows(tmp_path, "ranking")[0][1][3].startswith("−0.0300 ")


def test_one_seed_is_called_so(tmp_path):
    record(tmp_path, {arm: {1: by_seed[1]} for arm, by_seed in LOSSES.items()}, seeds=[1])
    found, below = rows(tmp_path, "ranking", "arms=good")
    assert [row[3:5] for row in found] == [["−0.0200", "1"], ["0", "1"]]
    assert below == "One seed an arm: no intervals, no claim."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("against=no", r"against: unknown 'no' \(there are baseline, good, "),
        ("arms=good,no", "arms: unknown 'no'"),
        ("against=good,best", "against: give one arm"),
        ("against=fails", "against: 'fails' has no finished run"),
        ("top=0", "top must be 1 or more"),
        ("top=x", "top must be 1 or more"),
    ],
)
def test_options_that_cannot_be_followed(tmp_path, options, message):
    record(tmp_path)
    with pytest.raises(UserError, match=message):
        document.draw(f"ranking results.json {options}", tmp_path)


def look(folder, arm, seed, *looks, budget="1"):
    """Write metrics.jsonl of a run with looks; a look is (intra_cos, margin_p50)."""
    run = folder / arm / budget / f"seed-{seed}"
    run.mkdir(parents=True)
    lines = [{"kind": "train", "step": 1}]
    for step, (intra, margin) in enumerate(looks, 1):
        rest = {"inter_cos": 0.5, "effective_rank": 57.26, "margin_cos_p50": None}
        line = {"kind": "geometry", "step": step, "intra_cos": intra, "margin_p50": margin, **rest}
        lines += [line, {"kind": "eval", "step": step, "ce": 4.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_looks_are_the_last_of_each_run_and_go_with_the_loss(tmp_path):
    results_json = record(tmp_path)
    shorter = {"arm": "good", "budget": 0.5, "seed": 2, "path": "good/0.5/seed-2"}
    results_json["runs"].append({**results_json["runs"][0], **shorter})
    write(tmp_path, results_json)
    look(tmp_path, "good", 2, (7.0, 7.0), budget="0.5")
    # Over baseline, good and best, CE changes by 0, −0.03 and −0.1.
    for seed, shift in ((1, -0.01), (2, 0.01)):
        look(tmp_path, "baseline", seed, (9.0, 9.0), (0.4 + shift, -2.0))
        look(tmp_path, "good", seed, (9.0, 9.0), (0.43 + shift, -2.2))
        look(tmp_path, "best", seed, (9.0, 9.0), (0.5 + shift, -2.1))
        look(tmp_path, "tied", seed, (9.0, 9.0), (0.0 + shift, 5.0))
    look(tmp_path, "good", 3, (7.0, 7.0))
    found, below = rows(tmp_path, "looks")
    assert [(row[0], row[2:]) for row in found] == [
        ("best", ["0.500", "0.500", "57.3", "−2.100", "–"]),
        ("good", ["0.430", "0.500", "57.3", "−2.200", "–"]),
        ("baseline", ["0.400", "0.500", "57.3", "−2.000", "–"]),
        ("tied †", ["0.000", "0.500", "57.3", "5.000", "–"]),
        ("fails", ["–"] * 5),
    ]
    assert found[0][1] == "−0.1000 [−0.1000, −0.1000]"
    # By hand: deviations of CE (13, 4, −17)/300, of margins (1, −1, 0)/10, and 9/√(474 · 2).
    assert below.endswith(
        "Pearson's r over arms, without those marked †, of the change of CE with that of each: "
        "intra_cos −1.00 (n = 3), inter_cos – (n = 3), effective_rank – (n = 3), "
        "margin_p50 +0.29 (n = 3), margin_cos_p50 – (n = 0). The arms were chosen and are no "
        "sample: no intervals."
    )
    assert below.startswith(f"{BRACKETS} † Differs from ")


def test_two_arms_have_no_correlation(tmp_path):
    record(tmp_path)
    for arm, cos in (("baseline", 0.4), ("good", 0.5)):
        look(tmp_path, arm, 1, (cos, cos))
    below = rows(tmp_path, "looks", "arms=good")[1]
    assert "over arms, of the change" in below
    assert "intra_cos – (n = 2)" in below


def test_a_study_without_looks_is_told(tmp_path):
    record(tmp_path)
    look(tmp_path, "good", 1)
    with pytest.raises(UserError, match=r"results.json: no look at the geometry .*analyze_every"):
        document.draw("looks results.json", tmp_path)


def test_why_there_are_no_intervals(tmp_path):
    """Not for want of seeds, if a run diverged; and the reference has none beside itself."""
    losses = {"baseline": dict.fromkeys(range(4), 5.0), "simreg": dict.fromkeys(range(5), 4.5)}
    failures = {"baseline/1/seed-4": "NaN"}
    record(tmp_path, losses, {"simreg": {}}, failures=failures, seeds=[*range(5)])
    below = rows(tmp_path, "ranking")[1]
    assert "a run diverged" in below
    assert "One seed" not in below
    assert "One seed" not in rows(tmp_path, "ranking", "arms=baseline")[1]


def test_clipped_steps_are_those_of_the_full_budget(tmp_path):
    _, found = made(tmp_path, {"fast": 1.35}, seeds=[0, 1], name="two")
    budgets = found["arms"]["fast"]["budgets"]
    for budget, share in (("0.6", 0.9), ("0.8", 0.8), ("1", 0.1)):
        budgets[budget]["clipped"] = share
    write(tmp_path, found)
    column = head(tmp_path, "ranking").index("clipped steps")
    assert {row[0]: row[column] for row in rows(tmp_path, "ranking")[0]}["fast"] == "10.0 %"
