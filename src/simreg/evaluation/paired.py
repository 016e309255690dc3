"""Arms against each other on the same items with the same seeds.

A difference is that of two arms' scores of the same seed on the same items. It varies with the
training (seeds) and with the benchmark (items) alike, which are crossed: every seed sees the same
items. Its variance is the two-way cluster-robust one of Cameron, Gelbach and Miller (2011, Journal
of Business & Economic Statistics 29:2, doi:10.1198/jbes.2010.07136),

    V = V_seed + V_item − V_both,

each from the sums of the same linearised gaps within clusters (`ratio`): by seed, by item, and by
both at once, which the other two count twice. V is never taken below V_seed or V_item, to which the
difference of noisy estimates may fall. The limits are Student's t with one degree of freedom less
than there are clusters of the rarer kind, as a rule the seeds. Items that were cut from one
document are one cluster.

With one seed the limits cover the items alone, and say nothing of other seeds.

A percentile bootstrap that draws seeds and clusters of items with replacement stands beside it:
with few seeds it is too narrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simreg.evaluation.outcome import Outcome, cluster_sums, ratio
from simreg.intervals import CONFIDENCE, t_factor

RESAMPLES = 4000
Scores = Mapping[int, Outcome]
"""seed -> outcome"""


@dataclass(frozen=True)
class _Gaps:
    """Of one task, for each cluster of items: sums of differences `[seeds, clusters]` and of
    weights `[clusters]`."""

    values: np.ndarray
    weights: np.ndarray
    items: int

    @property
    def of_seeds(self) -> np.ndarray:
        """The difference of each seed, `[seeds]`."""
        return np.asarray(self.values.sum(1) / self.weights.sum())

    def variances(self) -> tuple[float, float]:
        """V_item and V_both; 0 from a single cluster, of whose kind nothing is known."""
        items = ratio(self.values.mean(0), self.weights)[1]
        # Each seed has the items for itself: as many cells as seeds × clusters.
        both = ratio(self.values.ravel(), np.tile(self.weights, len(self.values)))[1]
        return (items or 0.0) ** 2, (both or 0.0) ** 2 if items is not None else 0.0


def difference(
    arm: Mapping[str, Scores], reference: Mapping[str, Scores], *, normalised: bool = False
) -> dict[str, Any] | None:
    """Arm minus reference, averaged over tasks (task -> seed -> outcome) and common seeds.

    With `normalised`, tasks that have normalised scores count by these. Returns `{mean, low, high,
    bootstrap, seeds, items, clusters}`, or None without a common seed. `low`, `high`: 95 % limits
    of Student's t, None from one seed if a task has a single cluster of items, and where all gaps
    are equal; `bootstrap`: `[low, high]` of the percentile bootstrap, None likewise; `items` and
    their independent `clusters`: counts over tasks. ValueError if the arms were scored on other
    items.
    """
    tasks = [task for task in arm if task in reference]
    seeds = sorted(
        set.intersection(
            *({*arm[task]} & {*reference[task]} for task in tasks) if tasks else [set()]
        )
    )
    if not seeds:
        return None
    gaps = [_gaps(arm[task], reference[task], seeds, normalised) for task in tasks]
    low, high = _limits(gaps)
    return {
        "mean": float(np.mean([task.of_seeds.mean() for task in gaps])),
        "low": low,
        "high": high,
        "bootstrap": _bootstrap(gaps),
        "seeds": len(seeds),
        "items": sum(task.items for task in gaps),
        "clusters": sum(len(task.weights) for task in gaps),
    }


def _gaps(arm: Scores, reference: Scores, seeds: Sequence[int], normalised: bool) -> _Gaps:
    rows = []
    for seed in seeds:
        one, other = arm[seed], reference[seed]
        same = one.weights == other.weights and one.clusters == other.clusters
        if one.n != other.n or not same:
            raise ValueError(f"the arms were scored on other items ({one.n} and {other.n})")
        x, y = one.values, other.values
        if normalised and one.normalised is not None and other.normalised is not None:
            x, y = one.normalised, other.normalised
        rows.append(np.subtract(x, y))
    first = arm[seeds[0]]
    weights = np.ones(first.n) if first.weights is None else np.array(first.weights)
    values = np.array([cluster_sums(row, first.clusters) for row in rows])
    return _Gaps(values, cluster_sums(weights, first.clusters), first.n)


def _limits(gaps: Sequence[_Gaps]) -> tuple[float | None, float | None]:
    """Limits of the average over tasks.

    Tasks share their seeds, so V_seed is that of each seed's average; items of different tasks are
    independent, so their variances add up.
    """
    by_seed = np.mean([task.of_seeds for task in gaps], axis=0)
    fewest = min(len(task.weights) for task in gaps)
    seeds = len(by_seed)
    if seeds == 1 and fewest == 1:
        return None, None
    of_items, of_both = np.sum([task.variances() for task in gaps], axis=0) / len(gaps) ** 2
    of_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    variance = of_items if seeds == 1 else max(of_seeds, of_items, of_seeds + of_items - of_both)
    if variance == 0:  # all alike: few that agree do not say that all would
        return None, None
    kinds = [count for count in (seeds, fewest) if count > 1]
    half = t_factor(min(kinds) - 1) * np.sqrt(variance)
    return float(by_seed.mean() - half), float(by_seed.mean() + half)


def _bootstrap(gaps: Sequence[_Gaps]) -> list[float] | None:
    """`[low, high]`: seeds are drawn for all tasks at once, clusters of items for each task."""
    seeds = len(gaps[0].values)
    if seeds == 1 and max(len(task.weights) for task in gaps) == 1:
        return None
    rng = np.random.default_rng(0)
    draws = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    total = np.sum([_resampled(task, draws, rng) for task in gaps], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(total / len(gaps), [tail, 1 - tail])
    return [float(low), float(high)] if low < high else None


def _resampled(gaps: _Gaps, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The difference in each resample, given how often (as a share) it draws each seed.

    Clusters alike in all seeds are drawn together: how often a resample draws any of them is
    multinomial, so 67,000 items of BLiMP cost no more than the few patterns they fall into.
    """
    columns = np.vstack([gaps.values, gaps.weights]).T
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
    each item (by cluster, as `ratio`), None from one cluster; sd is None from one seed.
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
        "stderr": ratio(mean_items, outcomes[0].weights, outcomes[0].clusters)[1],
        "normalised": float(np.mean(normalised)) if len(normalised) == len(values) else None,
        "seeds": sorted(scores),
    }
