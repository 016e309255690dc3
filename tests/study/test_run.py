import io
import json
import sys
import types
from dataclasses import replace

import pytest
from rich.console import Console

from simreg.recipe.errors import Diverged, UserError
from simreg.recipe.folder import RunFolder
from simreg.study import plan, run, sizing
from simreg.study.plan import CompareOptions
from tests.study.fakes import write_run

SPEED = 1.35


class Lab:
    """Replaces training and timing; remembers what was asked of them."""

    def __init__(self, monkeypatch):
        self.trained, self.timed, self.before = [], [], lambda config: None
        self.tokens_per_s, self.ratio = 9000.0, 1.1
        self.draw, self.report = run.report.write, lambda *args: None
        corpus = types.SimpleNamespace(tokens=10**9, require_batch=lambda rows: None)
        monkeypatch.setattr(run.data, "prepare", lambda config: corpus)
        monkeypatch.setattr(run.train, "train", self.train)
        monkeypatch.setattr(run.timing, "throughput", lambda config, corpus: self.tokens_per_s)
        monkeypatch.setattr(run.timing, "step_time_ratio", self.step_time_ratio)
        monkeypatch.setattr(run.time, "sleep", self.sleep)
        monkeypatch.setattr(run.report, "write", lambda *args: self.report(*args))
        self.on_sleep = lambda: pytest.fail("waited for nobody")

    def train(self, config, *, corpus=None):
        folder = RunFolder(config.out)
        if (result := folder.finished(config)) is not None:
            return result
        with folder.claimed(config):
            self.before(config)
            self.trained.append(config.out)
            return write_run(config, SPEED if config.simreg.weight else 1.0)

    def step_time_ratio(self, base, arm, corpus):
        assert base.simreg.weight == 0
        self.timed.append(arm.simreg.weight)
        return {"ratio": self.ratio, "base_s": 0.4, "arm_s": 0.4 * self.ratio, "n": 20}

    def sleep(self, seconds):
        self.on_sleep()


@pytest.fixture
def lab(monkeypatch):
    return Lab(monkeypatch)


@pytest.fixture
def study(tmp_path):
    base = {"train": {"tokens": 1_000_000, "eval_tokens": 5000}}
    return plan.from_dict({"out": str(tmp_path / "s"), "base": base})


def compare(study, **kwargs):
    screen = io.StringIO()
    results = run.compare(study, console=Console(file=screen, width=120), **kwargs)
    return results, screen.getvalue()


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
    assert "[2/4] simreg · 0.6 N · seed 0 · about" in screen
    assert "left in all" in screen
    assert "claims no interval" in " ".join(screen.split())


def test_finished_runs_and_timings_are_reused(lab, study):
    first, _ = compare(study)
    trained, timed = list(lab.trained), list(lab.timed)
    again, screen = compare(study)
    assert (lab.trained, lab.timed) == (trained, timed)
    assert again == first
    assert "4 of 4 runs are finished already" in screen


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


def test_arms_seeds_and_budgets_are_added_to_what_is_there(lab, study):
    compare(study)
    more = replace(
        study,
        arms={**study.arms, "strong": {"simreg": {"weight": 1.0}}},
        seeds=[0, 1],
        budgets=[0.5, 0.6, 0.8, 1.0],
    )
    results, _ = compare(more)
    assert len(lab.trained) == len(set(lab.trained)) == len(more.cells()) == 18
    assert lab.timed == [0.3, 1.0]
    assert results["isoloss"]["strong"]["tokens_saved"]["n"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"optim": {"lr": 1e-4}}}, r"optim.lr: 0.003 -> 0.0001"),
        ({"arms": {"simreg": {"simreg": {"weight": 2.0}}}}, r"arm 'simreg'.*weight: 0.3 -> 2.0"),
        ({"minutes": 3.0}, "was made with 1000000 tokens"),
    ],
)
def test_another_base_is_refused_and_nothing_is_lost(lab, study, change, message):
    compare(study)
    values = plan.to_dict(study)
    values["base"]["optim"].update(change.pop("base", {}).get("optim", {}))
    values["arms"].update(change.pop("arms", {}))
    with pytest.raises(UserError, match=message):
        compare(plan.from_dict({**values, **change}))
    assert len(lab.trained) == 4


def test_a_foreign_run_in_the_folder_is_refused(lab, study):
    compare(study)
    without = replace(study, arms={"baseline": study.arms["baseline"], "other": {}})
    compare(without)
    changed = replace(study, arms={**study.arms, "simreg": {"simreg": {"weight": 2.0}}})
    with pytest.raises(UserError, match="another config"):
        compare(changed)


