"""The arithmetic of a study, on plain numbers: crossings, intervals, paired differences.

Definitions (nothing here extrapolates):

- The *iso-loss crossing* of a seed is the token count at which an arm's final validation
  cross-entropy equals the reference's of the same seed. Between budgets the loss is interpolated
  linearly in log tokens. If the loss is not monotone and passes the target several times, the
  crossing is the smallest token count from which it *stays* at or below the target: a lucky short
  run alone saves nothing.
- Status: `ok`; `at_least`, already better at the smallest budget, so only a lower bound of the
  saving is known; `not_reached`, worse than the target at the largest budget.
- Over seeds: `ok` only if every seed is. With any `not_reached` no mean is given; else, with any
  `at_least`, the mean is a lower bound (such seeds enter with their bound) and has no interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from simreg.intervals import CONFIDENCE, Interval, t_interval

Status = Literal["ok", "at_least", "not_reached"]


@dataclass(frozen=True)
class Crossing:
    """Where a curve of losses meets a target; `tokens` is None if it does not."""

    status: Status
    tokens: float | None
    monotone: bool | None
    """Whether the loss falls all along the curve; None without a whole curve."""


def _between(tokens: np.ndarray, ce: np.ndarray, i: int, target: float) -> float:
    """Token count in segment [i - 1, i] where the loss, linear in log tokens, equals the target."""
    if ce[i] == target:  # but for rounding
        return float(tokens[i])
    x0, x1 = np.log(tokens[i - 1 : i + 1])
    share = (ce[i - 1] - target) / (ce[i - 1] - ce[i])
    return float(np.exp(x0 + share * (x1 - x0)))


def _check_target(target: float) -> None:
    if not np.isfinite(target):  # a comparison with it would count as a saving
        raise ValueError(f"the target must be finite, got {target}")


def _curve(tokens: Sequence[float], ce: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(tokens, dtype=float), np.asarray(ce, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"tokens and ce must be equally long lists, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or x.min() <= 0:
        raise ValueError("tokens and ce must be finite, tokens positive")
    if (np.diff(x) <= 0).any():
        raise ValueError("tokens must increase")
    return x, y


def crossing(tokens: Sequence[float], ce: Sequence[float], target: float) -> Crossing:
    """Smallest token count from which the final losses stay at or below `target`.

    `tokens` must increase; `ce[i]` is the final loss of the full schedule of `tokens[i]`.
    """
    _check_target(target)
    x, y = _curve(tokens, ce)
    monotone = bool((np.diff(y) < 0).all())
    above = np.flatnonzero(y > target)
    if not len(above):
        # Exactly on the target at the smallest budget is a crossing, not a bound.
        exact = bool(y[0] == target)
        return Crossing("ok" if exact else "at_least", float(x[0]), monotone)
    last = int(above[-1])
    if last == len(x) - 1:
        return Crossing("not_reached", None, monotone)
    return Crossing("ok", _between(x, y, last + 1, target), monotone)


def first_passing(tokens: Sequence[float], ce: Sequence[float], target: float) -> Crossing:
    """Where the mid-run curve of one run first reaches `target` (its learning rate still high)."""
    _check_target(target)
    x, y = _curve(tokens, ce)
    monotone = bool((np.diff(y) < 0).all())
    below = np.flatnonzero(y <= target)
    if not len(below):
        return Crossing("not_reached", None, monotone)
    first = int(below[0])
    if first == 0:
        exact = bool(y[0] == target)
        return Crossing("ok" if exact else "at_least", float(x[0]), monotone)
    return Crossing("ok", _between(x, y, first, target), monotone)


def interpolate(tokens: Sequence[float], ce: Sequence[float], at: float) -> float | None:
    """Loss at `at` tokens, linear in log tokens; None outside the measured range."""
    x, y = _curve(tokens, ce)
    if not x[0] <= at <= x[-1]:
        return None
    return float(np.interp(np.log(at), np.log(x), y))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap limits of the mean (seeded); None from fewer than two values.

    With few seeds it is narrower than it should be: read it beside the t interval, not instead.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return None
    limits = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(limits.low), float(limits.high)


def mean_sd(values: Sequence[float]) -> dict[str, float | int | None]:
    """`{mean, sd, n}`; sd is the sample's (n - 1), None from fewer than two values."""
    x = np.asarray(values, dtype=float)
    return {
        "mean": float(x.mean()) if len(x) else None,
        "sd": float(x.std(ddof=1)) if len(x) > 1 else None,
        "n": len(x),
    }


def overall(statuses: Sequence[Status]) -> Status:
    """The status of several seeds together: the weakest of them."""
    if not statuses or "not_reached" in statuses:
        return "not_reached"
    return "at_least" if "at_least" in statuses else "ok"


def saving(
    crossings: dict[int, Crossing], reference_tokens: dict[int, float], cost: float | None = 1.0
) -> dict[str, Any]:
    """Saved fraction over seeds: `1 - exp(mean log(tokens at crossing / reference tokens)) * cost`.

    `cost` is 1 for tokens; for seconds the step time with the arm over that of the reference
    (None: unknown, and so is the saving). Keys of both dicts are seeds.
    """
    seeds = sorted(crossings)
    status = overall([crossings[s].status for s in seeds])
    logs = {
        s: float(np.log(tokens / reference_tokens[s]))
        for s in seeds
        if (tokens := crossings[s].tokens) is not None
    }

    def saved(log_ratio: float | None) -> float | None:
        if log_ratio is None or cost is None:
            return None
        return float(1 - np.exp(log_ratio) * cost)

    t = Interval(None, None, None, len(seeds))
    boot = None
    if status == "ok":
        t, boot = t_interval(list(logs.values())), bootstrap_interval(list(logs.values()))
    elif status == "at_least":
        t = Interval(float(np.mean(list(logs.values()))), None, None, len(seeds))
    counts = {
        k: sum(c.status == k for c in crossings.values()) for k in ("at_least", "not_reached")
    }
    return {
        # A larger log ratio is a smaller saving, so the limits change places.
        "mean": saved(t.mean),
        "low": saved(t.high),
        "high": saved(t.low),
        "n": t.n,
        "status": status,
        **counts,
        "bootstrap": {"low": saved(boot[1]), "high": saved(boot[0])} if boot else None,
        "per_seed": [
            {
                "seed": s,
                "status": crossings[s].status,
                "saved": saved(logs.get(s)),
                "crossing_tokens": crossings[s].tokens,
                "monotone": crossings[s].monotone,
            }
            for s in seeds
        ],
    }
