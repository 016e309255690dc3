"""Several processes over gloo, that end in bounded time whatever happens."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 240.0  # seconds
ROOT = Path(__file__).parents[1]


def popen(command: list[str]) -> subprocess.Popen[bytes]:
    """A command with pipes for its output, buffered as for users."""
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment)


def spawn(
    worker: Callable[..., None],
    arguments: tuple[Any, ...],
    processes: int = 2,
    *,
    fresh: bool = False,
) -> None:
    """Run `worker(rank, *arguments)` in each process; raises what one of them raised.

    They are forked from a server that has imported what takes long, with the environment of its
    start. With `fresh` they start from nothing, in the environment as it is now.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed", "transformers.trainer"])
    method = "spawn" if fresh else "forkserver"
    context = mp.start_processes(
        worker, arguments, nprocs=processes, join=False, start_method=method
    )
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                raise TimeoutError(f"the processes did not end within {LIMIT:.0f} s")
    finally:
        for process in context.processes:
            process.kill()


def meet(rank: int, port: int, processes: int = 2) -> None:
    """Put into a worker's environment what torchrun would, for a trainer to read."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
    }


def leave() -> None:
    """End a worker that is done, without tearing down gloo, which may wait for ever."""
    dist.barrier()
    os._exit(0)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(
    *commands: list[str],
    environments: list[dict[str, str]] | None = None,
    limit: float = LIMIT,
    leader: bool = False,
) -> list[subprocess.CompletedProcess[str]]:
    """Run commands side by side in the repository, each with additions to the environment.

    TimeoutError, with what they wrote, if they do not all end within `limit` seconds; then they and
    all that they started are killed. With `leader`, the end of the first is the end of the others.
    """
    programs, outputs = [], []
    for command, extra in zip(commands, environments or [{}] * len(commands), strict=True):
        out, err = (tempfile.TemporaryFile("w+") for _ in "12")  # noqa: SIM115 (read at the end)
        outputs.append((out, err))
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra
        programs.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
        )
    end = time.monotonic() + limit
    late = []
    for program in programs:
        if leader and program is not programs[0]:
            program.kill()
        try:
            program.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(program.pid)
    for pid in late:
        _kill_tree(pid)
    texts = [[_content(file) for file in pair] for pair in outputs]
    if late:
        raise TimeoutError(f"not done within {limit:.0f} s: {commands}\n{texts}")
    return [
        subprocess.CompletedProcess(command, program.returncode, *text)
        for command, program, text in zip(commands, programs, texts, strict=True)
    ]


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            each.kill()


def _content(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()
