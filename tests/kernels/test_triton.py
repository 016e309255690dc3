"""The Triton kernels: on the CPU by the interpreter with small tiles, on CUDA as they are."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import fuzz
from tests.kernels.problems import each_variant, needs_triton, problem, quiet, small_tiles
from tests.test_loss import per_token, value_and_grad

pytestmark = [needs_triton, quiet]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"SLOTS": 0, "SCRATCH": 0}  # launches of one row tile


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What is allocated and not written is NaN: a slot read in vain shows."""
    torch.use_deterministic_algorithms(True)
    with small_tiles("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", range(24))
def test_as_accurate_as_the_naive_loss(seed):
    problem = fuzz.random_problem(seed, 16, DEVICE)
    limits = LIMITS if seed % 2 else {}
    with small_tiles("triton", **limits):
        ratios = fuzz.error_ratios(problem, "triton")
    assert max(ratios) <= 2, f"{dict(zip(fuzz.NAMES, ratios, strict=True))}: {problem}"


@each_variant
@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["whole", "panels"])
@pytest.mark.parametrize(("length", "segments"), [(1, 0), (2, 0), (16, 0), (33, 0), (50, 3)])
def test_equals_the_reference(variant, limits, length, segments):
    hidden, labels, ids = problem(2, length, 5, 7, segments, dtype=torch.float32)
    options = {"variant": variant, "segments": None if ids is None else ids.to(DEVICE)}
    hidden, labels = hidden.to(DEVICE), labels.to(DEVICE)
    truth = value_and_grad(per_token, hidden.double(), labels, backend="reference", **options)
    with small_tiles("triton", **limits):
        ours = value_and_grad(per_token, hidden, labels, backend="triton", **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_and_ignored_rubbish(variant, dtype):
    hidden, labels, _ = problem(2, 40, 16, 5, dtype=dtype)
    hidden[0, 3], hidden[1, 5] = 0, hidden[1, 4]
    labels[0, 3] = labels[0, 4] = 1
    labels[0, 17] = -100
    truth = value_and_grad(per_token, hidden.double(), labels, variant=variant, backend="reference")
    hidden[labels == -100] = torch.nan
    ours = value_and_grad(per_token, hidden, labels, variant=variant, backend="triton")
    (loss, grad), (exact_loss, exact) = ours, truth
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-4, atol=1e-4)
    # The gradient of the zero vector is some 1/ε times larger, beyond float16.
    assert (grad[0, 3].double() / exact[0, 3]).isinf().any() == (dtype == torch.float16)
    exact[0, 3], grad[0, 3] = 0, 0
    error = (grad.double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours[1][labels == -100] == 0).all()


def test_nan_is_not_hidden():
    hidden, labels, _ = problem(1, 40, 4, 3, dtype=torch.float32)
    labels[:] = labels.clamp_min(0)
    hidden[0, 7, 2] = torch.nan
    loss, grad = value_and_grad(per_token, hidden, labels, backend="triton")
    assert loss.isnan().all()
    assert grad.isnan().all()


@pytest.fixture
def products(monkeypatch):
    """How many products of tiles the interpreter did: the work, not the time."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = [0]
    plain = InterpreterBuilder.create_dot

    def counted(*arguments):
        count[0] += 1
        return plain(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    return count


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter counts")
def test_tiles_outside_a_segment_are_not_computed(products):
    length, documents = 128, 4  # 8 rows of tiles; a document is 2 of them
    hidden = torch.randn(1, length, 16, requires_grad=True)
    labels = torch.randint(0, 50, (1, length))
    packed = (torch.arange(length) * documents // length)[None]

    def work(ids, labels=labels, chunk=None, limits=None):
        counts = []
        with small_tiles("triton", **(limits or {})):
            products[0] = 0
            loss = per_token(hidden, labels, segments=ids, chunk_size=chunk, backend="triton")
            counts.append(products[0])
            loss.sum().backward()
            counts.append(products[0] - counts[0])
        return counts

    assert work(None) == [36, 36 + 64]  # the triangle of S; the same again and M·H
    assert work(None, limits={"SCRATCH": 0})[1] == 64 + 64
    for ids in (packed, packed[:, torch.randperm(length)]):
        assert work(ids) == [documents * 3, documents * (3 + 4)]
    assert work(None, chunk=32) == [documents * 3, documents * (3 + 4)]
    half = labels.masked_fill(torch.arange(length) >= 64, -100)
    assert work(None, half) == [10, 10 + 16]


@each_variant
def test_no_allocation_is_quadratic(variant):
    from simreg.kernels import triton

    length, dim = 160, 2
    hidden, labels, _ = problem(1, length, dim, 50, dtype=torch.float32)
    limits = {"SLOTS": 1 << 12, "SCRATCH": 1 << 12}
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes())
            return result

    with small_tiles("triton", **limits), Watch():
        loss, _, _, *saved = triton.forward(hidden, labels.clamp_min(-1), None, 0.1, variant)
        forward, largest[0] = largest[0], 0
        triton.backward(torch.ones_like(loss), hidden, labels, None, saved, 0.1, variant)
    tiles, tile = length // 16, 16
    one_tile_row = 4 * 4 * tiles * tile  # slots of four sums, the least a launch can take
    hidden_bytes = 4 * length * dim
    assert forward <= max(limits["SLOTS"], one_tile_row, 8 * 4 * length)  # runs: 4 int64 a token
    assert largest[0] <= max(
        limits["SCRATCH"] // 2 + hidden_bytes, 4 * tiles * tile * tile, 32 * length
    )
    assert largest[0] < 4 * length * length / 8
