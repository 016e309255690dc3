"""Pages: markers, the command, and those of this repository."""

import json
import re
import shutil
from pathlib import Path

import pytest

from simreg.recipe.errors import UserError
from simreg.study.tables import __main__ as command
from simreg.study.tables import document

ROOT = Path(__file__).parents[2]
RECORD = {
    "ratio": 1.25,
    "ratio_quartiles": [1.2, 1.3],
    "base_s": 0.4,
    "arm_s": 0.5,
    "n": 7,
    "machine": {"device": "cpu", "cpu": "A", "threads": 1},
    "config": {
        "model": {"preset": "m"},
        "data": {"seq_len": 8},
        "train": {"batch_rows": 2},
        "simreg": {"push": 3.5, "depths": [0.5]},
    },
}
ROW = "| m | A, 1 threads | 2 × 8 | 3.5 | 2 | 0.400 | 0.500 | 1.250 [1.200, 1.300] | 7 |"
MARKED = "<!-- table: step b/r.json -->\n<!-- /table -->\n"


@pytest.fixture
def page(tmp_path):
    """`write(text)`: a page in docs/ of a checkout that has a record b/r.json."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/r.json").write_text(json.dumps(RECORD))

    def write(text, name="page.md"):
        path = tmp_path / "docs" / name
        path.write_text(text)
        return path

    return write


def test_the_documents_of_this_repository_are_up_to_date(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr()
    tabled = [
        str(page.relative_to(ROOT))
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
        if re.search(r"^<!-- table: ", page.read_text(), re.MULTILINE)
    ]
    assert sorted(tabled) == sorted(command.PAGES)
    for page in ("README.md", "docs/results.md"):
        first = r"\n<!-- table: headline docs/results/headline-bias/results.json"
        assert re.search(first, (ROOT / page).read_text())


def test_a_changed_record_makes_a_document_of_this_repository_stale(tmp_path, capsys):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in re.findall(r"docs/results/\S+/results\.json", (ROOT / "README.md").read_text()):
        record = tmp_path / name
        record.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, record)
    record = tmp_path / "docs/results/headline-bias/results.json"
    found = json.loads(record.read_text())
    assert command.main(["--check", str(tmp_path / "README.md")]) == 0
    found["isoloss"]["depths-previous"]["tokens_saved"]["mean"] += 0.01
    record.write_text(json.dumps(found))
    assert command.main(["--check", str(tmp_path / "README.md")]) == 1
    assert "README.md" in capsys.readouterr().out


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_is_no_table_stays_to_the_byte(page, newline):
    path = page("")
    for end in ("", "\n\n"):
        text = f"one\u2028two\x0cthree\x85\n{MARKED}last{end}".replace("\n", newline)
        path.write_bytes(text.encode())
        drawn = document.redraw(path).text
        assert ROW in drawn.split(newline)
        start, rest = drawn.split("<!-- table")
        kept = [start, rest.split("/table -->")[1]]
        assert kept == [text.split("<!-- table")[0], text.split("/table -->")[1]]
        assert drawn.count("\n") == drawn.count(newline)


def test_tables_are_drawn_between_markers_and_nothing_else_is_touched(page):
    path = page(f"# Head\nbefore\n{MARKED}\nbetween | words\n{MARKED}after\n")
    assert command.main([str(path)]) == 0
    text = path.read_text()
    assert text.count(ROW) == 2
    pieces = text.replace("<!-- /table -->", "<!-- table: step b/r.json -->").split(
        "<!-- table: step b/r.json -->"
    )
    assert [pieces[i] for i in (0, 2, 4)] == [
        "# Head\nbefore\n",
        "\n\nbetween | words\n",
        "\nafter\n",
    ]
    # A table needs a blank line on both sides, or the comment becomes a part of it.
    assert pieces[1].startswith("\n\n| model |")
    assert pieces[1].endswith(" 7 |\n\n")


def test_drawing_again_changes_nothing(page, capsys):
    path = page(MARKED)
    command.main([str(path)])
    once, before = path.read_text(), path.stat().st_mtime_ns
    capsys.readouterr()
    assert command.main([str(path)]) == 0
    assert (path.read_text(), path.stat().st_mtime_ns) == (once, before)
    assert capsys.readouterr().out == ""


def test_a_check_names_what_is_stale_and_changes_nothing(page, capsys):
    fresh = page(MARKED, "fresh.md")
    command.main([str(fresh)])
    stale = page("\n" + fresh.read_text().replace("1.250", "1.251"), "stale.md")
    before = stale.read_text()
    capsys.readouterr()
    assert command.main(["--check", str(fresh), str(stale)]) == 1
    assert capsys.readouterr().out == f"{stale}:2: table step b/r.json is stale\n"
    assert stale.read_text() == before
    assert command.main([str(stale)]) == 0
    assert stale.read_text() == "\n" + fresh.read_text()
    assert command.main(["--check", str(fresh), str(stale)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: stop b/r.json -->\n<!-- /table -->\n", ":1: unknown kind 'stop': one of "),
        ("<!-- table: step b/no.json -->\n<!-- /table -->\n", ":1: b/no.json does not exist"),
        ("\n<!-- table: step b/r.json -->\ntext\n", ":2: no `<!-- /table -->` before the next"),
        ("<!-- table: step b/r.json -->\n" + MARKED, ":1: no `<!-- /table -->` before the next"),
        ("<!-- /table -->\n", ":1: expected `<!-- table: KIND PATH ... -->`"),
        ("<!-- table: step b/r.json\n-->\n<!-- /table -->\n", ":1: expected `<!-- table: KIND"),
        ("<!-- table: step b/r.json --> x\n<!-- /table -->\n", ":1: expected `<!-- table: KIND"),
        ("<!-- tables: step b/r.json -->\n", ":1: expected `<!-- table: KIND"),
        ("<!-- table: step -->\n<!-- /table -->\n", ":1: step takes the paths of JSON files"),
        (
            "<!-- table: loss b/r.json b/r.json -->\n<!-- /table -->\n",
            ":1: loss takes one of the paths of JSON files",
        ),
        (
            "<!-- table: step b/r.json top=3 -->\n<!-- /table -->\n",
            ":1: step has no option 'top' (options: none)",
        ),
        (
            "<!-- table: ranking b/r.json -->\n<!-- /table -->\n",
            ":1: b/r.json is not what this kind is drawn from: it lacks 'study'",
        ),
        ("<!-- table: step b -->\n<!-- /table -->\n", ":1: cannot read b: "),
        ("<!-- table: step 'b -->\n<!-- /table -->\n", ":1: cannot read the marker: "),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(page, capsys, text, message):
    good, bad = page(MARKED, "good.md"), page(text, "bad.md")
    for flags in ([], ["--check"]):
        assert command.main([*flags, str(good), str(bad)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {bad}{message}")
        assert (good.read_text(), bad.read_text()) == (MARKED, text)


def test_a_page_that_is_not_there(tmp_path, capsys):
    assert command.main([str(tmp_path / "no.md")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path / 'no.md'}: ")


def test_a_damaged_record_is_told(page):
    path = page(MARKED)
    (path.parents[1] / "b/r.json").write_text("{")
    with pytest.raises(UserError, match=r"page.md:1: cannot read b/r.json: "):
        document.redraw(path)


def test_a_record_that_is_a_list_is_told(page):
    path = page(MARKED)
    (path.parents[1] / "b/r.json").write_text("[]")
    with pytest.raises(UserError, match="it lacks 'ratio'"):
        document.redraw(path)


def test_markers_shown_as_code_are_left_alone(page):
    text = "    <!-- table: step b/no.json -->\n"
    assert document.redraw(page(text)) == document.Page(text, [])
