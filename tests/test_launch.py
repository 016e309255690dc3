"""The commands of docs/distributed.md, with two processes on the CPU."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from simreg.recipe.config import RunConfig, to_yaml
from simreg.recipe.train import train
from tests.processes import ROOT, free_port, launch
from tests.recipe import tiny

SCRIPT = "examples/transformers_trainer.py"
ABORT = "terminate called without an active exception"
"""Of gloo's threads, now and then, as a process exits that has done its work (pytorch#179291)."""
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch"],
}
PAGE = (ROOT / "docs/distributed.md").read_text()
COMMANDS = re.findall(r"^ {4}((?:torchrun|accelerate launch) .*)$", PAGE, re.MULTILINE)


def localised(command: str, config: Path) -> list[list[str]]:
    """The command of each machine, for one process a machine on this one."""
    two = "HOST" in command
    port = str(free_port())
    command = command.replace("HOST", "127.0.0.1").replace("29500", port)
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 1")
    command = command.replace("--num_processes 16", "--num_processes 2")
    command = command.replace("run.yaml", str(config))
    if command.startswith("accelerate") and not two:  # else two tests may meet on its usual port
        command = command.replace("launch ", f"launch --main_process_port {port} ")
    name = next(name for name in LAUNCHERS if command.startswith(name))
    rest = command.removeprefix(name)
    return [
        LAUNCHERS[name] + shlex.split(rest.replace("RANK", str(rank))) for rank in range(1 + two)
    ]


def run(command: str, config: Path) -> list[str]:
    """Run the command as printed, on each machine; returns what the machines wrote."""
    done = launch(*localised(command, config), limit=120)
    finished = any('{"loss"' in d.stdout for d in done)
    if SCRIPT in command and finished and any(ABORT in d.stderr for d in done if d.returncode):
        done = launch(*localised(command, config), limit=120)  # once
    failed = [f"exit status {d.returncode}:\n{d.stderr}" for d in done if d.returncode]
    assert not failed, "\n".join(failed)  # a text, which pytest shows whole
    return [d.stdout for d in done]


def make(folder: Path, text: Path) -> RunConfig:
    changes = {"model": {"preset": "llama-tiny"}, "data": {"cache_dir": str(folder / "cache")}}
    return tiny.config(folder, text, changes)


def files(folder: Path) -> set[str]:
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return {re.sub(r"rng_state(_\d)?\.pth", "rng_state", name) for name in names}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, text: Path) -> RunConfig:
    """The run of one process."""
    config = make(tmp_path_factory.mktemp("one"), text)
    train(config)
    return config


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What the example writes in one process."""
    [done] = launch([sys.executable, SCRIPT], limit=120)
    return last_line(done.stdout)


def last_line(output: str) -> dict[str, Any]:
    [line] = [line for line in output.splitlines() if line.startswith('{"loss"')]
    record: dict[str, Any] = json.loads(line)
    return record


def test_the_page_has_all_commands() -> None:
    assert len(COMMANDS) == len(set(COMMANDS)) == 6


@pytest.mark.parametrize("command", [c for c in COMMANDS if "simreg.cli" in c])
def test_simreg_train(tmp_path: Path, text: Path, one: RunConfig, command: str) -> None:
    config = make(tmp_path, text)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    said = "".join(run(command, file)).splitlines()
    # One process speaks, with as many lines as one alone.
    assert "cpu × 2 fp32" in said[0]
    assert len(said) == 2 + len(tiny.metrics(one.out)) + 1
    for expected, actual in zip(tiny.metrics(one.out), tiny.metrics(config.out), strict=True):
        assert expected.pop("kind") == actual.pop("kind")
        assert actual == pytest.approx(expected, rel=2e-4, abs=1e-6)
    whole, shared = (Path(c.out) for c in (one, config))
    assert files(shared) == files(whole)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, shared)]
    assert [r.pop("processes") for r in results] == [1, 2]
    ce = [r.pop("final_ce") for r in results]
    assert ce[0] == pytest.approx(ce[1], abs=1e-5)
    for result in results:
        del result["seconds"], result["machine"]
    assert results[0] == results[1]
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list((tmp_path / "cache/tokens").glob("*/entry.json"))) == 1


@pytest.mark.parametrize("command", [c for c in COMMANDS if SCRIPT in c])
def test_script(tmp_path: Path, script: dict[str, Any], command: str) -> None:
    actual = last_line("".join(run(command, tmp_path / "unused")))
    assert actual == pytest.approx(script | {"processes": 2}, rel=1e-4)
