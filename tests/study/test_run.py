import contextlib
import io
import json
import signal
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from simreg.recipe import progress
from simreg.recipe.errors import Diverged, UserError
from simreg.recipe.folder import RunFolder
from simreg.study import plan, run, sizing
from simreg.study.options import CompareOptions, from_options
from tests.study.fakes import SPEED, compare, write_run


def test_runs_everything_and_finds_the_known_saving(lab, study, tmp_path):
    lab.report = lab.draw
    results, screen = compare(study, command="simreg compare")
    assert [out[len(study.out) + 1 :] for out in lab.trained] == [
        "baseline/1/seed-0",
        "simreg/0.6/seed-0",
        "simreg/0.8/seed-0",
        "simreg/1/seed-0",
    ]
    saved = results["isoloss"]["simreg"]
    assert saved["tokens_saved"]["mean"] == pytest.approx(1 - 1 / SPEED, abs=3e-3)
    tokens_saved = saved["tokens_saved"]["mean"]
    assert saved["seconds_saved"]["mean"] == pytest.approx(1 - (1 - tokens_saved) * lab.ratio)
    assert results["complete"]
    for name in ("results.json", "report.html", "study.yaml", "curves.png", "isoloss.svg"):
        assert (tmp_path / "s" / name).stat().st_size > 100
    assert json.loads((tmp_path / "s" / "results.json").read_text()) == results
    assert "[2/4] simreg · 0.6 N · seed 0 · 147 steps, 602 k tokens · about" in screen
    assert "left in all" in screen
    assert "simreg · 0.6 N  step 147/147 100.0%  1.23M tok  validation ce 4.5000" in screen
    assert "llama-tiny: 1.84M parameters" in screen
    assert "claims no interval" in " ".join(screen.split())


def test_finished_runs_and_timings_are_reused(lab, study):
    first, _ = compare(study)
    trained, timed = list(lab.trained), list(lab.timed)
    again, screen = compare(study, command="simreg compare again")
    assert (lab.trained, lab.timed) == (trained, timed)
    assert again == first  # its command adds nothing
    assert "4 of 4 runs are finished already" in screen
    assert f"nothing to train: this is on record in {study.out}" in screen
    (Path(study.out) / "results.json").unlink()
    assert compare(study, command="simreg compare again")[0]["commands"][-1].endswith("again")


def test_a_study_that_is_over_is_drawn_anywhere_with_its_times(lab, study, monkeypatch):
    first, _ = compare(study)
    monkeypatch.setattr(sizing.torch, "__version__", "another")
    monkeypatch.setattr(run.data, "prepare", lambda config: pytest.fail("needs no data"))
    again, _ = compare(study)
    assert again["step_time"] == first["step_time"]
    assert lab.timed == [0.3]


def test_times_are_taken_anew_for_new_runs_on_another_machine(lab, study, monkeypatch):
    compare(study)
    monkeypatch.setattr(sizing.torch, "__version__", "another")
    compare(replace(study, seeds=[0, 1]))
    assert lab.timed == [0.3, 0.3]


def test_only_arms_that_are_asked_for_are_timed(lab, study):
    arms = {
        "strong": {"simreg": {"weight": 3, "variant": "in"}},
        "weak": {"simreg": {"weight": 0.1, "variant": "decoupled"}},
    }
    results, screen = compare(replace(study, arms=study.arms | arms, timed=["weak"]))
    assert lab.timed == [0.1]
    assert results["step_time"].keys() == {"weak"}
    saved = results["isoloss"]
    assert saved["weak"]["seconds_saved"]["mean"] is not None
    assert saved["strong"]["tokens_saved"]["mean"] is not None
    assert not (saved["strong"]["seconds_saved"] or {}).get("mean")
    _, screen = compare(replace(study, arms=study.arms | arms, timed=["weak"]))
    assert "timing" not in screen
    assert lab.timed == [0.1]


def test_an_interrupted_study_continues(lab, study):
    def stop(config):
        if "0.8" in config.out:
            raise KeyboardInterrupt

    lab.before = stop
    with pytest.raises(KeyboardInterrupt):
        compare(study)
    lab.before = lambda config: None
    compare(study)
    assert len(lab.trained) == len(set(lab.trained)) == 4


