import io
import re
from dataclasses import replace

import pytest

from simreg.recipe import progress
from simreg.recipe.errors import UserError
from simreg.study import plan, report, results, summary
from simreg.study.plan import Cell
from simreg.study.records import Run
from tests.study.fakes import TIMES, made

INTERVAL = {"low": 0.1, "high": 0.3}
NONE = {"low": None, "high": None}


def test_a_seed_that_lacks_a_run_does_not_count(five):
    runs, found = five
    study = plan.from_dict({**found["study"], "out": "x"})
    lacking = [r for r in runs if (r.cell.arm, r.cell.budget, r.cell.seed) != ("fast", 0.6, 3)]
    found = results.build(study, lacking, {}, [])
    saved = found["isoloss"]["fast"]["tokens_saved"]
    assert [s["seed"] for s in saved["per_seed"]] == [0, 1, 2, 4]
    assert (saved["n"], saved["missing"]) == (4, [3])
    assert found["isoloss"]["fast"]["seconds_saved"]["missing"] == [3]
    assert summary.headlines(found)[0].endswith(
        ". 1 of 5 seeds is left out: its runs are not finished (seed 3)."
    )


@pytest.mark.parametrize(("arm", "status"), [("near", "ok"), ("slow", "not_reached")])
def test_runs_shorter_than_one_that_falls_short_are_not_asked_for(tmp_path, arm, status):
    runs, found = made(tmp_path, {"near": 1.1, "slow": 0.95}, seeds=[0, 1, 2, 3, 4], name="near")
    whole = found["isoloss"][arm]["tokens_saved"]
    assert whole["status"] == status
    study = plan.from_dict({**found["study"], "out": "x"})

    def without(*budgets):
        left = [r for r in runs if r.cell not in [Cell(arm, b, 3) for b in budgets]]
        return results.build(study, left, {}, [])["isoloss"][arm]["tokens_saved"]

    assert without(0.6) == whole  # near reaches it between 0.8 and 1, slow after 1
    assert without(0.8)["missing"] == without(0.6, 0.8)["missing"] == ([3] if arm == "near" else [])
    assert without(1.0)["missing"] == [3]


def test_a_budget_that_no_seed_has_run_yet_is_missing_all_the_same(five):
    runs, found = five
    study = plan.from_dict({**found["study"], "out": "x"})
    # Without its largest budgets `slow` would seem not to reach what it was never given.
    lacking = [r for r in runs if (r.cell.arm, r.cell.budget) != ("fast", 1.0)]
    found = results.build(study, lacking, {}, [])
    assert found["isoloss"]["fast"]["tokens_saved"]["missing"] == [0, 1, 2, 3, 4]
    assert summary.headlines(found)[0] == "fast: no seed has all of its runs yet."
    lacking = [r for r in runs if r.cell != Cell("fast", 0.6, 1) and r.cell.seed != 2]
    found = results.build(study, lacking, {}, [])
    assert found["isoloss"]["fast"]["tokens_saved"]["n"] == 3
    assert (
        "2 of 5 seeds are left out: their runs are not finished (seeds 1, 2)."
        in (summary.headlines(found)[0])
    )


def with_diverged(five, cell):
    """The runs that are left when one diverged, and what they show."""
    runs, found = five
    study = plan.from_dict({**found["study"], "out": "x"})
    ended = [r for r in runs if r.cell != cell]
    times = dict.fromkeys(study.others, TIMES)
    return ended, results.build(study, ended, times, [], {cell.folder: "NaN"})


def test_a_diverged_seed_counts_as_not_reached(five):
    ended, found = with_diverged(five, Cell("fast", 0.6, 3))
    for kind in ("tokens_saved", "seconds_saved"):
        saved = found["isoloss"]["fast"][kind]
        assert (saved["status"], saved["mean"]) == ("not_reached", None)
        assert (saved["n"], saved["not_reached"]) == (5, 1)
        assert (saved["missing"], saved["diverged"]) == ([], [3])
    assert summary.headlines(found)[0] == (
        "fast did not reach the final loss of baseline within 1 N in 1 of 5 seeds: no saving is "
        "claimed. 1 of 15 runs of fast diverged."
    )
    assert (
        "did not always end lower"
        not in report.html(ended, found).split("Arms")[0].split("slow:")[0]
    )


