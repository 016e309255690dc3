"""On one GPU: products of bfloat16 that only CUDA has, in tiles of the size used there."""

import pytest
import torch

from benchmarks import fuzz
from simreg.kernels.pairs import block
from tests.parallel.test_loss import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("seed", range(24))
def test_as_accurate_as_the_naive_loss(seed):
    problem = fuzz.random_problem(seed, block(torch.device("cuda")), "cuda")
    check(problem, [torch.arange(problem.labels.shape[1], device="cuda")], 0)
