"""Objectives with targets of their own: NITP's projector and the centres of classes."""

import copy

import pytest
import torch
from hypothesis import given, settings

from tests.baselines.problems import (
    assert_equals,
    call,
    gradients,
    joined,
    leaves,
    make,
    problem,
    problems,
    tokens,
    unit,
)


@settings(max_examples=60, deadline=None)
@given(p=problems())
def test_nitp(p):
    objective = make("nitp", p, expansion=3, weight=0.7)
    for weight in objective.parameters():
        weight.data.mul_(50)
    gate, up, down = (layer.weight for layer in (objective.gate, objective.up, objective.down))

    def naive(p):
        total = 0
        for b, i, _ in tokens(p):
            if (b, i + 1) in [(c, j) for c, j, _ in tokens(p)] and joined(p, b, i, i + 1):
                h, z = p["hidden"][b, i], unit(p["earlier"][0][b, i + 1].detach())
                opened = gate @ h
                guess = down @ (opened * torch.sigmoid(opened) * (up @ h))
                total = total + 1 - unit(guess).dot(z)
        return total

    assert_equals(objective, p, naive)


def test_nitp_trains_its_projector_and_leaves_its_targets_alone():
    p, inputs = leaves(problem(dim=16, ignored=0))
    objective = make("nitp", p)
    hidden, _, shallow, other = gradients(call(objective, p)[0], inputs)
    assert hidden.abs().sum() > 0
    assert hidden[:, -1].abs().sum() == shallow.abs().sum() == other.abs().sum() == 0
    first = call(objective, p)[0].item()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        call(objective, p)[0].backward()
        optimizer.step()
    assert call(objective, p)[0] < 0.2 * first
    assert {key: tuple(x.shape) for key, x in objective.state_dict().items()} == {
        "gate.weight": (64, 16),
        "up.weight": (64, 16),
        "down.weight": (16, 64),
    }


def test_nitp_starts_small_and_reads_an_early_layer():
    objective = make("nitp", problem(dim=64))
    assert objective.reads.depths == (0.2,)
    for weight in objective.parameters():
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(p=problems())
def test_center(p):
    objective = make("center", p, weight=0.7)
    centers = objective.centers.clone()

    def naive(p):
        total = 0
        for b, i, y in tokens(p):
            total = total + 0.5 * (unit(p["hidden"][b, i]) - centers[y]).square().sum()
        return total

    assert_equals(objective, p, naive)


@settings(max_examples=60, deadline=None)
@given(p=problems())
def test_centers_move_towards_the_means_of_their_labels(p):
    objective = make("center", p, alpha=0.3)
    expected = objective.centers.clone()
    for y in range(len(expected)):
        mine = [unit(p["hidden"][b, i]) for b, i, label in tokens(p) if label == y]
        for e in mine:
            expected[y] -= 0.3 * (objective.centers[y] - e) / (1 + len(mine))
    frozen = copy.deepcopy(objective).eval()
    call(objective, p)
    torch.testing.assert_close(objective.centers, expected, rtol=1e-12, atol=1e-12)
    before = frozen.centers.clone()
    call(frozen, p)
    assert torch.equal(frozen.centers, before)


def test_centers_find_the_means_and_are_saved():
    p = problem(ignored=0, length=40, vocab=3)
    objective = make("center", p)
    for _ in range(60):
        call(objective, p)
    units = torch.nn.functional.normalize(p["hidden"], dim=-1)
    for y in range(3):
        torch.testing.assert_close(objective.centers[y], units[p["labels"] == y].mean(0))
    assert list(objective.parameters()) == []
    again = make("center", p)
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.centers, objective.centers)


def test_a_center_without_tokens_does_not_pull():
    p, inputs = leaves(problem(ignored=0))
    objective = make("center", p).eval()
    objective.centers.zero_()
    loss, _ = call(objective, p)
    assert loss.item() == pytest.approx(0.5 * objective.weight)
    assert gradients(loss, inputs)[0].abs().max() < 1e-12
