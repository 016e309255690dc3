"""Every contender computes the same loss, or the products it claims to."""

import functools
import importlib.util
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simreg import simreg_loss
from simreg.bench import contenders as module
from simreg.bench.contenders import BARE, CAPTURED, COMPILED, METRIC_LEARNING, ROUNDED, contenders
from simreg.bench.problem import Shape
from simreg.bench.recompute import chunked_recompute
from simreg.loss import BACKENDS, VARIANTS

CPU = torch.device("cpu")
EVERY = [c for c in contenders(CPU, VARIANTS) if c.name != BARE]


def problem(shape, classes=9, ignored=0.15):
    """Tokens with and without positives, some ignored."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.length)
    hidden = torch.randn(*size, shape.dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, size, generator=generator) ** 2
    labels = torch.where(labels > 20, torch.arange(100, 100 + shape.length), labels)
    labels = labels.masked_fill(torch.rand(size, generator=generator) < ignored, -100)
    return hidden.requires_grad_(), labels


def truth(hidden, labels, **options):
    loss = simreg_loss(hidden, labels, backend="reference", **options)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("contender", EVERY, ids=lambda c: c.title)
def test_equals_the_reference_in_value_and_gradient(contender, chunk, monkeypatch):
    if contender.name == METRIC_LEARNING:
        pytest.importorskip("pytorch_metric_learning")
    elif contender.missing is not None:
        pytest.skip(contender.missing)
    # Inductor takes its time; what it would compile is traced all the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    shape = Shape(batch=3, length=40, dim=6, dtype="float64", chunk=chunk)
    hidden, labels = problem(shape)
    value, grad = truth(hidden, labels, variant=contender.variant, chunk_size=chunk)
    step = contender.prepare(hidden, labels, shape)
    for _ in range(2):  # a step must not add to the gradient of the one before
        found = step()
    tolerance = 1e-5 if contender.name == METRIC_LEARNING else 1e-10  # it adds 1e-6 to counts
    torch.testing.assert_close(found, value, rtol=tolerance, atol=0)
    torch.testing.assert_close(hidden.grad, grad, rtol=tolerance, atol=tolerance)


def test_a_peer_on_cuda_multiplies_in_the_dtype_of_the_embeddings(monkeypatch):
    (peer,) = (c for c in contenders(torch.device("cuda")) if c.name == ROUNDED)
    assert ROUNDED not in {c.name for c in contenders(CPU)}
    assert ROUNDED not in {c.name for c in contenders(torch.device("cuda"), ["in"])}
    products, seen = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda a, b: [seen.append(a.dtype), products(a, b)][1])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shape = Shape(batch=3, length=40, dim=6, dtype="bfloat16", chunk=20)
    hidden, labels = problem(shape)
    value, grad = truth(hidden, labels, chunk_size=20)
    assert peer.prepare(hidden, labels, shape)() == pytest.approx(value.item(), rel=1e-10)
    torch.testing.assert_close(hidden.grad, grad)
    half = hidden.detach().bfloat16().requires_grad_()
    assert peer.prepare(half, labels, shape)() == pytest.approx(value.item(), rel=0.03)
    assert seen == [torch.float64, torch.bfloat16]
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_from_a_graph(variant):
    cuda = torch.device("cuda")
    shape = Shape(batch=3, length=40, dim=16, dtype="bfloat16", chunk=20)
    hidden, labels = problem(shape)
    hidden = hidden.detach().to(cuda, torch.bfloat16).requires_grad_()
    by_name = {c.name: c for c in contenders(cuda, [variant])}
    steps = {
        name: by_name[name].prepare(hidden, labels.to(cuda), shape) for name in ("triton", CAPTURED)
    }
    for name in ("triton", CAPTURED, "triton", CAPTURED):  # neither disturbs the other
        hidden.grad = None
        found = steps[name](), hidden.grad
        if name == "triton":
            eager = found
    assert torch.equal(found[0], eager[0])
    assert torch.equal(found[1], eager[1])


@pytest.mark.parametrize("pairs", [1, 17, 60, 17**2, 2 * 17**2, 10**6])
def test_recompute_in_any_chunks(pairs):
    hidden, labels = problem(Shape(batch=3, length=17, dim=5, dtype="float64"))
    value, grad = truth(hidden, labels)
    loss = chunked_recompute(hidden, labels, pairs=pairs)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grad)


@pytest.mark.parametrize("labels", [torch.full((2, 9), -100), torch.arange(18).view(2, 9)])
def test_recompute_without_positives_is_zero(labels):
    hidden = torch.randn(2, 9, 4, requires_grad=True)
    loss = chunked_recompute(hidden, labels, pairs=20)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


def test_recompute_saves_no_matrix():
    length, dim = 512, 8
    hidden, labels = torch.randn(2, length, dim), torch.randint(0, 30, (2, length))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_recompute(hidden, labels, pairs=2**12)
    assert 4 * hidden.numel() <= sum(saved.values()) < 8 * 4 * hidden.numel() < 4 * length**2


@pytest.mark.parametrize("shared", [0, 2**31])
@pytest.mark.parametrize("chunk", [None, 8])
def test_bare_products_are_those_of_the_loss(monkeypatch, chunk, shared):
    monkeypatch.setattr(module, "SHARED", shared)
    shape = Shape(batch=3, length=32, dim=5, dtype="bfloat16", chunk=chunk)
    hidden = torch.randn(3, 32, 5, dtype=torch.bfloat16, requires_grad=True)
    bare = contenders(CPU)[0]
    step = bare.prepare(hidden, torch.zeros(3, 32, dtype=torch.int64), shape)
    with FlopCounterMode(display=False) as counter:
        step()
    assert bare.name == BARE
    assert counter.get_total_flops() == 6 * 3 * 32 * (chunk or 32) * 5


def test_every_backend_takes_part_by_itself(monkeypatch):
    names = [c.name for c in contenders(CPU)]
    assert {"naive" if b == "reference" else b for b in BACKENDS} - {"auto"} <= set(names)
    assert "auto" not in names
    monkeypatch.setattr(module, "BACKENDS", ("auto", "reference", "blockwise", "triton"))
    missing = {c.title: c.missing for c in contenders(CPU, VARIANTS)}
    assert missing["triton (in)"] == "runs on CUDA only"
    assert missing["blockwise (decoupled)"] is None
    assert {c.name: c.missing for c in contenders(torch.device("cuda"))}["triton"] is None


def test_peers_know_one_variant():
    titles = [c.title for c in contenders(CPU, ["in"])]
    assert "naive (in)" in titles
    assert not {COMPILED, "chunked recompute", METRIC_LEARNING, "naive"} & set(titles)


def test_what_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = {c.name: c.missing for c in contenders(CPU)}
    assert missing[METRIC_LEARNING] == "not installed (pip install pytorch-metric-learning)"
    assert missing[COMPILED] == "needs a C++ compiler"
    monkeypatch.setenv("CXX", "mine")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "mine" else None)
    assert {c.name: c.missing for c in contenders(CPU)}[COMPILED] is None
    assert missing[BARE] is None
    assert {c.name: c.missing for c in contenders(torch.device("cuda"))}[COMPILED] == "needs triton"