def test_runs_of_another_process_come_last(lab, study):
    held = study.config(study.cells()[1])
    other = RunFolder(held.out).claimed(held)
    other.__enter__()
    waited = []

    def finish_elsewhere():
        waited.append(list(lab.trained))
        write_run(held, SPEED)
        other.__exit__(None, None, None)

    lab.on_sleep = finish_elsewhere
    results, screen = compare(study)
    assert results["complete"]
    assert held.out not in lab.trained
    assert len(waited[0]) == 3, "the others were not trained before waiting"
    assert "waiting for another process to finish 1 run(s)" in screen


def test_a_diverged_run_does_not_end_the_study(lab, study):
    def diverge(config):
        if config.simreg.weight and config.train.tokens == 1_000_000:
            raise Diverged("the loss became NaN or infinite at step 7")

    lab.before, lab.report = diverge, lab.draw
    results, _ = compare(study)
    assert results["failures"] == {"simreg/1/seed-0": "the loss became NaN or infinite at step 7"}
    assert not results["complete"]
    assert results["arms"]["simreg"]["final_ce"] == {"mean": None, "sd": None, "n": 0}
    assert "step 7" in (RunFolder(study.out).root / "report.html").read_text()


def test_other_errors_end_it(lab, study):
    def full(config):
        raise UserError("cannot write: No space left on device")

    lab.before = full
    with pytest.raises(UserError, match="No space"):
        compare(study)


def test_unwritable_folder(lab, study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in the study folder"):
        compare(replace(study, out=str(tmp_path / "file" / "s")))


def test_the_size_is_measured_once(lab, tmp_path):
    study = plan.from_options(CompareOptions(out=str(tmp_path / "s")))
    compare(study)
    sized = plan.load(tmp_path / "s" / "study.yaml")
    lab.tokens_per_s *= 10
    compare(study)
    assert plan.load(tmp_path / "s" / "study.yaml") == sized
    assert len(lab.trained) == 4


def test_the_size_stays_within_the_corpus(lab, tmp_path, monkeypatch):
    corpus = types.SimpleNamespace(tokens=300_000, require_batch=lambda rows: None)
    monkeypatch.setattr(run.data, "prepare", lambda config: corpus)
    compare(plan.from_options(CompareOptions(out=str(tmp_path / "s"))))
    assert plan.load(tmp_path / "s" / "study.yaml").base.train.tokens == 300_000


def test_size_fills_the_time():
    study = plan.from_options(CompareOptions(minutes=5))
    speed, ratio = 9000.0, 1.2
    base = sizing.fit(study, speed, {"simreg": ratio}, 300)
    tokens = base.train.tokens
    steps = tokens * (1.0 + ratio * (0.6 + 0.8 + 1.0)) / speed
    evaluation = 4 * base.train.evals * base.train.eval_tokens / speed / 3
    assert 250 < steps + evaluation < 300
    assert tokens % (base.train.batch_rows * base.data.seq_len) == 0
    assert sizing.fit(study, 1.0, {}, 300).steps == sizing.MIN_STEPS


def test_a_step_time_belongs_to_its_configs(lab, study):
    compare(study)
    assert set(sizing.cached_step_times(study)) == {"simreg"}
    other = replace(study, arms={**study.arms, "simreg": {"simreg": {"weight": 2.0}}})
    assert sizing.cached_step_times(other) == {}
    longer = replace(study, base=replace(study.base, train=replace(study.base.train, tokens=9)))
    assert set(sizing.cached_step_times(longer)) == {"simreg"}


def test_time_left_learns_from_what_was_slower(study):
    times = {"simreg": {"ratio": 1.1, "base_s": 0.4, "arm_s": 0.44, "n": 20}}
    left = sizing.TimeLeft(study, times)
    first, *rest = study.cells()
    before = left.of(rest)
    assert before > 0.44 * study.config(rest[0]).steps
    left.ended(first, 2 * left.predict(first))
    assert left.of(rest) == pytest.approx(2 * before)
    assert sizing.TimeLeft(study, {}).of(rest) is None


def test_main_records_its_command(lab, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a b"
    monkeypatch.setattr(sys, "argv", ["/some/where/simreg", "compare", "--out", str(out)])
    run.main(CompareOptions(out=str(out)))
    results = json.loads((out / "results.json").read_text())
    assert results["commands"] == [f"simreg compare --out '{out}'"]
    assert "report.html" in capsys.readouterr().out
