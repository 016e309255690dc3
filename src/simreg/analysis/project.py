"""A map of the embeddings of a few labels: two coordinates for each token."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simreg.geometry.sample import Sample, unit
from simreg.recipe.errors import UserError

EACH = 60
"""Tokens of a label, at most."""


def choose(labels: Tensor, decile: Tensor, name: Callable[[int], str]) -> list[int]:
    """Six labels to show: of evenly spread deciles, the most frequent of each in the sample.

    Only those whose `name` can be printed: a byte of a longer character says nothing.
    """
    chosen: list[int] = []
    for i in torch.linspace(0, 9, 6).round().long().tolist():
        own = labels[decile == i]
        ids, counts = torch.unique(own, return_counts=True)
        order = ids[counts.argsort(descending=True, stable=True)].tolist()
        new = (label for label in order if label not in chosen)
        chosen += [
            label for label in new if name(label).isprintable() and "\ufffd" not in name(label)
        ][:1]
    return chosen


def check(method: str) -> None:
    """UserError for a method that is not installed."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError("--projection umap, but umap is not installed: pip install umap-learn")


def project(sample: Sample, chosen: list[int], method: str) -> dict[str, Any] | None:
    """`{method, points: {label id: [[x, y], ...]}, explained}` of unit embeddings.

    PCA of the chosen tokens, each axis turned so that its largest coordinate is positive;
    `explained` is the share of their variance on the two axes. UMAP (cosine) if it is installed.
    None where there is nothing to see: fewer than three tokens, or all of them one point.
    """
    places = [(sample.labels == label).nonzero()[:EACH, 0] for label in chosen]
    if sum(map(len, places)) < 3:
        return None
    e = unit(sample.hidden[sample.index[torch.cat(places)]].double())
    if torch.equal(e, e[:1].expand_as(e)):
        return None
    explained: list[float] | None = None
    if method == "umap":
        import umap

        flat = torch.as_tensor(umap.UMAP(metric="cosine", random_state=0).fit_transform(e.numpy()))
    else:
        _, s, axes = torch.linalg.svd(e - e.mean(0), full_matrices=False)
        flat = (e - e.mean(0)) @ axes[:2].T
        flat = flat * flat.gather(0, flat.abs().argmax(0, keepdim=True)).sign()
        explained = [round(float(v), 4) for v in s[:2].square() / s.square().sum()]
    parts = torch.split(flat, [len(place) for place in places])
    points = {
        str(label): [[round(x, 4), round(y, 4)] for x, y in part.tolist()]
        for label, part in zip(chosen, parts, strict=True)
    }
    if len({tuple(point) for part in points.values() for point in part}) < 2:
        return None
    return {"method": method, "points": points, "explained": explained}
