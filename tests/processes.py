"""Several processes over gloo, that end in bounded time whatever happens."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 240.0  # seconds


def spawn(worker: Callable[..., None], arguments: tuple[Any, ...], processes: int = 2) -> None:
    """Run `worker(rank, *arguments)` in each process; raises what one of them raised."""
    context = mp.spawn(worker, arguments, nprocs=processes, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                raise TimeoutError(f"the processes did not end within {LIMIT:.0f} s")
    finally:
        for process in context.processes:
            process.kill()


def leave() -> None:
    """End a worker that is done, without tearing down gloo, which may wait for ever."""
    dist.barrier()
    os._exit(0)