def test_a_study_has_its_results_even_if_the_evaluation_of_its_models_fails(
    lab, study, monkeypatch, tmp_path
):
    lab.report = lab.draw

    def fail(*arguments):
        raise ValueError("odd text")

    monkeypatch.setattr(run.zeroshot, "after_training", fail)
    with pytest.raises(ValueError, match="odd text"):
        compare(study)
    assert json.loads((tmp_path / "s" / "results.json").read_text())["complete"]
    assert (tmp_path / "s" / "report.html").exists()


def test_what_is_evaluated_is_in_the_results(lab, study, monkeypatch, tmp_path):
    known = {}
    monkeypatch.setattr(run.zeroshot, "recorded", lambda *a: dict(known))
    monkeypatch.setattr(
        run.zeroshot, "after_training", lambda *a: known.update(small="scores") or True
    )
    monkeypatch.setattr(run.zeroshot, "show", lambda *a: None)
    results, _ = compare(study)
    assert results["zero_shot"] == {"small": "scores"}
    assert json.loads((tmp_path / "s" / "results.json").read_text()) == results


def test_processes_that_share_a_study_end_it_one_after_the_other(lab, study, monkeypatch):
    inside = threading.Semaphore(1)

    def alone(*arguments):
        assert inside.acquire(blocking=False)
        threading.Event().wait(0.3)
        inside.release()

    monkeypatch.setattr(run.zeroshot, "after_training", alone)
    compare(study)
    with ThreadPoolExecutor() as pool:
        screens = [found[1] for found in pool.map(compare, [study] * 3)]
    assert sum("waiting for another process that" in screen for screen in screens) >= 1


def test_several_processes_of_a_launcher_are_refused(lab, study, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        compare(study)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_study_stops_after_a_time_as_if_asked_to(lab, tmp_path, before):
    options = CompareOptions(out=str(tmp_path / "s"), tokens=1_000_000, stop_after=0.002)
    lab.before = lambda config: threading.Event().wait(10)
    outside = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.main(options)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outside)
    assert lab.trained == []
    lab.before = lambda config: None
    run.main(replace(options, stop_after=5))
    assert len(lab.trained) == len(set(lab.trained)) == 4
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # cancelled, not waiting to strike
    with pytest.raises(UserError, match="--stop-after 0: expected minutes above 0"):
        run.main(replace(options, stop_after=0))


def test_arms_seeds_and_budgets_are_added_to_what_is_there(lab, study):
    compare(study)
    more = replace(
        study,
        arms={**study.arms, "strong": {"simreg": {"weight": 1.0, "variant": "in"}}},
        seeds=[0, 1],
        budgets=[0.5, 0.6, 0.8, 1.0],
    )
    results, _ = compare(more)
    assert len(lab.trained) == len(set(lab.trained)) == len(more.cells()) == 18
    assert lab.timed == [0.3, 1.0]
    assert results["isoloss"]["strong"]["tokens_saved"]["n"] == 2


def test_budgets_added_to_a_sized_study_differ_or_are_refused_before_training(lab, tmp_path):
    study = plan.from_dict({"out": str(tmp_path / "s"), "minutes": 0.5})
    results, _ = compare(study)
    steps = results["arms"]["simreg"]["budgets"]["0.6"]["steps"]
    trained = len(lab.trained)
    with pytest.raises(
        UserError, match=f"0.5999 and 0.6 of arm 'simreg' both come to {steps} step"
    ):
        compare(replace(study, budgets=[0.5999, 0.6, 0.8, 1.0]))
    assert len(lab.trained) == trained


def test_the_size_is_measured_once(lab, tmp_path):
    study = from_options(CompareOptions(out=str(tmp_path / "s")))
    compare(study)
    sized = plan.load(tmp_path / "s" / "study.yaml")
    lab.tokens_per_s *= 10
    compare(study)
    assert plan.load(tmp_path / "s" / "study.yaml") == sized
    assert len(lab.trained) == 4