def test_headlines_say_no_more_than_is_known(five):
    fast, far, slow = summary.headlines(five[1])
    assert re.search(
        r"2\d\.\d % fewer tokens \(5 seeds, 95 % interval 2\d\.\d % to 2\d\.\d %\)", fast
    )
    assert "less training time" in fast
    assert "(× 1.050, quartiles 1.020 to 1.080)" in fast
    assert "without the spread of the timing itself)." in fast
    assert "at least 40.0 % fewer tokens" in far.replace("39.8", "40.0")
    assert "in 5 of 5 seeds it was already better at the smallest budget tried, 0.6 N" in far
    assert "did not reach" in slow
    assert "no saving is claimed" in slow


@pytest.mark.parametrize(
    ("tokens", "budgets", "times", "sentence"),
    [
        (
            {"status": "at_least", "mean": 0.4, "at_least": 1, "n": 1, **NONE},
            ["1", "0.6"],
            TIMES,
            "a reached the final loss of baseline with at least 40.0 % fewer tokens: in the only "
            "seed it was already better at the smallest budget tried, 0.6 N (one seed: this shows "
            "the difference and claims no interval).",
        ),
        (
            {"status": "at_least", "mean": -0.196, "at_least": 2, "n": 5, **NONE},
            ["1.2", "1.4"],
            TIMES,
            "a reached the final loss of baseline with at most 19.6 % more tokens: in 2 of 5 seeds "
            "it was already better at the smallest budget tried, 1.2 N (5 seeds, a lower bound "
            "without an interval).",
        ),
        (
            {"status": "not_reached", "mean": None, "not_reached": 1, "n": 1, **NONE},
            ["1"],
            TIMES,
            "a did not reach the final loss of baseline within 1 N in the only seed: no saving is "
            "claimed.",
        ),
        (
            {"status": "ok", "mean": 0.2, "n": 5, **INTERVAL},
            ["0.6", "1"],
            TIMES,
            "a reached the final loss of baseline with 20.0 % fewer tokens (5 seeds, 95 % interval "
            "10.0 % to 30.0 %); with its own step time counted (× 1.050, quartiles 1.020 to "
            "1.080), 1.0 % more training time (95 % interval -0.5 % to 2.0 %, which includes no "
            "difference, without the spread of the timing itself).",
        ),
        (
            {"status": "ok", "mean": -0.2, "n": 1, **NONE},
            ["0.6", "1"],
            {**TIMES, "n": 0},
            "a reached the final loss of baseline with 20.0 % more tokens (one seed: this shows "
            "the difference and claims no interval); its steps cost the same, so 1.0 % more "
            "training time.",
        ),
        (
            {"status": "ok", "mean": 0.2, "n": 1, **NONE},
            ["0.6", "1"],
            None,
            "a reached the final loss of baseline with 20.0 % fewer tokens (one seed: this shows "
            "the difference and claims no interval).",
        ),
    ],
)
def test_sentences(tokens, budgets, times, sentence):
    limits = NONE if tokens["low"] is None else {"low": -0.02, "high": 0.005}
    found = {
        "study": {"reference": "baseline"},
        "seeds": list(range(tokens["n"])),
        "arms": {
            "baseline": {"budgets": {"1": {}}},
            "a": {"budgets": {key: {} for key in budgets}},
        },
        "isoloss": {
            "a": {
                "tokens_saved": {**tokens, "missing": [], "diverged": []},
                "seconds_saved": {"mean": -0.01, **limits},
            }
        },
        "step_time": {"a": times} if times else {},
        "failures": {},
    }
    assert summary.headlines(found) == [sentence]


def test_the_table_shows_how_sure_a_step_time_is(five):
    column = summary.COLUMNS.index("step time, quartiles")
    cells = {row[0]: row[column] for row in summary.rows(five[1]) if row[column]}
    assert (cells["baseline"], cells["fast"]) == ("× 1", "× 1.050 [1.020, 1.080]")


