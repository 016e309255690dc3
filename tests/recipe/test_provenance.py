"""What a number comes from is written with it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from simreg.recipe import provenance


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
