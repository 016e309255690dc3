import copy
import json
import shutil

import pytest

from simreg.recipe import trained
from simreg.recipe.errors import UserError
from simreg.study import geometry, report
from tests.study.fakes import made
from tests.study.test_report import Checker


def test_an_analysis_is_a_section_of_the_report_with_told_pictures(analysed, tmp_path):
    runs, results = made(tmp_path, {"fast": 1.35}, seeds=[0, 1], name="s")
    assert "Geometry" not in Checker(report.html(runs, results)).text
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry" / "results.json").write_text(json.dumps(analysed))
    page = report.html(runs, results, geometry.load(tmp_path))
    checked = Checker(page)
    assert "Geometry" in checked.text
    assert len(checked.ids) == len(set(checked.ids))
    assert (
        sum(label.startswith("Margins. Median margin of baseline") for label in checked.labels) == 1
    )
    assert len([label for label in checked.labels if len(label) > 40]) == checked.tags.count("svg")
    assert checked.tags.count("svg") >= 6 + 2
    assert "simreg analyze study" in checked.text  # how to repeat it
    assert "simreg minus baseline, at rare labels (tail)" in checked.text
    assert "Student-t intervals of paired differences over seeds. Metrics" in checked.text
    other = {**analysed, "text": {**analysed["text"], "source": "other/*.txt"}}
    assert "validation text of other/*.txt;" in Checker(report.html(runs, results, other)).text
    assert " text; head" in checked.text
    lost = {"fast/1/seed-0": "loss is nan", "fast/0.5/seed-1": "loss is nan"}
    checked = Checker(report.html(runs, results | {"failures": lost}, analysed))
    assert "Diverged, so not in them: fast/1/seed-0; the rest is no" in checked.text
    older = {k: v for k, v in analysed.items() if k not in ("tail_minus_head", "over_tokens")}
    assert "at rare labels" not in report.html(runs, results, older)
    assert not [colour for colour in report._VARIABLES if colour in page]


def test_the_report_looks_for_it(analysed, tmp_path, monkeypatch):
    runs, results = made(tmp_path, {"fast": 1.35}, seeds=[0, 1], name="s")
    seen = []
    monkeypatch.setattr(report, "html", lambda *args: seen.append(args[-1]) or "")
    monkeypatch.setattr(report.plots, "curves", lambda picture: None)
    monkeypatch.setattr(report.plots, "isoloss", lambda picture: None)
    report.write(tmp_path, runs, results)
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry" / "results.json").write_text(json.dumps(analysed))
    report.write(tmp_path, runs, results)
    assert seen == [None, json.loads(json.dumps(analysed))]
    (tmp_path / "geometry" / "results.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report.write(tmp_path, runs, results)


def test_an_analysis_of_models_that_have_changed_is_left_out(analysed, study, tmp_path, capsys):
    out = tmp_path / "s"
    shutil.copytree(study, out)
    path = out / "geometry" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(analysed))
    assert geometry.load(out) == json.loads(json.dumps(analysed))
    shutil.rmtree(out / "baseline" / "1" / "seed-1" / "model")
    assert geometry.load(out) is not None  # of a model that is gone, the record is kept
    weights = out / "simreg" / "1" / "seed-2" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"else")
    assert not capsys.readouterr().err
    assert geometry.load(out) is None
    assert "models that have changed since: left out" in capsys.readouterr().err
    older = copy.deepcopy(analysed)
    for model in older["models"]:
        del model["fingerprint"]
    path.write_text(json.dumps(older))
    assert geometry.load(out) == json.loads(json.dumps(older))


def test_a_trained_model_is_known_by_its_files(analysed, study):
    for model in analysed["models"]:
        if not model["final"]:
            assert model["fingerprint"] is None
            continue
        [subject] = trained.find([str(study / model["arm"] / "1" / f"seed-{model['seed']}")])
        assert model["fingerprint"] == subject.fingerprint()
