"""Arms against each other on the same items with the same seeds, with bootstrap intervals.

A difference is that of two arms' scores of the same seed on the same items. Its interval is a
percentile bootstrap over seeds and items, each drawn with replacement (crossed: all seeds of a
resample see the same items), so it covers the spread of training and of the benchmark alike. With
one seed it covers the items alone, and says nothing of other seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simreg.evaluation.outcome import Outcome, ratio

CONFIDENCE, RESAMPLES = 0.95, 4000
Scores = Mapping[int, Outcome]
"""seed -> outcome"""


def difference(
    arm: Mapping[str, Scores], reference: Mapping[str, Scores], *, normalised: bool = False
) -> dict[str, Any] | None:
    """Arm minus reference, averaged over tasks (task -> seed -> outcome) and common seeds.

    With `normalised`, tasks that have normalised scores count by these. Returns `{mean, low, high,
    seeds, items}`, or None without a common seed; low and high are None where neither a second
    seed nor a second item is there to resample.
    """
    tasks = [task for task in arm if task in reference]
    seeds = sorted(
        set.intersection(
            *({*arm[task]} & {*reference[task]} for task in tasks) if tasks else [set()]
        )
    )
    if not seeds:
        return None
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), RESAMPLES) / len(seeds)
    total, means, items = np.zeros(RESAMPLES), [], []
    for task in tasks:
        gaps, weights = _gaps(arm[task], reference[task], seeds, normalised)
        means.append(float((gaps.sum(1) / weights.sum()).mean()))
        items.append(gaps.shape[1])
        total += _resampled(gaps, weights, draws, rng)
    varies = len(seeds) > 1 or max(items) > 1
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(total / len(tasks), [tail, 1 - tail]) if varies else (None, None)
    return {
        "mean": float(np.mean(means)),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "seeds": len(seeds),
        "items": sum(items),
    }


def _gaps(
    arm: Scores, reference: Scores, seeds: Sequence[int], normalised: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Differences [seeds, items] of values, and the items' weights [items]."""
    rows = []
    for seed in seeds:
        one, other = arm[seed], reference[seed]
        if one.n != other.n or one.weights != other.weights:
            raise ValueError(f"the arms were scored on other items ({one.n} and {other.n})")
        x, y = one.values, other.values
        if normalised and one.normalised is not None and other.normalised is not None:
            x, y = one.normalised, other.normalised
        rows.append(np.subtract(x, y))
    weights = arm[seeds[0]].weights
    return np.array(rows), np.ones(len(rows[0])) if weights is None else np.array(weights)


def _resampled(
    gaps: np.ndarray, weights: np.ndarray, draws: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The difference in each resample, given how often (as a share) it draws each seed.

    Items alike in all seeds are drawn together: how often a resample draws any of them is
    multinomial, so 67,000 items of BLiMP cost no more than the few patterns they fall into.
    """
    columns = np.vstack([gaps, weights]).T
    kinds, counts = np.unique(columns, axis=0, return_counts=True)
    n, result = len(columns), np.empty(len(draws))
    step = max(1, 2**24 // len(kinds))  # bounds the memory
    for start in range(0, len(draws), step):
        part = slice(start, start + step)
        picked = rng.multinomial(n, counts / n, len(draws[part]))
        by_seed = picked @ kinds[:, :-1]
        result[part] = (by_seed * draws[part]).sum(1) / (picked @ kinds[:, -1])
    return result


def over_seeds(scores: Scores) -> dict[str, Any]:
    """An arm on one task: mean and sample sd over seeds, and the standard error over items.

    `{metric, n, score, sd, stderr, normalised, seeds}`; stderr is that of the seeds' mean score of
    each item, None from one item; sd is None from one seed.
    """
    outcomes = list(scores.values())
    values = np.array([outcome.score for outcome in outcomes])
    mean_items = np.mean([outcome.values for outcome in outcomes], axis=0)
    normalised = [ratio(o.normalised, None)[0] for o in outcomes if o.normalised is not None]
    return {
        "metric": outcomes[0].metric,
        "n": outcomes[0].n,
        "score": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "stderr": ratio(mean_items.tolist(), outcomes[0].weights)[1],
        "normalised": float(np.mean(normalised)) if len(normalised) == len(values) else None,
        "seeds": sorted(scores),
    }
