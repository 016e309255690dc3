"""Objectives on pairs of embeddings, against loops over the pairs."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.baselines.problems import (
    assert_equals,
    call,
    gradients,
    joined,
    leaves,
    make,
    others,
    problem,
    problems,
    tokens,
    unit,
)

few = settings(max_examples=60, deadline=None)


def simctg(margin, layer="hidden"):
    def naive(p):
        total, states = 0, p["hidden"] if layer == "hidden" else p["earlier"][layer]
        for b, i, _ in tokens(p):
            e, js = unit(states[b, i]), others(p, b, i)
            for j in js:
                gap = margin - e.dot(e) + e.dot(unit(states[b, j]))
                total = total + (gap if gap > 1e-12 else 0 * gap) / len(js)
        return total

    return naive


@few
@given(p=problems(), margin=st.sampled_from([0.0, 0.5, 1.3]))
def test_simctg(p, margin):
    assert_equals(make("simctg", p, margin=margin, weight=0.7), p, simctg(margin))


def test_simctg_of_several_layers():
    p = problem(documents=2)
    objective = make("simctg", p, depths=[0.25, 0.5])
    assert objective.reads.depths == (0.25, 0.5)
    layers = [simctg(0.5, layer) for layer in ("hidden", 0, 1)]
    assert len({round(float(naive(p)), 6) for naive in layers}) == 3
    assert_equals(objective, p, lambda p: sum(naive(p) for naive in layers) / 3)


def cosine(p, threshold=None):
    total = 0
    for b, i, _ in tokens(p):
        js = others(p, b, i)
        if not js:
            continue
        mean = sum(unit(p["hidden"][b, i]).dot(unit(p["hidden"][b, j])) for j in js) / len(js)
        total = total + (mean if threshold is None else (mean - threshold).relu())
    return total


@few
@given(p=problems(), threshold=st.sampled_from([None, 0.0, 0.4]))
def test_cosine(p, threshold):
    truth = functools.partial(cosine, threshold=threshold)
    assert_equals(make("cosine", p, weight=0.7, threshold=threshold), p, truth)


def contraclm(views, temperature):
    """The loop for given views `[2, B, L, d]` of the hidden states."""

    def naive(p):
        total = 0
        for b, i, _ in tokens(p):
            for v in (0, 1):
                anchor = unit(views(p)[v, b, i])
                positive = anchor.dot(unit(views(p)[1 - v, b, i])) / temperature
                negatives = [
                    anchor.dot(unit(views(p)[w, b, j])) / temperature
                    for j in others(p, b, i)
                    for w in (0, 1)
                ]
                total = total + (torch.stack([positive, *negatives]).logsumexp(0) - positive) / 2
        return total

    return naive


@few
@given(p=problems(), dropout=st.sampled_from([0.0, 0.1, 0.5]), training=st.booleans())
def test_contraclm_given_its_masks(p, dropout, training):
    torch.manual_seed(5)
    ones = torch.ones_like(p["hidden"])
    masks = torch.stack([F.dropout(ones, dropout, training) for _ in range(2)])
    objective = make("contraclm", p, temperature=0.2, dropout=dropout, weight=0.7).train(training)
    torch.manual_seed(5)
    assert_equals(objective, p, contraclm(lambda p: masks * p["hidden"], 0.2))


def test_contraclm_drops_only_in_training():
    p = problem()
    objective = make("contraclm", p, dropout=0.5)
    assert call(objective, p)[0] != call(objective, p)[0]
    objective.eval()
    assert call(objective, p)[0] == call(objective, p)[0]


def test_contraclm_equals_nt_xent():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    p = problem(batch=1, length=9, ignored=0)
    torch.manual_seed(5)
    views = [F.dropout(p["hidden"], 0.1)[0] for _ in range(2)]
    peer = losses.NTXentLoss(temperature=0.05)
    expected = peer(torch.cat(views), torch.arange(9).repeat(2))
    objective = make("contraclm", p)
    torch.manual_seed(5)
    torch.testing.assert_close(call(objective, p)[0], expected, rtol=1e-9, atol=0)


def spread(p, states, temperature):
    total = 0
    for b, i, _ in tokens(p):
        mine = [j for c, j, _ in tokens(p) if c == b and joined(p, b, i, j)]
        near = []
        for j in mine:
            for k in mine:
                if j != k:
                    cos = unit(states[b, j]).dot(unit(states[b, k]))
                    angle = cos.arccos() if cos.abs() < 1 - 1e-6 else cos.detach().sign()
                    if cos.abs() >= 1 - 1e-6:  # flat there
                        angle = (angle * (1 - 1e-6)).arccos()
                    near.append((-angle / (math.pi * temperature)).exp())
        if near:
            total = total + torch.stack(near).mean().log()
    return total


@settings(max_examples=30, deadline=None)
@given(p=problems(), temperature=st.sampled_from([0.02, 0.5, 3.0]))
def test_dispersion(p, temperature):
    objective = make("dispersion", p, temperature=temperature, weight=0.7)
    assert_equals(objective, p, lambda p: spread(p, p["hidden"], temperature))


def test_dispersion_of_several_layers():
    p = problem(documents=2)
    objective = make("dispersion", p, depths=[0.25, 0.5])
    assert objective.reads.depths == (0.25, 0.5)
    layers = [p["hidden"], *p["earlier"]]
    assert len({round(float(spread(p, x, 0.5)), 6) for x in layers}) == 3
    assert_equals(
        objective, p, lambda p: sum(spread(p, x, 0.5) for x in (p["hidden"], *p["earlier"])) / 3
    )


NAIVE = {
    "simctg": simctg(0.5),
    "cosine": cosine,
    "contraclm": contraclm(lambda p: torch.stack([p["hidden"]] * 2), 0.05),
    "dispersion": lambda p: spread(p, p["hidden"], 0.5),
}


@pytest.mark.parametrize("name", NAIVE)
def test_zero_and_tiny_vectors(name):
    p = problem(ignored=0)
    p["hidden"][0, 0] = 0
    p["hidden"][0, 1] *= 1e-7 / p["hidden"][0, 1].norm()  # below the least norm: gradients are huge
    objective = make(name, p, weight=1e-6).eval()
    assert_equals(objective, p, NAIVE[name])
    q, (hidden, *_) = leaves(p)
    assert gradients(call(objective, q)[0], [hidden])[0][0, :2].norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("name", NAIVE)
def test_steps_against_the_gradient_part_the_embeddings(name):
    p = problem(seed=1, length=5, ignored=0)
    p["hidden"] = p["hidden"] * 0.3 + 1  # a narrow cone
    objective = make(name, p).eval()

    def mean_cosine(hidden):
        units = F.normalize(hidden, dim=-1)
        return (units @ units.mT).mean()

    q, (hidden, *_) = leaves(p)
    (grad, *_) = gradients(call(objective, q)[0], [hidden])
    assert mean_cosine(hidden - 0.1 * grad) < mean_cosine(hidden)
