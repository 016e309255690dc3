"""What a number comes from is written with it."""

import json
import math
import os
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
