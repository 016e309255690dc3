import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from simreg.analysis.options import AnalyzeOptions
from simreg.recipe.errors import UserError
from simreg.recipe.folder import STUDY_FILE
from simreg.study import geometry, models, plan
from tests.study import fakes


@pytest.fixture
def study(tmp_path):
    """Runs of three arms and two seeds, as if they had been trained."""
    values = {"arms": {"simreg": {}, "other": {"simreg": {"weight": 1.0}}}, "seeds": [1, 2]}
    base = {"train": {"tokens": 1_000_000}}
    made = plan.from_dict({"out": str(tmp_path / "s"), "base": base, **values})
    for cell in made.cells():
        fakes.write_run(made.config(cell))
        model = Path(made.out) / cell.folder / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
    plan.save(made, tmp_path / "s" / STUDY_FILE)
    return made


def brief(found):
    return [(model.arm, model.seed) for model in found]


def test_a_study_is_its_runs_at_the_full_budget(study, capsys):
    expected = [(arm, seed) for arm in ("baseline", "simreg", "other") for seed in (1, 2)]
    assert brief(models.of_study(study)) == brief(models.find([study.out])) == expected
    assert [m.name for m in models.of_study(study)][:2] == [
        "baseline/1/seed-1",
        "baseline/1/seed-2",
    ]
    assert models.find([study.out])[0].name == f"{study.out}/baseline/1/seed-1"
    assert not capsys.readouterr().err
    plan.save(replace(study, reference="simreg", out="elsewhere"), Path(study.out) / STUDY_FILE)
    found = models.find([study.out])
    assert found[0].arm == models.reference([Path(study.out)], found) == "simreg"


def test_arms_are_those_of_the_study(study):
    """Though their configs were the same but for the seed."""
    out = Path(study.out)
    same = replace(study, arms={**study.arms, "other": {}})
    shutil.rmtree(out / "other")
    shutil.copytree(out / "simreg", out / "other")
    for missing in ("simreg/1/seed-2", "other/1/seed-1"):
        shutil.rmtree(out / missing)
    plan.save(same, out / STUDY_FILE)
    expected = [("baseline", 1), ("baseline", 2), ("simreg", 1), ("other", 2)]
    assert brief(models.find([study.out])) == expected
    one = str(out / "simreg/1/seed-1")  # named first, it is the study's all the same
    assert {*brief(models.find([one, study.out]))} == {*expected}
    fakes.write_run(replace(study, seeds=[9]).config(plan.Cell("simreg", 1.0, 9)))
    shutil.copytree(out / "simreg/1/seed-1/model", out / "simreg/1/seed-9/model")
    beside = str(out / "simreg/1/seed-9")  # which is of no plan
    assert {*brief(models.find([beside, study.out]))} == {*expected, ("simreg", 9)}


def test_a_run_of_a_study_is_of_its_arm_wherever_it_is_named(study, tmp_path):
    out = Path(study.out)
    one = str(out / "simreg" / "1" / "seed-1")
    expected = [(arm, seed) for arm in ("baseline", "simreg", "other") for seed in (1, 2)]
    assert sorted(brief(models.find([one, study.out]))) == sorted(expected)
    named = models.find([f"mine={one}", study.out])
    assert brief(named)[:2] == [("mine", 1), ("baseline", 1)]
    extra = tmp_path / "extra" / "simreg" / "seed-3"  # another seed of it, made by hand
    fakes.write_run(replace(study, seeds=[3], out=str(extra)).config(plan.Cell("simreg", 1.0, 3)))
    shutil.move(extra / "simreg/1/seed-3", tmp_path / "moved")
    shutil.copytree(out / "simreg/1/seed-1/model", tmp_path / "moved" / "model")
    found = brief(models.find([study.out, str(tmp_path / "moved")]))
    assert found == [*expected, ("simreg", 3)]


def test_the_reference_is_rather_the_studys_own(study):
    out = Path(study.out)
    found = models.find([f"base={out}/baseline/1/seed-1", study.out])
    assert found[0].arm == "base"
    assert models.reference([out], found) == "baseline"


def test_two_studies(study, tmp_path):
    copy = shutil.copytree(study.out, tmp_path / "t")
    found = models.find([str(copy), study.out, f"{study.out}/simreg/1/seed-1"])
    arms = [f"{name}/{arm}" for name in "ts" for arm in ("baseline", "simreg", "other")]
    assert brief(found) == [(arm, seed) for arm in arms for seed in (1, 2)]
    assert models.reference([copy, tmp_path / "s"], found) == "t/baseline"
    assert models.reference([tmp_path / "s"], found) == "s/baseline"
    assert models.reference([copy, tmp_path / "s"], found[6:]) == "s/baseline"
    with pytest.raises(UserError, match="would both be of the arm mine and seed 1"):
        models.find([f"mine={study.out}"])