def test_a_step_time_that_was_taken_beside_other_work_is_called_so(five):
    runs, found = five
    assert summary.busy(found) is None
    times = {"fast": TIMES | {"load": 2.6}, "slow": TIMES | {"load": 2.4}, "old": dict(TIMES)}
    del times["old"]["load"], times["old"]["threads"]  # as records were once
    busy = {**found, "step_time": times}
    said = summary.busy(busy)
    assert said.startswith("other work ran while the steps of fast were timed (load 2.6)")
    screen = io.StringIO()
    summary.show(busy, progress.console(file=screen, width=100))
    assert said in screen.getvalue()
    assert said[1:] in report.html(runs, busy)
    assert "\n±: standard deviation over seeds; brackets: 95 % intervals\n" in re.sub(
        r" +\n", "\n", screen.getvalue()
    )


def test_few_seeds_and_an_interval_over_zero_are_called_so(tmp_path):
    _, found = made(tmp_path, {"simreg": 1.0}, seeds=[0, 1], budgets=[0.6, 1.0, 1.4])
    line = summary.headlines(found)[0]
    assert "which includes no difference" in line
    assert "a claim takes at least 5 seeds" in line


def test_seeds_left_by_divergence_have_no_interval(five):
    runs, found = five
    values = {**found["study"], "out": "x", "budgets": {"baseline": [1.0, 1.1]}}
    study = plan.from_dict(values)
    full = [r for r in runs if r.cell.budget == 1.0 and r.cell != Cell("fast", 1.0, 3)]
    longer = [replace(r, cell=Cell("baseline", 1.1, r.cell.seed)) for r in full]
    longer = [
        replace(r, result={**r.result, "tokens": 1_200_000, "final_ce": r.final_ce - 0.1})
        for r, before in zip(longer, full, strict=True)
        if before.cell.arm == "baseline"
    ]
    failures = {"fast/1/seed-3": "NaN"}
    times = dict.fromkeys(study.others, TIMES)
    found = results.build(study, full + longer, times, [], failures)
    for difference in (
        found["arms"]["fast"]["budgets"]["1"]["ce_minus_reference"],
        found["equal_time"]["fast"]["ce_difference"],
    ):
        assert (difference["n"], difference["diverged"]) == (4, [3])
        assert difference["low"] is difference["high"] is None
    headline = summary.headlines(found)[0]
    assert "(4 seeds that did not diverge, which are no sample of all: no interval; a" in headline
    assert headline.endswith("seeds). 1 of 5 runs of fast diverged.")
    assert "not finished" not in headline
    other = found["arms"]["far"]["budgets"]["1"]["ce_minus_reference"]
    assert (other["n"], other["diverged"]) == (5, [])
    assert other["low"] is not None
    # The reference's own divergence leaves the seeds that have all of their runs.
    lacking = [r for r in longer if r.cell.seed != 2]
    found = results.build(study, full + lacking, times, [], {"baseline/1.1/seed-2": "NaN"})
    entry = found["equal_time"]["far"]
    assert (entry["status"], entry["ce_difference"]["n"]) == ("ok", 4)
    assert entry["ce_difference"]["diverged"] == [2]


def test_a_seed_whose_reference_diverged_leaves_no_interval(five):
    _, found = with_diverged(five, Cell("baseline", 1.0, 3))
    for kind in ("tokens_saved", "seconds_saved", "midrun_tokens_saved"):
        saved = found["isoloss"]["fast"][kind]
        assert (saved["n"], saved["missing"], saved["diverged"]) == (4, [3], [3])
        assert saved["low"] is saved["high"] is saved["bootstrap"] is None
    gap = found["arms"]["fast"]["budgets"]["1"]["ce_minus_reference"]
    assert (gap["n"], gap["diverged"], gap["low"], gap["high"]) == (4, [3], None, None)
    headline = summary.headlines(found)[0]
    assert "(4 seeds that did not diverge, which are no sample of all: no interval; a" in headline
    assert headline.endswith("1 of 5 runs of baseline diverged.")
    assert "not finished" not in headline


def test_a_diverged_seed_never_passes_mid_run(five):
    _, found = with_diverged(five, Cell("fast", 0.6, 3))
    saved = found["isoloss"]["fast"]["midrun_tokens_saved"]
    assert (saved["status"], saved["not_reached"], saved["missing"]) == ("not_reached", 1, [])


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (999_400, "999 k"),
        (999_700, "1 M"),
        (1_230_000, "1.23 M"),
        (999_999_999, "1 B"),
        (512, "512"),
    ],
)
def test_tokens_in_words(tokens, text):
    assert summary.count(tokens) == text


