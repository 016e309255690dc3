import json
import shutil
from pathlib import Path

import pytest

from simreg.recipe import config as recipe
from simreg.recipe import trained
from simreg.recipe.errors import UserError


def make(folder, seed=0, *, finished=True, steps=(), **optim):
    """The folder of a run as the trainer writes it, without weights."""
    values = {"out": str(folder), "optim": optim, "data": {"source": "a.txt", "seq_len": 32}}
    values["train"] = {"tokens": 20 * 4 * 32, "batch_rows": 4, "seed": seed}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(recipe.to_yaml(recipe.from_dict(values)))
    for step in steps:
        (folder / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
    if finished:
        result = {"final_ce": 1.0, "corpus": {"fingerprint": "f00d"}}
        (folder / "result.json").write_text(json.dumps(result))
        hugging_face(folder / "model")
    return folder


def hugging_face(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def arms(*names, **options):
    return [(m.arm, m.seed) for m in trained.find([str(name) for name in names], **options)]


def test_a_run_with_its_checkpoints_in_order(tmp_path):
    run = make(tmp_path / "simreg" / "1" / "seed-2", 2, steps=(10, 20))
    [model] = trained.find([str(run)])
    assert (model.arm, model.seed, model.step, model.tokens) == ("simreg", 2, 20, 20 * 4 * 32)
    assert (model.name, model.model, model.run) == (str(run), run / "model", run)
    assert (model.title, model.final, model.corpus) == ("simreg, seed 2", True, "f00d")
    half, whole = trained.find([str(run)], series=True)
    assert (half.title, half.final, half.tokens) == ("simreg, seed 2, step 10", False, 10 * 4 * 32)
    assert half.name == str(half.model) == str(run / "checkpoints" / "step-0000010")
    assert whole == model
    named = trained.find([f"mine={run}", str(run / "model")])
    assert [m.title for m in named] == ["mine, seed 2"]  # of one and the same
    elsewhere = shutil.copytree(run / "model", tmp_path / "model")
    assert [m.title for m in trained.find([str(elsewhere)])] == ["model"]


def test_a_run_without_a_model_is_known_by_its_checkpoints(tmp_path):
    run = make(tmp_path / "run", steps=(20, 10))
    (run / "model" / "config.json").unlink()
    found = trained.find([str(run)], series=True)
    assert [(m.step, m.final) for m in found] == [(10, False), (20, False)]
    way = rf"has no trained model: remove {run}/result.json and finish it again by the command"
    with pytest.raises(UserError, match=way + r" that began it; simreg analyze --series looks"):
        trained.find([str(run)])
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"no trained model: finish it by the command"):
        trained.find([str(run)])
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rmdir()
    for series in (False, True):
        with pytest.raises(UserError, match=r"by the command that began it$"):
            trained.find([str(run)], series=series)


def test_a_model_without_a_result_is_not_finished(tmp_path):
    """The model is there a moment before the result, and an earlier one before a new run ends."""
    run = make(tmp_path / "run")
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="finish it by the command that began it"):
        trained.find([str(run)])


def test_runs_below_a_folder_in_the_order_of_their_seeds(tmp_path, capsys):
    for seed in (10, 9):
        make(tmp_path / "a" / "plain" / f"seed-{seed}", seed)
    make(tmp_path / "a" / "plain" / "seed-11", 11, finished=False, steps=(5,))
    assert arms(tmp_path / "a") == [("plain", 9), ("plain", 10)]
    assert f"{tmp_path}/a/plain/seed-11 has no trained model" in capsys.readouterr().err
    assert arms(tmp_path / "a", series=True)[-1] == ("plain", 11)
    make(tmp_path / "b" / "begun", finished=False)
    with pytest.raises(UserError, match=r"no run below .*b has a trained model"):
        arms(tmp_path / "b")


def test_arms_differ_in_more_than_seeds(tmp_path):
    one = [make(tmp_path / "one" / f"try-{seed}", seed, lr=1e-3) for seed in (1, 2)]
    other = make(tmp_path / "other", 1, lr=2e-3)
    assert arms(*one, other) == [("try-1", 1), ("try-1", 2), ("other", 1)]
    assert arms(other, one[1], tmp_path / "other") == [("other", 1), ("try-2", 2)]
    assert arms(tmp_path / "one", *one) == [("try-1", 1), ("try-1", 2)]  # each once
    given = arms(f"a={other}", f"a={one[1]}", one[0])
    assert given == [("a", 1), ("a", 2), ("try-1", 1)]  # as one says


def test_arms_are_called_as_their_folders(tmp_path):
    x, y = (
        make(tmp_path / s / "simreg" / "1" / "seed-1", 1, lr=lr) for s, lr in (("x", 1), ("y", 2))
    )
    half = make(tmp_path / "x" / "simreg" / "0.5" / "seed-1", 1, lr=3)
    assert arms(x) == [("simreg", 1)]
    assert arms(x, half) == [("simreg", 1), ("simreg/0.5", 1)]
    assert arms(x, y) == [("x/simreg", 1), ("y/simreg", 1)]
    assert arms(f"simreg={y}", x) == [("simreg", 1), ("x/simreg", 1)]
    odd = make(tmp_path / "x" / "simreg" / "1" / "seed-2", 2, lr=4)  # beside a run of another rate
    assert arms(x, odd) == [("simreg", 1), ("simreg (2)", 2)]
    models = [hugging_face(tmp_path / name / "model") for name in ("m", "n")]
    assert arms(models[0]) == [("model", None)]
    assert arms(*models) == [("m/model", None), ("n/model", None)]


