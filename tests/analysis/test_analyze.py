import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from simreg import cli
from simreg.analysis import compare, describe, figures, measure, plots, run, summary
from simreg.analysis.options import AnalyzeOptions
from simreg.geometry import collapse
from simreg.geometry.classes import classes, token_cosines
from simreg.geometry.groups import mean_se
from simreg.geometry.margins import margins
from simreg.recipe.errors import UserError
from simreg.study import geometry
from simreg.theme import PRINT
from tests.analysis.running import analyze
from tests.geometry import problems


def values(results, arm, group, metric):
    return [m["groups"][group][metric] for m in results["models"] if m["arm"] == arm and m["final"]]


def test_every_model_has_every_group(analysed):
    assert [m["step"] for m in analysed["models"]] == [10, 20] * 6
    full, part = analysed["models"][1]["groups"], analysed["models"][0]["groups"]
    parts = ["all", "head", "torso", "tail"]
    deciles = [f"decile-{i}" for i in range(1, 11)]
    assert list(full) == [*parts, *deciles, *(f"position-{i}" for i in range(1, 5))]
    assert list(part) == parts
    tokens = {name: own["tokens"] for name, own in full.items()}
    assert tokens["all"] == analysed["text"]["tokens"]
    for names in (parts[1:], deciles, [f"position-{i}" for i in range(1, 5)]):
        assert sum(tokens[n] for n in names) == tokens["all"]
    assert full["all"]["loss"] == pytest.approx(
        sum(full[d]["loss"] * tokens[d] for d in deciles if tokens[d]) / tokens["all"], rel=1e-4
    )
    assert all(not isinstance(v, float) or math.isfinite(v) for own in full.values()
               for v in own.values())  # fmt: skip
    assert 0 < full["all"]["has_positive"] < 1
    assert full["all"]["margin_p5"] < full["all"]["margin_p50"] < full["all"]["margin_p95"]


