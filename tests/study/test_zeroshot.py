import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from simreg import cli
from simreg.evaluation import offline
from simreg.evaluation.options import EvalOptions
from simreg.evaluation.scoring import Scorer
from simreg.recipe import progress
from simreg.recipe.errors import UserError
from simreg.study import plan, plots, records, report, run, zeroshot
from simreg.study.picture import Picture
from tests.recipe import tiny
from tests.study import fakes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study that was really trained: (its folder, its text, results, what was printed)."""
    folder = tmp_path_factory.mktemp("study")
    text = tiny.write_text(folder)
    study = make(folder / "s", text)
    screen = io.StringIO()
    found = run.compare(study, console=progress.console(file=screen, width=120))
    return folder, text, found, screen.getvalue()


def make(out, text):
    base = tiny.config(out, text, {"train": {"evals": 1, "tokens": 10 * 4 * 32}})
    values = plan.recipe.to_dict(base)
    values.pop("out")
    return plan.from_dict(
        {"out": str(out), "base": values, "seeds": [1, 2], "budgets": [0.5, 1.0], "name": "t"}
    )


def test_compare_ends_with_a_zero_shot_figure(trained):
    folder, _, found, printed = trained
    suite = found["zero_shot"]["offline"]
    assert list(suite["arms"]) == ["baseline", "simreg"]
    assert suite["limit"] == zeroshot.ITEMS
    gap = suite["differences"]["simreg"]["heldout-cloze"]["score"]
    assert gap["seeds"] == 2
    assert json.loads((folder / "s" / "results.json").read_text()) == found
    assert "simreg on heldout-cloze: accuracy" in printed
    models = json.loads((folder / "s" / "zero-shot/offline/results.json").read_text())["models"]
    assert [m["name"] for m in models] == [
        f"{arm}/1/seed-{seed}" for arm in ("baseline", "simreg") for seed in (1, 2)
    ]


def test_the_report_has_a_section(trained):
    page = (trained[0] / "s" / "report.html").read_text()
    section = page.split("<h2>Zero-shot</h2>")[1].split("</section>")[0]
    assert "simreg on heldout-cloze: accuracy" in section
    cell = zeroshot.summary.difference(
        "acc", trained[2]["zero_shot"]["offline"]["differences"]["simreg"]["heldout-cloze"]["score"]
    )
    assert section.count("<svg") == 1
    assert (trained[0] / "s" / "zero-shot.png").is_file()
    assert f"<td>{cell.replace(' [', '<br>[')}</td>" in section


def test_the_figure_shows_each_difference_with_its_interval(trained):
    results = trained[2]
    picture = Picture([], {**results, "zero_shot": {"offline": results["zero_shot"]["offline"]}})
    [ax] = plots.zero_shot(picture).axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["heldout-cloze", "heldout-cloze (normalised)"]  # bits are no accuracy
    gaps = results["zero_shot"]["offline"]["differences"]["simreg"]["heldout-cloze"]
    drawn = [line.get_xdata() for line in ax.lines[:4]]
    for i, kind in enumerate(("score", "normalised")):
        gap = gaps[kind]
        assert drawn[2 * i] == pytest.approx([100 * gap["low"], 100 * gap["high"]])
        assert drawn[2 * i + 1] == pytest.approx([100 * gap["mean"]])


def test_a_report_without_it_says_nothing(five):
    assert "Zero-shot" not in report.html(*five)


def test_what_is_recorded_is_not_done_again(trained, tmp_path, monkeypatch):
    folder, text, found, _ = trained
    out = tmp_path / "s"
    shutil.copytree(folder / "s", out)
    monkeypatch.setattr(run.report, "write", lambda *args: None)
    monkeypatch.setattr(Scorer, "__call__", lambda *a: pytest.fail("scored again"))
    again, printed = fakes.compare(make(out, text))
    assert again["zero_shot"] == found["zero_shot"]
    assert "simreg on heldout-cloze: accuracy" in printed
    weights = "1/seed-1/model/model.safetensors"
    shutil.copy(out / "simreg" / weights, out / "baseline" / weights)
    monkeypatch.setattr(zeroshot.run, "evaluate", lambda *a, **k: pytest.fail("other weights"))
    with pytest.raises(pytest.fail.Exception, match="other weights"):
        fakes.compare(make(out, text))


def test_without_models_or_text_the_records_speak(trained, tmp_path, monkeypatch):
    folder, text, found, _ = trained
    out = tmp_path / "s"
    shutil.copytree(folder / "s", out)
    monkeypatch.setattr(run.report, "write", lambda *args: None)
    monkeypatch.setattr(zeroshot.run, "evaluate", lambda *a, **k: pytest.fail("evaluated"))
    for model in out.glob("*/*/*/model"):
        shutil.rmtree(model)
    again, _ = fakes.compare(make(out, text))
    assert again["zero_shot"] == found["zero_shot"]
    shutil.rmtree(out / "zero-shot")
    again, printed = fakes.compare(make(out, text))
    assert again["zero_shot"] == {}
    assert "left out" not in printed


def test_scores_of_models_that_have_changed_are_left_out(trained, tmp_path, capsys):
    out = tmp_path / "s"
    shutil.copytree(trained[0] / "s", out)
    study = make(out, tmp_path / "text.jsonl")
    assert list(zeroshot.recorded(study, {})) == ["offline"]
    weights = next(out.glob("simreg/1/seed-*/model/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"else")
    assert zeroshot.recorded(study, {}) == {}
    assert "models that have changed since: left out" in capsys.readouterr().err


def edited(trained, tmp_path, change):
    """A copy of the study whose record of the offline suite was changed."""
    out = tmp_path / "s"
    shutil.copytree(trained[0] / "s", out)
    path = out / "zero-shot" / "offline" / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    return make(out, trained[1])


def of_dropped_arm(results):
    results["models"].append({**results["models"][0], "name": "other/1/seed-1"})


def of_dropped_seed(results):
    results["models"].append({**results["models"][0], "name": "simreg/1/seed-9"})


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda results: None, False),
        (lambda results: results.update(limit=None), False),  # 1,000 items
        (lambda results: results.update(limit=249), True),
        (lambda results: results.update(schema=1), True),
        (lambda results: results["tasks"].pop("heldout-bits"), True),
        (lambda results: results["models"].pop(), True),
        (of_dropped_arm, True),
        (of_dropped_seed, True),
    ],
)
def test_what_is_done_again(trained, tmp_path, monkeypatch, change, again):
    study, asked = edited(trained, tmp_path, change), []

    def evaluate(*args, **kwargs):
        asked.append(args)
        raise zeroshot.UserError("not now")

    monkeypatch.setattr(zeroshot.run, "evaluate", evaluate)
    zeroshot.after_training(study, None, {}, Console(quiet=True))
    assert bool(asked) == again


def test_a_model_that_is_gone_stays_in_the_record(trained, tmp_path, monkeypatch):
    study = edited(trained, tmp_path, lambda results: None)
    monkeypatch.setattr(zeroshot.run, "evaluate", lambda *a, **k: pytest.fail("evaluated"))
    shutil.rmtree(Path(study.out) / "simreg/1/seed-2/model")
    zeroshot.after_training(study, None, {}, Console(quiet=True))
    assert zeroshot.recorded(study, {})["offline"] == trained[2]["zero_shot"]["offline"]


def test_limits_of_an_older_record_are_the_bootstraps_and_not_shown(trained, tmp_path, capsys):
    def old(results):
        results["schema"] = 1
        gap = results["differences"]["simreg"]["heldout-cloze"]["score"]
        gap.update(low=-0.25, high=0.5)
        del gap["bootstrap"]

    study = edited(trained, tmp_path, old)
    found = zeroshot.recorded(study, {})["offline"]
    assert "has bootstrap intervals alone: not shown" in capsys.readouterr().err
    gap = found["differences"]["simreg"]["heldout-cloze"]["score"]
    assert (gap["low"], gap["high"], gap["bootstrap"]) == (None, None, [-0.25, 0.5])
    [sentence] = zeroshot.summary.sentences(found)
    assert "points (interval not known) against baseline" in sentence
    assert "[" not in zeroshot.summary.difference("acc", gap)
    picture = Picture([], {**trained[2], "zero_shot": {"offline": found}})
    assert plots.zero_shot(picture) is not None


def test_a_difference_without_a_diverged_seed_has_no_limits(trained, tmp_path):
    study = edited(trained, tmp_path, lambda results: None)
    score = lambda found: found["differences"]["simreg"]["heldout-cloze"]["score"]  # noqa: E731
    whole = zeroshot.recorded(study, {"simreg/0.5/seed-1": "loss is nan"})["offline"]  # not at N
    assert (whole["diverged"], score(whole)["low"] is None) == ({}, False)
    assert zeroshot.summary.sentences(whole)[0].endswith("items.")
    for arm in ("simreg", "baseline"):
        found = zeroshot.recorded(study, {f"{arm}/1/seed-2": "loss is nan"})["offline"]
        assert found["diverged"] == {"simreg": [2]}
        assert score(found)["low"] is score(found)["high"] is score(found)["bootstrap"] is None
        assert score(found)["mean"] == score(whole)["mean"]
        [sentence] = zeroshot.summary.sentences(found)
        assert "(interval not known)" in sentence
        assert sentence.endswith(" Without seed 2: a run diverged.")


def test_missing_text_leaves_it_out(trained, tmp_path):
    out, text = tmp_path / "s", tmp_path / "text.jsonl"
    shutil.copytree(trained[0] / "s", out)
    shutil.rmtree(out / "zero-shot")
    study, screen = make(out, text), io.StringIO()
    for cell in study.cells():  # as if it had been trained on text that is gone now
        (out / cell.folder / "config.yaml").write_text(plan.recipe.to_yaml(study.config(cell)))
    zeroshot.after_training(study, None, {}, progress.console(file=screen, width=500))
    assert "left out: the text of baseline/1/seed-1 is not there" in screen.getvalue()


def test_eval_of_a_study_adds_to_its_report(trained, tmp_path, capsys, monkeypatch):
    out, cache = tmp_path / "s", tmp_path / "cache"
    shutil.copytree(trained[0] / "s", out)
    flags = ["--tasks", "heldout-cloze", "--limit", "7", "--cache-dir", str(cache)]
    assert cli.main(["eval", str(out), *flags]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["zero_shot"]) == ["offline", "tasks"]
    assert results["zero_shot"]["tasks"]["arms"]["simreg"]["tasks"]["heldout-cloze"]["n"] == 7
    assert "Tasks chosen by hand." in (out / "report.html").read_text()
    monkeypatch.setattr("sys.argv", ["simreg", "eval", "other tasks"])
    flags[1] = "heldout-bits"
    for _ in range(2):  # the same command line replaces its own
        assert cli.main(["eval", str(out), *flags]) == 0
    found = json.loads((out / "results.json").read_text())["zero_shot"]
    assert [[*found[name]["tasks"]] for name in ("tasks", "tasks-2")] == [
        ["heldout-cloze"],
        ["heldout-bits"],
    ]
    assert found.keys() == {"offline", "tasks", "tasks-2"}
    shutil.rmtree(out / "simreg")
    shutil.rmtree(out / "baseline")
    assert cli.main(["eval", str(out)]) == 2
    assert "has no trained models at its full budget" in capsys.readouterr().err


def test_scores_of_few_items_do_not_replace_those_of_many(trained, tmp_path, capsys):
    out = tmp_path / "s"
    shutil.copytree(trained[0] / "s", out)
    path = out / "zero-shot/offline/results.json"
    before, flags = path.read_text(), ["--cache-dir", str(tmp_path / "cache"), "--limit"]
    assert cli.main(["eval", str(out), *flags, "249"]) == 2
    assert "of the same models on 250 items of a task, which --limit 249" in capsys.readouterr().err
    assert path.read_text() == before
    path.write_text(json.dumps(json.loads(before) | {"limit": 3}))
    assert cli.main(["eval", str(out), *flags, "4"]) == 0
    assert json.loads(path.read_text())["limit"] == 4
    path.write_text(json.dumps(json.loads(before) | {"limit": None}))
    assert cli.main(["eval", str(out), *flags, "999"]) == 2
    other = json.loads(before)
    other["models"][0]["fingerprint"] = "of other weights"
    path.write_text(json.dumps(other))
    assert cli.main(["eval", str(out), *flags, "4"]) == 0


def test_other_text_does_not_pass_for_the_corpus(trained, tmp_path):
    out, other = tmp_path / "s", tmp_path / "other.txt"
    shutil.copytree(trained[0] / "s", out)
    other.write_text("\n\n".join(f"Other text, number {i} of many. " * 40 for i in range(60)))
    own = json.loads((out / "zero-shot/offline/results.json").read_text())
    flags = ["--text", str(other), "--limit", "9", "--cache-dir", str(tmp_path / "cache")]
    assert cli.main(["eval", str(out), *flags]) == 0
    assert json.loads((out / "zero-shot/offline/results.json").read_text()) == own
    suites = json.loads((out / "results.json").read_text())["zero_shot"]
    assert list(suites) == ["offline", "offline-text"]
    assert suites["offline-text"]["tasks"]["heldout-cloze"]["source"].startswith("text ")
    page = (out / "report.html").read_text()
    assert page.count("Held-out documents of the corpus itself") == 1
    assert page.count("Other text, given with --text") == 1


def test_a_study_among_other_names_is_its_runs_at_the_full_budget(trained, tmp_path):
    study, out = trained[0] / "s", tmp_path / "out"
    names = [str(study), str(study / "simreg/0.5/seed-1")]
    flags = ["--limit", "5", "--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert cli.main(["eval", *names, *flags]) == 0
    models = json.loads((out / "results.json").read_text())["models"]
    runs = [f"{arm}/1/seed-{seed}" for arm in ("baseline", "simreg") for seed in (1, 2)]
    assert [model["name"] for model in models] == [str(study / run) for run in runs] + names[1:]


def test_differences_to_another_arm_are_not_drawn_as_those_to_the_reference(trained):
    suite = {**trained[2]["zero_shot"]["offline"], "reference": "simreg"}  # baseline had no model
    assert plots.zero_shot(Picture([], {**trained[2], "zero_shot": {"offline": suite}})) is None


@pytest.mark.parametrize(
    ("step_s", "minutes", "items"), [(0.1, 5, 250), (1.5, 5, 124), (60, 5, 50), (60, None, 250)]
)
def test_a_sized_study_spends_20_seconds_on_it(tmp_path, step_s, minutes, items):
    base = {"train": {"tokens": 10**6}}
    study = plan.from_dict({"out": str(tmp_path), "base": base, "minutes": minutes})
    times = {"simreg": {**fakes.TIMES, "base_s": step_s}}
    assert zeroshot._items(study, times, 2) == items
    # 2 models, 550 tokens an item, at 0.4 of a step of 4096 tokens
    if items == 124:
        assert items * 2 * 550 * 0.4 * step_s / 4096 == pytest.approx(zeroshot.SECONDS, rel=0.01)


def test_damaged_records_are_passed_over(tmp_path):
    study = plan.from_dict({"out": str(tmp_path), "base": {"train": {"tokens": 10**6}}})
    path = Path(tmp_path) / "zero-shot" / "small"
    path.mkdir(parents=True)
    (path / "results.json").write_text("{")
    assert zeroshot.recorded(study, {}) == {}
    assert records.collect(study) == []


def test_what_is_drawn_anew_is_of_the_plan_that_is_there(tmp_path):
    """Another plan was begun and interrupted before its results: a seed less, an arm more."""
    base = {"train": {"tokens": 1_000_000}}
    values = {"out": str(tmp_path), "base": base, "arms": {"fast": {}}, "seeds": [0, 1]}
    study = plan.from_dict(values)
    for cell in study.cells():
        fakes.write_run(study.config(cell), 1.0 if cell.arm == "baseline" else 1.35)
    run.redraw(study, console=Console(quiet=True), command="simreg compare")
    more = {**study.arms, "new": {"simreg": {"weight": 1.0}}}
    for damage in (None, "{", "{}", "[]"):
        if damage is not None:
            (tmp_path / "results.json").write_text(damage)
        zeroshot._redraw(replace(study, seeds=[0], arms=more))
        found = json.loads((tmp_path / "results.json").read_text())
        assert (found["seeds"], found["complete"]) == ([0], False)
        assert found["commands"] == ([] if damage else ["simreg compare"])


@pytest.mark.parametrize(("suite", "kept"), [("small", True), ("offline", False)])
def test_all_items_of_a_benchmark_are_more_than_any_limit(tmp_path, suite, kept):
    """Of the offline suite all are `offline.ITEMS`."""
    models = [{"name": "a", "fingerprint": "f"}]
    earlier = {"suite": suite, "limit": None, "tasks": {}, "reference": "a", "arms": {}}
    earlier |= {"differences": {}, "models": models}
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    options = EvalOptions([], limit=offline.ITEMS + 1)
    found = [SimpleNamespace(name="a", fingerprint=lambda: "f")]
    if kept:
        with pytest.raises(UserError, match="on all items of a task"):
            zeroshot._check_fuller(tmp_path, options, found)
    else:
        zeroshot._check_fuller(tmp_path, options, found)
