"""Random problems: each backend against float64, with the naive loss in the same dtype beside it.

    python benchmarks/fuzz.py blockwise            # 2,000 problems, to benchmarks/results/
    python benchmarks/fuzz.py summed               # the same for losses that are summed, on the CPU
    python benchmarks/fuzz.py triton               # on CUDA
    TRITON_INTERPRET=1 python benchmarks/fuzz.py triton    # on the CPU, with small tiles

Rule: |ours − truth| ≤ 2 · (|naive − truth| + u), maxima over a tensor, where the truth is the L×L
definition in float64, naive is the same in float32 of the same inputs (with their dimensions in
four orders, the worst of which counts, so that no lucky rounding is the measure), and u is the unit
in the last place of the largest value in the dtype of the result (of a gradient that cancels, of
what it sums in float32). In one dimension all gradients cancel but that of a zero vector, whose
terms the matrix products round to the dtype of the inputs: there u holds half a unit of these terms
as well. On CUDA u grows with the width: a matrix unit cuts off what it adds, 16 products at a time,
and without one a sum of products is rounded at every product. A ratio is an error over (...).
Gradients are multiplied by ‖h‖, so that no token counts more for being short.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simreg.kernels import blockwise
from simreg.kernels.order import Form
from simreg.kernels.reference import EPS
from simreg.loss import VARIANTS, per_token
from simreg.recipe import provenance

RESULTS = Path(__file__).parent / "results"
ORDERS = 4
SMALL = 32  # tokens of a tile on the CPU, so that small problems have many
NAMES = ("loss", "pos_cos", "neg_cos", "gradient")


class Problem(NamedTuple):
    """Arguments of `simreg.loss.per_token`, and weights of the tokens' losses."""

    hidden: Tensor
    labels: Tensor
    segments: Tensor | None
    form: Form
    chunk_size: int | None
    weights: Tensor

    def __str__(self) -> str:
        batch, length, dim = self.hidden.shape
        segments = 0 if self.segments is None else len(self.segments.unique())
        return (
            f"B={batch} L={length} d={dim} {self.hidden.dtype} {self.form.variant} "
            f"τ={self.form.temperature} push={self.form.push} above {self.form.push_above:.3f} "
            f"classes={len(self.labels.unique())} segments={segments} chunk={self.chunk_size} "
            f"ignored={int((self.labels == -100).sum())}"
        )


def random_problem(seed: int, tile: int, device: str = "cpu") -> Problem:
    """Ragged around multiples of `tile`; every other is several tiles with mixed-up segments."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):  # type: ignore[no-untyped-def]
        return choices[torch.randint(len(choices), (), generator=generator)]

    large = seed % 2 == 0
    batch = pick(1, 2, 3)
    length = pick(2, 3) * tile + pick(-1, 0, 1, 5) if large else pick(1, 2, 5, tile - 1, tile + 1)
    dim = pick(1, 3, 16, 33, 80, 256)
    shape = (batch, length)
    hidden = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
    # Embeddings of trained models share a direction, differ in length, and some are nearly equal.
    hidden += pick(0, 0.5, 3) * torch.randn(dim, generator=generator, dtype=torch.float64)
    hidden *= torch.exp(pick(0, 1) * torch.randn(*shape, 1, generator=generator))
    if pick(False, False, True):
        hidden[:, 0] = pick(0, 1e-7, -1) * hidden[:, -1]
    labels = torch.randint(0, pick(1, 2, 7, 10**6), shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < pick(0, 0.1, 0.2 if large else 0.9)
    labels = labels.masked_fill(ignored, -100)
    segments = None
    if large or pick(False, True):
        segments = torch.randint(-2, pick(0 if large else -1, 0, 3), shape, generator=generator)
    weights = torch.randn(shape, generator=generator) * 10.0 ** pick(-6, 0, 3)
    hidden = hidden.to(pick(torch.float32, torch.bfloat16, torch.float16))
    temperature, variant = pick(0.01, 0.05, 0.1, 1.0), VARIANTS[seed % len(VARIANTS)]
    chunk_size = pick(None, None, None, max(2, length // 3), tile, tile + 3)
    form = Form(temperature, variant, pick(0.0, 3.0), clear_of_pairs(hidden))
    return Problem(
        hidden.to(device),
        labels.to(device),
        None if segments is None else segments.to(device),
        form,
        chunk_size,
        weights.to(device),
    )


def small_blocks(seed: int) -> NamedTuple:
    """Sizes of Triton's tiles of SMALL tokens: all alike, or each another."""
    from simreg.kernels import triton

    if seed % 2:
        return triton.Blocks(SMALL, 16, 4, 1, 1, wide=64, step=16, wide_warps=1, wide_stages=1)
    return triton.Blocks(SMALL, SMALL, 8, 1, 1, SMALL, SMALL, 1, 1)


def clear_of_pairs(hidden: Tensor) -> float:
    """A cosine from 0.3 to 0.7 that no pair of a row is near: the push has a kink there."""
    units = torch.nn.functional.normalize(hidden.double(), dim=-1, eps=EPS)
    cosines = torch.cat([(units @ units.mT).flatten(), torch.zeros(1)]).sort().values
    grid = torch.linspace(0.3, 0.7, 81, dtype=torch.float64)
    above = torch.searchsorted(cosines, grid).clamp(1, len(cosines) - 1)
    distance = torch.minimum(grid - cosines[above - 1], cosines[above] - grid).abs()
    return float(grid[distance.argmax()])


