"""The kernels on CUDA, with the tiles that they have there."""

import pytest
import torch

from benchmarks import fuzz
from simreg import simreg_loss
from tests.kernels.problems import needs_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_triton,
]


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("seed", range(60))
def test_as_accurate_as_the_naive_loss(backend, seed):
    problem = fuzz.random_problem(seed, 128, "cuda")
    ratios = fuzz.error_ratios(problem, backend)
    assert max(ratios) <= 2, f"{dict(zip(fuzz.NAMES, ratios, strict=True))}: {problem}"


def test_a_long_sequence_keeps_to_its_memory():
    length, dim = 32_768, 1024
    hidden = torch.randn(1, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 5000, (1, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    simreg_loss(hidden, labels, backend="triton").backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 2 * hidden.numel() * 2 + 64 * 2**20  # design: twice hidden, and 64 MiB
