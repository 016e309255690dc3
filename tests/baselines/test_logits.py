"""Objectives on logits, against loops over the tokens and against torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from simreg.baselines.reweighting import STRATEGIES, Reweighting
from simreg.capture import attach, shift_left
from tests.baselines.problems import (
    assert_equals,
    call,
    changed,
    gradients,
    joined,
    leaves,
    make,
    problem,
    problems,
    tokens,
)
from tests.test_capture import batch, build

few = settings(max_examples=60, deadline=None)


def surprise(logits, label):
    return -(logits.exp() / logits.exp().sum())[label].log()


@few
@given(p=problems())
def test_z_loss(p):
    def naive(p):
        return sum(p["logits"][b, i].exp().sum().log() ** 2 for b, i, _ in tokens(p))

    assert_equals(make("z-loss", p, weight=0.7), p, naive)


@few
@given(p=problems(), epsilon=st.sampled_from([0.0, 0.1, 1.0]))
def test_label_smoothing(p, epsilon):
    def naive(p):
        total = 0
        for b, i, y in tokens(p):
            every = [surprise(p["logits"][b, i], j) for j in range(p["logits"].shape[-1])]
            total = total + sum(every) / len(every) - every[y]
        return total

    assert_equals(make("label-smoothing", p, weight=epsilon), p, naive)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7, 1.0])
def test_label_smoothing_makes_that_of_torch(epsilon):
    p, inputs = leaves(problem(seed=4, batch=3, length=11, vocab=9))
    flat, labels = p["logits"].flatten(0, 1), p["labels"].flatten()
    expected = F.cross_entropy(flat, labels, label_smoothing=epsilon)
    added, _ = call(make("label-smoothing", p, weight=epsilon), p)
    loss = F.cross_entropy(flat, labels) + added
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@few
@given(p=problems())
def test_deep_supervision(p):
    def naive(p):
        total = 0
        for b, i, y in tokens(p):
            state = p["earlier"][0][b, i]
            size = (state.square().mean() + 1e-6).sqrt()
            total = total + surprise(p["head"].weight @ (state / size) + p["head"].bias, y)
        return total

    assert_equals(make("deep-supervision", p, weight=0.7), p, naive)


@pytest.mark.parametrize(
    ("states", "weights"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),  # autocast
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_deep_supervision_has_the_models_precision(states, weights):
    p = changed(problem(), lambda x: x.to(states))
    seen = []
    p["head"].to(weights).register_forward_hook(lambda *call: seen.append(call[2].dtype))
    hidden, labels = p["hidden"], p["labels"]
    objective = make("deep-supervision", p)
    loss, _ = objective(hidden, labels, head=p["head"], earlier=p["earlier"][:1])
    assert seen == [states]
    assert loss.dtype == torch.float32


def test_deep_supervision_says_that_the_head_does_not_fit():
    p = problem()
    with pytest.raises(ValueError, match=r"the LM head takes states of width 4, .* layer have 3"):
        make("deep-supervision", p)(
            p["hidden"], p["labels"], head=p["head"], earlier=[p["earlier"][0][..., :3]]
        )


def test_deep_supervision_of_the_last_layer_is_cross_entropy():
    """As long as the gain of the final norm is 1."""
    model = build()
    ids, labels = batch()[:2]
    objective = make("deep-supervision", problem(), weight=1.0, depth=1.0)
    with attach(model, objective) as reg:
        out = model(input_ids=ids, labels=labels)
        torch.testing.assert_close(reg(labels), out.loss)


@few
@given(p=problems(), horizon=st.integers(2, 9))
def test_mtp(p, horizon):
    last = p["labels"].shape[1] - 1

    def reached(p, b, i, j):
        """Whether the token that is the label of j is in the row, and all up to it one segment."""
        return j < last and joined(p, b, i, j) and joined(p, b, i, j + 1)

    def naive(p):
        total = 0
        for b, i, _ in tokens(p):
            for c, j, y in tokens(p):
                if c == b and i < j < i + horizon and reached(p, b, i, j):
                    total = total + surprise(p["logits"][b, i], y) / (horizon - 1)
        return total

    assert_equals(make("mtp", p, horizon=horizon, weight=0.7), p, naive)


@pytest.mark.parametrize("horizon", [2, 3, 9])
def test_mtp_does_not_predict_the_next_document(horizon):
    """Packed, a document's last label is the next one's first token; alone, it has none."""
    p = problem(batch=1, length=12, ignored=0)
    ids, start = p["labels"], 5
    packed = p | {
        "labels": shift_left(ids),
        "segments": (torch.arange(12) >= start).long()[None],
    }
    parts = []
    for part in (slice(0, start), slice(start, 12)):
        cut = changed(p, lambda x, part=part: x[:, part])
        parts.append(cut | {"labels": shift_left(ids[:, part])})
    objective = make("mtp", p, horizon=horizon)
    expected = sum(call(objective, part, 1.0)[0] for part in parts)
    assert expected > 0
    torch.testing.assert_close(call(objective, packed, 1.0)[0], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@few
@given(p=problems(), strength=st.sampled_from([0.0, 1.0, 4.0]))
def test_reweighting(strategy, p, strength):
    shape = {
        "linupper": lambda x: min(x + 1, 1),
        "quadratic": lambda x: 1 - x * x,
        "extremes": abs,
    }[strategy]

    def naive(p):
        total = 0
        for row in range(len(p["labels"])):
            losses = [surprise(p["logits"][b, i], y) for b, i, y in tokens(p) if b == row]
            if not losses:
                continue
            values = [x.item() for x in losses]
            low, high = min(values), max(values)
            span = max(high - low, 1e-6)
            raw = [math.exp(strength * shape((2 * x - low - high) / span)) for x in values]
            mean = sum(raw) / len(raw)
            total = total + sum((w / mean - 1) * x for w, x in zip(raw, losses, strict=True))
        return total

    objective = make("reweighting", p, strategy=strategy, strength=strength, weight=0.7)
    assert_equals(objective, p, naive)


@few
@given(p=problems(), strength=st.sampled_from([0.0, 1.0, 4.0]))
def test_reweighting_of_sequences(p, strength):
    def naive(p):
        rows = {}
        for b, i, y in tokens(p):
            rows.setdefault(b, []).append(surprise(p["logits"][b, i], y))
        means = {b: sum(x.item() for x in own) / len(own) for b, own in rows.items()}
        low, high = (edge(means.values(), default=0) for edge in (min, max))
        span = max(high - low, 1e-6)
        raw = {b: math.exp(strength * min((2 * x - low - high) / span + 1, 1))
               for b, x in means.items()}  # fmt: skip
        count = sum(map(len, rows.values()))
        mean = sum(raw[b] * len(own) for b, own in rows.items()) / max(count, 1)
        return sum((raw[b] / mean - 1) * x for b, own in rows.items() for x in own)

    objective = make("reweighting", p, strength=strength, weight=0.7, unit="sequence")
    assert not objective.by_rows
    assert_equals(objective, p, naive)


def test_reweighting_prefers_what_its_strategies_say():
    losses, valid = torch.tensor([[1.0, 3.0, 4.0, 5.0, 9.0]]), torch.tensor([[True] * 4 + [False]])
    weights = {
        name: make("reweighting", problem(), strategy=name).weights(losses, valid)[0].tolist()
        for name in STRATEGIES
    }
    easy, middle, hard, hardest, ignored = weights["linupper"]
    assert easy < middle == pytest.approx(hard) == pytest.approx(hardest)
    easy, middle, hard, hardest, ignored = weights["quadratic"]
    assert middle > hard > hardest == pytest.approx(easy)
    easy, middle, hard, hardest, ignored = weights["extremes"]
    assert middle < hard < hardest == pytest.approx(easy)
    assert ignored == 1
    for found in weights.values():
        assert sum(found[:4]) / 4 == pytest.approx(1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ignored_tokens_beside_one_label_do_not_make_weights_nan(strategy):
    losses, valid = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[True, False, False]])
    assert Reweighting(strategy=strategy).weights(losses, valid).tolist() == [[1.0, 1.0, 1.0]]
