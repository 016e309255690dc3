"""The Triton kernels with small tiles, on the CPU by the interpreter (test_cuda: as they are)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import fuzz
from simreg import simreg_loss
from simreg.kernels.order import Form
from simreg.parallel.loss import per_token as sharded
from tests.kernels.problems import each_variant, needs_triton, problem, quiet, small_tiles
from tests.parallel import worlds
from tests.peak import Peak
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
    problem = fuzz.random_problem(seed, fuzz.SMALL, DEVICE)
    limits = (LIMITS, {}, {"WHOLE_ROWS": 0})[seed % 3]
    with small_tiles("triton", fuzz.small_blocks(seed // 2), **limits):
        ratios = fuzz.error_ratios(problem, "triton")
    assert max(ratios) <= 2, f"{dict(zip(fuzz.NAMES, ratios, strict=True))}: {problem}"


@each_variant
@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["whole", "panels"])
@pytest.mark.parametrize(
    ("length", "segments", "push"),
    [(1, 0, 0), (2, 0, 2), (16, 0, 0), (33, 0, 2), (50, 3, 2), (120, 2, 0)],
)
def test_equals_the_reference(variant, limits, length, segments, push):
    hidden, labels, ids = problem(2, length, 5, 7, segments, dtype=torch.float32)
    ids = None if ids is None else ids.to(DEVICE)
    options = {"variant": variant, "segments": ids, "push": float(push), "push_above": 0.2}
    hidden, labels = hidden.to(DEVICE), labels.to(DEVICE)
    truth = value_and_grad(per_token, hidden.double(), labels, backend="reference", **options)
    with small_tiles("triton", **limits):
        ours = value_and_grad(per_token, hidden, labels, backend="triton", **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "length", "limits"),
    # Ten tiles: a group and a part. Five: slots of two rows of three, M of two tiles, then of one.
    [(1, 300, {}), (3, 140, {"SLOTS": 45_000, "SCRATCH": 60_000, "TOKEN": 0})],
    ids=["whole rows", "two rows of slots, two tiles of M"],
)
def test_many_tiles(rows, length, limits):
    hidden, labels, _ = problem(rows, length, 16, 30, dtype=torch.float32)
    truth = value_and_grad(per_token, hidden.double(), labels, backend="reference")
    with small_tiles("triton", **limits):
        ours = value_and_grad(per_token, hidden, labels, backend="triton")
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_float16_under_loss_scaling():
    hidden, labels, _ = problem(1, 40, 16, 5)
    hidden = (hidden * 120 / hidden.norm(dim=-1, keepdim=True)).half()
    scaled = []
    for h, backend in ((hidden.double(), "reference"), (hidden, "triton")):
        leaf = h.requires_grad_()
        (2**14 * per_token(leaf, labels, backend=backend).sum()).backward()
        scaled.append(leaf.grad.double())
    truth, ours = scaled
    assert (ours - truth).abs().max() <= 2 * torch.finfo(torch.float16).eps * truth.abs().max()


def test_what_comes_back_to_ignored_tokens_does_not_scale_float16():
    hidden, labels, _ = problem(1, 40, 16, 5)
    gradients = []
    for upstream in (0, 1e12):
        leaf = hidden.half().requires_grad_()
        loss = per_token(leaf, labels, backend="triton", push=3.0)
        loss.backward(torch.ones_like(loss).masked_fill(labels < 0, upstream))
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


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
    labels = torch.arange(40)[None]  # nobody has positives: only with a push do others meet it
    loss = per_token(hidden, labels, backend="triton")
    assert loss.isnan().sum() == 1
    assert loss[0, 7].isnan()
    loss, grad = value_and_grad(per_token, hidden, labels, backend="triton", push=1)
    assert loss.isnan().all()
    assert grad.isnan().all()


def test_vectors_shorter_than_eps_have_no_length():
    hidden, labels, _ = problem(1, 40, 4, 3, dtype=torch.float32)
    labels[:] = labels.clamp_min(0)
    hidden[0, 7] *= 5e-7 / hidden[0, 7].norm()  # half of it
    truth = value_and_grad(per_token, hidden.double(), labels, backend="reference")
    ours = value_and_grad(per_token, hidden, labels, backend="triton")
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_norms_whose_squares_float32_does_not_hold():
    hidden, labels, _ = problem(1, 40, 4, 3, dtype=torch.float32)
    hidden[0, 7] *= 1e20
    truth = per_token(hidden.double(), labels, backend="reference")
    ours = per_token(hidden, labels, backend="triton")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    hidden[0, 8] *= 1e20  # nor their product
    labels[:] = 1
    found = per_token(hidden, labels, backend="triton").isnan()
    assert found.nonzero()[:, 1].tolist() == [7, 8]


def test_norms_that_float32_does_not_hold():
    hidden, labels, _ = problem(1, 40, 4, 3, dtype=torch.float32)
    labels[:] = 1
    hidden *= 1e-3
    hidden[0, 7] = 2e38 * hidden[0, 7].sign()
    for backend in ("blockwise", "triton"):
        assert per_token(hidden, labels, backend=backend)[0, 7].isnan()


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
    length, documents = 128, 2  # 4 rows of tiles; a document is 2 of them
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

    assert work(None) == [10, 10 + 16]  # the triangle of S; the same again and M·H
    assert work(None, limits={"SCRATCH": 0})[1] == 16 + 16
    for ids in (packed, packed[:, torch.randperm(length)]):
        assert work(ids) == [documents * 3, documents * (3 + 4)]
    assert work(None, chunk=64) == [documents * 3, documents * (3 + 4)]
    half = labels.masked_fill(torch.arange(length) >= 64, -100)
    assert work(None, half) == [3, 3 + 4]


class Unlaunched:
    """In the place of a kernel."""

    def __getitem__(self, grid):
        assert all(size < 2**16 for size in grid[1:])
        return lambda *arguments, **constants: None


def _unlaunched(monkeypatch):
    from simreg.kernels import tiles, tokens, triton

    torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    for name in ("find_runs", "inverses", "merge", "results", "ends"):
        monkeypatch.setattr(tokens, name, Unlaunched())
    for name in ("sums", "gradients", "apply"):
        monkeypatch.setattr(tiles, name, Unlaunched())
    monkeypatch.setattr(triton, "blocks", lambda *_: triton.Blocks(128, 64, 8, 4, 3, 256, 64, 8, 8))


META = {"dtype": torch.bfloat16, "device": "meta"}
SHAPES = [
    (32, 2048, 768),
    (8, 8192, 4096),
    (1, 131_072, 4096),
    (1, 131_072, 768),
    (512, 128, 768),
    (70_000, 16, 768),
    (4, 16_384, 1024),
    (64, 8192, 64),  # whose statistics are as large as the hidden states
]


@each_variant
@pytest.mark.parametrize("push", [0.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extra_memory_is_within_budget(monkeypatch, variant, push, shape):
    from simreg.kernels import triton

    _unlaunched(monkeypatch)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(shape[:2], dtype=torch.int64, device="meta")
    form = Form(0.1, variant, push)
    budget = 2 * hidden.numel() * 2 + 64 * 2**20  # twice hidden, and 64 MiB
    with Peak() as forward:
        loss, _, _, *saved = triton.forward(hidden, labels, None, form)
    assert loss.shape == labels.shape
    assert 0 < forward.peak <= budget
    kept = sum(value.untyped_storage().nbytes() for value in saved)
    with Peak() as backward:
        grad = triton.backward(loss, hidden, labels, None, saved, form)
    assert grad.shape == hidden.shape
    assert hidden.numel() * 2 < backward.peak <= budget - kept
    problem = triton.Problem(hidden, labels, None, saved[0], saved[1])
    assert not problem.copied  # or the M of a long row would have no room


@pytest.mark.parametrize("kind", ["every other token", "sequence first", "width 4090"])
@pytest.mark.parametrize("shape", [(8, 8192), (1, 131_072), (64, 512)], ids=str)
def test_what_has_to_be_copied_is_within_budget(monkeypatch, kind, shape):
    """The copy takes the place of the scratch that long rows have else."""
    from simreg.kernels import triton

    _unlaunched(monkeypatch)
    batch, length = shape
    hidden = {
        "every other token": lambda: torch.empty(batch, 2 * length, 4096, **META)[:, ::2],
        "sequence first": lambda: torch.empty(length, batch, 8192, **META)[..., ::2].transpose(
            0, 1
        ),
        "width 4090": lambda: torch.empty(batch, length, 4090, **META),
    }[kind]()
    labels = torch.empty(shape, dtype=torch.int64, device="meta")
    form = Form(0.1, "out", 3.0)
    padded = batch * length * 4096 * 2
    with Peak(hidden) as forward:
        loss, _, _, *saved = triton.forward(hidden, labels, None, form)
    assert padded <= forward.peak <= 2 * padded + 64 * 2**20
    kept = sum(value.untyped_storage().nbytes() for value in saved)
    with Peak(hidden) as backward:
        grad = triton.backward(loss, hidden, labels, None, saved, form)
    assert grad.is_contiguous()
    assert 2 * padded <= backward.peak <= 2 * padded + 64 * 2**20 - kept


class Operations(TorchDispatchMode):
    """Names of torch's operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not (function.is_view or name.startswith(("empty", "new_empty"))):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("push", [0.0, 3.0])
