"""The figures of one shape: a record for each contender."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from simreg.bench import measure, problem
from simreg.bench.contenders import BARE, Contender, Step
from simreg.bench.memory import peak_extra_bytes
from simreg.bench.problem import Shape
from simreg.recipe.processes import warn


def measure_shape(
    shape: Shape,
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    memory: bool,
) -> list[dict[str, Any]]:
    """Time the contenders in turns, then measure the memory of each that could run.

    Returns:
        Of each contender, in their order, the fields of `shape` and ``name``, ``variant``;
        ``median_s`` and ``quartiles_s`` (first, third) over ``rounds``; ``over_bare``, the median
        over that of the bare products; ``peak_extra_bytes``; or, with None and 0 for these,
        ``skipped``: why it has no figures.
    """
    skipped = {c.title: reason for c in contenders if (reason := unfit(c, shape, device))}
    able = [c for c in contenders if c.title not in skipped]
    steps, failed = _prepared(able, shape, device)
    times = measure.time_in_turns(steps, device, rounds=rounds, seconds=seconds)
    skipped |= failed | times.failed
    bare = times.seconds.get(BARE)
    records = []
    for contender in contenders:
        taken = times.seconds.get(contender.title)
        record = {
            **asdict(shape),
            "name": contender.name,
            "variant": contender.variant,
            "median_s": None,
            "quartiles_s": None,
            "rounds": 0,
            "over_bare": None,
            "peak_extra_bytes": None,
            "skipped": skipped.get(contender.title),
        }
        if taken is not None:
            record |= _summary(taken, bare)
            record["peak_extra_bytes"] = _peak(contender, shape, device) if memory else None
        records.append(record)
    return records


def unfit(contender: Contender, shape: Shape, device: torch.device) -> str | None:
    """Why the contender is not run at this shape: missing here, or too large for what is free."""
    if contender.missing is not None:
        return contender.missing
    needed, free = contender.working(shape), measure.free_memory(device)
    if needed > free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None


def _prepared(
    contenders: Sequence[Contender], shape: Shape, device: torch.device
) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps by title, and why those that could not be built were not."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for contender in contenders:
        try:
            if not steps:
                inputs = problem.inputs(shape, device)
            steps[contender.title] = contender.prepare(*inputs, shape)
        except Exception as error:  # any: one contender must not cost the others their figures
            failed[contender.title] = measure.why(error)
    return steps, failed


def _summary(taken: list[float], bare: list[float] | None) -> dict[str, Any]:
    median = statistics.median(taken)
    return {
        "median_s": median,
        "quartiles_s": statistics.quantiles(taken, n=4, method="inclusive")[::2],
        "rounds": len(taken),
        "over_bare": median / statistics.median(bare) if bare else None,
    }


def _peak(contender: Contender, shape: Shape, device: torch.device) -> int | None:
    """None if it has none, or fails: the times, which are there, are worth having without it."""
    if contender.replayed:
        return None
    try:
        return peak_extra_bytes(contender, shape, device)
    except Exception as error:
        warn(f"no memory figure of {contender.title} at {shape}: {measure.why(error)}")
        return None