def test_a_mean_over_lines_is_one_over_their_steps():
    lines = [{"step": 10, "clipped": 1.0}, {"step": 11, "clipped": 0.0}, {"step": 12}]
    lines += [{"step": 13, "clipped": 0.0}]
    run = Run(Cell("a", 1.0, 0), {}, lines, [])
    assert run.mean("clipped") == pytest.approx(10 / 12)
    assert run.mean("grad_norm") is None


def test_a_seed_is_left_out_for_its_own_reason(five):
    """That a longer run of the reference diverged does not finish the arm's."""
    runs, found = five
    budgets = {"baseline": [1.0, 1.1], "fast": [0.6, 0.8, 1.0], "far": [0.6], "slow": [0.6]}
    study = plan.from_dict({**found["study"], "out": "x", "budgets": budgets})
    ended = [run for run in runs if run.cell != Cell("fast", 0.6, 2)]
    known = results.build(study, ended, {}, [], {"baseline/1.1/seed-2": "NaN"})
    line = summary.headline(known, "fast")
    assert "1 of 5 seeds is left out: its runs are not finished (seed 2)." in line
    lost = results.build(study, ended, {}, [], {"fast/0.6/seed-2": "NaN"})
    assert "left out" not in summary.headline(lost, "fast")


def test_a_curve_within_a_run_is_asked_of_arms_that_are_trained_to_the_end(five):
    runs, found = five
    study = plan.from_dict({**found["study"], "out": "x", "budgets": [0.6, 0.8]})
    ended = [run for run in runs if run.cell.arm == "baseline" or run.cell.budget < 1]
    ended = [run for run in ended if run.cell != Cell("fast", 0.6, 3)]
    known = results.build(study, ended, {}, [], {"fast/0.6/seed-3": "NaN"})
    assert known["isoloss"]["fast"]["midrun_tokens_saved"] is None


def test_equal_time_is_of_seeds_that_have_the_budgets_it_lies_between(five):
    runs, found = five
    budgets = {"baseline": [1.0, 1.1], "fast": [1.0], "far": [1.0], "slow": [1.0]}
    study = plan.from_dict({**found["study"], "out": "x", "budgets": budgets})
    ended = [run for run in runs if run.cell.budget == 1]
    longer = [
        replace(run, cell=replace(run.cell, budget=1.1), result={**run.result, "tokens": 1_100_000})
        for run in ended
        if run.cell.arm == "baseline" and run.cell.seed != 2
    ]
    times = {"fast": {**TIMES, "ratio": 1.0}}
    seeds = results.build(study, [*ended, *longer], times, [])["equal_time"]["fast"]
    assert [each["seed"] for each in seeds["ce_difference"]["per_seed"]] == [0, 1, 3, 4]


def test_a_study_whose_missing_runs_diverged_is_complete(five):
    runs, found = five
    study = plan.from_dict({**found["study"], "out": "x"})
    lost = Cell("fast", 0.6, 3)
    ended = [run for run in runs if run.cell != lost]
    assert results.build(study, ended, {}, [], {lost.folder: "NaN"})["complete"]
    assert not results.build(study, ended, {}, [])["complete"]


def test_runs_that_saw_two_texts_are_refused(five):
    runs, found = five
    study = plan.from_dict({**found["study"], "out": "x"})
    other = runs[-1].result | {"corpus": {"fingerprint": "beef"}}
    with pytest.raises(UserError, match=r"saw different data .*f00d.*beef"):
        results.build(study, [*runs[:-1], replace(runs[-1], result=other)], {}, [])


def test_budgets_ascend_whichever_seed_has_them(five):
    fast = [run for run in five[0] if run.cell.arm == "fast" and run.cell != Cell("fast", 0.6, 0)]
    assert list(results.grid(fast)["fast"]) == [0.6, 0.8, 1.0]


def test_a_seed_whose_reference_diverged_is_not_called_unfinished(tmp_path):
    runs, found = made(tmp_path, {"fast": 1.35}, seeds=[0, 1, 2], budgets=[1.0])
    study = plan.from_dict({**found["study"], "out": "x"})
    left = [run for run in runs if run.cell != Cell("baseline", 1.0, 1)]
    found = results.build(study, left, {}, [], {"baseline/1/seed-1": "NaN"})
    said = summary.headline(found, "fast")
    assert "1 of 3 runs of baseline diverged." in said
    assert "not finished" not in said