def evaluate(problem: Problem, backend: str, dtype: torch.dtype, order: int = 0) -> list[Tensor]:
    """Loss, cosines and gradient times ‖h‖, with hidden states in `dtype`.

    `order` is a seed of the dimensions' order in which products are summed (0: as they come).
    """
    hidden = problem.hidden.to(dtype, copy=True).requires_grad_()
    dims = torch.arange(hidden.shape[-1], device=hidden.device)
    if order:
        dims = torch.randperm(len(dims), generator=torch.Generator().manual_seed(order)).to(dims)
    summed = backend == "summed"
    loss, pos_cos, neg_cos, _ = per_token(
        hidden[..., dims],
        problem.labels,
        problem.segments,
        form=problem.form,
        chunk_size=problem.chunk_size,
        backend="blockwise" if summed else backend,
        summed=summed,
    )
    (gradient,) = torch.autograd.grad((loss * problem.weights.to(loss.dtype)).sum(), hidden)
    norm = problem.hidden.double().norm(dim=-1, keepdim=True).clamp_min(EPS)
    return [loss.detach(), pos_cos.detach(), neg_cos.detach(), gradient * norm]


def error_ratios(problem: Problem, backend: str) -> list[float]:
    """For each of NAMES; not more than 2 by the rule, infinite where NaNs differ."""
    dtype = problem.hidden.dtype
    truth = evaluate(problem, "reference", torch.float64)
    naive = [evaluate(problem, "reference", dtype, order) for order in range(ORDERS)]
    ours = evaluate(problem, backend, dtype)
    values = zip(ours, zip(*naive, strict=True), truth, units(problem, truth[3]), strict=True)
    return [ratio(*value) for value in values]


def units(problem: Problem, gradient: Tensor) -> list[float]:
    """For each of NAMES the unit in the last place, given the true gradient times ‖h‖."""
    single, own = torch.finfo(torch.float32).eps, torch.finfo(problem.hidden.dtype).eps
    per_weight = 1 / problem.form.temperature + problem.form.push
    pull = float(problem.weights.abs().max()) * per_weight  # on one embedding
    sums = own * float(gradient.abs().nan_to_num(0).max()) + 4 * single * pull
    dim = problem.hidden.shape[-1]
    terms = own / 2 * pull if dim == 1 else 0.0
    cosine = single
    if problem.hidden.is_cuda:  # cut off always in one direction, or rounded in either
        cosine *= max(1, dim**0.5 / 4 if own == single else dim / 16)
    return [cosine * per_weight, cosine, cosine, sums + terms]


def ratio(ours: Tensor, naive: tuple[Tensor, ...], truth: Tensor, unit: float) -> float:
    """Largest error of `ours` over that of the worst of `naive` plus `unit`."""
    if not torch.equal(ours.isnan(), truth.isnan()):
        return torch.inf
    error, *allowed = ((x - truth).abs().nan_to_num(0, torch.inf).max() for x in (ours, *naive))
    return float(error / (max(allowed) + unit))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("backend", choices=("blockwise", "summed", "triton"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/fuzz-BACKEND-DEVICE.json"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.backend == "summed" and device != "cpu":
        parser.error("summed: on the CPU only")
    name = f"fuzz-{options.backend}-{device}.json"
    out = provenance.check_writable(options.out or RESULTS / name)
    tile = SMALL if device == "cpu" else 128
    seeds = range(options.first, options.first + options.count)

    began, worst, failed, checked = time.time(), dict.fromkeys(NAMES, (0.0, "")), [], 0
    check = partial(check_seed, backend=options.backend, tile=tile, device=device)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for seed, (ratios, text) in zip(seeds, pool.map(check, seeds, chunksize=8), strict=True):
            for name, value in zip(NAMES, ratios, strict=True):
                if value > 2:
                    failed.append(f"seed {seed}: {name} {value:.2f}: {text}")
                    print(failed[-1], flush=True)
                if value >= worst[name][0]:
                    worst[name] = (value, f"seed {seed}: {text}")
            if (seed + 1) % 100 == 0:
                print(f"{seed + 1}: worst", {k: round(v[0], 2) for k, v in worst.items()})
            checked += 1
            if time.time() - began > 60 * options.minutes:
                pool.shutdown(cancel_futures=True)
                break
    results = {
        "what": "worst error over that of the naive loss plus a unit (see the script); rule: 2",
        "backend": options.backend,
        "seeds": [options.first, options.first + checked],
        "tile": tile,
        "worst": {name: {"ratio": value, "problem": text} for name, (value, text) in worst.items()},
        "failed": failed,
        "seconds": time.time() - began,
    }
    provenance.write(out, results)
    print(f"{len(failed)} of {checked} failed; written to {out}")
    sys.exit(bool(failed))


def check_seed(seed: int, backend: str, tile: int, device: str) -> tuple[list[float], str]:
    """Error ratios of a random problem, with tiles so small that on the CPU it has many."""
    torch.set_num_threads(1)
    if tile == SMALL:
        if backend == "blockwise":
            blockwise.block = lambda device: tile
        elif backend == "summed":  # rows that are short, or not
            blockwise.block = lambda device: 4 * tile if seed % 4 > 1 else tile
        else:
            from simreg.kernels import triton

            triton.blocks = lambda dtype, device: small_blocks(seed)
    problem = random_problem(seed, tile, device)
    if backend == "summed":
        weights = problem.weights[:1, :1].expand_as(problem.weights)
        problem = problem._replace(hidden=problem.hidden.float(), weights=weights)
    return error_ratios(problem, backend), str(problem)


if __name__ == "__main__":
    main()
