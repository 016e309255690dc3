"""Time of steps in turns, and how much memory is free."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

LEAST_ROUNDS = 3


@dataclass
class Times:
    """Seconds of each step by its key, and why the steps that failed did."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def time_in_turns(
    steps: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
) -> Times:
    """Times of `steps`, taken in rounds that run each of them once: a, b, c, then c, b, a, ...

    So whatever else the machine does falls on all alike, and each follows each neighbour equally
    often. The first round warms up (and compiles). A step that raises is left out from there on.

    Args:
        rounds: at most so many after the warm-up.
        seconds: no new round after so long, but `LEAST_ROUNDS` at least.
    """
    times = Times({key: [] for key in steps})
    began = time.perf_counter()
    for turn in range(rounds + 1):
        alive = [key for key in steps if key not in times.failed]
        for key in alive if turn % 2 == 0 else reversed(alive):
            try:
                taken = _timed(steps[key], device)
            except Exception as error:  # any: one contender must not cost the others their figures
                times.failed[key] = why(error)
                del times.seconds[key]
                release(device)
                continue
            if turn:
                times.seconds[key].append(taken)
        if turn == 0:
            began = time.perf_counter()
        elif turn >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
    return times


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def release(device: torch.device) -> None:
    """Give memory that the allocator caches back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def why(error: BaseException) -> str:
    """What went wrong, in a few words."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    first = next(itertools.chain(filter(None, map(str.strip, text.splitlines())), [""]))
    return f"{type(error).__name__}: {first}"[:200]
