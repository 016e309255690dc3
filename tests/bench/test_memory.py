"""What the peak of a step is taken to be; tests/kernels/test_blockwise.py does it for real."""

import dataclasses
import json
import platform
import subprocess
import threading
import time

import pytest
import torch

from simreg.bench import memory
from simreg.bench.contenders import BARE, Contender, contenders
from simreg.bench.problem import Shape

MIB = 2**20
CPU = torch.device("cpu")
NAIVE = contenders(CPU)[1]
SMALL = Shape(batch=2, length=64, dim=8, dtype="float32", chunk=32)


def test_growth_sees_what_a_step_takes_and_gives_back():
    def step():
        taken = torch.ones(64 * MIB // 4)
        del taken

    step()  # so that threads and code are there
    assert 60 * MIB < memory.growth(step) < 80 * MIB
    assert memory.growth(lambda: None) < 8 * MIB


def test_the_watch_ends_with_a_step_that_fails():
    before = threading.active_count()

    def fail():
        raise ValueError("so")

    with pytest.raises(ValueError, match="so"):
        memory._sampled_peak(fail)
    assert threading.active_count() == before


def test_the_process_is_told_what_to_run(monkeypatch, capsys):
    commands = []

    def fake(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="hello from a library\n4096\n")

    monkeypatch.setattr(subprocess, "run", fake)
    assert memory.peak_extra_bytes(NAIVE, SMALL, CPU) == 4096
    (command,) = commands
    assert command[1:3] == ["-m", "simreg.bench.memory"]
    monkeypatch.setattr(memory, "growth", lambda step: [step(), 77][1])
    shapes = []
    real = memory.problem.inputs
    monkeypatch.setattr(
        memory.problem,
        "inputs",
        lambda shape, device: [shapes.append(shape), real(shape, device)][1],
    )
    memory.main(*command[3:])
    assert capsys.readouterr().out == "77\n"
    assert shapes[-1] == SMALL
    memory.peak_extra_bytes(contenders(CPU)[0], SMALL, CPU)  # of no variant
    assert commands[-1][3:5] == [BARE, "out"]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_warmed_up_leaves_no_gradient_behind(monkeypatch, capsys, compiled):
    """Else the step that is measured would find the memory of its gradient there."""
    steps = []

    def prepare(hidden, labels, shape):
        def step():
            steps.append((shape, hidden.grad is None))
            hidden.grad = torch.zeros_like(hidden)

        return step

    made = Contender("made", prepare, lambda shape: 0, "in", compiled=compiled)
    monkeypatch.setattr(memory, "contenders", lambda device, variants: [made][: variants == ["in"]])
    monkeypatch.setattr(memory, "growth", lambda step: step() or 5)
    shape = Shape(batch=3, length=700, dim=2, dtype="float32", chunk=350)
    memory.main("made", "in", json.dumps(dataclasses.asdict(shape)))
    assert capsys.readouterr().out == "5\n"
    first = shape if compiled else Shape(batch=1, length=600, dim=2, dtype="float32")
    assert steps == [(first, True), (shape, True)]


@pytest.mark.parametrize(
    ("status", "stderr", "says"),
    [(-9, "", "killed"), (1, "Traceback\nMemoryError: x\n", "MemoryError: x"), (3, "", "status 3")],
)
def test_a_process_that_fails_says_why(monkeypatch, status, stderr, says):
    def fake(command, **options):
        return subprocess.CompletedProcess(command, status, stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", fake)
    with pytest.raises(RuntimeError, match=says):
        memory.peak_extra_bytes(NAIVE, SMALL, CPU)


def test_a_process_that_cannot_be_made_says_why(monkeypatch):
    def fake(command, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "run", fake)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        memory.peak_extra_bytes(NAIVE, SMALL, CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_what_a_warm_up_freed_does_not_hide_the_step():
    shape = Shape(batch=1, length=512, dim=16, dtype="float32")  # the warm-up is as large
    found = [memory.in_fresh_process(NAIVE, shape) for _ in range(2)]
    assert min(found) > 5 * 512**2 * 4
    assert found[1] == pytest.approx(found[0], abs=MIB)  # the kernel counts pages in batches


def test_samples_where_the_kernel_keeps_no_peak(monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(memory.Path, "write_text", refuse)

    def step():
        taken = torch.ones(64 * MIB // 4)
        time.sleep(0.1)  # long enough for a sample on a busy machine
        del taken

    step()
    assert 60 * MIB < memory.growth(step) < 80 * MIB
