import math
from pathlib import Path

import pytest
import torch

from simreg.analysis import compare, figures, run, summary
from simreg.analysis.measure import Tokens
from simreg.analysis.options import AnalyzeOptions
from simreg.recipe.trained import Trained
from simreg.study import geometry
from tests.analysis.running import analyze
from tests.analysis.test_analyze import values


def made(arm, seed, **groups):
    """A model as results.json has it, `tail=1.0` being its loss there."""
    own = {group: {"loss": loss, "se": {}} for group, loss in groups.items()}
    return {"arm": arm, "seed": seed, "compared": True, "final": True, "groups": own}


def test_the_change_in_the_tail_is_set_against_that_in_the_head():
    models = [
        made("base", 1, head=1.0, tail=5.0),
        made("base", 2, head=2.0, tail=7.0),
        made("base", 3, head=2.0, tail=None),
        made("ours", 1, head=0.5, tail=4.0),  # -0.5 and -1: -0.5
        made("ours", 2, head=1.5, tail=6.4),  # -0.5 and -0.6: -0.1
        made("ours", 3, head=1.5, tail=6.4),
        made("ours", 4, head=1.5, tail=6.4),
        made("other", 9, head=1.0, tail=1.0),
    ]
    found = compare.tail_minus_head(models, "base")
    assert list(found) == ["ours"]
    entry = found["ours"]["loss"]
    assert (entry["mean"], entry["n"]) == (pytest.approx(-0.3), 2)
    half = 12.7062 * 0.2  # t with one degree of freedom; sd 0.2·√2 over √2
    assert (entry["low"], entry["high"]) == pytest.approx((-0.3 - half, -0.3 + half), rel=1e-4)


def test_the_contrast_of_an_analysis_is_that_of_its_models(analysed):
    for metric in ("loss", "variance_share"):
        each = {
            (arm, group): values(analysed, arm, group, metric)
            for arm in ("baseline", "simreg") for group in ("head", "tail")
        }  # fmt: skip
        found = analysed["tail_minus_head"]["simreg"][metric]
        differences = [
            (a - b) - (c - d)
            for a, b, c, d in zip(
                each["simreg", "tail"], each["baseline", "tail"],
                each["simreg", "head"], each["baseline", "head"], strict=True,
            )
        ]  # fmt: skip
        assert found["mean"] == pytest.approx(sum(differences) / 3, abs=1e-5)
        assert found["n"] == 3
    [sentence] = summary.sentences(analysed)
    entry = analysed["tail_minus_head"]["simreg"]["loss"]
    interval = f"{entry['mean']:+.4g} [{entry['low']:+.3g}, {entry['high']:+.3g}]"
    assert f"loss (nats) {interval}; cosine margin" in sentence
    assert sentence.endswith("(3 seeds).")


def test_models_that_are_no_runs_pair_with_each_other_and_never_with_a_run():
    two = [made("a", None, all=1.0), made("b", None, all=3.0)]
    assert compare.paired(two, "a")["b"]["all"]["loss"]["mean"] == 2.0
    assert compare.paired([made("a", 0, all=1.0), two[1]], "a") == {}
    results = {"means": {"a": {}, "b": {}}, "reference": "a", "minus_reference": {}}
    assert summary.sentences(results) == ["b shares no seed with a: not compared."]


def test_a_model_beside_runs_does_not_choose_their_seeds(study, capsys):
    run_, other = (Trained(arm, Path(arm), arm, seed) for arm, seed in (("a", 0), ("a", 1)))
    model = Trained("m", Path("m"), "m")
    assert run._compared([run_, other, Trained("b", Path("b"), "b", 1), model]) == {1, -1}
    assert "seeds 0 of a have no pair" in capsys.readouterr().err


