"""Arms against each other over seeds, and whether margin and loss go together."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from simreg.analysis.measure import Tokens
from simreg.geometry.groups import mean_se, se_of_rows
from simreg.intervals import (
    CONFIDENCE,
    NO_SEED,
    paired_difference,
    pairing,
    t_factor,
    t_interval,
)

Model = dict[str, Any]
PARTS = ("all", "head", "torso", "tail")
PREDICTORS = ("margin", "margin_cos", "intra_cos", "inter_cos", "variance_share", "effective_rank")
_PER_TOKEN = ("margin", "margin_cos", "intra_cos")


def final(models: Iterable[Model], arm: str) -> dict[int, Model]:
    """Seed (`pairing`) -> the trained model of the arm, of those that are compared."""
    return {pairing(m["seed"]): m for m in models if m["arm"] == arm and m["compared"]}


def seeds_compared(seeds: dict[str, set[int]]) -> set[int]:
    """The seeds that every arm of runs has, so that means and pictures compare like with like.

    `seeds` are those of each arm's trained models; if the arms share none, all seeds are taken.
    Models that are no runs are compared in any case.
    """
    runs = [real for own in seeds.values() if (real := own - {NO_SEED})]
    shared = set[int].intersection(*runs) if runs else set()
    return (shared or set().union(*runs)) | {NO_SEED}


def arms_of(models: Iterable[Model]) -> list[str]:
    """The arms in the order in which they come."""
    return list(dict.fromkeys(m["arm"] for m in models))


def means(models: list[Model]) -> dict[str, Any]:
    """arm -> group -> metric -> {mean, low, high, n} over the seeds of trained models."""
    found: dict[str, Any] = {}
    for arm in arms_of(models):
        trained = list(final(models, arm).values())
        found[arm] = {}
        for group, metric in _columns(trained):
            values = _values(trained, group, metric)
            interval = t_interval(values)
            entry = {k: getattr(interval, k) for k in ("mean", "low", "high", "n")}
            found[arm].setdefault(group, {})[metric] = _rounded(entry)
    return found


def paired(models: list[Model], reference: str) -> dict[str, Any]:
    """arm -> group -> metric -> arm minus reference over the seeds that both have."""
    base = final(models, reference)
    found: dict[str, Any] = {}
    for arm in arms_of(models):
        own = final(models, arm)
        if arm == reference or not own.keys() & base.keys():
            continue
        found[arm] = {}
        for group, metric in _columns(list(own.values())):
            here, there = (
                {s: v for s, m in each.items() if (v := _value(m, group, metric)) is not None}
                for each in (own, base)
            )
            difference = paired_difference(here, there)
            if difference["n"]:
                del difference["per_seed"]  # which the models themselves say
                found[arm].setdefault(group, {})[metric] = _rounded(difference)
    return found


def tail_minus_head(models: list[Model], reference: str) -> dict[str, Any]:
    """arm -> metric -> the change at rare labels minus that at frequent ones.

    The change is arm minus reference; mean and interval are over the seeds that both have.
    Intervals of head and tail apart do not say whether the two differ: a seed moves them together.
    """

    def apart(arm: str, metric: str) -> dict[int, float]:
        found = {}
        for seed, model in final(models, arm).items():
            tail, head = (_value(model, group, metric) for group in ("tail", "head"))
            if tail is not None and head is not None:
                found[seed] = tail - head
        return found

    found: dict[str, Any] = {}
    metrics = dict.fromkeys(metric for group, metric in _columns(models) if group == "tail")
    for arm in (arm for arm in arms_of(models) if arm != reference):
        for metric in metrics:
            difference = paired_difference(apart(arm, metric), apart(reference, metric))
            if difference.pop("per_seed"):
                found.setdefault(arm, {})[metric] = _rounded(difference)
    return found


def over_tokens(
    tokens: dict[tuple[str, int], Tokens],
    masks: dict[str, Tensor],
    rows: Tensor,
    reference: str,
) -> dict[str, Any]:
    """arm -> group -> metric -> arm minus reference over tokens, for arms of a single pair.

    `{mean, low, high, n, rows}`: 95 % Student-t limits of the mean over the n tokens of which both
    models have a value, clustered by row (`groups.mean_se`; of means over pairs `influence`), so
    with one degree of freedom less than rows. They say what other text would change, and nothing of
    other seeds.
    """
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(arm for arm, _ in tokens if arm != reference):
        seeds = [s for own, s in tokens if own == arm and (reference, s) in tokens]
        if len(seeds) != 1:
            continue
        own, base = tokens[arm, seeds[0]], tokens[reference, seeds[0]]
        for group, mask in masks.items():
            for metric in own.values:
                differences = (own.values[metric] - base.values[metric])[mask]
                mean, se, n = mean_se(differences, rows[mask])
                clusters = len(torch.unique(rows[mask][~differences.isnan()]))
                if metric in own.moved[group]:
                    moved = own.moved[group][metric] - base.moved[group][metric]
                    se, clusters = se_of_rows(moved, n), len(moved)
                if (entry := _limits(mean, se, n, clusters)) is not None:
                    found.setdefault(arm, {}).setdefault(group, {})[metric] = entry
    return found


def _limits(mean: float, se: float, n: int, clusters: int) -> dict[str, Any] | None:
    if clusters < 2 or not n:
        return None
    half = t_factor(clusters - 1) * se
    return _rounded(
        {"mean": mean, "low": mean - half, "high": mean + half, "n": n, "rows": clusters}
    )


def across_models(models: list[Model]) -> dict[str, Any]:
    """group -> metric -> its correlation with the mean loss over models, pooled and by arm.

    Points are models: seeds, and checkpoints where they were analysed; `trained` has no
    checkpoints, behind whose correlation is mostly the time of training. Pooled, the arm itself is
    behind part of it: read it beside the correlation within each arm.
    """
    found: dict[str, Any] = {}
    for group in PARTS:
        for metric in PREDICTORS:
            trained = [m for m in models if m["final"]]
            entry = {
                "pooled": _correlation(models, group, metric),
                "trained": _correlation(trained, group, metric),
            }
            for arm in arms_of(models):
                entry[arm] = _correlation([m for m in models if m["arm"] == arm], group, metric)
            found.setdefault(group, {})[metric] = entry
    return found


def across_tokens(
    tokens: dict[tuple[str, int], Tokens], masks: dict[str, Tensor], reference: str
) -> dict[str, Any]:
    """arm -> group -> metric -> r over tokens of its change with the change of the token's loss.

    `tokens` has the values of trained models by (arm, seed), all on the same tokens; the change is
    arm minus reference of the same seed. Mean and interval are over seeds.
    """
    found: dict[str, Any] = {}
    for (arm, seed), own in tokens.items():
        if arm == reference or (reference, seed) not in tokens:
            continue
        values, base = own.values, tokens[reference, seed].values
        for group in PARTS:
            for metric in _PER_TOKEN:
                r = _pearson(*((values[key] - base[key])[masks[group]] for key in (metric, "loss")))
                if r is not None:
                    seeds = found.setdefault(arm, {}).setdefault(group, {}).setdefault(metric, [])
                    seeds.append(r)
    return {
        arm: {
            group: {metric: _rounded(vars(t_interval(rs))) for metric, rs in by_metric.items()}
            for group, by_metric in by_group.items()
        }
        for arm, by_group in found.items()
    }


def _pearson(x: Tensor, y: Tensor) -> float | None:
    kept = ~(x.isnan() | y.isnan())
    if int(kept.sum()) < 3:
        return None
    r = float(torch.corrcoef(torch.stack([x[kept], y[kept]]))[0, 1])
    return r if np.isfinite(r) else None


def _correlation(models: list[Model], group: str, metric: str) -> dict[str, Any]:
    """Pearson with the 95 % interval of Fisher's z, and Spearman; None from fewer than 4 points.

    No interval where a run gives several points, which are not independent.
    """
    points = [
        (x, y)
        for m in models
        if (x := _value(m, group, metric)) is not None
        and (y := _value(m, group, "loss")) is not None
    ]
    empty = {"pearson": None, "low": None, "high": None, "spearman": None, "n": len(points)}
    margins, losses = np.array(points, dtype=float).reshape(-1, 2).T
    if len(points) < 4 or margins.std() == 0 or losses.std() == 0:
        return empty
    pearson = stats.pearsonr(margins, losses)
    limits = pearson.confidence_interval(CONFIDENCE)
    rho = float(stats.spearmanr(margins, losses).statistic)
    low: float | None = float(limits.low)
    high: float | None = float(limits.high)
    if len({(m["arm"], m["seed"]) for m in models}) < len(models):
        low = high = None
    values = {"pearson": float(pearson.statistic), "low": low, "high": high}
    return _rounded({**values, "spearman": rho, "n": len(points)})


def _columns(models: list[Model]) -> list[tuple[str, str]]:
    seen = {
        (group, metric): None
        for m in models
        for group, metrics in m["groups"].items()
        for metric in metrics
        if metric != "se"
    }
    return list(seen)


def _value(model: Model, group: str, metric: str) -> float | None:
    value: float | None = model["groups"].get(group, {}).get(metric)
    return value


def _values(models: list[Model], group: str, metric: str) -> list[float]:
    return [v for m in models if (v := _value(m, group, metric)) is not None]


def _rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """Six digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in entry.items()}
