"""Time and peak memory of the loss, forward and backward, beside bare matrix products.

    python benchmarks/loss.py            # the CPU's figures, to benchmarks/results/loss-cpu.json

"Bare" is the 6·L²·d operations of the textbook loss (S forward, S again and G·E backward) as plain
`torch.matmul`. Variants are timed in turns, so that what else the machine does falls on all alike.
"""

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from simreg import simreg_loss
from simreg.loss import VARIANTS
from simreg.recipe import provenance

RESULTS = Path(__file__).parent / "results"
SHAPES = [(16, 256, 128), (4, 1024, 512), (1, 4096, 512)]
MEMORY_SHAPE = (1, 16_384, 512)


def problem(batch: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Random embeddings, and labels with the long-tailed frequencies of text."""
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, dim, requires_grad=True)
    frequency = 1 / torch.arange(1, 32_001)
    labels = torch.multinomial(frequency, batch * length, replacement=True).view(batch, length)
    return hidden, labels


def loss_step(hidden: Tensor, labels: Tensor, **options: str) -> Callable[[], None]:
    def step() -> None:
        hidden.grad = None
        simreg_loss(hidden, labels, **options).backward()

    return step


def bare_step(hidden: Tensor) -> Callable[[], None]:
    e = hidden.detach()

    def step() -> None:
        for row in e:
            s = row @ row.T
            s = row @ row.T
            s @ row

    return step


def contenders(hidden: Tensor, labels: Tensor) -> dict[str, Callable[[], None]]:
    steps = {"bare matmuls": bare_step(hidden)}
    for variant in VARIANTS:
        steps[f"blockwise {variant}"] = loss_step(hidden, labels, variant=variant)
    steps["reference out"] = loss_step(hidden, labels, backend="reference")
    return steps


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if k:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    return times


def peak_extra(step: Callable[[], None]) -> int:
    """Bytes of resident memory that a step takes beyond what was there, sampled every 5 ms."""
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return peak - start


def memory() -> int:
    """Peak extra bytes of a step at MEMORY_SHAPE; right only before much else was allocated."""
    hidden, labels = problem(*MEMORY_SHAPE)
    loss_step(hidden[:, :600].detach().requires_grad_(), labels[:, :600])()  # load what loads once
    return peak_extra(loss_step(hidden, labels))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "loss-cpu.json")
    options = parser.parse_args()

    extra = memory()
    timings = []
    for batch, length, dim in SHAPES:
        times = time_in_turns(contenders(*problem(batch, length, dim)), options.rounds)
        bare = statistics.median(times["bare matmuls"])
        print(f"\nbatch {batch}, L {length}, d {dim}")
        for name, values in times.items():
            median = statistics.median(values)
            low, high = statistics.quantiles(values, n=4)[::2]
            print(f"  {name:<20}{1e3 * median:8.1f} ms  {median / bare:5.2f} × bare")
            timings.append(
                {
                    "batch": batch,
                    "length": length,
                    "dim": dim,
                    "name": name,
                    "median_s": median,
                    "quartiles_s": [low, high],
                    "over_bare": median / bare,
                }
            )
    naive = 4 * MEMORY_SHAPE[0] * MEMORY_SHAPE[1] ** 2 * 4
    print(f"\nbatch 1, L {MEMORY_SHAPE[1]}, d {MEMORY_SHAPE[2]}: {extra / 2**20:.0f} MiB extra,")
    print(f"against over {naive / 2**30:.0f} GiB for four L×L float32 matrices")
    results = {
        "what": "forward + backward of simreg_loss, float32, medians of interleaved rounds",
        "rounds": options.rounds,
        "timings": timings,
        "memory": {"shape": MEMORY_SHAPE, "name": "blockwise out", "peak_extra_bytes": extra},
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
