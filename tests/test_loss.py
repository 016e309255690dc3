"""The loss against its definition, its invariances, and its contract."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simreg import SimRegLoss, explain, simreg_loss
from simreg.baselines.simctg import SimCTG
from simreg.loss import LEAST_TEMPERATURE, VARIANTS
from simreg.parallel import ShardedSimRegLoss
from tests.truth import brute_force

KERNELS = ("reference", "blockwise")
each_kernel = pytest.mark.parametrize("backend", KERNELS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def value_and_grad(loss_fn, hidden: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Per-token losses and the gradient of a fixed random combination of them."""
    hidden = hidden.detach().requires_grad_()
    loss = loss_fn(hidden, labels, **options)
    weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (grad,) = torch.autograd.grad((loss * weights).sum(), hidden, allow_unused=True)
    return loss.detach(), torch.zeros_like(hidden) if grad is None else grad


def per_token(hidden: Tensor, labels: Tensor, **options) -> Tensor:
    return simreg_loss(hidden, labels, reduction="none", **options)


@st.composite
def problems(draw):
    """Hidden states, labels and options: ragged shapes, ignored labels, non-contiguous segments."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, length)
    hidden = torch.randn(*shape, draw(st.integers(1, 5)), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, draw(st.integers(1, 6)), shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    labels = labels.masked_fill(ignored, -100)
    segments = None
    if draw(st.booleans()):
        segments = torch.randint(-2, draw(st.integers(-1, 3)), shape, generator=generator)
    options = {
        "variant": draw(st.sampled_from(VARIANTS)),
        "temperature": draw(st.sampled_from([0.01, 0.1, 1.0])),
        "push": draw(st.sampled_from([0.0, 3.0])),
        "push_above": draw(st.sampled_from([0.5, -0.2])),
        "chunk_size": draw(st.sampled_from([None, 2, 3, 100])),
        "segments": segments,
    }
    return hidden, labels, options


@each_kernel
@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_equals_the_definition(backend, problem):
    hidden, labels, options = problem
    truth, truth_grad = value_and_grad(brute_force, hidden, labels, **options)
    loss, grad = value_and_grad(per_token, hidden, labels, backend=backend, **options)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9)
    scale = 1 / options["temperature"]
    torch.testing.assert_close(grad, truth_grad, rtol=1e-9, atol=1e-9 * scale)
    assert (grad[labels == -100] == 0).all()


@each_kernel
@each_variant
def test_the_least_temperature_is_finite(backend, variant):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 20, 8, generator=generator)
    labels = torch.randint(0, 4, (1, 20), generator=generator)
    options = {"temperature": LEAST_TEMPERATURE, "variant": variant, "push": 3.0}
    for value in value_and_grad(per_token, hidden, labels, backend=backend, **options):
        assert value.isfinite().all()
        assert value.count_nonzero()


@each_kernel
@each_variant
def test_antipodal_at_low_temperature(backend, variant):
    # s spans 200 nats: any shift but the running maximum of the very set underflows to log 0.
    e = torch.tensor([1.0, 0.0])
    hidden = torch.stack([e, -e, e, -e, e])[None]
    labels = torch.tensor([[0, 0, 1, 1, 1]])
    options = {"temperature": 0.01, "variant": variant}
    truth, truth_grad = value_and_grad(brute_force, hidden.double(), labels, **options)
    loss, grad = value_and_grad(per_token, hidden, labels, backend=backend, **options)
    assert truth.max() > 100
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad.double(), truth_grad, rtol=1e-5, atol=1e-3)


@each_kernel
@each_variant
def test_zero_and_tiny_vectors(backend, variant):
    hidden = torch.randn(1, 6, 4, dtype=torch.float64)
    hidden[0, 0] = 0
    hidden[0, 1] *= 1e-7 / hidden[0, 1].norm()  # under ε: the gradient is (dL/de)/ε
    labels = torch.tensor([[0, 0, 1, 1, 0, 2]])
    truth, truth_grad = value_and_grad(brute_force, hidden, labels, variant=variant)
    loss, grad = value_and_grad(per_token, hidden, labels, variant=variant, backend=backend)
    assert truth_grad[0, 0].norm() > 1e4
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-9, atol=1e-9)


@each_variant
def test_gradcheck(variant):
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 7))
    labels[0, 2] = -100
    segments = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [3] * 7])
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda h, r=reduction: simreg_loss(
                h, labels, variant=variant, segments=segments, reduction=r, temperature=0.5
            ),
            hidden,
        )


@each_kernel
@each_variant
def test_invariances(backend, variant):
    torch.manual_seed(1)
    hidden = torch.randn(2, 40, 8, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 40))
    labels[1, :7] = -100

    def loss(h: Tensor, y: Tensor, **options) -> Tensor:
        return simreg_loss(h, y, variant=variant, backend=backend, **options)

    plain = loss(hidden, labels)
    scaled = loss(hidden * torch.rand(2, 40, 1).add(0.1), labels)
    shuffle = torch.randperm(40)
    shuffled = loss(hidden[:, shuffle], labels[:, shuffle])
    relabel = torch.randperm(1000)
    relabelled = loss(hidden, torch.where(labels < 0, labels, relabel[labels.clamp_min(0)]))
    doubled = loss(torch.cat([hidden, hidden]), torch.cat([labels, labels]))
    for other in (scaled, shuffled, relabelled, doubled):
        torch.testing.assert_close(other, plain, rtol=1e-12, atol=0)


@each_kernel
@each_variant
def test_packed_rows_equal_separate_rows(backend, variant):
    torch.manual_seed(2)
    hidden, labels = torch.randn(1, 30, 4, dtype=torch.float64), torch.randint(0, 5, (1, 30))
    ends = [0, 4, 5, 17, 30]
    segments = torch.zeros(1, 30, dtype=torch.int32)
    for k, (start, end) in enumerate(pairwise(ends)):
        segments[:, start:end] = 7 - k
    options = {"variant": variant, "backend": backend}
    packed = per_token(hidden, labels, segments=segments, **options)
    separate = [per_token(hidden[:, a:b], labels[:, a:b], **options) for a, b in pairwise(ends)]
    torch.testing.assert_close(packed, torch.cat(separate, 1), rtol=1e-12, atol=1e-12)


@each_kernel
@each_variant
@pytest.mark.parametrize("chunk", [2, 4, 5, 10, 30, 31])
def test_chunked_equals_calls_a_chunk(backend, variant, chunk):
    torch.manual_seed(3)
    hidden, labels = torch.randn(2, 30, 4, dtype=torch.float64), torch.randint(0, 5, (2, 30))
    segments = torch.randint(0, 2, (2, 30))
    options = {"variant": variant, "backend": backend}
    whole = per_token(hidden, labels, segments=segments, chunk_size=chunk, **options)
    parts = [
        per_token(h, y, segments=g, **options)
        for h, y, g in zip(
            hidden.split(chunk, 1), labels.split(chunk, 1), segments.split(chunk, 1), strict=True
        )
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)


@each_kernel
@each_variant
def test_ignored_tokens_are_never_read(backend, variant):
    torch.manual_seed(4)
    hidden, labels = torch.randn(2, 20, 4), torch.randint(0, 4, (2, 20))
    labels[:, ::3] = -100
    options = {"variant": variant, "backend": backend}
    loss, grad = value_and_grad(per_token, hidden, labels, **options)
    poisoned = hidden.masked_fill((labels < 0)[..., None], torch.nan)
    loss2, grad2 = value_and_grad(per_token, poisoned, labels, **options)
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)
    assert (grad[labels < 0] == 0).all()
    assert loss.abs().sum() > 0


@each_kernel
@each_variant
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("labels", [[0, 0, 1, 2], [0, 1, 2, 3]], ids=["positives", "none"])
def test_nan_in_nan_out(backend, variant, bad, labels):
    hidden = torch.randn(1, 4, 3)
    hidden[0, 3, 1] = bad
    assert simreg_loss(hidden, torch.tensor([labels]), variant=variant, backend=backend).isnan()


@each_kernel
@each_variant
def test_nothing_to_compare_is_zero(backend, variant):
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    nothing = [torch.full((2, 5), -100), torch.arange(10).view(2, 5)]
    for labels in nothing:
        loss = simreg_loss(hidden, labels, variant=variant, backend=backend)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert loss == 0
        assert (grad == 0).all()


@each_kernel
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 3), (2, 5, 0)])
def test_empty_input_is_zero(backend, shape):
    hidden = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    loss = per_token(hidden, labels, backend=backend, chunk_size=2)
    assert loss.shape == labels.shape
    total = simreg_loss(hidden[..., :0, :], labels[..., :0], backend=backend)
    total.backward()
    assert total == 0
    assert not hidden.grad.any()


def test_variants_agree_with_one_positive():
    torch.manual_seed(5)
    hidden = torch.randn(1, 4, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 0, 1, 1]])
    out, inside, decoupled = (per_token(hidden, labels, variant=v) for v in VARIANTS)
    torch.testing.assert_close(out, inside)
    torch.testing.assert_close(out, decoupled)


def test_mean_counts_every_valid_label():
    torch.manual_seed(6)
    hidden, labels = torch.randn(2, 12, 3), torch.randint(0, 8, (2, 12))
    labels[0, :5] = -100
    loss = per_token(hidden, labels)
    assert 0 < (loss > 0).sum() < (labels >= 0).sum()
    torch.testing.assert_close(simreg_loss(hidden, labels), loss.sum() / (labels >= 0).sum())
    torch.testing.assert_close(simreg_loss(hidden, labels, reduction="sum"), loss.sum())
    flat = simreg_loss(hidden[0], labels[0], reduction="none")
    torch.testing.assert_close(flat, loss[0])
    shifted = labels.masked_fill(labels == -100, -7)
    torch.testing.assert_close(per_token(hidden, shifted, ignore_index=-7), loss)
    for ignored in (0, 3):
        expected = per_token(hidden, labels.masked_fill(labels == ignored, -100))
        assert torch.equal(per_token(hidden, labels, ignore_index=ignored), expected)
        assert not torch.equal(expected, loss)
    torch.testing.assert_close(per_token(hidden, shifted), loss)  # negative labels are never valid
    assert simreg_loss(hidden, shifted) == simreg_loss(hidden, labels)


def test_divisors():
    hidden, labels = torch.randn(1, 8, 3), torch.zeros(1, 8, dtype=torch.int64)
    objective = SimRegLoss(weight=1.0)
    total, _ = objective(hidden, labels, num_items=1)
    for items in (16, 16.0, torch.tensor(16), torch.tensor([16])):
        loss, _ = objective(hidden, labels, num_items=items)
        assert loss.shape == ()
        torch.testing.assert_close(loss, total / 16)
    for nothing in (0, torch.tensor(0), None):
        loss, _ = objective(hidden, torch.full_like(labels, -100), num_items=nothing)
        assert loss == 0
    tensors = torch.tensor([7, 8]), torch.tensor(True), torch.tensor(7j)
    for bad in (-5, float("nan"), float("inf"), "7", *tensors):
        with pytest.raises(ValueError, match="num_items: expected a finite number"):
            objective(hidden, labels, num_items=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_dtype_and_gradient_dtype(dtype):
    hidden = torch.randn(1, 9, 4).to(dtype).requires_grad_()
    loss = simreg_loss(hidden, torch.randint(0, 3, (1, 9)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_module_is_the_weighted_function():
    torch.manual_seed(7)
    hidden, labels = torch.randn(2, 30, 6), torch.randint(0, 9, (2, 30))
    labels[0, :9] = -100
    module = SimRegLoss(0.25, temperature=0.2, chunk_size=10)
    loss, metrics = module(hidden, labels)
    mean = simreg_loss(hidden, labels, temperature=0.2, chunk_size=10, push=3.333)
    torch.testing.assert_close(loss, 0.25 * mean)
    torch.testing.assert_close(metrics["loss"], mean)
    doubled, _ = module(hidden, labels, num_items=2 * (labels >= 0).sum())
    torch.testing.assert_close(doubled, loss / 2)
    silent, metrics = SimRegLoss(0.0)(hidden.requires_grad_(), labels)
    assert silent == 0
    assert not silent.requires_grad
    assert metrics["loss"] > 0
    for wrong in (-1, float("nan"), "a"):
        module.weight = wrong
        with pytest.raises(ValueError, match="weight"):
            module(hidden, labels)
    numbers = SimRegLoss(np.float32(0.25), temperature=np.float32(0.2), push=np.float32(3.333))
    torch.testing.assert_close(
        numbers(hidden, labels)[0], SimRegLoss(0.25, temperature=0.2)(hidden, labels)[0]
    )


@each_kernel
@each_variant
def test_what_arrives_at_ignored_tokens_counts_for_nothing(backend, variant):
    torch.manual_seed(11)
    hidden = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 20)).masked_fill(torch.arange(20) % 4 == 0, -100)
    loss = per_token(hidden, labels, variant=variant, push=2, push_above=-0.5, backend=backend)
    plain = torch.ones_like(loss)
    poisoned = plain.masked_fill(labels < 0, torch.nan)
    found = [torch.autograd.grad(loss, hidden, w, retain_graph=True) for w in (plain, poisoned)]
    torch.testing.assert_close(found[1], found[0])


@each_kernel
def test_push_is_that_of_simctg(backend):
    """For embeddings that are not 0, whatever the labels, and weighted by λ too."""
    torch.manual_seed(10)
    hidden = torch.randn(2, 30, 6, dtype=torch.float64) + 0.7 * torch.randn(6)
    labels, segments = torch.randint(0, 9, (2, 30)), torch.randint(0, 3, (2, 30))
    labels[0, :9] = -100
    options = {"weight": 0.3, "chunk_size": None, "backend": backend}
    push, _ = SimCTG(weight=0.6, margin=0.4)(hidden, labels, segments)
    plain, _ = SimRegLoss(**options, push=0)(hidden, labels, segments)
    pushed, metrics = SimRegLoss(**options, push=2, push_above=0.6)(hidden, labels, segments)
    assert push > 0.01
    torch.testing.assert_close(pushed, plain + push)
    torch.testing.assert_close(metrics["loss"] * 0.3, pushed)


@each_kernel
@pytest.mark.parametrize("segmented", [False, True])
def test_metrics_are_mean_cosines(backend, segmented):
    torch.manual_seed(8)
    hidden, labels = torch.randn(2, 15, 4), torch.randint(0, 6, (2, 15))
    labels[1, 3:6] = -100
    labels[0] = 2  # none of which has a negative
    segments = torch.randint(0, 2, (2, 15)) if segmented else None
    _, metrics = SimRegLoss(backend=backend)(hidden, labels, segments)
    cosines: dict[bool, list[float]] = {True: [], False: []}
    for b in range(2):
        for i in range(15):
            of_token: dict[bool, list[float]] = {True: [], False: []}
            for j in range(15):
                same = segments is None or segments[b, i] == segments[b, j]
                if i != j and same and labels[b, i] >= 0 and labels[b, j] >= 0:
                    cosine = torch.cosine_similarity(hidden[b, i], hidden[b, j], dim=0)
                    of_token[bool(labels[b, i] == labels[b, j])].append(cosine.item())
            for kind, values in of_token.items():
                if values:
                    cosines[kind].append(sum(values) / len(values))
    valid = int((labels >= 0).sum())
    for name, kind in (("pos", True), ("neg", False)):
        assert metrics[f"{name}_fraction"].item() == pytest.approx(len(cosines[kind]) / valid)
        expected = sum(cosines[kind]) / len(cosines[kind])
        assert metrics[f"{name}_cos"].item() == pytest.approx(expected, abs=1e-5)


def test_negative_cosine_is_not_a_difference_of_large_sums():
    # 4095 clustered positives and one foreign label: all − positives would lose the negative.
    torch.manual_seed(9)
    hidden = torch.randn(64) * 10 + torch.randn(1, 4096, 64)
    labels = torch.zeros(1, 4096, dtype=torch.int64)
    hidden[0, 7], labels[0, 7] = torch.randn(64), 1
    _, single = SimRegLoss()(hidden, labels)
    _, double = SimRegLoss()(hidden.double(), labels)
    assert single["neg_cos"].item() == pytest.approx(double["neg_cos"].item(), abs=1e-6)


def test_needs_torch_alone():
    extras = ["transformers", "accelerate", "numpy", "pydantic", "yaml", "tyro", "rich", "triton"]
    block = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    use = "import torch, simreg; simreg.simreg_loss(torch.randn(1, 4, 2), torch.zeros(1, 4).long())"
    subprocess.run([sys.executable, "-c", f"{block}; {use}"], check=True, timeout=300)


H, Y = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((H[0, 0], Y), {}, "hidden"),
        ((H.int(), Y), {}, "hidden"),
        ((H, Y[:, :3]), {}, "labels"),
        ((H, Y.int()), {}, "labels"),
        ((H, Y.to("meta")), {}, "labels"),
        ((H, Y), {"segments": Y[:1]}, "segments"),
        ((H, Y), {"segments": Y.float()}, "segments"),
        ((H, Y), {"segments": Y.to("meta")}, "segments"),
        ((H, Y), {"temperature": 0.0}, "temperature"),
        ((H, Y), {"temperature": float("nan")}, "temperature"),
        ((H, Y), {"temperature": 1e-40}, "temperature"),
        ((H, Y), {"variant": "both"}, "variant"),
        ((H, Y), {"push": -1.0}, "push"),
        ((H, Y), {"push": float("inf")}, "push"),
        ((H, Y), {"push_above": 1.5}, "push_above"),
        ((H, Y), {"push_above": float("nan")}, "push_above"),
        ((H, Y), {"chunk_size": 0}, "chunk_size"),
        ((H, Y), {"chunk_size": 1}, "chunk_size"),
        ((H, Y), {"chunk_size": True}, "chunk_size"),
        ((H, Y), {"ignore_index": None}, "ignore_index"),
        ((H, Y), {"ignore_index": 2**70}, "ignore_index"),
        ((H, Y), {"temperature": "a"}, "temperature"),
        ((H, [[0]]), {}, "labels"),
        ((H, Y), {"reduction": "max"}, "reduction"),
        ((H, Y), {"backend": "fast"}, "backend"),
    ],
)
def test_bad_arguments_are_named(arguments, options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected .* got "):
        simreg_loss(*arguments, **options)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "0.3"])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match=r"^weight: expected"):
        SimRegLoss(weight)


def test_a_weight_in_a_tensor_is_told_how_to_leave_it():
    with pytest.raises(ValueError, match=r"^weight: .*got tensor\(0.3000\) \(.*item\(\)"):
        SimRegLoss(torch.tensor(0.3))


@pytest.mark.parametrize("items", [[100, 101, 102], [100.5, 101.5, 102.5]], ids=["int", "float"])
def test_a_divisor_that_changes_compiles_without_a_break(items):
    """Tokens of the whole batch, under gradient accumulation."""
    hidden, labels = torch.randn(2, 12, 4), torch.arange(24).view(2, 12) % 3
    objective, graphs = SimRegLoss(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda n: objective(hidden, labels, num_items=n)[0], fullgraph=True, backend=count
    )
    for each in items:
        torch.testing.assert_close(compiled(each), objective(hidden, labels, num_items=each)[0])
    assert len(graphs) <= 2  # the first number, then any


@pytest.mark.parametrize("temperature", [1e-31, 1e39, float("inf"), float("nan"), "0.1"])
def test_temperatures_that_float32_cannot_hold_are_refused(temperature):
    hidden, labels = torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature: expected a number from 1e-30 to 1e\\+30"):
        SimRegLoss(temperature=temperature)(hidden, labels)
    _, metrics = SimRegLoss(temperature=1e30)(hidden, labels)
    assert not any(value.isnan() for name, value in metrics.items() if name != "neg_cos")


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        ([1], "expected a tensor, got list"),
        (torch.ones(1, 2, 3).to_sparse(), "expected a dense tensor"),
        (torch.ones(2, 3, dtype=torch.long), r"expected \[B, L, d\] or"),
        (torch.ones(3), r"expected \[B, L, d\] or"),
    ],
)
def test_explain_refuses_what_the_loss_refuses(hidden, says):
    with pytest.raises(ValueError, match=f"hidden: {says}"):
        explain(hidden)


@pytest.mark.parametrize("kind", [SimRegLoss, ShardedSimRegLoss])
def test_a_wrong_ignore_index_is_refused_at_once(kind):
    with pytest.raises(ValueError, match="ignore_index: expected an int of 64 bits, got 'x'"):
        kind(ignore_index="x")


def test_the_repr_says_what_is_not_as_usual():
    assert "ignore_index" not in repr(SimRegLoss())
    said = repr(SimRegLoss(ignore_index=0, backend="reference"))
    assert said.endswith(", ignore_index=0, backend='reference')")
