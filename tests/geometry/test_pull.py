import pytest
import torch
from torch.nn import functional as F

from simreg.geometry.pull import gradient_ratio
from simreg.loss import SimRegLoss, simreg_loss


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 5, generator=generator)
    labels = torch.randint(0, 4, (2, 9), generator=generator)
    labels[0, :3] = -100
    return hidden, labels, torch.randn(7, 5, generator=generator), torch.randn(7)


@pytest.mark.parametrize("segments", [None, torch.arange(9).expand(2, 9) // 4])
@torch.no_grad()
def test_it_is_the_ratio_of_the_two_gradients(segments):
    hidden, labels, head, bias = problem()
    given = hidden, labels, head, bias
    found = gradient_ratio(*given, SimRegLoss(0.4, temperature=0.2, push=2), segments)
    with torch.enable_grad():
        h = hidden.double().requires_grad_()
        logits = h @ head.double().T + bias.double()
        ce = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        settings = {"temperature": 0.2, "push": 2, "reduction": "sum"}
        reg = 0.4 * simreg_loss(h, labels, segments=segments, **settings)
        one, other = (torch.autograd.grad(x, h)[0].norm() for x in (reg, ce))
    assert found == pytest.approx(float(one / other), rel=1e-5)
    twice = gradient_ratio(*given, SimRegLoss(0.8, temperature=0.2, push=2), segments)
    assert twice == pytest.approx(2 * found, rel=1e-5)


def test_without_a_pull_there_is_none():
    hidden, labels, head, _ = problem()
    assert gradient_ratio(hidden, labels, head, None, SimRegLoss(0.0)) is None
    different = torch.arange(18).view(2, 9) % 7
    different[1] = -100  # and a row in which each label is there once
    different[0] = torch.tensor([0, 1, 2, 3, 4, 5, 6, -100, -100])
    assert gradient_ratio(hidden, different, head, None, SimRegLoss(1.0, push=0)) is None


def test_states_of_half_precision_are_looked_at_in_float32_and_left_alone():
    given = [x.bfloat16() if x.is_floating_point() else x for x in problem()]
    found = gradient_ratio(*given, SimRegLoss(0.4))
    wide = gradient_ratio(
        *(x.float() if x.is_floating_point() else x for x in given), SimRegLoss(0.4)
    )
    assert found == wide > 0
    assert not given[0].requires_grad
    whole = problem()[0]
    gradient_ratio(whole, *given[1:], SimRegLoss(0.4))
    assert not whole.requires_grad


def test_beside_no_gradient_of_cross_entropy_there_is_no_ratio():
    hidden, labels, head, _ = problem()
    assert gradient_ratio(hidden, labels, 0 * head, None, SimRegLoss(0.4)) is None
