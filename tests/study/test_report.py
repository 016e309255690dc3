import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from simreg.study import plan, plots, records, report, results, sizing, summary
from simreg.study.picture import Picture
from tests.study.fakes import SPEED, TIMES, made, write_run

VOID = {"meta", "br", "link", "img", "hr", "input"}
SCHEMA = Path(__file__).parents[2] / "docs" / "results-schema.md"


class Checker(HTMLParser):
    """Collects tags, ids and addresses; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.labels = [], [], [], [], []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "data", "action"):
                self.addresses.append(value)
            if key == "aria-label":
                self.labels.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(five):
    page = report.html(*five)
    checked = Checker(page)
    assert "script" not in checked.tags
    assert all(address.startswith("#") for address in checked.addresses)
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    assert len(checked.ids) == len(set(checked.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {a[1:] for a in checked.addresses}
    assert used <= set(checked.ids)
    assert checked.tags.count("svg") == 4
    assert all(len(label) > 40 for label in checked.labels)
    assert "prefers-color-scheme: dark" in page
    # No stand-in colour is left, and no fixed colour is drawn that one of the modes would hide.
    assert not re.search(
        r"#0[0-9a-f]{5}\b",
        re.sub(r"<style>.*?</style>", "", page, count=1, flags=re.S).split("</head>")[1],
    )
    assert "simreg compare --out 'a <b>'" in checked.text.replace("’", "'")


def test_one_corpus_however_long_the_runs(five):
    assert [len(five[1][key]) for key in ("corpus", "versions", "machine")] == [1, 1, 1]
    assert "different" not in report.html(*five).split("Arms")[0]


def test_one_seed_claims_no_interval(tmp_path):
    runs, found = made(tmp_path, {"simreg": 1.35})
    saved = found["isoloss"]["simreg"]["tokens_saved"]
    assert (saved["low"], saved["high"], saved["n"]) == (None, None, 1)
    assert (
        "one seed: this shows the difference and claims no interval" in summary.headlines(found)[0]
    )
    Checker(report.html(runs, found))


def test_arms_that_are_not_paired_are_named(tmp_path):
    arms = {
        "tied": {"model": {"tie_embeddings": True}},
        "wide": {"train": {"batch_rows": 32}},
        "same": {"model": {"preset": "llama-tiny"}, "optim": {"lr": 1e-3}},
    }
    study = plan.from_dict({"out": str(tmp_path), "arms": arms})
    found = results.build(study, [], {}, [])
    assert {arm: entry["unpaired"] for arm, entry in found["arms"].items()} == {
        "baseline": [],
        "tied": ["model.tie_embeddings"],
        "wide": ["train.batch_rows"],
        "same": [],
    }
    notes = Checker(report.html([], found)).text.split("Arms")[0]
    assert "tied changes model.tie_embeddings: its runs do not share initial weights" in notes
    assert "wide changes train.batch_rows" in notes
    assert "same changes" not in notes


def test_a_study_of_equal_steps_has_no_time_axis(tmp_path):
    arms = {"lr": {"simreg": {"weight": 0}, "optim": {"lr": 1e-3}}}
    study = plan.from_dict({"out": str(tmp_path), "arms": arms})
    for cell in study.cells():
        write_run(study.config(cell), 1.2)
    runs = records.collect(study)
    found = results.build(study, runs, sizing.cached_step_times(study), [])
    saved = found["isoloss"]["lr"]
    assert saved["seconds_saved"]["mean"] == saved["tokens_saved"]["mean"]
    assert found["equal_time"]["lr"]["status"] == "ok"
    assert len(plots.curves(Picture(runs, found)).axes) == 1
    Checker(report.html(runs, found))


def test_a_tuning_study_ranks_final_losses(tmp_path):
    runs, found = made(tmp_path, {"bad": 0.5, "good": 2.0}, budgets=[1.0])
    assert found["isoloss"] == {}
    assert [row[0] for row in summary.rows(found)] == ["good", "baseline", "bad"]
    assert "nats per token below baseline at equal tokens" in summary.headlines(found)[1]
    Checker(report.html(runs, found))


def test_equal_time_needs_reference_budgets_around_it(tmp_path):
    _, without = made(tmp_path / "a", {"simreg": 1.35})
    assert without["equal_time"]["simreg"]["status"] == "not_run"
    assert without["equal_time"]["simreg"]["reference_tokens"] == pytest.approx(1.05e6, rel=0.01)
    budgets = {"baseline": [1.0, 1.1], "simreg": [0.6, 0.8, 1.0]}
    _, found = made(tmp_path / "b", {"simreg": 1.35}, budgets=budgets)
    entry = found["equal_time"]["simreg"]
    ce = {r["path"]: r["final_ce"] for r in found["runs"]}
    low, high = ce["baseline/1.1/seed-0"], ce["baseline/1/seed-0"]
    expected = ce["simreg/1/seed-0"] - high, ce["simreg/1/seed-0"] - low
    assert expected[0] < entry["ce_difference"]["mean"] < expected[1]


def test_names_are_escaped(tmp_path):
    runs, found = made(tmp_path, {"simreg": 1.35})
    found["failures"] = {"x": "<script>alert(1)</script>"}
    assert "script" not in Checker(report.html(runs, found)).tags


def test_pictures_for_other_documents_are_opaque(five, tmp_path):
    report.write(tmp_path, *five)
    for name in ("curves", "isoloss"):
        png, svg = (tmp_path / f"{name}.{kind}" for kind in ("png", "svg"))
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "fill: #ffffff" in svg.read_text()
        assert "<text" not in svg.read_text(), "needs fonts of the reader's machine"


def test_nothing_finished_yet(tmp_path):
    study = plan.from_dict({"out": str(tmp_path)})
    found = results.build(study, [], {}, [])
    Checker(report.html([], found))
    assert not found["complete"]
    assert "no seed has all of its runs yet" in summary.headlines(found)[0]


def test_the_documented_fields_exist(five):
    documented = re.findall(r"^\| `([^`]+)` \|", SCHEMA.read_text(), flags=re.M)
    assert len(documented) > 25
    for path in documented:
        found = [five[1]]
        for key in path.split("."):
            name, is_list = key.removesuffix("[]"), key.endswith("[]")
            many = name.startswith("<")
            found = [v for f in found for v in (f.values() if many else [f[name]])]
            if is_list:
                found = [v for f in found for v in f]
            found = [f for f in found if f is not None]
        assert found or "null" in SCHEMA.read_text().split(f"`{path}`")[1].splitlines()[0], path


def test_every_field_is_documented(five):
    text = SCHEMA.read_text()
    assert [
        key
        for key in five[1]
        if f"`{key}`" not in text and f"`{key}." not in text and f"`{key}[" not in text
    ] == []
    saved = five[1]["isoloss"]["fast"]["tokens_saved"]
    assert [key for key in saved if f"tokens_saved.{key}" not in text] == []


@pytest.mark.parametrize(("others", "shown"), [(8, 8), (10, 10), (14, 10)])
def test_arms_that_are_drawn_can_be_told_apart(tmp_path, others, shown):
    arms = {f"arm-{k}": {"simreg": {"weight": 0.1 * k}} for k in range(1, others + 1)}
    study = plan.from_dict({"out": str(tmp_path), "arms": arms, "budgets": [1.0]})
    for cell in study.cells():  # the later the better
        write_run(study.config(cell), 1 + 0.1 * list(study.arms).index(cell.arm))
    runs = records.collect(study)
    picture = Picture(runs, results.build(study, runs, {}, []))
    looks = {(picture.colours[arm], picture.line(arm)) for arm in picture.shown}
    best = [f"arm-{k}" for k in range(others - shown + 1, others + 1)]
    assert picture.shown == ["baseline", *best]
    assert len(looks) == len(picture.shown)
    texts = [text.get_text() for text in plots.curves(picture).legends[0].get_texts()]
    assert set(picture.shown) <= set(texts)
    assert ("the best arms, 4 left out" in texts) == (others == 14)


def test_time_axis_counts_whole_minutes(tmp_path):
    study = plan.from_dict({"out": str(tmp_path), "base": {"train": {"tokens": 10**6}}})
    for cell in study.cells():
        write_run(study.config(cell), 1.35)
    runs = records.collect(study)
    step_time = {"simreg": {**TIMES, "ratio": 1.0, "base_s": 3.0, "arm_s": 3.0}}
    figure = plots.curves(Picture(runs, results.build(study, runs, step_time, [])))
    axis = figure.axes[1]
    steps = study.config(study.cells()[0]).steps
    assert "minutes" in axis.get_xlabel()
    ends = [line.get_xdata()[-1] for line in axis.lines if len(line.get_xdata()) == 1]
    assert max(ends) == pytest.approx(steps * 3.0 / 60)


def test_times_are_compared_by_the_token_whatever_the_batch(tmp_path):
    arms = {"wide": {"train": {"batch_rows": 32}}}
    study = plan.from_dict(
        {"out": str(tmp_path), "arms": arms, "base": {"train": {"tokens": 2**20}}}
    )
    for cell in study.cells():
        write_run(study.config(cell), 1.0 if cell.arm == "baseline" else 1.35)
    runs = records.collect(study)
    found = results.build(study, runs, {"wide": {**TIMES, "ratio": 2.0}}, [])
    saved = found["isoloss"]["wide"]
    assert saved["tokens_saved"]["mean"] > 0.2
    assert saved["seconds_saved"]["mean"] == pytest.approx(saved["tokens_saved"]["mean"])
    assert found["equal_time"]["wide"]["reference_tokens"] == 2**20
    seconds = Picture(runs, found).seconds_per_token()
    assert seconds["wide"] == pytest.approx(seconds["baseline"])


def test_no_time_is_saved_by_noise_of_the_timing(tmp_path):
    arms = {"simreg": {}, "small": {"model": {"layers": 1}}, "plain": {"simreg": {"weight": 0}}}
    study = plan.from_dict({"out": str(tmp_path), "arms": arms})
    for cell in study.cells():
        write_run(study.config(cell), 1.0 if cell.arm == "baseline" else 1.35)
    runs = records.collect(study)
    times = {arm: {**TIMES, "ratio": 0.95, "ratio_quartiles": [0.9, 1.0]} for arm in arms}
    found = results.build(study, runs, times, [])
    saved = {arm: found["isoloss"][arm]["seconds_saved"]["mean"] for arm in arms}
    assert saved["simreg"] is None
    assert saved["small"] > 0.2
    assert saved["plain"] > 0.2
    assert found["equal_time"]["simreg"]["reference_tokens"] is None
    assert (
        "were timed as faster (× 0.950, quartiles 0.900 to 1.000): that is noise, and the time "
        "saved is not known."
    ) in summary.headlines(found)[0]
    Checker(report.html(runs, found))


def test_a_step_time_that_is_noise_is_not_drawn(tmp_path):
    runs, found = made(tmp_path, {"baseline": 1.0, "simreg": SPEED})
    drawn = Picture(runs, found).seconds_per_token()
    assert drawn["simreg"] == pytest.approx(1.05 * drawn["baseline"])
    found["step_time"]["simreg"] = {**TIMES, "ratio": 0.9}
    assert "simreg" not in Picture(runs, found).seconds_per_token()


def test_what_stands_beside_the_headline(five):
    """Each figure is in its own column."""
    found = five[1]
    page = report._apart(found)
    row = page.split("fast")[1].split("</tr>")[0].replace("<br>", " ")
    row = re.findall(r"<td[^>]*>(.*?)</td>", row)
    saved = found["isoloss"]["fast"]
    boot = saved["tokens_saved"]["bootstrap"]
    limits = f"{summary.percent(boot['low'])} to {summary.percent(boot['high'])}"
    assert boot["low"] < boot["high"]
    assert row[:2] == [summary.saving_cell(saved["midrun_tokens_saved"]), limits]
    assert row[0] != summary.saving_cell(saved["tokens_saved"])


def test_a_reader_is_told_what_weakens_the_headline(five):
    runs, found = five
    page = report.html(runs, found)
    assert "did not always end lower" not in page
    assert "saw the corpus more than once" not in page
    found = copy.deepcopy(found)
    found["isoloss"]["fast"]["tokens_saved"]["per_seed"][3]["monotone"] = False
    found["runs"][0]["epochs"] = 1.01
    page = report.html(runs, found)
    assert "fast: a longer schedule did not always end lower (seeds 3)" in page
    assert "Some runs saw the corpus more than once." in page


def test_equal_time_over_some_of_the_seeds_says_so(five):
    runs, found = five
    found = copy.deepcopy(found)
    gap = {"mean": -0.01, "low": -0.03, "high": 0.01, "n": 3}
    found["equal_time"]["fast"] |= {"status": "ok", "ce_difference": gap}
    assert "-0.0100<br>[-0.0300, +0.0100] (3 of 5 seeds)" in report.html(runs, found)