def test_one_pair_has_intervals_over_tokens_by_row(study):
    named = [f"{arm}={study}/{arm}/1/seed-1/model" for arm in ("baseline", "simreg")]
    options = AnalyzeOptions(
        named, tokens=600, least=2, source=str(next(study.parent.glob("*.jsonl"))),
        seq_len=32, cache_dir=str(study.parent / "cache"),
    )  # fmt: skip
    found = analyze(options)
    assert [m["seed"] for m in found["models"]] == [None, None]
    means = found["minus_reference"]["simreg"]
    over = found["over_tokens"]["simreg"]
    assert list(over) == ["all", "head", "torso", "tail"]
    for metric in ("loss", "margin", "intra_cos", "inter_cos"):
        assert over["all"][metric]["mean"] == pytest.approx(means["all"][metric]["mean"], abs=1e-4)
        assert over["tail"][metric]["low"] < over["tail"][metric]["mean"]
    assert means["all"]["loss"]["low"] is None
    rows = {(row[0], row[1]): row[-1] for row in summary.rows(found)}
    loss = over["all"]["loss"]
    assert (loss["n"], loss["rows"]) == (found["text"]["tokens"], found["text"]["rows"])
    assert rows["loss (nats)", "all"].endswith(f"[{loss['low']:+.3g}, {loss['high']:+.3g}]")
    assert "[" not in rows["CDNV", "all"]  # is of classes, not of tokens
    assert "with one seed, over tokens by row, which says nothing of other" in geometry.note(found)
    assert "one pair, of which no interval is known" in summary.sentences(found)[0]
    assert figures.PICTURES[4].draw(found).axes[0].get_title("left").startswith("baseline:")


def test_the_interval_over_tokens_is_that_of_row_means():
    draw = torch.Generator().manual_seed(0)
    rows = torch.arange(8).repeat_interleave(5)
    change = (torch.randn(8, generator=draw).repeat_interleave(5)).double()
    start = torch.randn(40, generator=draw).double()
    masks = {"all": torch.ones(40, dtype=torch.bool), "tail": rows > 5, "head": rows == 0}
    tokens = {
        (arm, 1): Tokens({"loss": loss}, {group: {} for group in masks})
        for arm, loss in (("base", start), ("ours", start + change))
    }
    found = compare.over_tokens(tokens, masks, rows, "base")["ours"]
    means = change.view(8, 5)[:, 0]
    half = 2.364624 * float(means.std()) / math.sqrt(8)
    entry = found["all"]["loss"]
    assert entry["mean"] == pytest.approx(float(means.mean()), rel=1e-4)
    assert entry["high"] - entry["mean"] == pytest.approx(half, rel=1e-4)
    assert (entry["n"], entry["rows"]) == (40, 8)
    half = 12.7062 * float(means[6:].std()) / math.sqrt(2)
    assert found["tail"]["loss"]["high"] - found["tail"]["loss"]["mean"] == pytest.approx(
        half, rel=1e-4
    )
    assert "head" not in found  # one row
    for arm, part in (("base", 1.0), ("ours", 3.0)):  # of means over pairs, what all rows move
        own = tokens[arm, 1]
        own.values["intra_cos"] = own.values["loss"]
        for group in masks:
            own.moved[group]["intra_cos"] = part * (means - means.mean())
    found = compare.over_tokens(tokens, masks, rows, "base")["ours"]
    half = 2.364624 * 2 * float(means.std()) * math.sqrt(8) / 10
    assert found["tail"]["intra_cos"] == {
        "mean": found["tail"]["loss"]["mean"],
        "low": pytest.approx(found["tail"]["loss"]["mean"] - half, rel=1e-4),
        "high": pytest.approx(found["tail"]["loss"]["mean"] + half, rel=1e-4),
        "n": 10,
        "rows": 8,
    }
    tokens |= {("base", 2): tokens["base", 1], ("ours", 2): tokens["ours", 1]}
    assert compare.over_tokens(tokens, masks, rows, "base") == {}  # seeds speak for themselves


def test_a_correlation_over_runs_is_told_by_value_and_by_rank():
    points = [(1, -1.0), (2, -2.0), (3, -3.5), (4, -3.0), (10, -9.0)]
    models = [made("a", seed, all=loss) for seed, (_, loss) in enumerate(points)]
    for model, (margin, _) in zip(models, points, strict=True):
        model["groups"]["all"]["margin"] = float(margin)
    found = compare.across_models(models)["all"]["margin"]["a"]
    truth = torch.corrcoef(torch.tensor(points).double().T)[0, 1]
    assert found["pearson"] == pytest.approx(float(truth), abs=1e-5)
    assert found["spearman"] == -0.9
    half = 1.959964 / math.sqrt(5 - 3)  # of Fisher's z
    ends = (math.tanh(math.atanh(float(truth)) + sign * half) for sign in (-1, 1))
    assert (found["low"], found["high"]) == pytest.approx(tuple(ends), rel=1e-4)
    few = compare.across_models(models[:3])["all"]["margin"]["a"]
    assert few == {"pearson": None, "low": None, "high": None, "spearman": None, "n": 3}
