"""Rows dealt out to processes: how, and what each of them should compute."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import fuzz
from simreg.kernels import rectangular
from simreg.kernels.reference import EPS
from simreg.parallel import loss as parallel_loss
from simreg.parallel import rows, shards
from tests.processes import leave, spawn

BLOCK = 16  # tokens of a tile


def run(worker: Callable[..., None], processes: int, *arguments: Any) -> None:
    """`worker(rank, *arguments)` in each of some processes with small tiles and small chunks."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        spawn(_enter, (path, processes, worker, arguments), processes)


def _enter(rank, path, processes, worker, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=processes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "block", lambda device: BLOCK)
        patch.setattr(shards, "CHUNK", 0)  # a tile travels at a time
        patch.setattr(rows, "ROUND", 2**14)  # and a row or two are computed
        try:
            worker(rank, *arguments)
        except BaseException as error:  # pytest's own would end the process without a word
            raise RuntimeError(f"rank {rank}: {error}") from error
    leave()


def as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """bfloat16 is multiplied as there, but exactly; Triton's kernels are interpreted."""
    patch.setattr(rectangular, "mixed", lambda hidden: hidden.dtype == torch.bfloat16)
    patch.setattr(rectangular, "product", lambda a, b: torch.bmm(a.float(), b.float()))


def only_fused(patch: pytest.MonkeyPatch) -> None:
    """No tile is computed in plain PyTorch."""
    patch.setattr(rectangular, "Plain", None)


def deal(layout: str, length: int, ranks: int, seed: int = 0) -> list[torch.Tensor]:
    """The positions that each rank holds."""
    generator = torch.Generator().manual_seed(seed)
    everything = torch.arange(length)
    if layout == "even":
        return list(everything.tensor_split(ranks))
    if layout == "uneven":  # some may be empty
        cuts = torch.randint(0, length + 1, (ranks - 1,), generator=generator).sort()[0]
        return list(everything.tensor_split(cuts.tolist()))
    if layout == "head-tail":
        parts = everything.tensor_split(2 * ranks)
        return [torch.cat([parts[r], parts[-1 - r]]) for r in range(ranks)]
    assert layout == "mixed"
    return list(everything[torch.randperm(length, generator=generator)].tensor_split(ranks))


def take(problem: fuzz.Problem, positions: torch.Tensor) -> fuzz.Problem:
    """Some tokens of every row of a problem."""
    parts = {
        name: value[:, positions]
        for name, value in problem._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    return problem._replace(**parts)


def evaluate(
    problem: fuzz.Problem, positions: torch.Tensor | None, whole_rows: bool, **groups: Any
) -> list[torch.Tensor]:
    """As `fuzz.evaluate`: loss, cosines and gradient times ‖h‖ of this rank's tokens."""
    hidden = problem.hidden.clone().requires_grad_()
    found = parallel_loss.per_token(
        hidden,
        problem.labels,
        problem.segments,
        positions,
        form=problem.form,
        chunk_size=problem.chunk_size,
        whole_rows=whole_rows,
        **groups,
    )
    (found.loss * problem.weights.to(found.loss.dtype)).sum().backward()
    norm = problem.hidden.double().norm(dim=-1, keepdim=True).clamp_min(EPS)
    return [found.loss.detach(), found.pos_cos, found.neg_cos, hidden.grad * norm]
