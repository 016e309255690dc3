"""Peak memory of a step beyond its inputs; on the CPU in a process of its own.

    python -m simreg.bench.memory NAME VARIANT SHAPE    # the CPU's, as `in_fresh_process` calls it

The allocator of the CPU does not say how much was in use, and memory that earlier steps freed
would hide what the next one takes: so there each figure is the growth of a fresh process.
"""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from simreg.bench import problem
from simreg.bench.contenders import Contender, contenders
from simreg.bench.measure import release, synchronize
from simreg.bench.problem import Shape

INTERVAL = 0.005
"""Seconds between samples of the resident memory, where the kernel keeps no peak."""
_WARM_UP_LENGTH = 600
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
"""For glibc: what is freed goes back to the system, and is seen when it is taken again."""


def peak_extra_bytes(contender: Contender, shape: Shape, device: torch.device) -> int:
    """Bytes at the peak of a step (gradient included) beyond those of the inputs.

    On CUDA what tensors took; on MPS what the driver gave; on the CPU the growth of resident memory
    of a fresh process. RuntimeError says why there is no figure.
    """
    if device.type == "cpu":
        return in_fresh_process(contender, shape)
    hidden, labels = problem.inputs(shape, device)
    step = contender.prepare(hidden, labels, shape)
    step()
    hidden.grad = None
    release(device)
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    before = torch.mps.driver_allocated_memory()
    step()
    synchronize(device)
    return torch.mps.driver_allocated_memory() - before


def in_fresh_process(contender: Contender, shape: Shape) -> int:
    """`growth` of a step on the CPU, in a process that did nothing before."""
    spec = json.dumps(dataclasses.asdict(shape))
    command = [sys.executable, "-m", "simreg.bench.memory", contender.name]
    try:
        run = subprocess.run(
            [*command, contender.variant or "out", spec],
            env={**_GIVE_BACK, **os.environ},
            capture_output=True,
            text=True,
        )
    except OSError as error:  # no memory for a process
        raise RuntimeError(str(error)) from None
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError("killed" if run.returncode < 0 else lines[-1])
    return int(run.stdout.split()[-1])  # what libraries print when they are imported is before it


def growth(step: Callable[[], Any]) -> int:
    """Bytes of resident memory that a step takes beyond what was there.

    On Linux the peak that the kernel keeps, elsewhere that of samples.
    """
    gc.collect()
    start = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    except OSError:
        return _sampled_peak(step) - start
    step()
    kept = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kept is not None
    return 1024 * int(kept[1]) - start


def _sampled_peak(step: Callable[[], Any]) -> int:
    process, done = psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss)


def main(name: str, variant: str, spec: str) -> None:
    """Print the growth of one contender's step."""
    device, shape = torch.device("cpu"), Shape(**json.loads(spec))
    contender = next(c for c in contenders(device, [variant]) if c.name == name)
    # A small step first, to load what is loaded once; a compiled one is made for its shape alone.
    small = dataclasses.replace(
        shape, batch=1, length=min(shape.length, _WARM_UP_LENGTH), chunk=None
    )
    if not contender.compiled:
        contender.prepare(*problem.inputs(small, device), small)()
    hidden, labels = problem.inputs(shape, device)
    step = contender.prepare(hidden, labels, shape)
    if contender.compiled:
        step()
        hidden.grad = None
    print(growth(step))


if __name__ == "__main__":
    main(*sys.argv[1:])
