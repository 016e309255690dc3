"""The record of the loss on a CPU: `simreg bench` in every variant, and memory at a long row.

python benchmarks/loss.py            # the CPU's figures, to benchmarks/results/loss-cpu.json
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from simreg.bench import run
from simreg.bench.contenders import contenders
from simreg.bench.memory import peak_extra_bytes
from simreg.bench.problem import Shape
from simreg.loss import VARIANTS

SHAPES = ["16x256x128", "4x1024x512", "1x4096x512"]
MEMORY_SHAPE = Shape(batch=1, length=16_384, dim=512, dtype="float32")
MEASURED = "blockwise"


@dataclass
class Options:
    """Record the CPU's figures of the loss."""

    rounds: int = 15
    """Measurements of each contender, at most."""
    seconds: float = 60.0
    """No new round for a shape after so long."""
    out: Path = Path(__file__).parent / "results" / "loss-cpu.json"
    """The JSON file; the figure goes beside it."""


def memory() -> int:
    """Peak bytes beyond the inputs of a step of the loss at MEMORY_SHAPE."""
    cpu = torch.device("cpu")
    loss = next(c for c in contenders(cpu) if c.name == MEASURED)
    return peak_extra_bytes(loss, MEMORY_SHAPE, cpu)


def main(options: Options) -> None:
    run.check_writable(options.out)
    console = Console(highlight=False)
    extra = memory()
    grid = run.BenchOptions(
        shapes=SHAPES,
        variants=list(VARIANTS),
        device="cpu",
        rounds=options.rounds,
        seconds=options.seconds,
    )
    results = run.bench(grid, console, command=shlex.join(["python", *sys.argv]))
    results["memory"] = {
        "length": MEMORY_SHAPE.length,
        "dim": MEMORY_SHAPE.dim,
        "batch": MEMORY_SHAPE.batch,
        "name": MEASURED,
        "peak_extra_bytes": extra,
    }
    naive = 4 * MEMORY_SHAPE.batch * MEMORY_SHAPE.length**2 * 4
    console.print(f"{MEMORY_SHAPE}: {extra / 2**20:.0f} MiB extra,")
    console.print(f"against {naive / 2**30:.0f} GiB for four L×L float32 matrices")
    run.write(results, options.out)
    console.print(f"written to {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
