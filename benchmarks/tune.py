"""Tile sizes of the Triton kernels, tried on the GPU at hand: what `simreg.kernels.triton.blocks`
should say for it.

    python benchmarks/tune.py                     # three shapes, from llama-130m's to wide ones
    python benchmarks/tune.py --shapes 4096x2048

Compiles the choices in several processes, then prints the time of each: forward and backward, and
what each kernel takes of it; fastest last.
"""

import itertools
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from simreg.bench import problem
from simreg.bench.contenders import contenders
from simreg.bench.measure import time_in_turns
from simreg.bench.problem import Shape
from simreg.kernels import triton
from simreg.kernels.triton import Blocks
from simreg.recipe import provenance

CUDA = torch.device("cuda")
KERNELS = ("find_runs", "inverses", "sums", "merge", "gradients", "apply")
PROFILED = 3


@dataclass
class Options:
    """Try tile sizes."""

    shapes: list[str] = field(default_factory=lambda: ["2048x768", "4096x2048", "8192x4096"])
    """LENGTHxDIM."""
    tokens: int = 65_536
    """Of a batch."""
    dtype: str = "bfloat16"
    rounds: int = 5
    seconds: float = 20.0
    """No new round for a shape after so long."""
    jobs: int = min(12, os.cpu_count() or 1)
    """Processes that compile."""
    out: Path = Path(__file__).parent / "results" / "tune-cuda.json"


def candidates(default: Blocks) -> Iterator[Blocks]:
    """The default; tiles of S, with the rest as it is; tiles of dH, likewise."""
    yield default
    for depth, warps, stages in itertools.product((32, 64), (4, 8), (2, 3, 4, 5)):
        yield default._replace(depth=depth, warps=warps, stages=stages)
    yield default._replace(tile=64, depth=64, warps=4, stages=3)
    for wide, step, warps, stages in itertools.product((128, 256), (32, 64), (4, 8), (4, 6, 8)):
        if wide == 128 or warps == 8:  # else the registers do not suffice
            yield default._replace(wide=wide, step=step, wide_warps=warps, wide_stages=stages)


def steps(shape: Shape, choices: list[Blocks]) -> dict[str, Callable[[], object]]:
    """A step of each, all of the same inputs."""
    triton_step = next(c for c in contenders(CUDA) if c.name == "triton").prepare
    run = triton_step(*problem.inputs(shape, CUDA), shape)

    def with_blocks(chosen: Blocks) -> None:
        triton.blocks = lambda dtype, device: chosen
        run()

    return {str(chosen): partial(with_blocks, chosen) for chosen in choices}


def compiled(chosen: Blocks, dims: list[int], dtype: str) -> str | None:
    """Leave the kernels in Triton's cache; why they do not compile, if so."""
    try:
        for dim in dims:
            for run in steps(Shape(2, 512, dim, dtype), [chosen]).values():
                run()
        torch.cuda.synchronize()
    except Exception as error:  # any: of one choice
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return None


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Mean seconds of each kernel in a step, from the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        name = event.key if event.key in KERNELS else "other"
        found[name] += event.self_device_time_total / 1e6 / PROFILED
    return dict(found)


def main(options: Options) -> None:
    provenance.check_writable(options.out)
    default = triton.blocks(getattr(torch, options.dtype), CUDA)
    shapes = problem.shapes(options.shapes, options.tokens, [options.dtype], [None])
    choices = list(dict.fromkeys(candidates(default)))
    compile_ = partial(compiled, dims=[shape.dim for shape in shapes], dtype=options.dtype)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        reasons = list(pool.map(compile_, choices))
    failed = {str(c): why for c, why in zip(choices, reasons, strict=True) if why}
    working = [c for c, why in zip(choices, reasons, strict=True) if not why]
    records = []
    for shape in shapes:
        runs = steps(shape, working)
        times = time_in_turns(runs, CUDA, rounds=options.rounds, seconds=options.seconds)
        medians = {name: statistics.median(taken) for name, taken in times.seconds.items()}
        kernels = {name: kernel_seconds(runs[name]) for name in medians}
        print(f"\n{shape}; default {default}")
        for name in sorted(medians, key=lambda name: -medians[name]):
            parts = (f"{k} {1e3 * kernels[name].get(k, 0):.2f}" for k in (*KERNELS, "other"))
            print(f"  {1e3 * medians[name]:8.2f} ms  {name}  {', '.join(parts)}")
        record = {"shape": str(shape), "median_s": medians, "kernel_s": kernels}
        records.append(record | {"failed": times.failed | failed})
        provenance.write(options.out, {"default": default._asdict(), "records": records})


if __name__ == "__main__":
    main(tyro.cli(Options))
