import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from simreg.recipe import outputs
from simreg.recipe.errors import Diverged, UserError
from simreg.recipe.folder import RunFolder
from simreg.study import geometry, plan, run, sizing
from simreg.study.options import CompareOptions, from_options
from tests.study.fakes import SPEED, compare, write_run


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


def test_a_study_file_of_ones_own_is_kept(lab, study):
    file = Path(study.out) / "study.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    plan.save(study, file)
    text = "# what I want to know\n" + file.read_text()
    file.write_text(text)
    with pytest.raises(UserError, match=r"study\.yaml is not as .simreg compare. writes it"):
        compare(study)
    assert file.read_text() == text


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
        if len(waited) < 3:
            return
        write_run(held, SPEED)
        other.__exit__(None, None, None)

    lab.on_sleep = finish_elsewhere
    results, screen = compare(study)
    assert results["complete"]
    assert held.out not in lab.trained
    assert len(waited[0]) == 3, "the others were not trained before waiting"
    assert len(waited) == 3
    assert screen.count("waiting for another process to finish 1 run(s)") == 1
    assert screen.count("[2/4]") == 1


def test_a_diverged_run_does_not_end_the_study(lab, study):
    def diverge(config):
        if config.simreg.weight and config.train.tokens == 1_000_000:
            raise Diverged("the loss became NaN or infinite at step 7")

    lab.before, lab.report = diverge, lab.draw
    results, screen = compare(study)
    assert results["failures"] == {"simreg/1/seed-0": "the loss became NaN or infinite at step 7"}
    assert results["complete"]  # no run is left to be trained
    assert results["arms"]["simreg"]["final_ce"] == {"mean": None, "sd": None, "n": 0}
    page = (RunFolder(study.out).root / "report.html").read_text()
    assert "step 7" in page
    assert "Not all runs are finished" not in page
    saved = results["isoloss"]["simreg"]["tokens_saved"]
    assert (saved["status"], saved["n"], saved["diverged"]) == ("not_reached", 1, [0])
    assert (
        "simreg did not reach the final loss of baseline within 1 N in the only seed: no saving is "
        "claimed. 1 of 3 runs of simreg diverged." in " ".join(screen.split())
    )


def test_a_diverged_run_is_not_tried_until_it_passes(lab, study):
    def diverge(config):
        if config.simreg.weight and config.train.tokens == 1_000_000:
            raise Diverged("NaN at step 7")

    lab.before = diverge
    first, _ = compare(study)
    lab.before = lambda config: None
    count = len(lab.trained)
    again, screen = compare(study)
    assert again["failures"] == first["failures"] == {"simreg/1/seed-0": "NaN at step 7"}
    assert len(lab.trained) == count
    folder = f"{study.out}/simreg/1/seed-0"
    assert f"diverged before: NaN at step 7; delete {folder} to try again" in screen
    (RunFolder(folder).root / "diverged.json").write_text("{")
    with pytest.raises(UserError, match=r"diverged\.json is damaged"):
        compare(study)
    shutil.rmtree(folder)
    assert compare(study)[0]["complete"]


def test_a_study_over_but_for_what_diverged_is_drawn_without_its_text(lab, study, monkeypatch):
    def diverge(config):
        if config.simreg.weight and config.train.tokens == 1_000_000:
            raise Diverged("NaN")

    lab.before = diverge
    compare(study)
    monkeypatch.setattr(run.data, "prepare", lambda config: pytest.fail("read the text"))
    compare(study)


