"""Losses that are summed, whose gradient on the CPU comes with them."""

import logging

import pytest
import torch
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint

from simreg import SimRegLoss, explain, simreg_loss
from simreg.kernels import blockwise, op
from simreg.kernels.order import Form
from tests.kernels.problems import each_variant, problem, small_tiles
from tests.peak import Peak
from tests.test_loss import problems
from tests.truth import brute_force

FACTOR = -0.37  # of dL/dloss


def gradient(hidden, labels, backend="auto", **options):
    """Of a sum times a factor, and its value."""
    leaf = hidden.detach().requires_grad_()
    loss = FACTOR * simreg_loss(leaf, labels, reduction="sum", backend=backend, **options)
    loss.backward()
    return loss.detach(), leaf.grad


def refuse(*arguments):
    raise AssertionError("not expected to be called")


@each_variant
@pytest.mark.parametrize("push", [0.0, 2.0])
@pytest.mark.parametrize("segments", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("classes", [1, 7, 10**6])
def test_equals_the_reference(monkeypatch, variant, push, length, classes, segments):
    # With tiles of 16: rows whose tiles are kept, rows that are not sorted, and the others
    hidden, labels, ids = problem(70, length, 5, classes, segments)
    options = {"variant": variant, "segments": ids, "push": push, "push_above": 0.2}
    truth = gradient(hidden, labels, backend="reference", **options)
    monkeypatch.setattr(op, "loss", refuse)
    monkeypatch.setattr(blockwise, "backward", refuse)
    with small_tiles("blockwise"):
        ours = gradient(hidden, labels, **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(problems())
def test_equals_the_definition(example):
    hidden, labels, options = example
    leaf = hidden.clone().requires_grad_()
    truth = FACTOR * brute_force(leaf, labels, **options).sum()
    (expected,) = torch.autograd.grad(truth, leaf, allow_unused=True)
    value, grad = gradient(hidden, labels, **options)
    torch.testing.assert_close(value, truth.detach(), rtol=1e-9, atol=1e-9)
    expected = torch.zeros_like(grad) if expected is None else expected
    torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-9)


@each_variant
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("length", [100, 250, 500, 600])
def test_as_accurate_as_the_naive_loss(variant, temperature, length):
    hidden, labels, _ = problem(3, length, 65, 40, dtype=torch.float32)
    options = {"variant": variant, "temperature": temperature, "push": 3.0, "push_above": 0.1}
    truth = gradient(hidden.double(), labels, backend="reference", **options)
    naive = gradient(hidden, labels, backend="reference", **options)
    ours = gradient(hidden, labels, **options)
    for value, plain, exact in zip(ours, naive, truth, strict=True):
        error, allowed = (value - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()


@each_variant
@pytest.mark.parametrize("length", [8, 40])
def test_any_other_weights_are_right_too(variant, length):
    hidden, labels, ids = problem(3, length, 5, 7, 2)
    options = (0.1, variant, 2.0, 0.2)
    weights = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64).view_as(labels)
    grads = []
    with small_tiles("blockwise"):
        for results in (
            lambda h: op.summed(h, labels, ids, *options, "auto"),
            lambda h: op.loss(h, labels, ids, *options, "reference"),
        ):
            leaf = hidden.clone().requires_grad_()
            (results(leaf)[0] * weights).sum().backward()
            grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight", [2.0, torch.inf, torch.nan])
def test_what_arrives_at_ignored_tokens_counts_for_nothing(monkeypatch, weight):
    hidden, labels, _ = problem(3, 40, 5, 7)
    monkeypatch.setattr(blockwise, "backward", refuse)
    expected = gradient(hidden, labels)[1]
    leaf = hidden.clone().requires_grad_()
    loss = op.summed(leaf, labels, None, 0.1, "out", 0.0, 0.5, "auto")[0]
    loss.backward(torch.full_like(loss, FACTOR).masked_fill(labels < 0, weight))
    assert torch.equal(leaf.grad, expected)


def test_without_labels_there_is_no_gradient():
    hidden, labels, _ = problem(2, 12, 5, 4)
    ignored, turned = torch.full_like(labels, -100), hidden.mT.contiguous().mT
    for states in (hidden, turned):
        value, grad = gradient(states, ignored, push=2.0)
        assert value == 0
        assert torch.equal(grad, torch.zeros_like(hidden))
    results = op.summed(turned, ignored, None, 0.1, "out", 2.0, 0.5, "auto")
    backward = (torch.ones(2, 12).double(), turned, ignored, None, *results[3:])
    options = (0.1, "out", 2.0, 0.5, "auto")
    torch.library.opcheck(op.summed_backward, (*backward, *options))
    assert op.summed(hidden[:0], labels[:0], None, *options)[0].shape == (0, 12)
    assert op.loss(hidden[:0], labels[:0], None, *options)[0].shape == (0, 12)


@pytest.mark.parametrize(
    ("ignored", "moved"),
    [
        (slice(0, 0), False),
        (slice(15, 16), False),
        (slice(9, 16), False),  # padding
        (slice(3, 4), False),
        (slice(3, 5), True),
        (slice(0, 16), False),
    ],
)
def test_short_rows_are_sorted_only_for_ignored_tokens_among_others(ignored, moved):
    labels = torch.arange(16).expand(2, 16) % 3
    labels = labels.masked_fill(torch.isin(torch.arange(16), torch.arange(16)[ignored]), -1)
    order = blockwise.describe(blockwise.sort_tokens(labels, None), labels, None)
    with small_tiles("blockwise"):
        assert blockwise.Rows.of(torch.randn(2, 16, 4), order).moved == moved
        hidden = torch.randn(2, 16, 4, dtype=torch.float64)
        ours, truth = (gradient(hidden, labels, backend=b) for b in ("auto", "reference"))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("length", [8, 12, 40])
def test_a_bad_token_leaves_other_rows_as_they_are(length, bad):
    hidden, labels, ids = problem(3, length, 5, 4, 2)
    labels[1, 3], ids[1, 3] = 2, 0
    hidden[labels < 0] = bad  # never read
    clean = gradient(hidden, labels, segments=ids, push=2.0)[1]
    hidden[1, 3, 2] = bad
    with small_tiles("blockwise"):
        found = gradient(hidden, labels, segments=ids, push=2.0)[1]
    torch.testing.assert_close(found[::2], clean[::2], rtol=1e-9, atol=1e-9)
    assert found[1][(ids[1] == 0) & (labels[1] >= 0)].isnan().all()


@pytest.mark.parametrize("length", [12, 600])
def test_strided_hidden_states(length):
    hidden, labels, _ = problem(3, length, 8, 5, dtype=torch.float32)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    plain = gradient(hidden, labels)
    for ours, expected in zip(gradient(strided, labels.mT.contiguous().mT), plain, strict=True):
        assert torch.equal(ours, expected)


def test_only_where_it_pays(monkeypatch):
    hidden, labels, _ = problem(2, 12, 5, 4, dtype=torch.float32)
    monkeypatch.setattr(op, "summed", refuse)
    wanted = hidden.clone().requires_grad_()
    with torch.no_grad():
        simreg_loss(wanted, labels)
    simreg_loss(hidden, labels)
    SimRegLoss(0.0)(wanted, labels)
    simreg_loss(wanted, labels, reduction="none")
    simreg_loss(wanted, labels, backend="reference")
    simreg_loss(wanted.bfloat16(), labels)  # it would be rounded twice
    for compute in (simreg_loss, SimRegLoss()):
        with pytest.raises(AssertionError, match="not expected"):
            compute(wanted, labels)


@pytest.mark.parametrize(
    ("length", "variant", "temperature", "times"),
    [
        (8, "out", 0.1, 1),
        (8, "in", 0.1, 1),
        (8, "decoupled", 0.1, 3),
        (8, "out", 0.01, 2),
        (9, "out", 0.1, 2),
    ],
)
def test_tiles_of_short_rows_are_computed_once(monkeypatch, length, variant, temperature, times):
    tiles, products = [], []
    found, multiplied = blockwise.tiles, blockwise.Rows.similarities
    monkeypatch.setattr(
        blockwise, "tiles", lambda *a: (tiles.append(tile) or tile for tile in found(*a))
    )
    monkeypatch.setattr(
        blockwise.Rows, "similarities", lambda *a: products.append(1) or multiplied(*a)
    )
    hidden, labels, _ = problem(3, length, 5, 2)
    with small_tiles("blockwise"):
        order = blockwise.describe(blockwise.sort_tokens(labels, None), labels, None)
        one_pass = len(list(found(order.in_rows(), 16)))
        gradient(hidden, labels, variant=variant, temperature=temperature)
    assert len(products) == times * one_pass


def test_gradients_of_many_short_rows_are_not_copied():
    hidden, labels, _ = problem(300, 8, 512, 5, dtype=torch.float32)
    with small_tiles("blockwise"), Peak(hidden, labels) as memory:
        blockwise.forward_and_gradient(hidden, labels, None, Form(0.1, "out", 2.0))
    # Embeddings, their gradient, what is known of tokens and of the pairs of 16 rows
    assert memory.peak <= 2 * hidden.nbytes + 400 * labels.numel() + 16 * 8 * 8 * 4 * 10


def test_the_log_says_what_explain_says(caplog):
    hidden, labels, _ = problem(1, 9, 4, 3)
    hidden.requires_grad_()
    for backend in ("auto", "blockwise"):
        with caplog.at_level(logging.DEBUG, "simreg"):
            simreg_loss(hidden, labels, backend=backend)
        name, why = explain(hidden, backend=backend).split(": ", 1)
        assert f"backend {name} ({why}) for [1, 9, 4]" in caplog.text


def test_storage_saved_for_backward():
    hidden, labels, ids = problem(2, 48, 64, 30, 2, dtype=torch.float32)
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = hidden.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = simreg_loss(leaf, labels, segments=ids)
    tokens = labels.numel()
    # hidden itself and the gradient; labels, segments, the permutation; and a few floats a token
    assert 8 * 64 * tokens <= sum(saved.values()) <= tokens * (8 * 64 + 3 * 8 + 8 * 4)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_variant
def test_custom_op_is_well_formed(variant):
    hidden = torch.randn(2, 20, 4, requires_grad=True)
    # Every token has positives and negatives: opcheck takes NaN (a mean of none) for a difference.
    labels = (torch.arange(20).expand(2, 20) % 3).contiguous()
    ids = (torch.arange(20).expand(2, 20) // 10).contiguous()
    for segments in (None, ids):
        options = (0.1, variant, 3.0, 0.5, "auto")
        torch.library.opcheck(op.summed, (hidden, labels, segments, *options))
        saved = [value.detach() for value in op.summed(hidden, labels, segments, *options)[3:]]
        for grad in (torch.randn(2, 20), torch.ones(2, 20)):
            backward = (grad, hidden.detach(), labels, segments, *saved, *options)
            torch.library.opcheck(op.summed_backward, backward)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed-chunks"])
def test_compiles_once_for_all_lengths(packed):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(simreg_loss, fullgraph=True, backend=count, dynamic=True)
    with small_tiles("blockwise"):
        for length in (7, 12, 28, 33):
            hidden, labels, segments = problem(2, length, 8, 5, 3, torch.float32)
            options = {"segments": segments, "chunk_size": 5} if packed else {}
            grads = []
            for loss in (compiled, simreg_loss):
                leaf = hidden.clone().requires_grad_()
                loss(leaf, labels, **options).backward()
                grads.append(leaf.grad)
            assert torch.equal(*grads)
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_autocast_and_checkpointing_change_nothing(reentrant):
    hidden, labels, _ = problem(2, 20, 8, 5, dtype=torch.float32)

    def checkpointed(h, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(simreg_loss, h, y, use_reentrant=reentrant)

    grads = []
    for loss in (simreg_loss, checkpointed):
        leaf = hidden.clone().requires_grad_()
        loss(leaf, labels).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_differentiable_once():
    hidden, labels, _ = problem(1, 9, 4, 3, dtype=torch.float32)
    loss = simreg_loss(hidden.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
