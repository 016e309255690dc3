"""Tile sizes of the Triton kernels, tried on the GPU at hand: what `simreg.kernels.triton.blocks`
should say for it.

    python benchmarks/tune.py                     # the shapes of benchmarks/gpu_queue.md
    python benchmarks/tune.py --shapes 4096x2048

Prints the time of every choice, forward and backward, fastest last, and what the default is.
"""

import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from simreg.bench import problem
from simreg.bench.contenders import contenders
from simreg.bench.measure import time_in_turns
from simreg.kernels import triton
from simreg.kernels.triton import Blocks
from simreg.recipe import provenance

CUDA = torch.device("cuda")


@dataclass
class Options:
    """Try tile sizes."""

    shapes: list[str] = field(default_factory=lambda: ["2048x768", "4096x2048", "8192x4096"])
    """LENGTHxDIM."""
    tokens: int = 65_536
    """Of a batch."""
    dtype: str = "bfloat16"
    rounds: int = 5
    seconds: float = 60.0
    """No new round for a shape after so long."""
    out: Path = Path(__file__).parent / "results" / "tune-cuda.json"


def candidates() -> list[Blocks]:
    choices = itertools.product((128,), (32, 64), (128, 256), (4, 8), (3, 4))
    return [Blocks(*choice) for choice in choices]


def step(shape: problem.Shape, chosen: Blocks) -> Callable[[], object]:
    triton_step = next(c for c in contenders(CUDA) if c.name == "triton").prepare
    run = triton_step(*problem.inputs(shape, CUDA), shape)

    def with_blocks() -> None:
        triton.blocks = lambda dtype, device: chosen
        run()

    return with_blocks


def main(options: Options) -> None:
    default = triton.blocks(getattr(torch, options.dtype), CUDA)
    records = []
    for shape in problem.shapes(options.shapes, options.tokens, [options.dtype], [None]):
        steps = {str(chosen): step(shape, chosen) for chosen in candidates()}
        times = time_in_turns(steps, CUDA, rounds=options.rounds, seconds=options.seconds)
        medians = {name: statistics.median(taken) for name, taken in times.seconds.items()}
        print(f"\n{shape}; default {default}")
        for name in sorted(medians, key=medians.get, reverse=True):
            print(f"  {1e3 * medians[name]:8.2f} ms  {name}")
        records.append({"shape": str(shape), "median_s": medians, "failed": times.failed})
    results = {
        "default": default._asdict(),
        "records": records,
        "command": shlex.join(["python", *sys.argv]),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