def test_nothing_is_computed_around_the_kernels(monkeypatch, push):
    """At short rows the host's time would be longer than the kernels'."""
    from simreg.kernels import triton

    _unlaunched(monkeypatch)
    hidden = torch.empty(32, 2048, 768, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(32, 2048, dtype=torch.int64, device="meta")
    form = Form(0.1, "out", push)
    with Operations() as forward:
        loss, _, _, *saved = triton.forward(hidden, labels, None, form)
    assert forward.names == ["sort"]
    with Operations() as backward:
        triton.backward(loss, hidden, labels, None, saved, form)
    assert backward.names == []


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's launches are watched")
def test_every_launch_says_that_it_wants_fused_arithmetic(monkeypatch):
    """Of which newer versions of Triton warn, or make none, where it is not said."""
    from triton.runtime.interpreter import GridExecutor

    said, launch = {}, GridExecutor.__call__

    def watched(self, *args, **options):
        said.setdefault(self.fn.__name__, set()).add(options.get("enable_fp_fusion"))
        launch(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", watched)
    worlds.as_on_cuda(monkeypatch)
    hidden, labels, _ = problem(1, 6, 4, 2, dtype=torch.bfloat16)
    leaf = hidden.requires_grad_()
    simreg_loss(leaf, labels, backend="triton").backward()
    sharded(leaf, labels, form=Form(0.1, "out"), whole_rows=False).loss.sum().backward()
    one = {"find_runs", "inverses", "sums", "merge", "results", "ends", "gradients", "apply"}
    assert said == {name: {True} for name in one | {"row_sums", "entries"}}
