"""What is left for a GPU: its commands exist, and say at once where there is none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUEUE = (ROOT / "benchmarks" / "gpu_queue.md").read_text(encoding="utf-8")
SCRIPTS = sorted((ROOT / "benchmarks" / "gpu").glob("*.sh"))


STAND_IN = f"""#!/bin/sh
case "$1$2" in
  -) ;; # is there a GPU?
  -mpytest) shift 2; exec {sys.executable} -m pytest --collect-only "$@" ;;
  *) exit 1 ;;
esac
"""
"""A `python` for which there is a GPU, and which names tests instead of running them."""


def shell(*command: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{first or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


def test_what_the_queue_names_exists():
    named = re.findall(r"(?:benchmarks|studies)/[\w./-]+\.(?:sh|yaml)", QUEUE)
    assert len(set(named)) > 10
    assert not [path for path in named if not (ROOT / path).is_file()]
    measures = set(re.findall(r"measure\.sh ([\w-]+)", QUEUE)) | {"fuzz-blockwise", "variants"}
    script = (ROOT / "benchmarks/gpu/measure.sh").read_text(encoding="utf-8")
    cases = {
        name for line in re.findall(r"^  ([\w| -]+)\)", script, re.M) for name in line.split(" | ")
    }
    assert measures <= cases


def test_scales_of_the_queue_are_in_their_studies():
    named = re.findall(r"studies/([\w-]+)\.yaml`? --scale (\w+)", QUEUE)
    assert named
    for study, scale in named:
        assert f"\n  {scale}:" in (ROOT / "studies" / f"{study}.yaml").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_without_a_gpu_a_script_says_so(script):
    assert shell("bash", "-n", str(script)).returncode == 0
    done = shell(str(script), "tune")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "no CUDA GPU: torch.cuda.is_available() is False\n"


def test_the_tests_that_scripts_name_are_there(tmp_path):
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    done = shell("benchmarks/gpu/tests.sh", first=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check, *_, everything = re.findall(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.M)
    assert int(check) == 2 + 6
    assert int(everything) > 100
