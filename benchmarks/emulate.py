"""Do tensor cores explain what fuzzing found on a GPU? The same problems, products emulated.

    python benchmarks/emulate.py    # reads results/fuzz-triton-cuda.json; minutes of a core

What is recorded is of the problems that `fuzz.py` drew up to commit ccebb9b: check that out.

Emulated as Khattak and Mikaitis (arXiv 2512.07004) model these cards: of a group of products and
the sum so far each is aligned to the largest and truncated some bits below float32's last place,
and their sum is truncated to float32. For float32, which does without them: a sum rounded at every
product. Mean cosines of such products are held against the rule of `fuzz.py` as it was, whose unit
did not grow with the width.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial

import fuzz
import numpy as np
import torch

from simreg.recipe import provenance

SOURCE, OUT = (
    fuzz.RESULTS / f"{name}.json" for name in ("fuzz-triton-cuda", "emulated-tensor-cores")
)
TILE, DIM = 128, 256  # of the fuzzing; all that missed the rule were so wide
Products = Callable[[np.ndarray], np.ndarray]


def tensor_core(x: np.ndarray, group: int = 16, bits: int = 2) -> np.ndarray:
    """x·xᵀ of exact numbers ``[n, d]``, in float64."""
    total = np.zeros((len(x), len(x)))
    for k in range(0, x.shape[1], group):
        part = x[:, k : k + group]
        terms = np.concatenate([total[..., None], part[:, None] * part[None]], -1)
        summed = _truncated(terms, np.abs(terms).max(-1, keepdims=True), 23 + bits).sum(-1)
        total = _truncated(summed, np.abs(summed), 23)
    return total


def _truncated(x: np.ndarray, like: np.ndarray, bits: int) -> np.ndarray:
    """Without what is `bits` and more below the leading one of `like`."""
    quantum = np.ldexp(1.0, np.maximum(np.frexp(like)[1] - 1, -126) - bits)
    return np.trunc(x / quantum) * quantum


def one_by_one(x: np.ndarray) -> np.ndarray:
    """x·xᵀ, rounded to float32 after each product."""
    total = np.zeros((len(x), len(x)), np.float32)
    for column in x.T:
        total = (total + np.outer(column, column)).astype(np.float32)
    return total.astype(np.float64)


def mean_cosines(problem: fuzz.Problem, products: Products) -> tuple[torch.Tensor, torch.Tensor]:
    """To positives and to negatives, ``[B, L]``, summed in float64."""
    found = []
    for b, hidden in enumerate(problem.hidden.double().numpy()):
        length = len(hidden)
        norm = np.maximum(np.linalg.norm(hidden, axis=-1), fuzz.EPS)
        inverse = (1 / norm).astype(np.float32).astype(np.float64)
        cosines = products(hidden) * inverse[:, None] * inverse
        labels = problem.labels[b].numpy()
        keys = [np.arange(length) // problem.chunk_size] if problem.chunk_size else []
        keys += [] if problem.segments is None else [problem.segments[b].numpy()]
        candidate = (labels >= 0)[:, None] & (labels >= 0) & ~np.eye(length, dtype=bool)
        for key in keys:
            candidate &= key[:, None] == key
        same = labels[:, None] == labels
        with np.errstate(invalid="ignore"):
            found.append(
                [(cosines * m).sum(1) / m.sum(1) for m in (candidate & same, candidate & ~same)]
            )
    positive, negative = torch.tensor(np.array(found)).unbind(1)
    return positive, negative


def ratio(problem: fuzz.Problem, products: Products) -> float:
    """The larger of both mean cosines'."""
    unit = torch.finfo(torch.float32).eps
    truth = fuzz.evaluate(problem, "reference", torch.float64)
    naive = fuzz.evaluate(problem, "reference", problem.hidden.dtype)
    ours = mean_cosines(problem, products)
    return max(fuzz.ratio(ours[k], (naive[1 + k],), truth[1 + k], unit) for k in (0, 1))


def main() -> None:
    torch.set_num_threads(1)
    record = json.loads(SOURCE.read_text())
    on_gpu: dict[int, dict[str, float]] = {}
    for line in record["failed"]:
        match = re.match(r"seed (\d+): (\w+) ([\d.]+): (.*)", line)
        assert match is not None
        if match[4] != str(fuzz.random_problem(int(match[1]), TILE)):
            sys.exit(f"seed {match[1]}: fuzz.py draws another problem by now; see this script")
        on_gpu.setdefault(int(match[1]), {})[match[2]] = float(match[3])
    models = {
        f"{group} products, {bits} bits": partial(tensor_core, group=group, bits=bits)
        for group, bits in ((16, 2), (16, 1), (8, 2))
    }
    problems = []
    for seed in range(*record["seeds"]):
        problem = fuzz.random_problem(seed, TILE)
        single = problem.hidden.dtype == torch.float32
        if problem.hidden.shape[-1] != DIM or (single and seed not in on_gpu):
            continue
        chosen = {"one by one": one_by_one} if single else models
        emulated = {name: ratio(problem, products) for name, products in chosen.items()}
        if seed in on_gpu or max(emulated.values()) > 2:
            problems.append(
                {
                    "seed": seed,
                    "on_gpu": on_gpu.get(seed),
                    "emulated": emulated,
                    "problem": str(problem),
                }
            )
            print(problems[-1], flush=True)
    results = {
        "what": "ratio of the error of mean cosines, on the GPU and emulated, where one is above 2",
        "problems": problems,
    }
    provenance.write(OUT, results)


if __name__ == "__main__":
    main()
