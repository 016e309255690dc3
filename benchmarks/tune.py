"""Tile sizes of the Triton kernels, tried on the GPU at hand: what `simreg.kernels.triton.blocks`
should say for it.

    python benchmarks/tune.py                     # the shapes of benchmarks/gpu_queue.md
    python benchmarks/tune.py --shapes 4096x2048

Prints forward and backward of every choice, fastest last, and what the default is.
"""

import itertools
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from simreg import simreg_loss
from simreg.bench import problem
from simreg.kernels import triton
from simreg.kernels.triton import Blocks
from simreg.recipe import provenance


@dataclass
class Options:
    """Try tile sizes."""

    shapes: list[str] = field(default_factory=lambda: ["2048x768", "4096x2048", "8192x4096"])
    """LENGTHxDIM."""
    tokens: int = 65_536
    """Of a batch."""
    dtype: str = "bfloat16"
    rounds: int = 5
    out: Path = Path(__file__).parent / "results" / "tune-cuda.json"


def candidates() -> list[Blocks]:
    choices = itertools.product((128,), (32, 64), (128, 256), (4, 8), (3, 4))
    return [Blocks(*choice) for choice in choices]


def milliseconds(step, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[rounds // 2]


def measure(shape: problem.Shape, chosen: Blocks, rounds: int) -> dict[str, float]:
    triton.blocks = lambda dtype, device: chosen
    hidden, labels = problem.inputs(shape, torch.device("cuda"))

    def loss():
        return simreg_loss(hidden, labels, backend="triton")

    value = loss()
    return {
        "forward_ms": milliseconds(loss, rounds),
        "backward_ms": milliseconds(lambda: value.backward(retain_graph=True), rounds),
    }


def main(options: Options) -> None:
    default = triton.blocks(getattr(torch, options.dtype), torch.device("cuda"))
    records = []
    for shape in problem.shapes(options.shapes, options.tokens, [options.dtype], [None]):
        found = []
        for chosen in candidates():
            try:
                found.append((chosen, measure(shape, chosen, options.rounds)))
            except Exception as error:  # too much shared memory, say: one choice less
                print(f"{chosen}: {str(error).splitlines()[0]}")
        print(f"\n{shape}; default {default}")
        for chosen, times in sorted(found, key=lambda item: -sum(item[1].values())):
            print(f"  {sum(times.values()):8.2f} ms  {times}  {chosen}")
            records.append({"shape": str(shape), **chosen._asdict(), **times})
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
