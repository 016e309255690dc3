"""Batches for rival objectives, and the comparison with loops over their tokens in float64."""

import copy

import torch
from hypothesis import strategies as st

from simreg.baselines.registry import build
from simreg.objectives import reads


def problem(seed=0, batch=2, length=7, dim=4, vocab=6, ignored=0.25, documents=0):
    """Hidden states, two earlier ones, logits, labels and segments (not contiguous), float64.

    The LM head has a bias, and parameters that bfloat16 holds; logits are not what it gives.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shape = (batch, length)
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    segments = torch.randint(-1, documents, shape, generator=generator) if documents else None
    head = torch.nn.Linear(dim, vocab, dtype=torch.float64)
    for parameter in head.parameters():
        parameter.data = normal(*parameter.shape).bfloat16().double()
    return {
        "hidden": normal(*shape, dim),
        "earlier": (normal(*shape, dim), normal(*shape, dim)),
        "logits": 3 * normal(*shape, vocab),
        "head": head,
        "labels": labels,
        "segments": segments,
    }


def problems():
    """`problem`s of ragged shapes, for hypothesis."""
    return st.builds(
        problem,
        seed=st.integers(0, 2**31),
        batch=st.integers(1, 3),
        length=st.integers(1, 7),
        dim=st.integers(1, 5),
        vocab=st.integers(1, 6),
        ignored=st.sampled_from([0.0, 0.3, 1.0]),
        documents=st.integers(0, 3),
    )


def changed(p, change):
    """The same problem with `change` applied to whatever the model computed."""
    states = {"hidden": change(p["hidden"]), "logits": change(p["logits"])}
    return p | states | {"earlier": tuple(change(e) for e in p["earlier"])}


def leaves(p):
    """The same problem, and a list of what takes gradients in it."""
    p = changed(p, lambda x: x.detach().clone().requires_grad_())
    return p, [p["hidden"], p["logits"], *p["earlier"]]


def make(name, p, **options):
    """The objective for the sizes of a problem, in float64; centres are not 0."""
    torch.manual_seed(3)
    sizes = {"hidden_size": p["hidden"].shape[-1], "vocab_size": p["logits"].shape[-1]}
    objective = build(name, options, **sizes).double()
    if name == "center":
        objective.centers.normal_()
    return objective


def read(objective, p):
    """What the objective reads of a problem besides the final hidden states."""
    wanted = reads(objective)
    found = {"logits": p["logits"]} if wanted.logits else {}
    if wanted.depths:
        found["earlier"] = p["earlier"][: len(wanted.depths)]
    if wanted.head:
        dtype = torch.promote_types(p["hidden"].dtype, torch.float32)
        same = p["head"].weight.dtype == dtype
        found["head"] = p["head"] if same else copy.deepcopy(p["head"]).to(dtype)
    return found


def call(objective, p, num_items=None):
    """The objective's loss and metrics of a problem, given just what it reads."""
    states = (p["hidden"], p["labels"], p["segments"])
    return objective(*states, num_items=num_items, **read(objective, p))


def gradients(loss, inputs):
    """Of each input; zeros where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_equals(objective, p, naive, tolerance=1e-9):
    """The loss is weight · naive(p) / num_items, in value and gradient; so is its metric."""
    p, inputs = leaves(p)
    inputs += [*objective.parameters(), *p["head"].parameters()]
    loss, metrics = call(objective, p, num_items=7.0)
    truth = naive(p) + 0 * p["hidden"].sum()
    torch.testing.assert_close(loss, objective.weight * truth / 7, rtol=tolerance, atol=tolerance)
    count = max(1, int((p["labels"] >= 0).sum()))
    torch.testing.assert_close(
        metrics["loss"], truth.detach() / count, rtol=tolerance, atol=tolerance
    )
    assert not metrics["loss"].requires_grad
    actual = gradients(loss, inputs)
    expected = gradients(objective.weight * truth / 7, inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def tokens(p):
    """(row, position, label) of those that have a label."""
    return [
        (b, i, y) for b, row in enumerate(p["labels"].tolist()) for i, y in enumerate(row) if y >= 0
    ]


def joined(p, b, i, j):
    """Whether two positions of a row are of one segment."""
    return p["segments"] is None or bool(p["segments"][b, i] == p["segments"][b, j])


def others(p, b, i):
    """The other tokens that a token meets."""
    return [j for c, j, _ in tokens(p) if c == b and j != i and joined(p, b, i, j)]


def unit(vector):
    return vector / vector.norm().clamp_min(1e-6)