def test_a_study_stays_in_one_precision(lab, study):
    compare(study)
    for path in RunFolder(study.out).root.glob("*/*/*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "bf16"}))
    results, _ = compare(study)  # nothing is missing
    assert {each["precision"] for each in results["runs"]} == {"bf16"}
    with pytest.raises(UserError, match="trained in bf16; what is missing would be in fp32"):
        compare(replace(study, seeds=(0, 1)))


def test_other_folders_are_left_alone(lab, study):
    out = RunFolder(study.out).root
    out.mkdir()
    (out / "results.json").write_text('{"suite": "small"}')
    with pytest.raises(UserError, match="that `simreg compare` did not write and would replace"):
        compare(study)
    assert (out / "results.json").read_text() == '{"suite": "small"}'
    (out / "results.json").unlink()
    (out / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is the folder of a run"):
        compare(study)
    assert lab.trained == []


def test_what_a_study_loses_is_told(lab, study, capsys):
    compare(replace(study, seeds=(0, 1)))
    assert "its results are without" not in capsys.readouterr().err
    compare(study)
    assert (
        f"the study in {study.out} has been of 4 runs, such as baseline/1/seed-1 too: its results "
        "are without now" in " ".join(capsys.readouterr().err.split())
    )


def test_an_arm_that_always_diverges(lab, study):
    def diverge(config):
        if config.simreg.weight:
            raise Diverged("NaN")

    lab.before, lab.report = diverge, lab.draw
    results, screen = compare(study)
    assert "no saving is claimed. 3 of 3 runs of simreg diverged." in " ".join(screen.split())
    assert results["isoloss"]["simreg"]["budgets"] == []


def test_a_reference_that_diverges_leaves_nothing_to_compare(lab, study):
    def diverge(config):
        if not config.simreg.weight:
            raise Diverged("NaN")

    lab.before = diverge
    results, screen = compare(study)
    assert results["isoloss"]["simreg"]["tokens_saved"]["missing"] == [0]
    assert "no seed has all of its runs yet. 1 of 1 runs of baseline diverged" in screen


def test_other_errors_end_it(lab, study):
    def full(config):
        raise UserError("cannot write: No space left on device")

    lab.before = full
    with pytest.raises(UserError, match="No space"):
        compare(study)


def test_unwritable_folder(lab, study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        compare(replace(study, out=str(tmp_path / "file" / "s")))


@pytest.mark.parametrize(("tokens_per_s", "warns"), [(1_000, True), (3_000, False)])
def test_too_few_minutes_are_said_before_the_start(lab, tmp_path, tokens_per_s, warns):
    lab.tokens_per_s = tokens_per_s
    _, screen = compare(from_options(CompareOptions(out=str(tmp_path / "s"))))
    assert ("more than the 5 minutes asked for" in screen.split("[1/4]")[0]) == warns


@pytest.mark.parametrize(("factor", "warns"), [(1.3, False), (1.6, True)])
def test_a_first_run_slower_than_timed_is_said(lab, tmp_path, monkeypatch, factor, warns):
    study = from_options(CompareOptions(out=str(tmp_path / "s")))
    monkeypatch.setattr(
        sizing.TimeLeft,
        "ended",
        lambda self, cell, seconds: (
            setattr(self, "_predicted", self.predict(cell))
            or setattr(self, "_actual", factor * self._predicted)
        ),
    )
    _, screen = compare(study)
    assert screen.count("slower than timed by a factor of 1.6 · about") == warns


def test_other_data_are_refused_and_never_paired(lab, study):
    compare(study)
    lab.corpus.fingerprint = "beef"
    with pytest.raises(UserError, match=r"changed since baseline/1/seed-0.*f00d then, beef now"):
        compare(replace(study, seeds=[0, 1]))
    assert len(lab.trained) == 4
    result = RunFolder(study.config(study.cells()[1]).out).result
    result.write_text(result.read_text().replace("f00d", "beef"))
    with pytest.raises(UserError, match=r"\(baseline/1/seed-0: f00d, simreg/0.6/seed-0: beef\)"):
        compare(study)


def test_mistakes_are_found_before_any_text_is_read(lab, study, monkeypatch):
    monkeypatch.setattr(run.data, "prepare", lambda config: pytest.fail("read the text"))
    for arm in ({"model": {"preset": "nobody"}}, {"simreg": {}, "model": {"preset": "gpt"}}):
        with pytest.raises(UserError, match="no preset"):
            compare(replace(study, arms={"simreg": arm}))


def test_text_too_short_for_one_arms_batch_is_said_before_any_run(lab, study):
    def require_batch(rows):
        if rows > 64:
            raise UserError("fewer than one batch")

    lab.corpus.require_batch = require_batch
    big = {"train": {"batch_rows": 128}}
    with pytest.raises(UserError, match="arm 'big': fewer than one batch"):
        compare(replace(study, arms={**study.arms, "big": big}))
    assert not lab.trained


def test_a_damaged_or_full_study_folder_is_named(lab, study, monkeypatch):
    compare(study)
    path = RunFolder(study.out).root / "study.yaml"
    path.write_text("")
    with pytest.raises(UserError, match=r"study.yaml is damaged"):
        compare(study)
    path.unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "write_atomically", full)
    with pytest.raises(UserError, match="No space left"):
        compare(study)
    monkeypatch.setattr(plan, "write_atomically", full)
    with pytest.raises(UserError, match="No space left"):
        compare(replace(study, seeds=[0, 1]))


@pytest.mark.parametrize("text", ["[]", '{"simreg": 5}', "{", "null"])
def test_a_damaged_cache_of_step_times_is_as_good_as_none(lab, study, text):
    compare(study)
    (RunFolder(study.out).root / sizing.STEP_TIME_FILE).write_text(text)
    compare(study)
    assert lab.timed == [0.3, 0.3]


@pytest.mark.parametrize("text", ["base:\nname: x", "base: 5", "[1]", "arms: 5"])
def test_a_study_file_of_another_shape_is_damaged(lab, study, text):
    compare(study)
    (Path(study.out) / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=r"study.yaml (is (damaged|not as)|must hold a mapping)"):
        compare(study)


def test_a_sized_study_whose_size_is_lost_is_not_sized_anew(lab, tmp_path):
    study = plan.from_dict({"out": str(tmp_path), "minutes": 5})
    compare(study)
    path = tmp_path / "study.yaml"
    size = plan.load(path).base.train.tokens
    path.unlink()
    with pytest.raises(UserError, match=r"no study.yaml that says how large they are.*--tokens"):
        compare(study)
    assert not path.exists()
    assert str(size) in (tmp_path / "baseline/1/seed-0/config.yaml").read_text()


def test_a_run_that_diverged_stays_so_whatever_is_made_of_it(lab, study):
    def diverge(config):
        if config.simreg.weight and config.train.tokens == 1_000_000:
            raise Diverged("NaN at step 7")

    lab.before = diverge
    compare(study)
    [lost] = [cell for cell in study.cells() if cell.arm == "simreg" and cell.budget == 1]
    write_run(study.config(lost), 1.35)  # somebody trains on in the folder
    found, _ = compare(study)
    again = run.redraw(study, console=Console(quiet=True))
    for each in (found, again):
        assert each["failures"] == {lost.folder: "NaN at step 7"}
        assert lost.folder not in {run["path"] for run in each["runs"]}
        assert each["isoloss"]["simreg"]["tokens_saved"]["status"] == "not_reached"


def test_results_that_are_a_folder_are_not_replaced(lab, study):
    (Path(study.out) / "results.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"results.json that `simreg compare` did not write"):
        compare(study)


def test_runs_without_their_curves_can_be_drawn(lab, study):
    lab.report = lab.draw
    compare(study)
    for cell in study.cells():
        (Path(study.out) / cell.folder / "metrics.jsonl").unlink()
    assert run.redraw(study, console=Console(quiet=True))["complete"]
    assert (Path(study.out) / "curves.png").exists()


@pytest.mark.parametrize("change", [{"final_ce": float("nan")}, {"tokens": None}, {"tokens": 0}])
def test_a_result_that_is_no_number_is_named_and_compared_with_nothing(lab, study, change):
    compare(study)
    path = Path(study.out) / study.cells()[0].folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"cannot read the run in {path.parent}.*delete the folder"):
        compare(study)


def test_pictures_of_an_earlier_plan_are_removed(lab, study):
    lab.report = lab.draw
    compare(study)
    assert (Path(study.out) / "isoloss.png").exists()
    compare(replace(study, budgets=[1.0]))
    assert sorted(path.name for path in Path(study.out).glob("*.png")) == ["curves.png"]
    assert not (Path(study.out) / "isoloss.svg").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"models": [{}]}', "{"])
def test_a_damaged_analysis_is_named(tmp_path, text):
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry/results.json").write_text(text)
    with pytest.raises(UserError, match=r"results.json is damaged"):
        geometry.load(tmp_path)