def test_only_whole_runs_teach_how_long_runs_take(lab, study, monkeypatch):
    ended = []
    monkeypatch.setattr(sizing.TimeLeft, "ended", lambda self, cell, seconds: ended.append(cell))
    begun, elsewhere, *_, last = study.cells()
    folder = RunFolder(study.config(begun).out)
    folder.root.mkdir(parents=True)
    folder.metrics.write_text("")

    original = lab.train

    def train(config, **kwargs):
        if config.out == study.config(elsewhere).out:  # another process ended it meanwhile
            return write_run(config, SPEED)
        return original(config, **kwargs)

    monkeypatch.setattr(run.train, "train", train)
    _, screen = compare(study)
    assert last in ended
    assert begun not in ended
    assert elsewhere not in ended
    assert "[1/4] baseline · 1 N · seed 0 · 245 steps, 1 M tokens · continues" in screen


def test_main_records_its_command(lab, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a b"
    monkeypatch.setattr(sys, "argv", ["/some/where/simreg", "compare", "--out", str(out)])
    run.main(CompareOptions(out=str(out)))
    results = json.loads((out / "results.json").read_text())
    first = f"simreg compare --out '{out}'"
    assert results["commands"] == [first]
    for seeds in ([0], [0, 1], [0, 1]):  # the first and the last train nothing
        monkeypatch.setattr(sys, "argv", [*sys.argv[:4], "--seeds", *map(str, seeds)])
        run.main(CompareOptions(out=str(out), seeds=seeds))
    results = json.loads((out / "results.json").read_text())
    assert results["commands"] == [first, f"{first} --seeds 0 1"]
    assert "report.html" in capsys.readouterr().out


def test_an_unfinished_study_has_a_report_of_what_is_finished(lab, study, tmp_path, monkeypatch):
    lab.report, folder = lab.draw, tmp_path / "s"

    def stop(config):
        if config.train.tokens == 800_000:
            raise KeyboardInterrupt
        if config.train.tokens == 600_000:
            raise Diverged("NaN at step 7")

    lab.before = stop
    screen = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run.compare(study, console=progress.console(file=screen, width=120))
    assert "--report writes the report of the runs that are finished" in screen.getvalue()
    assert not (folder / "results.json").exists()
    trained, timed = list(lab.trained), list(lab.timed)
    argv = ["simreg", "compare", "--out", str(folder), "--tokens", "1000000", "--report"]
    monkeypatch.setattr(sys, "argv", argv)
    size = {"tokens": 1_000_000, "set": ["train.eval_tokens=5000"]}
    run.main(CompareOptions(out=str(folder), report=True, **size))
    found = json.loads((folder / "results.json").read_text())
    assert (lab.trained, lab.timed) == (trained, timed)
    assert [each["path"] for each in found["runs"]] == ["baseline/1/seed-0"]
    assert found["failures"] == {"simreg/0.6/seed-0": "NaN at step 7"}
    assert not found["complete"]
    assert found["commands"] == [f"simreg compare --out {folder} --tokens 1000000"]
    page = " ".join((folder / "report.html").read_text().split())
    assert "Not all runs are finished" in page
    assert "NaN at step 7" in page


def test_a_report_trains_nothing_and_says_what_the_study_says(lab, study):
    whole, _ = compare(study, command="simreg compare")
    count = len(lab.trained)
    lab.corpus = None  # it takes no text either
    again, screen = redraw(study)
    assert again == whole
    assert len(lab.trained) == count
    assert "4 of 4 runs are finished" in screen
    more = replace(study, arms=study.arms | {"other": {}})
    assert redraw(more)[0]["complete"] is False
    assert plan.load(f"{study.out}/study.yaml") == study  # the plan is as it was
    results = Path(study.out, "results.json").read_text()
    for cell in (cell for cell in study.cells() if cell.arm == "simreg"):  # while any has finished
        with pytest.raises(UserError, match=r"is of 3 runs, such as simreg/0.6/seed-0 too, and it"):
            redraw(replace(study, arms={"other": {}}))
        assert Path(study.out, "results.json").read_text() == results
        RunFolder(study.config(cell).out).result.unlink()
    assert redraw(replace(study, arms={"other": {}}))[0]["complete"] is False


def test_a_report_takes_a_study_that_has_finished_runs(lab, study, tmp_path):
    with pytest.raises(UserError, match=r"no study has begun in .*: leave out --report"):
        redraw(study)
    assert not (tmp_path / "s").exists()
    cell = study.cells()[0]
    (tmp_path / "s" / cell.folder).mkdir(parents=True)
    with pytest.raises(UserError, match=r"none of the 4 runs of the study in .* is finished yet"):
        redraw(study)
    write_run(study.config(cell))
    assert redraw(study)[0]["complete"] is False
    assert plan.load(tmp_path / "s" / "study.yaml") == study  # for `simreg eval`
    other = plan.from_dict({**plan.to_dict(study), "base": {"train": {"tokens": 2_000_000}}})
    with pytest.raises(UserError, match="has another base"):
        redraw(other)


def redraw(study):
    screen = io.StringIO()
    return run.redraw(study, console=progress.console(file=screen, width=120)), screen.getvalue()


def test_one_process_at_a_time_settles_times_and_ends_a_study(lab, study, monkeypatch):
    """The steps, between, are for all of them."""
    held, seen = [], []

    @contextlib.contextmanager
    def exclusive(out, console):
        out.mkdir(exist_ok=True)
        held.append(out)
        yield
        held.pop()

    def watched(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            seen.append((name, bool(held)))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(run.plan, "exclusive", exclusive)
    for module, name in ((run.sizing, "step_times"), (run.sizing, "fit"), (run.plan, "save")):
        watched(module, name)
    for module, name in ((run.train, "train"), (run.report, "publish")):
        watched(module, name)
    compare(plan.from_dict({"out": study.out, "minutes": 5}))
    assert ("train", False) in seen
    assert {name for name, inside in seen if inside} == {"step_times", "fit", "save", "publish"}
    assert {name for name, inside in seen if not inside} == {"train"}


def test_stop_after_is_in_minutes(lab, tmp_path, monkeypatch):
    waits = []

    class Timer(threading.Timer):
        def __init__(self, seconds, *rest):
            waits.append(seconds)
            super().__init__(seconds, *rest)

    monkeypatch.setattr(run.threading, "Timer", Timer)
    run.main(CompareOptions(out=str(tmp_path / "s"), tokens=1_000_000, stop_after=5))
    assert waits == [300]


def test_a_report_on_another_machine_keeps_the_times(lab, study, monkeypatch):
    whole, _ = compare(study)
    monkeypatch.setattr(sizing.torch, "__version__", "another")
    again, _ = redraw(study)
    assert again["step_time"] == whole["step_time"]
    assert again["isoloss"]["simreg"]["seconds_saved"]["mean"] is not None


def test_a_sized_study_counts_what_reading_and_timing_took(lab, tmp_path, monkeypatch):
    def sized(name, spent):
        clock = iter([0.0, *[spent] * 10**6])
        monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
        compare(plan.from_dict({"out": str(tmp_path / name), "minutes": 5}))
        return plan.load(tmp_path / name / "study.yaml").base.train.tokens

    whole, rest, half = (sized(*each) for each in (("a", 0), ("b", 120), ("c", 250)))
    assert rest < whole
    assert half < rest
    assert sized("d", 900) == sized("e", 150)  # half of the time at least


def test_a_sized_study_sees_no_row_twice(lab, tmp_path):
    lab.corpus.train = range(3_000)  # less than the time allows
    study = plan.from_dict({"out": str(tmp_path / "s"), "minutes": 60})
    compare(study)
    sized = plan.load(tmp_path / "s" / "study.yaml")
    configs = [sized.config(cell) for cell in sized.cells()]
    assert max(each.steps * each.train.batch_rows for each in configs) <= 3_000


def test_evaluations_of_a_sized_study_that_were_asked_for_are_not_changed_in_silence(lab, tmp_path):
    values = {"out": str(tmp_path / "s"), "minutes": 5}
    compare(plan.from_dict({**values, "base": {"train": {"evals": 7}}}))
    with pytest.raises(UserError, match=r"another base \(train.evals: 7 -> 9\)"):
        compare(plan.from_dict({**values, "base": {"train": {"evals": 9}}}))