def test_differences_are_paired_over_seeds(analysed):
    for metric in ("loss", "intra_cos", "cdnv", "effective_rank"):
        differences = [
            a - b
            for a, b in zip(
                values(analysed, "simreg", "all", metric),
                values(analysed, "baseline", "all", metric),
                strict=True,
            )
        ]
        found = analysed["minus_reference"]["simreg"]["all"][metric]
        assert found["n"] == 3
        mean = sum(differences) / 3
        assert found["mean"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
        assert found["high"] - found["mean"] == pytest.approx(
            4.302653 * sd / math.sqrt(3), rel=1e-3, abs=1e-5
        )


def test_cosines_within_rows_equal_whole_matrices():
    sample = problems.sample(160, 4, 12)
    pos, neg = measure._row_cosines(sample)
    for row in range(4):
        own = sample.rows == row
        matrix, y = problems.cosines(sample.hidden[own].double()), sample.labels[own]
        same = y[:, None] == y
        others = ~same
        same.fill_diagonal_(False)
        near = {"equal_nan": True, "atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(pos[own], (matrix * same).sum(1) / same.sum(1), **near)
        torch.testing.assert_close(neg[own], (matrix * others).sum(1) / others.sum(1), **near)


def test_correlations_over_models(analysed):
    found = analysed["correlations"]["models"]["tail"]["margin"]
    assert (found["pooled"]["n"], found["simreg"]["n"]) == (12, 6)
    points = [
        (m["groups"]["tail"]["margin"], m["groups"]["tail"]["loss"]) for m in analysed["models"]
    ]
    truth = torch.corrcoef(torch.tensor(points).double().T)[0, 1]
    assert found["pooled"]["pearson"] == pytest.approx(float(truth), abs=1e-4)
    assert found["pooled"]["low"] is found["simreg"]["high"] is None  # each run is there twice
    trained = [p for p, m in zip(points, analysed["models"], strict=True) if m["final"]]
    truth = torch.corrcoef(torch.tensor(trained).double().T)[0, 1]
    assert found["trained"]["n"] == 6
    assert found["trained"]["pearson"] == pytest.approx(float(truth), abs=1e-4)
    assert found["trained"]["low"] < found["trained"]["pearson"] < found["trained"]["high"]


def test_a_seed_without_its_checkpoint_is_not_in_the_curve(analysed):
    results = copy.deepcopy(analysed)
    models = results["models"]
    gone = next(m for m in models if not m["final"] and m["arm"] == "baseline")
    models.remove(gone)
    curves = plots.cosine_curves(results)
    assert gone["seed"] not in curves["baseline"]
    assert len(curves["baseline"]) == 2
    assert len(curves["simreg"]) == 3
    kept = [m for m in models if m["arm"] == "baseline" and m["seed"] != gone["seed"]]
    first = [m["groups"]["all"]["intra_cos"] for m in kept if not m["final"]]
    assert f"{sum(first) / 2:.3f} and" in describe.cosines(results).split(", then")[0]


def test_points_without_a_cosine_are_left_out_of_the_curve(analysed):
    results = copy.deepcopy(analysed)
    for m in results["models"]:
        if m["arm"] == "baseline" or not m["final"]:
            m["groups"]["all"]["intra_cos"] = None
    for curve in results["training"]:
        curve["records"] = [
            {"tokens": 10, "intra_cos": None, "inter_cos": 0.1},
            {"tokens": 20, "intra_cos": 0.5, "inter_cos": 0.25},
            {"tokens": 30, "intra_cos": 0.75, "inter_cos": 0.25},
        ][: 3 if curve["arm"] == "simreg" else 1]
    assert set(plots.cosine_curves(results)) == {"simreg"}
    told = describe.cosines(results)
    assert "0.500 and 0.250 at 20 tokens, then 0.750 and 0.250 at 30 tokens" in told
    assert plots.cosines(results, PRINT) is not None
    first = next(curve for curve in results["training"] if curve["arm"] == "simreg")
    first["records"][1]["inter_cos"] = None  # of one seed: 20 tokens are no point of any
    curves = plots.cosine_curves(results)["simreg"]
    assert set(map(len, curves.values())) == {1}
    assert len(curves) == 3
    results["training"] = []
    for m in results["models"]:
        m["groups"]["all"]["intra_cos"] = None
    assert plots.cosines(results, PRINT) is None


def test_a_group_without_tokens_is_drawn_without_them(analysed):
    results = copy.deepcopy(analysed)
    for m in results["models"]:
        m["groups"]["tail"] = dict.fromkeys(m["groups"]["tail"]) | {"se": {}}
    for own in results["means"].values():
        own["tail"] = {}
    for arm in results["map"]["arms"].values():
        arm["points"][next(iter(arm["points"]))] = []
    for picture in figures.PICTURES:
        assert picture.draw(results) is not None
        assert picture.describe(results)


def test_correlations_over_tokens():
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan]).double()
    base = {k: torch.zeros(5).double() for k in ("margin", "margin_cos", "intra_cos", "loss")}
    arm = {
        "loss": loss,
        "margin": -2 * loss,
        "margin_cos": torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0]).double(),
        "intra_cos": torch.full((5,), torch.nan).double(),
    }
    masks = {name: torch.ones(5, dtype=torch.bool) for name in compare.PARTS}
    start = torch.tensor([0.0, 5.0, -3.0, 1.0, 2.0]).double()  # what the arms have in common
    base, arm = (
        measure.Tokens({k: v + start for k, v in each.items()}, {}) for each in (base, arm)
    )
    tokens = {("baseline", 0): base, ("simreg", 0): arm, ("simreg", 1): arm}
    found = compare.across_tokens(tokens, masks, "baseline")["simreg"]["all"]
    assert found["margin"]["mean"] == pytest.approx(-1)
    assert found["margin"]["n"] == 1  # seed 1 has no reference
    assert found["margin_cos"]["mean"] == pytest.approx(0)
    assert "intra_cos" not in found


def test_what_was_logged_in_training_is_there(analysed):
    assert [c["seed"] for c in analysed["training"]] == [1, 2, 3] * 2
    assert [r["step"] for r in analysed["training"][0]["records"]] == [10, 20]


def test_every_picture_is_drawn_and_told(analysed, tmp_path):
    run.write(json.loads(json.dumps(analysed)), tmp_path)
    told = (tmp_path / "pictures.txt").read_text()
    for picture in figures.PICTURES:
        assert (tmp_path / f"{picture.name}.png").stat().st_size > 5000
        svg = (tmp_path / f"{picture.name}.svg").read_text()
        assert svg.startswith("<?xml")
        assert len(picture.describe(analysed)) > 60
        assert picture.describe(analysed) in told
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(analysed))


def test_a_picture_of_an_earlier_analysis_goes_and_another_file_stays(analysed, tmp_path):
    without = json.loads(json.dumps(analysed))
    without["map"]["arms"] = {}
    (tmp_path / "map.png").write_text("a map of mine")
    run.write(without, tmp_path)
    assert (tmp_path / "map.png").read_text() == "a map of mine"
    run.write(json.loads(json.dumps(analysed)), tmp_path)
    assert "\nmap: " in (tmp_path / "pictures.txt").read_text()
    run.write(without, tmp_path)
    assert not list(tmp_path.glob("map.*"))
    assert "\nmap: " not in (tmp_path / "pictures.txt").read_text()