def test_runs_that_a_study_no_longer_plans_are_left_out(study, capsys):
    out = Path(study.out)
    shutil.copytree(out / "simreg", out / "dropped")
    plan.save(replace(study, seeds=[2]), out / STUDY_FILE)
    assert brief(models.find([study.out])) == [("baseline", 2), ("simreg", 2), ("other", 2)]
    said = capsys.readouterr().err
    assert said.count("is not in the plan of its study: left out") == 5
    assert f"{out}/dropped/1/seed-1 is not" in said
    assert "not begun" not in said


def test_runs_that_a_study_lacks_are_named(study, capsys):
    out = Path(study.out)
    shutil.rmtree(out / "simreg" / "1" / "seed-2")
    (out / "other" / "1" / "seed-1" / "result.json").unlink()
    plan.save(replace(study, seeds=[1, 2, 3]), out / STUDY_FILE)
    assert len(models.find([study.out])) == len(models.of_study(study)) == 4
    said = capsys.readouterr().err
    missing = "baseline/1/seed-3, simreg/1/seed-2, simreg/1/seed-3, ..."
    assert f"4 of the 9 runs planned in {out} have not begun: {missing}\n" in said
    assert said.count("other/1/seed-1 has no trained model: finish it") == 1


def test_arms_that_are_not_trained_to_the_end_are_not_missed(study, capsys):
    budgets = {"baseline": [1.0], "simreg": [0.8], "other": [0.6, 0.8]}
    plan.save(replace(study, budgets=budgets), Path(study.out) / STUDY_FILE)
    for arm in ("simreg", "other"):
        shutil.rmtree(Path(study.out) / arm / "1")
    assert {model.arm for model in models.find([study.out])} == {"baseline"}
    assert not capsys.readouterr().err


def test_a_study_without_models(study):
    for cell in study.cells():
        shutil.rmtree(Path(study.out) / cell.folder)
    assert models.of_study(study) == []
    with pytest.raises(UserError, match="has no trained models at its full budget"):
        models.find([study.out])
    assert models.reference([Path(study.out)], []) is None
    (Path(study.out) / STUDY_FILE).write_text("")
    with pytest.raises(UserError, match=r"study.yaml is damaged \(it is empty\)"):
        models.find([study.out])


def test_studies_among_other_names(study, monkeypatch):
    out = Path(study.out)
    monkeypatch.setenv("HOME", str(out.parent))
    names = ["owner/name", f"{out}/simreg/1/seed-1", study.out, f"mine={out}", "~/s"]
    assert models.named(names) == [out] * 3


def test_analyze_takes_the_reference_and_the_folder_of_a_study(study, monkeypatch, tmp_path):
    asked = []

    def analyze(found, options, console, *, command):
        asked.append((found[0].arm, options.reference))
        raise UserError("enough")

    monkeypatch.setattr(geometry.run, "analyze", analyze)
    plan.save(replace(study, reference="simreg"), Path(study.out) / STUDY_FILE)
    run = f"base={study.out}/baseline/1/seed-1"
    for names, reference in (
        ([study.out], None),
        ([run, study.out], None),
        ([study.out], "other"),
        ([run], None),
    ):
        out = None if names == [study.out] else tmp_path / "out"
        with pytest.raises(UserError, match="enough"):
            geometry.main(AnalyzeOptions(names, reference=reference, out=out))
    assert asked == [("simreg", "simreg"), ("base", "simreg"), ("simreg", "other"), ("base", None)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(geometry.run, "analyze", lambda *args, **options: options)
    monkeypatch.setattr(geometry.run, "write", lambda results, out: asked.append(out))
    monkeypatch.setattr(geometry.summary, "show", lambda *args: None)
    asked.clear()
    for names in ([study.out], [study.out, run], [f"mine={run}"]):
        geometry.main(AnalyzeOptions(names))
    assert asked == [Path(study.out) / "geometry", *[Path("runs/geometry")] * 2]
    (Path(study.out) / "geometry").mkdir(exist_ok=True)
    (Path(study.out) / "geometry" / "results.json").write_text("mine")
    with pytest.raises(UserError, match=f"there is a {study.out}/geometry/results.json that"):
        geometry.main(AnalyzeOptions([study.out]))


def test_numbers_are_checked_before_models_are_asked_for(monkeypatch):
    monkeypatch.setattr(geometry.models, "find", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(UserError, match="must be 1 or more"):
        geometry.main(AnalyzeOptions(["owner/name"], pairs=0))