def test_a_run_made_twice_is_two_arms(tmp_path):
    one, two = (
        make(tmp_path / name / "run", 1, steps=steps) for name, steps in (("a", [10]), ("b", [15]))
    )
    assert arms(one, two) == [("a/run", 1), ("b/run", 1)]
    assert arms(one, two, series=True) == [(f"{n}/run", 1) for n in ("a", "a", "b", "b")]
    a, b = (
        [make(tmp_path / name / "1" / f"seed-{seed}", seed) for seed in seeds]
        for name, seeds in (("c", (1, 3)), ("d", (1, 2)))
    )
    assert arms(*a, *b) == [("c", 1), ("c", 3), ("d", 1), ("d", 2)]  # not d's second to c
    assert arms(a[1], *b) == [("c", 3), ("c", 1), ("c", 2)]


def test_two_models_of_one_name_are_refused(tmp_path):
    one, two = (make(tmp_path / name, 3) for name in ("one", "two"))
    message = f"{one} and {two} would both be of the arm x and seed 3: give them names"
    with pytest.raises(UserError, match=message):
        arms(f"x={one}", f"x={two}")
    copies = [shutil.copytree(run / "model", tmp_path / f"copy-{run.name}") for run in (one, two)]
    with pytest.raises(UserError, match="would both be of the arm x: give"):
        arms(*(f"x={copy}" for copy in copies))
    for budget in ("1", "0.5"):  # trained to other ends
        make(tmp_path / "s" / "arm" / budget / "seed-1", 1, lr=float(budget))
    with pytest.raises(UserError, match="would both be of the arm x and seed 1"):
        arms(f"x={tmp_path}/s/arm")
    with pytest.raises(UserError, match=f"{one} is named as a and as b"):
        arms(f"a={one}", f"b={one}")


def test_a_run_that_diverged_is_called_so(tmp_path):
    run = make(tmp_path / "run", finished=False)
    (run / "diverged.json").write_text("{}")
    with pytest.raises(UserError, match=r"run diverged, so it has no trained model$"):
        trained.find([str(run)])


def test_folders_that_are_numbers_are_no_budgets(tmp_path, monkeypatch):
    for lr in (1, 2):
        make(tmp_path / "sweep" / str(lr), lr=lr)
    assert arms(tmp_path / "sweep") == [("1", 0), ("2", 0)]
    run = make(tmp_path / "arm" / "0.5" / "seed-1", 1)
    monkeypatch.chdir(run)
    assert arms(".") == arms("../seed-1/") == [("arm/0.5", 1)]
    assert trained.arms.path_of(Path("/")) == ("/",)


def test_said_names_are_kept(tmp_path):
    for seed, lr in ((1, 1), (2, 2)):  # of one folder, but two arms
        make(tmp_path / "odd" / "simreg" / f"seed-{seed}", seed, lr=lr)
    other = make(tmp_path / "other" / "simreg" / "seed-1", 1, lr=3)
    plain = make(tmp_path / "plain", lr=4)
    found = arms(tmp_path / "odd", other, f"simreg={plain}")
    assert found == [
        ("odd/simreg", 1), ("odd/simreg (2)", 2), ("other/simreg", 1), ("simreg", 0),
    ]  # fmt: skip
    found = arms(tmp_path / "odd", f"simreg (2)={plain}")
    assert found == [("simreg", 1), ("simreg (3)", 2), ("simreg (2)", 0)]


def test_a_path_may_have_an_equals_sign(tmp_path, monkeypatch):
    run = make(tmp_path / "lr=3" / "run")
    assert arms(run) == [("run", 0)]
    assert arms(f"mine={run}") == [("mine", 0)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arms("~/lr=3/run") == arms(run)
    assert arms("mine=~/lr=3/run") == [("mine", 0)]
    assert trained.parts_of("mine=~/lr=3/run") == ("mine", run)
    assert arms(f"lr=1=a={run}") == [("lr=1=a", 0)]
    assert trained.parts_of("a=owner/name=x")[0] == "a"
    asked = []
    monkeypatch.setattr(trained.hub, "folder", lambda name, patterns: asked.append(name) or run)
    monkeypatch.chdir(tmp_path)
    for absent in ("lr=3/absent", "a/b=c", "=x", "x="):
        trained.find([absent])
    assert {*asked} == {"lr=3/absent", "a/b=c", "=x", "x="}


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def folder(name, patterns):
        asked.append((name, "pytorch_model*.bin" in patterns))
        return hugging_face(tmp_path / str(len(asked)))

    monkeypatch.setattr(trained.hub, "folder", folder)
    [model] = trained.find(["owner/name"])
    assert (model.arm, model.name, model.model) == ("owner/name", "owner/name", tmp_path / "2")
    assert asked == [("owner/name", False), ("owner/name", True)]  # it has no safetensors
    assert trained.find(["mine=owner/name"])[0].arm == "mine"


def test_a_name_that_is_nothing_is_said_to_be_so(monkeypatch):
    def nothing(*arguments, **options):
        raise OSError("offline\nfor long")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    message = "there is no folder nothere, and no model of that name could be had from the Hugging"
    with pytest.raises(UserError, match=message) as caught:
        trained.find(["nothere"])
    assert "\n" not in str(caught.value)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="name a model"):
        trained.find([])
    with pytest.raises(UserError, match=r"there is no folder \./nowhere"):
        trained.find(["./nowhere"])
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=rf"{path} is no run .* and has no runs below it"):
            trained.find([str(path)])


def test_a_name_that_was_said_is_of_what_it_was_said_of_alone(tmp_path):
    a, b, c = (make(tmp_path / name, seed) for seed, name in enumerate("abc"))
    assert arms(f"mine={a}", b, c) == [("mine", 0), ("b", 1), ("b", 2)]
    assert arms(a, f"mine={b}", c) == [("a", 0), ("mine", 1), ("a", 2)]