@pytest.mark.parametrize("arms", [["simreg"], ["baseline", "simreg"]])
def test_arms_that_have_but_checkpoints_are_in_some_pictures(study, tmp_path, arms):
    other = shutil.copytree(study, tmp_path / "study")
    for model in (model for arm in arms for model in other.glob(f"{arm}/1/*/model")):
        shutil.rmtree(model)
    options = AnalyzeOptions(
        [str(other)], tokens=600, series=True, least=2, cache_dir=str(tmp_path / "cache")
    )
    found = analyze(options)
    run.write(found, tmp_path)
    assert (tmp_path / "cosines.png").is_file()
    assert (tmp_path / "margins.png").is_file() == (len(arms) < 2)
    told = describe.margins(found)
    assert [arm for arm in ("baseline", "simreg") if arm in told] == ["baseline"][: 2 - len(arms)]


def test_pictures_are_the_same_each_time(analysed, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PICTURES", figures.PICTURES[2:3])
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        run.write(analysed, tmp_path / name)
    one, other = ((tmp_path / name / "cosines.svg").read_bytes() for name in ("one", "other"))
    assert one == other


def test_bars_are_the_differences_and_lines_their_intervals(analysed):
    figure = figures.PICTURES[1].draw(analysed)
    ax = figure.axes[0]
    found = analysed["minus_reference"]["simreg"]
    shown = [
        found[f"decile-{i}"]["loss"] for i in range(1, 11) if "loss" in found.get(f"decile-{i}", {})
    ]
    bars = list(ax.patches)
    assert [b.get_height() for b in bars] == [pytest.approx(e["mean"]) for e in shown]
    lines = next(c for c in ax.collections if hasattr(c, "get_segments")).get_segments()
    for line, entry in zip(lines, shown, strict=True):
        assert sorted(line[:, 1]) == pytest.approx([entry["low"], entry["high"]], rel=1e-4)


def test_histograms_are_of_the_arm(analysed):
    figure = figures.PICTURES[0].draw(analysed)
    steps = [p for p in figure.axes[0].patches if p.get_fill() is False]
    heights = [p.get_data().values for p in steps]
    for arm, height in zip(("baseline", "simreg"), heights, strict=True):
        own = [m["histograms"]["margin"]["all"] for m in analysed["models"]
               if m["arm"] == arm and m["final"]]  # fmt: skip
        assert height == pytest.approx([sum(v) / 3 for v in zip(*own, strict=True)])
        assert sum(height) == pytest.approx(1, abs=1e-3)


def test_the_table_names_every_metric_once(analysed):
    rows = summary.rows(analysed)
    assert len(rows) == len(summary.ROWS) * 3
    assert all(len(row) == len(summary.columns(analysed)) for row in rows)
    assert re.fullmatch(r"[+-][\d.e-]+ \[[+-].*, [+-].*\]", rows[0][-1])


def test_one_model_alone_on_other_text_has_pictures_too(study, analysed, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Other text, number {i} of many. " * 40 for i in range(400)))
    options = AnalyzeOptions(
        [str(study / "simreg" / "1" / "seed-1")], tokens=300, least=2, source=str(other),
        cache_dir=str(study.parent / "cache"), labels=None,
    )  # fmt: skip
    found = analyze(options)
    assert (found["text"]["source"], analysed["text"]["source"]) == (str(other), None)
    assert found["minus_reference"] == {}
    bars = figures.PICTURES[1].draw(found).axes[0]
    assert bars.patches
    assert bars.collections  # errors over rows, since there are no seeds
    assert figures.PICTURES[3].draw(found, PRINT) is None


def test_the_command(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["simreg", "analyze", str(study)])
    monkeypatch.setattr(figures, "PICTURES", figures.PICTURES[-1:])
    out = tmp_path / "out"
    common = ["--tokens", "200", "--least", "2", "--cache-dir", str(study.parent / "cache")]
    says = "simreg minus baseline, at rare labels (tail) minus at frequent ones (head): loss (nats)"
    assert cli.main(["analyze", str(study), "--out", str(out), *common]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["command"].startswith("simreg ")
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cpus"]
    printed = capsys.readouterr().out
    assert "effective rank" in printed
    assert says in printed
    for wrong, message in (
        (["--reference", "nobody"], "the arms are baseline, simreg"),
        (["--labels", "not one token at all"], "tokens of this tokenizer, not one"),
        (["--tokens", "0"], "must be 1 or more"),
        (["--projection", "umap"], "umap is not installed"),
        (["--least", "100000"], "no label has 100000 tokens in the sample: lower --least"),
    ):
        assert cli.main(["analyze", str(study), "--out", str(out), *common, *wrong]) == 2
        said = capsys.readouterr()
        assert message in said.err.strip().splitlines()[-1]
        late = {"--reference", "--least"} & {*wrong}
        assert late or "for states" not in said.out
    (out / "results.json").write_text('{"study": {}}')
    assert cli.main(["analyze", str(study), "--out", str(out), *common]) == 2
    assert "that `simreg analyze` did not write" in capsys.readouterr().err


def test_groups_without_a_class_have_no_metric():
    sample = problems.sample()
    none, everything = classes(sample, 10**6), classes(sample)
    weight, centre = torch.randn(100, sample.hidden.shape[-1]).double(), everything.centre
    found = measure._class_metrics(none, everything, weight, centre, pairs=10)
    assert all(map(math.isnan, found.values())), found


def test_the_folder_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(UserError, match=f"there is a {tmp_path}/out/results.json that"):
        geometry.main(AnalyzeOptions(models=["./absent"], out=Path("~/out")))


def test_only_seeds_that_all_arms_have_are_compared(study, capsys):
    runs = [f"{study}/{run}" for run in ("baseline/1/seed-2", "simreg/1/seed-1", "simreg/1/seed-2")]
    options = AnalyzeOptions(runs, tokens=200, least=2, cache_dir=str(study.parent / "cache"))
    found = analyze(options)
    assert "seeds 1 of simreg have no pair" in capsys.readouterr().err
    assert [m["compared"] for m in found["models"]] == [True, False, True]
    own = found["models"][2]["groups"]["all"]["loss"]
    assert found["means"]["simreg"]["all"]["loss"] == {
        "mean": own, "low": None, "high": None, "n": 1,
    }  # fmt: skip
    assert {entry["seed"] for entry in found["map"]["arms"].values()} == {2}


def test_arms_without_a_common_seed_are_shown_unpaired():
    none = compare.NO_SEED
    assert compare.seeds_compared({"a": {1, 2}, "b": {2, 3}}) == {2, none}
    assert compare.seeds_compared({"a": {1}, "b": {2}}) == {1, 2, none}
    assert compare.seeds_compared({"a": {1, 2}, "b": {2, 3}, "model": {none}}) == {2, none}
    assert compare.seeds_compared({}) == {none}


def test_groups_are_measured_on_their_own_tokens():
    sample = problems.sample(2000, 5, 60)
    weight, bias = problems.head_of(sample)
    frequency = torch.bincount(sample.labels, minlength=len(weight))
    states = measure.States(sample, weight, bias, "")
    record, _ = measure.measure(states, frequency, 51, measure.Settings(least=4))
    masks = measure.group_masks(sample, frequency, 51)
    for name in ("head", "tail", "decile-7", "position-3"):
        own, mask = record["groups"][name], masks[name]
        part = sample.where(mask)
        margin = margins(part, weight, bias)
        assert own["loss"] == pytest.approx(float(margin.loss.mean()), rel=1e-4)
        assert own["margin_p50"] == pytest.approx(float(margin.raw.median()), abs=0.05)
        assert own["se"]["loss"] == pytest.approx(mean_se(margin.loss, part.rows)[1], rel=1e-4)
        found = classes(part, 4)
        assert own["classes_measured"] == len(found)
        assert own["variance_share"] == pytest.approx(found.variance_share, rel=1e-4)
        intra, _ = token_cosines(sample)  # against the whole sample
        alone, se, _ = mean_se(intra[mask], part.rows)
        assert own["intra_cos"] == pytest.approx(alone, rel=1e-4)
        own_se = own["se"]["intra_cos"]  # larger than that of tokens alone; by position not known
        assert own_se is None if name == "position-3" else own_se > 1.3 * se
        centre = sample.hidden.double().mean(0)  # of the whole sample, of which others are too
        for metric, shift in (("inter_max_cos", None), ("inter_max_cos_centred", centre)):
            nearest = collapse.nearest_other(found, classes(sample, 4), shift)
            assert own[metric] == pytest.approx(float(nearest.mean()), rel=1e-4)
    assert masks["position-3"].nonzero()[:, 0].tolist() == [
        i for i, p in enumerate(sample.positions.tolist()) if 25 <= p < 38
    ]


@pytest.mark.parametrize(("labels", "given"), [(12, True), (11, False)])
def test_nc1_takes_twice_as_many_classes_as_dimensions(labels, given):
    sample = problems.sample(2000, 6, labels - 1)  # and a class of one
    weight, bias = problems.head_of(sample)
    states = measure.States(sample, weight, bias, "")
    frequency = torch.bincount(sample.labels, minlength=len(weight))
    settings = measure.Settings(least=1)
    record, _ = measure.measure(states, frequency, 51, settings, brief=True)
    groups = record["groups"]
    assert groups["all"]["classes_measured"] == labels
    expected = pytest.approx(collapse.nc1(classes(sample)), rel=1e-4) if given else None
    assert groups["all"]["nc1"] == expected
    assert groups["tail"]["classes_measured"] > 1
    assert groups["tail"]["nc1"] is None
    assert groups["tail"]["cdnv"] is not None
