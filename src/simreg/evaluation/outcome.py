"""What a model scored on the items of a task, and the figures that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

ACCURACIES = ("acc", "exact_match")
"""Metrics that are shares of items, said in per cent."""


def unit(metric: str) -> str:
    """What stands behind a task's name in a table: nothing for plain accuracy."""
    return "" if metric == "acc" else f" ({metric.replace('_', ' ')})"


@dataclass(frozen=True)
class Outcome:
    """Scores of one model on one task, an entry an item.

    The task's score is Σ values / Σ weights: an accuracy where the values are 0 or 1 and the
    weights 1, bits per byte where they are bits and bytes.
    """

    metric: str
    """`acc` for an accuracy, `bits_per_byte`, or the harness's name of another."""
    values: list[float]
    normalised: list[float] | None = None
    """The same by another score: log-likelihoods over length (the harness's `acc_norm`); those of
    `heldout-cloze` less those without the context."""
    weights: list[float] | None = None
    """None: all 1."""
    clusters: list[int] | None = None
    """What items depend on together, such as the document they were cut from; None: each is
    independent."""
    extra: dict[str, float] = field(default_factory=dict)
    """Other figures of the whole task, such as LAMBADA's perplexity."""

    @property
    def n(self) -> int:
        """Items."""
        return len(self.values)

    @property
    def score(self) -> float:
        """Of the whole task."""
        return ratio(self.values, self.weights)[0]

    def summary(self) -> dict[str, Any]:
        """`{metric, n, score, stderr, normalised, normalised_stderr, extra}`, None if unknown."""
        score, stderr = ratio(self.values, self.weights, self.clusters)
        normalised: tuple[float | None, float | None] = (None, None)
        if self.normalised is not None:
            normalised = ratio(self.normalised, None, self.clusters)
        return {
            "metric": self.metric,
            "n": self.n,
            "score": score,
            "stderr": stderr,
            "normalised": normalised[0],
            "normalised_stderr": normalised[1],
            "extra": self.extra,
        }


def ratio(
    values: ArrayLike, weights: ArrayLike | None, clusters: Sequence[int] | None = None
) -> tuple[float, float | None]:
    """Σ values / Σ weights over items, and its standard error (None from one cluster).

    Items with equal `clusters` are not independent; without, every item is a cluster. For weights
    of 1 and no clusters the error is sd/√n with the sample's sd, as the harness has it; else the
    linearised standard error of a ratio (Cochran 1977, Sampling Techniques, chapter 6), by cluster:
    √(C/(C − 1) Σ_c (Σ_{i∈c} (x_i − v w_i))²) / Σ w.
    """
    x = np.asarray(values, dtype=float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    value = float(x.sum() / w.sum())
    sums = cluster_sums(x - value * w, clusters)
    count = len(sums)
    if count < 2:
        return value, None
    spread = np.square(sums).sum() * count / (count - 1)
    return value, float(np.sqrt(spread) / w.sum())


def cluster_sums(values: np.ndarray, clusters: Sequence[int] | None) -> np.ndarray:
    """Sums of `values` `[items]` over the items of each cluster, in the order of their ids."""
    if clusters is None:
        return values
    place = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return np.bincount(place, weights=values)
