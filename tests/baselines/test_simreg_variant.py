"""SimReg with one thing changed, against loops over pairs; and unchanged, against SimReg."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simreg.baselines.simreg_variant import _shuffled
from simreg.loss import SimRegLoss
from simreg.objectives import labels_at
from tests.baselines.problems import (
    assert_equals,
    call,
    changed,
    make,
    others,
    problem,
    problems,
    tokens,
    unit,
)

NAME = "simreg-variant"
few = settings(max_examples=40, deadline=None)


def naive(p, states=None, tau=0.1, weights=None, embed=unit, pull=1.0):
    """Variant "out" of `p` by a loop; `states` in place of its hidden states."""
    h = p["hidden"] if states is None else states
    total = 0
    for b, i, y in tokens(p):
        near = others(p, b, i)
        positives = [j for j in near if p["labels"][b, j] == y]
        if not positives:
            continue
        s = {j: embed(h[b, i]).dot(embed(h[b, j])) / tau for j in near}
        loss = torch.stack(list(s.values())).logsumexp(0)
        loss = loss - pull * sum(s[j] for j in positives) / len(positives)
        total = total + loss * (1 if weights is None else weights[b, i])
    return total


@few
@given(p=problems(), variant=st.sampled_from(["out", "in", "decoupled"]), chunk=st.integers(2, 9))
def test_unchanged_it_is_simreg(p, variant, chunk):
    ours = make(NAME, p, weight=0.7, temperature=0.3, variant=variant, chunk_size=chunk)
    simreg = SimRegLoss(0.7, temperature=0.3, variant=variant, chunk_size=chunk, push=0)
    loss, metrics = call(ours, p, num_items=5.0)
    expected, known = simreg(p["hidden"], p["labels"], p["segments"], num_items=5.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["loss"], known["loss"])


def centred(p, over):
    """Less the mean over the valid tokens of each row, or of all rows."""
    h, there = p["hidden"], p["labels"] >= 0
    rows = []
    for b in range(len(h)):
        pool = h[there] if over == "batch" else h[b][there[b]]
        rows.append(h[b] - (pool.mean(0) if len(pool) else 0))
    return torch.stack(rows)


@few
@given(p=problems(), over=st.sampled_from(["row", "batch"]))
def test_centre(p, over):
    # At a temperature where float64 resolves what a mean close to a state leaves of it.
    ours = make(NAME, p, centre=over, temperature=0.5)
    assert_equals(ours, p, lambda p: naive(p, centred(p, over), tau=0.5), tolerance=1e-7)


def test_centred_it_is_blind_to_a_shared_direction_that_simreg_sees():
    p = problem(length=12)
    moved = changed(p, lambda x: x + 3)
    ours, plain = make(NAME, p, centre="row"), make(NAME, p)
    torch.testing.assert_close(call(ours, moved)[0], call(ours, p)[0])
    assert abs(call(plain, moved)[0] - call(plain, p)[0]) > 0.01


@few
@given(p=problems())
def test_batch_compares_all_rows(p):
    """As one long row, in which a document ends with its row."""
    flat = {
        "hidden": lambda p: p["hidden"].flatten(0, 1)[None],
        "labels": lambda p: p["labels"].flatten()[None],
    }

    def rows(p):
        segments = p["segments"]
        if segments is not None:
            own = torch.arange(len(segments))[:, None].expand_as(segments)
            pair = torch.stack([own, segments], -1).flatten(0, 1)
            segments = pair.unique(dim=0, return_inverse=True)[1][None]
        return naive(p | {key: of(p) for key, of in flat.items()} | {"segments": segments})

    assert_equals(make(NAME, p, batch=True), p, rows)


@few
@given(p=problems(), rarity=st.sampled_from([0.5, 1.0, 2.0]), batch=st.booleans())
def test_rarity_weighs_anchors_by_their_label(p, rarity, batch):
    labels, weights = p["labels"], torch.zeros(p["labels"].shape, dtype=torch.float64)
    for rows in [range(len(labels))] if batch else [[b] for b in range(len(labels))]:
        met = [(b, i, y) for b, i, y in tokens(p) if b in rows]
        raw = {(b, i): sum(y == z for *_, z in met) ** -rarity for b, i, y in met}
        for key, value in raw.items():
            weights[key] = value * len(raw) / sum(raw.values())
    if not batch:
        ours = make(NAME, p, rarity=rarity)
        # Weights are float32: they need no more digits.
        assert_equals(ours, p, lambda p: naive(p, weights=weights), tolerance=1e-6)
        return
    ours = make(NAME, p, rarity=rarity, batch=True)
    assert ours._weights(labels.flatten()[None]).view(labels.shape) == pytest.approx(weights)


@few
@given(p=problems(), final=st.booleans())
def test_layers_are_averaged(p, final):
    ours = make(NAME, p, depths=(0.5, 0.9), final=final)

    def layers(p):
        states = [*p["earlier"], *([p["hidden"]] if final else [])]
        return sum(naive(p, h) for h in states) / len(states)

    assert_equals(ours, p, layers)


@few
@given(p=problems())
def test_not_normalised(p):
    ours = make(NAME, p, normalise=False, temperature=2.0)
    assert_equals(ours, p, lambda p: naive(p, tau=2.0, embed=lambda x: x))


@few
@given(p=problems())
def test_learned_temperature(p):
    ours = make(NAME, p, learn_temperature=True, temperature=0.4)
    assert float(ours.log_temperature) == pytest.approx(math.log(0.4))
    assert_equals(ours, p, lambda p: naive(p, tau=ours.log_temperature.exp()))


def test_shuffled_labels_are_the_same_ones_elsewhere_in_their_row():
    labels = torch.randint(0, 6, (4, 40))
    labels[:, 30:], labels[2] = -100, -100
    dealt = _shuffled(labels)
    assert torch.equal(dealt, _shuffled(labels.clone()))
    assert torch.equal(dealt < 0, labels < 0)
    assert torch.equal(dealt.sort(1)[0], labels.sort(1)[0])
    for row in (0, 1, 3):
        assert not torch.equal(dealt[row], labels[row])
    numbered = torch.arange(40).repeat(2, 1)
    first, second = _shuffled(numbered)
    assert not torch.equal(first, second)
    assert not torch.equal(_shuffled(numbered + 1)[0] - 1, first)  # another batch, another deal


def test_the_deal_does_not_depend_on_the_default_device():
    labels = torch.randint(0, 6, (4, 40))
    dealt = _shuffled(labels)
    with torch.device("meta"):
        assert torch.equal(_shuffled(labels), dealt)


def test_without_segments_and_chunks_the_deal_is_that_of_the_records():
    """Runs are on record: another deal would make others of them."""
    labels = torch.arange(8).repeat(3, 1)
    labels[1], labels[:, 3] = -100, -100
    assert _shuffled(labels).tolist() == [
        [1, 7, 5, -100, 4, 6, 0, 2],
        [-100] * 8,
        [2, 0, 6, -100, 4, 7, 5, 1],
    ]


def with_positive(labels, pools):
    """How many tokens of each row have another of their label in their pool."""
    valid = labels >= 0
    met = (labels.unsqueeze(2) == labels.unsqueeze(1)) & (pools.unsqueeze(2) == pools.unsqueeze(1))
    met = met & valid.unsqueeze(2) & valid.unsqueeze(1) & ~torch.eye(labels.shape[1]).bool()
    return met.any(2).sum(1).tolist()


@pytest.mark.parametrize("documents", [0, 5])
@pytest.mark.parametrize("chunk", [None, 16, 7])
def test_shuffled_labels_have_as_many_positives(documents, chunk):
    p = problem(batch=3, length=64, vocab=8, documents=documents)
    labels, segments = p["labels"], p["segments"]
    pools = torch.arange(64).expand(3, 64) // (chunk or 64)
    if segments is not None:
        pools = pools + 100 * segments
    dealt = _shuffled(labels, segments, chunk)
    assert not torch.equal(dealt, labels)
    found = with_positive(labels, pools)
    assert min(found) > 0
    assert with_positive(dealt, pools) == found
    for row in range(3):
        for pool in pools[row].unique():
            here = pools[row] == pool
            assert torch.equal(dealt[row][here].sort()[0], labels[row][here].sort()[0])
    ours, plain = (make(NAME, p, chunk_size=chunk, shuffle=on) for on in (True, False))
    expected = call(plain, p | {"labels": dealt})[0]
    torch.testing.assert_close(call(ours, p)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.bool])
def test_segments_of_a_batch_may_be_of_a_small_dtype(kind):
    p = problem(batch=4, length=9, vocab=3)
    ids = torch.tensor([0, 1 if kind == torch.bool else 64])
    p["segments"] = ids[torch.arange(36).view(4, 9) % 2]
    ours = make(NAME, p, batch=True)
    expected = call(ours, p)[0]
    assert expected > 0
    actual = call(ours, p | {"segments": p["segments"].to(kind)})[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@few
@given(p=problems())
def test_shuffled_is_simreg_of_the_dealt_labels(p):
    ours = make(NAME, p, shuffle=True)
    dealt = _shuffled(p["labels"], p["segments"])
    assert_equals(ours, p, lambda p: naive(p | {"labels": dealt}))


@pytest.mark.parametrize("offset", [-2, 1])
@pytest.mark.parametrize("documents", [0, 2])
def test_compared_by_the_label_of_another_position(offset, documents):
    p = problem(length=30, vocab=3, documents=documents)
    moved = labels_at(p["labels"], p["segments"], offset)
    actual = call(make(NAME, p, offset=offset), p, num_items=5.0)[0]
    expected = call(make(NAME, p), p | {"labels": moved}, num_items=5.0)[0]
    assert expected > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@few
@given(p=problems())
def test_unlabelled_all_others_are_positives(p):
    same = torch.where(p["labels"] >= 0, 5, p["labels"])
    assert_equals(make(NAME, p, unlabelled=True), p, lambda p: naive(p | {"labels": same}))


@few
@given(p=problems(), pull=st.sampled_from([0.0, 0.5, 3.0]))
def test_pull(p, pull):
    assert_equals(make(NAME, p, pull=pull), p, lambda p: naive(p, pull=pull))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centre": "column"}, "centre: expected one of"),
        ({"final": True}, "final: goes with depths"),
        ({"normalise": False, "variant": "in"}, 'only with variant="out"'),
        ({"learn_temperature": True, "chunk_size": 4}, "no chunk_size"),
        ({"batch": True, "chunk_size": 4}, "batch: not with chunk_size"),
        ({"depths": 0.5}, "depths: expected a list"),
        ({"depths": [1.5]}, "depths: expected a finite number from 0.001 to 1, got 1.5"),
        ({"variant": "off"}, "variant: expected one of"),
        ({"temperature": 0}, "temperature: expected"),
        ({"offset": 0.5}, "offset: expected a whole number, got 0.5"),
        ({"pull": -1}, "pull: expected a finite number from 0, got -1"),
        ({"pull": 0, "chunk_size": 4}, "pull: only with"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        make(NAME, problem(), **options)
