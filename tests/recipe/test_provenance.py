"""What a number comes from is written with it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simreg.recipe import provenance, timing


def test_a_script_writes_what_made_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", "--set", "a b"])
    out = provenance.check_writable(tmp_path / "new" / "record.json")
    assert list(out.parent.iterdir()) == []
    provenance.write(out, {"what": "a ratio", "ratio": 1.5})
    record = json.loads(out.read_text())
    assert (record["what"], record["ratio"]) == ("a ratio", 1.5)
    assert record["command"] == "python benchmarks/step.py --set 'a b'"
    assert record["machine"]["cpus"] == os.cpu_count()
    assert record["versions"]["torch"] == torch.__version__
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # before anything is measured
        provenance.check_writable(tmp_path / "file" / "record.json")


@pytest.mark.parametrize("ran_before", [0.0, 2.0, 9.0])
def test_the_load_of_a_timing_is_not_that_of_what_ran_before(ran_before: float) -> None:
    for seconds, load in ((40, 2.0), (120, 2.0), (120, 5.0)):
        kept = math.exp(-seconds / 60)
        after = kept * ran_before + (1 - kept) * load
        assert timing.load_during(seconds, ran_before, after) == pytest.approx(load)
    assert timing.load_during(1, ran_before, 3.0) == 3.0
    assert timing.load_during(60, 9.0, 0.1) == 0.0


def test_the_fingerprint_of_a_model_is_of_all_that_it_consists_of(tmp_path: Path) -> None:
    names = ["a.json", "b.safetensors", "c.txt", "d.bin", "e.model", "f.jinja"]

    def found(changes: dict[str, str]) -> str:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        for name, text in (dict.fromkeys(names, "xx") | changes).items():
            (folder / name).write_text(text)
        return provenance.fingerprint(folder)

    whole = found({})
    assert found({"notes.md": "of a person"}) == whole
    changed = [found({name: "xy"}) for name in names]
    moved = found({"a.json": "x", "b.safetensors": "xxx"})
    assert len({whole, moved, *changed}) == len(names) + 2


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_told_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
        return subprocess.run(
            ["git", *own, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    file = tmp_path / "src" / "simreg" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1\n")
    monkeypatch.setattr(provenance.simreg, "__file__", str(file))
    installed = provenance.commit()  # no checkout: its code tells
    assert re.fullmatch(r"files-[0-9a-f]{12}", str(installed))
    file.write_text("a = 3\n")
    assert provenance.commit() != installed
    file.write_text("a = 1\n")
    assert provenance.commit() == installed
    for arguments in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*arguments)
    known, index = git("rev-parse", "--short=12", "HEAD"), tmp_path / ".git" / "index"
    os.utime(file, (1, 1))  # as a lock would be taken to note
    before = index.stat().st_mtime_ns
    assert provenance.commit() == known
    assert index.stat().st_mtime_ns == before
    git("tag", "-a", "v1", "-m", "first")  # after which `describe` tells no commit
    assert provenance.commit() == known
    (tmp_path / "untracked").touch()
    assert provenance.commit() == known
    file.write_text("a = 2\n")
    assert provenance.commit() == f"{known}-dirty"
