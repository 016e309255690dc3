import json

import pytest

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
