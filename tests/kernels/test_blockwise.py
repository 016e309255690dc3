"""What blockwise promises beyond being right: tiles, memory, compile, precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from simreg import SimRegLoss, simreg_loss
from simreg.kernels import blockwise as module
from simreg.kernels.blockwise import blockwise
from simreg.loss import VARIANTS
from tests.test_loss import per_token, value_and_grad

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def problem(batch, length, dim, classes, segments=0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (batch, length), generator=generator)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, -100)
    ids = torch.randint(0, segments, labels.shape, generator=generator) if segments else None
    return hidden, labels, ids


@each_variant
@pytest.mark.parametrize("segments", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 64, 129])
@pytest.mark.parametrize("classes", [1, 7, 10**6])
def test_many_tiles_equal_the_reference(monkeypatch, variant, length, classes, segments):
    monkeypatch.setattr(module, "_block", lambda device: 16)
    hidden, labels, ids = problem(3, length, 5, classes, segments)
    options = {"variant": variant, "segments": ids}
    truth = value_and_grad(per_token, hidden, labels, backend="reference", **options)
    ours = value_and_grad(per_token, hidden, labels, backend="blockwise", **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("length", [127, 1100])
def test_as_accurate_as_the_naive_loss(variant, dtype, temperature, length):
    hidden, labels, _ = problem(1, length, 65, 40, dtype=dtype)
    options = {"variant": variant, "temperature": temperature}
    truth = value_and_grad(per_token, hidden.double(), labels, backend="reference", **options)
    naive = value_and_grad(per_token, hidden, labels, backend="reference", **options)
    ours = value_and_grad(per_token, hidden, labels, backend="blockwise", **options)
    for value, plain, exact in zip(ours, naive, truth, strict=True):
        error, allowed = (value - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()


def test_tiles_outside_a_segment_are_not_visited():
    length, documents, block = 256, 8, 16
    labels = torch.randint(0, 50, (1, length))
    contiguous = (torch.arange(length) * documents // length)[None]
    scattered = contiguous[:, torch.randperm(length)]

    def visited(ids, labels=labels):
        order = module.describe(module.sort_tokens(labels, ids), labels, ids)
        return list(module.tiles(order, block))

    whole = visited(None)
    assert len(whole) == 16 * 17 // 2
    for ids in (contiguous, scattered):  # 8 documents of 2 blocks: 3 tiles each
        assert len(visited(ids)) == documents * 3
    assert len(visited(None, labels.masked_fill(torch.arange(length) >= 64, -100))) == 4 * 5 // 2
    covered = torch.zeros(length, length, dtype=torch.int64)
    for tile in whole:
        covered[tile.rows, tile.cols] += 1
        if tile.rows != tile.cols:
            covered[tile.cols, tile.rows] += 1
    assert (covered == 1).all()


@each_variant
def test_storage_saved_for_backward_is_linear(variant):
    batch, length, dim = 2, 1024, 16
    hidden, labels, ids = problem(batch, length, dim, 30, 2, dtype=torch.float32)
    hidden.requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = simreg_loss(hidden, labels, segments=ids, variant=variant)
    loss.backward()
    tokens = batch * length
    # hidden itself, labels, segments, the permutation (int64), and a few floats a token
    assert sum(saved.values()) <= tokens * (4 * dim + 3 * 8 + 8 * 4)
    assert sum(saved.values()) >= tokens * 4 * dim  # the hook does see what is saved


def test_peak_memory_at_long_sequences():
    # A process of its own: memory that earlier tests freed would hide what the loss takes.
    code = "from benchmarks.loss import MEMORY_SHAPE, memory; print(*MEMORY_SHAPE, memory())"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    batch, length, dim, peak = map(int, run.stdout.split())
    assert (batch, length, dim) == (1, 16_384, 512)  # the naive loss needs over 4 GiB
    assert peak >= 4 * length * dim  # at least the gradient: the watch does see memory
    assert peak < 400 * 2**20


@each_variant
def test_custom_op_is_well_formed(variant):
    hidden = torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
    labels, ids = torch.arange(20).expand(2, 20) % 3, torch.arange(20).expand(2, 20) // 10
    # Every token has positives and negatives: opcheck takes NaN (a mean of none) for a difference.
    torch.library.opcheck(blockwise, (hidden, labels.contiguous(), ids.contiguous(), 0.1, variant))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic):
    compiled = torch.compile(per_token, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (40, 56):
        hidden, labels, _ = problem(2, length, 8, 5, dtype=torch.float32)
        for ours, plain in zip(
            value_and_grad(compiled, hidden, labels),
            value_and_grad(per_token, hidden, labels),
            strict=True,
        ):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("dynamic", [None, True])
def test_module_compiles_while_its_weight_is_scheduled(dynamic):
    hidden, labels, _ = problem(2, 40, 8, 5, dtype=torch.float32)
    module = SimRegLoss()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for weight in (0.1, 0.2, 0.3, 0.0):
        module.weight = weight
        (ours, metrics), (plain, expected) = compiled(hidden, labels), module(hidden, labels)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(metrics, expected)


def test_autocast_and_checkpointing_change_nothing():
    hidden, labels, _ = problem(2, 40, 8, 5, dtype=torch.float32)

    def under_autocast(h, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return per_token(h, y)

    def checkpointed(h, y):
        return checkpoint(per_token, h, y, use_reentrant=False)

    plain = value_and_grad(per_token, hidden, labels)
    for changed in (under_autocast, checkpointed):
        for a, b in zip(value_and_grad(changed, hidden, labels), plain, strict=True):
            assert torch.equal(a, b)


def test_double_backward_is_refused():
    hidden, labels, _ = problem(1, 9, 4, 3)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(simreg_loss(hidden, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_two_runs_are_bitwise_equal():
    hidden, labels, _ = problem(2, 700, 33, 20, dtype=torch.float32)
    first, second = (value_and_grad(per_token, hidden, labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [127, 2500])
def test_on_cuda(variant, dtype, length):
    hidden, labels, ids = problem(3, length, 65, 40, 2, dtype=dtype)
    truth = value_and_grad(
        per_token, hidden.double(), labels, segments=ids, variant=variant, backend="reference"
    )
    cuda = {"segments": ids.cuda(), "variant": variant}
    naive = value_and_grad(per_token, hidden.cuda(), labels.cuda(), backend="reference", **cuda)
    ours = value_and_grad(per_token, hidden.cuda(), labels.cuda(), backend="blockwise", **cuda)
    for value, plain, exact in zip(ours, naive, truth, strict=True):
        error, allowed = (value.cpu() - exact).abs().max(), (plain.cpu() - exact).abs().max()
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()
