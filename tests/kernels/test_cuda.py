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


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_tf32_is_not_for_the_loss(backend):
    """Though the program has allowed it, as `TrainingArguments(torch_compile=True)` does."""
    matmul = torch.backends.cuda.matmul
    problem = fuzz.random_problem(0, 128, "cuda")
    plain = fuzz.evaluate(problem, backend, torch.float32)
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        allowed = fuzz.evaluate(problem, backend, torch.float32)
    finally:
        matmul.fp32_precision = before
    for one, other in zip(plain, allowed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chunk", [None, 30_000])
def test_a_long_sequence_keeps_to_its_memory(chunk):
    length, dim = 32_768, 1024
    hidden = torch.randn(1, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 5000, (1, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    simreg_loss(hidden, labels, chunk_size=chunk, backend="triton").backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 2 * hidden.numel() * 2 + 64 * 2**20  # twice hidden, and 64 MiB


def test_captured_in_a_graph():
    """Nothing waits for the host, so a training step with the loss can be replayed."""
    hidden = torch.randn(2, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    other = torch.randn_like(hidden)
    labels = torch.randint(0, 9, (2, 300), device="cuda")

    def step():
        loss = simreg_loss(hidden, labels, push=1.0, backend="triton")
        return loss, *torch.autograd.grad(loss, hidden)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        hidden.copy_(other)
    graph.replay()
    for ours, eager in zip(replayed, step(), strict=True):
        assert torch.equal(ours, eager)
