"""What a model scored on the items of a task, and the figures that follow from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


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
    """The same with log-likelihoods divided by length (the harness's `acc_norm`)."""
    weights: list[float] | None = None
    """None: all 1."""
    extra: dict[str, float] = field(default_factory=dict)
    """Other figures of the whole task, such as LAMBADA's perplexity."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the cache."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Outcome":
        """What `to_dict` gave."""
        return cls(**values)

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
        score, stderr = ratio(self.values, self.weights)
        normalised = (None, None) if self.normalised is None else ratio(self.normalised, None)
        return {
            "metric": self.metric,
            "n": self.n,
            "score": score,
            "stderr": stderr,
            "normalised": normalised[0],
            "normalised_stderr": normalised[1],
            "extra": self.extra,
        }


def ratio(values: list[float], weights: list[float] | None) -> tuple[float, float | None]:
    """Σ values / Σ weights over items, and its standard error (None from one item).

    For weights of 1 that is the mean and sd/√n with the sample's sd, as the harness has it; for
    others the linearised standard error of a ratio (Cochran 1977, Sampling Techniques,
    chapter 6).
    """
    x = np.asarray(values, dtype=float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    value = float(x.sum() / w.sum())
    if len(x) < 2:
        return value, None
    return value, float(np.std(x - value * w, ddof=1) / np.sqrt(len(x)) / w.mean())
