"""What is left for a GPU: its commands exist, and say at once where there is none."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import tyro

from benchmarks import step, tune
from simreg.bench import run
from simreg.recipe import config
from simreg.recipe.values import parse_assignments

ROOT = Path(__file__).parents[2]
QUEUE = (ROOT / "benchmarks" / "gpu_queue.md").read_text(encoding="utf-8")
SCRIPTS = sorted((ROOT / "benchmarks" / "gpu").glob("*.sh"))


STAND_IN = f"""#!/bin/sh
case "$1$2" in
  -) ;; # is there a GPU?
  -mpytest) shift 2; [ -n "$RECORD" ] || exec {sys.executable} -m pytest --collect-only "$@" ;;
  -c*) exit 1 ;;
  *) for word; do printf "'%s' " "$word"; done >> "$RECORD"; echo >> "$RECORD" ;;
esac
"""
"""A `python` for which there is a GPU; names tests instead of running them, records the rest."""


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def shell(*command: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{first or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_each_benchmark_begins(script):
    importlib.import_module(f"benchmarks.{script.stem}")


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


BUSY = """#!/bin/sh
[ "$1" = - ] || [ "$2" = pytest ] && exit 0
trap 'echo saved >> "$RECORD"; exit 130' TERM
echo begun >> "$RECORD"
while :; do sleep 0.1; done
"""
"""A `python` that trains until it is told to stop, by TERM alone."""


@pytest.mark.parametrize("to", [os.killpg, os.kill], ids=["Ctrl-C", "to the script"])
def test_a_study_that_is_interrupted_leaves_no_process(stand_in, to):
    (stand_in / "python").write_text(BUSY)
    record = stand_in / "record"
    own = {"PATH": f"{stand_in}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record)}
    script = subprocess.Popen(
        ["benchmarks/gpu/study.sh", "any.yaml"],
        cwd=ROOT,
        env={**os.environ, **own, "JOBS": "1"},
        start_new_session=True,
        # A shell can't trap what it was started to ignore, as in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 60
        while not record.exists() and time.monotonic() < until:
            time.sleep(0.05)
        to(script.pid, signal.SIGINT)
        assert script.wait(60) == 130
        assert record.read_text().split() == ["begun", "saved"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


def test_a_measurement_that_is_none_is_refused_before_any_check():
    for arguments in ([], ["nope"], ["loss variants"]):
        done = shell("benchmarks/gpu/measure.sh", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("expected one of: captured loss ")


def test_the_tests_that_scripts_name_are_there(stand_in, monkeypatch):
    monkeypatch.delenv("RECORD", raising=False)
    done = shell("benchmarks/gpu/tests.sh", first=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    check, *_, everything = re.findall(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.M)
    assert int(check) == 3 + 6
    assert int(everything) > 100


@pytest.mark.parametrize(
    "what",
    ["captured", "loss", "variants", "chunks", "long", "rows", "step", "fuzz-blockwise", "tune"],
)
def test_what_a_measurement_calls_can_be_called(what, stand_in, monkeypatch):
    monkeypatch.setenv("RECORD", str(stand_in / "calls"))
    done = shell("benchmarks/gpu/measure.sh", what, first=stand_in)
    assert done.returncode == 0, done.stderr
    calls = [shlex.split(line) for line in (stand_in / "calls").read_text().splitlines()]
    assert len(calls) == (3 if what == "step" else 1)
    cpu = torch.device("cpu")
    for program, *arguments in calls:
        if program == "-m":
            assert arguments[:2] == ["simreg.cli", "bench"]
            options = tyro.cli(run.BenchOptions, args=arguments[2:])
            assert run._grid(options, cpu)
            assert len(run._chosen(options, cpu)) > 1
        elif program == "benchmarks/step.py":
            options = tyro.cli(step.Options, args=arguments)
            found = config.from_dict(parse_assignments(options.set, "--set"))
            assert found.model.preset in ("llama-130m", "llama-1b")
        elif program == "benchmarks/tune.py":
            assert tyro.cli(tune.Options, args=arguments).jobs > 1
        else:
            assert [program, *arguments[:2]] == ["benchmarks/fuzz.py", "blockwise", "--jobs"]
