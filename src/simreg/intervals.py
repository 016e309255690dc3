"""Means over seeds with their confidence limits, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NO_SEED = -1
"""Stands for the seed of models that are no runs: they pair with each other, never with a run."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its confidence limits (None where n is too small)."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def pairing(seed: int | None) -> int:
    """By which a model is paired: its seed, or `NO_SEED`."""
    return NO_SEED if seed is None else seed


def t_factor(freedom: int) -> float:
    """How many standard errors the limits lie from a mean, with so many degrees of freedom."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and two-sided Student-t interval; no limits from fewer than two values."""
    x = np.asarray(values, dtype=float)
    n = len(x)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = float(x.mean())
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(t_factor(n - 1) * x.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def limits(found: Mapping[str, Any] | None, form: str, scale: float = 1) -> str:
    """The limits for a table, ` [-0.3, 2.6]`, each in the format `form`; nothing without any."""
    if found is None or found["low"] is None:
        return ""
    low, high = (format(scale * found[key], form) for key in ("low", "high"))
    return f" [{low}, {high}]"


def paired_difference(arm: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    """Arm minus reference over the seeds both have: mean, t interval, each seed's difference."""
    seeds = sorted(arm.keys() & reference.keys())
    differences = [arm[s] - reference[s] for s in seeds]
    return {
        **asdict(t_interval(differences)),
        "per_seed": [{"seed": s, "difference": d} for s, d in zip(seeds, differences, strict=True)],
    }
