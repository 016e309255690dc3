import json
import shutil

import pytest
import tyro

from simreg.analysis import run, targets
from simreg.analysis.options import AnalyzeOptions
from simreg.recipe.errors import UserError


def brief(found):
    return [(t.arm, t.seed, t.step, t.final) for t in found]


def test_a_study_is_its_runs(study):
    found = targets.find([str(study)], series=False)
    assert brief(found) == [
        (arm, seed, 20, True) for arm in ("baseline", "simreg") for seed in (1, 2, 3)
    ]
    assert {t.tokens for t in found} == {20 * 4 * 32}


def test_runs_that_a_study_no_longer_plans_are_left_out(study, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    shutil.copytree(copy / "simreg", copy / "dropped")
    plan = json.loads((copy / "study.yaml").read_text())
    (copy / "study.yaml").write_text(json.dumps({**plan, "seeds": [1, 3]}))
    found = targets.find([str(copy)], series=False)
    assert brief(found) == [(a, seed, 20, True) for a in ("baseline", "simreg") for seed in (1, 3)]
    said = capsys.readouterr().err
    assert said.count("is not in the plan of its study: left out") == 5
    assert "dropped/1/seed-1 is not" in said
    assert "not begun" not in said


def test_runs_that_a_study_lacks_are_named(study, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    shutil.rmtree(copy / "simreg" / "1" / "seed-2")
    plan = json.loads((copy / "study.yaml").read_text())
    (copy / "study.yaml").write_text(json.dumps({**plan, "seeds": [1, 2, 3, 4]}))
    assert len(targets.find([str(copy)], series=False)) == 5
    said = capsys.readouterr().err
    missing = "baseline/1/seed-4, simreg/1/seed-2, simreg/1/seed-4"
    assert f"3 of the 8 runs planned in {copy} have not begun: {missing}\n" in said


def test_arms_that_are_not_trained_to_the_end_are_not_missed(study, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    shutil.rmtree(copy / "simreg" / "1")
    plan = json.loads((copy / "study.yaml").read_text())
    plan["budgets"] = {"baseline": [1.0], "simreg": [0.5]}
    (copy / "study.yaml").write_text(json.dumps(plan))
    assert {target.arm for target in targets.find([str(copy)], series=False)} == {"baseline"}
    assert "begun" not in capsys.readouterr().err


def test_a_run_with_its_checkpoints_in_order(study):
    run = study / "simreg" / "1" / "seed-2"
    found = targets.find([str(run)], series=True)
    assert brief(found) == [("simreg", 2, 10, False), ("simreg", 2, 20, True)]
    assert found[0].path.endswith("checkpoints/step-0000010")
    named = targets.find([f"mine={run}", str(run / "model")], series=False)
    assert brief(named) == [("mine", 2, 20, True), ("model", None, None, True)]


def test_a_run_without_a_model_is_known_by_its_checkpoints(study, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(study / "simreg" / "1" / "seed-1", run)
    shutil.rmtree(run / "model")
    found = targets.find([str(run)], series=True)
    assert brief(found) == [("run", 1, 10, False), ("run", 1, 20, False)]
    with pytest.raises(UserError, match=r"has no trained model: finish it .* with --series"):
        targets.find([str(run)], series=False)
    shutil.rmtree(run / "checkpoints")
    for series in (False, True):
        with pytest.raises(UserError, match=r"by the command that began it$"):
            targets.find([str(run)], series=series)


def test_a_hub_id_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(targets.hub, "folder", lambda name, patterns: None)
    assert targets.find(["owner/name"], series=False)[0].path == "owner/name"


def test_a_name_that_is_nothing_is_said_to_be_so(monkeypatch):
    def nothing(*arguments, **options):
        raise OSError("offline\nfor long")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    message = "there is no folder nothere, and no model of that name could be had from the Hugging"
    with pytest.raises(UserError, match=message) as caught:
        targets.find(["nothere"], series=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name a model"),
        (["./nowhere"], "no folder"),
        (["{study}/simreg"], "no run"),
        (["a={study}/simreg/1/seed-1", "a={copy}"], "name their arms"),
    ],
)
def test_mistakes(study, tmp_path, names, message):
    copy = tmp_path / "seed-1"
    shutil.copytree(study / "simreg" / "1" / "seed-1", copy)
    with pytest.raises(UserError, match=message):
        targets.find([n.format(study=study, copy=copy) for n in names], series=False)


@pytest.mark.parametrize("text", ["", "arms:\nseeds:\n"])
def test_a_study_without_models(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match="no run with a model"):
        targets.find([str(tmp_path)], series=False)
    run = tmp_path / "a" / "1" / "seed-1"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()  # which no plan has
    with pytest.raises(UserError, match="no run with a model"):
        targets.find([str(tmp_path)], series=False)


def test_a_model_that_is_no_run_has_no_seed_in_its_name(study):
    model = study / "simreg" / "1" / "seed-2" / "model"
    [target] = targets.find([f"mine={model}"], series=False)
    assert target.name == "mine"
    [run] = targets.find([str(model.parent)], series=False)
    assert run.name == "simreg, seed 2"


def test_a_study_named_as_an_arm_is_that_study(study, monkeypatch, tmp_path):
    assert targets.study_of(str(study)) == targets.study_of(f"mine={study}") == study
    assert targets.study_of(str(study / "simreg" / "1" / "seed-2")) is None
    monkeypatch.setenv("HOME", str(study.parent))
    assert targets.study_of(f"~/{study.name}") == study
    assert run._in_study(["x", f"mine=~/{study.name}"]) == study / "geometry"
    plan = tmp_path / "study.yaml"
    plan.write_text("reference: simreg")
    options = AnalyzeOptions([f"mine={tmp_path}"])
    found = [targets.Target("baseline", "a"), targets.Target("simreg", "b")]
    assert run._reference(options, found) == "simreg"


def test_options_are_written_as_those_of_other_verbs():
    given = ["runs/a", "--tokens", "1e4", "--source", "a.txt", "b.txt"]
    options = tyro.cli(AnalyzeOptions, args=given)
    assert (options.tokens, options.source) == (10_000, ["a.txt", "b.txt"])
