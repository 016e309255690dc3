"""Outcomes to figures: of each model, of each arm, of arms against the reference; and a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from simreg.evaluation import paired
from simreg.evaluation.outcome import ACCURACIES, Outcome, unit
from simreg.intervals import NO_SEED, limits, pairing
from simreg.recipe.trained import Trained

Outcomes = dict[tuple[str, str], Outcome]
"""(name of the model, task) -> outcome"""
AVERAGE = "average"


def build(
    found: Sequence[Trained], tasks: Sequence[str], outcomes: Mapping[tuple[str, str], Outcome]
) -> dict[str, Any]:
    """`{reference, models, arms, differences}` of results.json (docs/evaluation.md)."""
    arms: dict[str, list[Trained]] = {}
    for model in found:
        arms.setdefault(model.arm, []).append(model)
    scores = {
        arm: {task: {pairing(s.seed): outcomes[s.name, task] for s in members} for task in tasks}
        for arm, members in arms.items()
    }
    reference = next(iter(arms))
    return {
        "reference": reference,
        "models": [_model(model, tasks, outcomes) for model in found],
        "arms": {arm: _arm(scores[arm]) for arm in arms},
        "differences": {
            arm: _differences(scores[arm], scores[reference]) for arm in arms if arm != reference
        },
    }


def _model(
    model: Trained, tasks: Sequence[str], outcomes: Mapping[tuple[str, str], Outcome]
) -> dict[str, Any]:
    own = {task: outcomes[model.name, task] for task in tasks}
    return {
        "name": model.name,
        "arm": model.arm,
        "seed": model.seed,
        "tasks": {task: outcome.summary() for task, outcome in own.items()},
        "average": average([outcome.summary() for outcome in own.values()]),
    }


def average(summaries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """`{score, normalised, tasks}` over the tasks that have accuracies; None if none has.

    In `normalised`, tasks without normalised accuracy count by their plain one.
    """
    counted = [s for s in summaries if s["metric"] in ACCURACIES]
    if not counted:
        return None
    either = [s["score"] if s["normalised"] is None else s["normalised"] for s in counted]
    return {
        "score": float(np.mean([s["score"] for s in counted])),
        "normalised": float(np.mean(either)),
        "tasks": len(counted),
    }


def _arm(scores: Mapping[str, paired.Scores]) -> dict[str, Any]:
    tasks = {task: paired.over_seeds(by_seed) for task, by_seed in scores.items()}
    for found in tasks.values():
        found["seeds"] = [seed for seed in found["seeds"] if seed != NO_SEED]
    return {"tasks": tasks, AVERAGE: average(list(tasks.values()))}


def _differences(
    arm: Mapping[str, paired.Scores], reference: Mapping[str, paired.Scores]
) -> dict[str, Any]:
    """For each task and the average: `{score, normalised}`, each a paired difference or None."""
    found = {task: _difference({task: arm[task]}, {task: reference[task]}) for task in arm}
    accuracies = [task for task in arm if _metric(arm[task]) in ACCURACIES]
    if accuracies:
        found[AVERAGE] = _difference(
            {task: arm[task] for task in accuracies},
            {task: reference[task] for task in accuracies},
        )
    return found


def _difference(
    arm: Mapping[str, paired.Scores], reference: Mapping[str, paired.Scores]
) -> dict[str, Any]:
    has = any(o.normalised is not None for by_seed in arm.values() for o in by_seed.values())
    return {
        "score": paired.difference(arm, reference),
        "normalised": paired.difference(arm, reference, normalised=True) if has else None,
    }


def _metric(scores: paired.Scores) -> str:
    return next(iter(scores.values())).metric


def value(metric: str, score: float | None) -> str:
    """A score for a table: accuracies in per cent, others as they are."""
    if score is None:
        return "–"
    return f"{100 * score:.1f}" if metric in ACCURACIES else f"{score:.4f}"


def difference(metric: str, found: dict[str, Any] | None) -> str:
    """A paired difference for a table: `+1.2 [-0.3, 2.6]`."""
    if found is None:
        return "–"
    form, scale = ("+.1f", 100) if metric in ACCURACIES else ("+.4f", 1)
    return f"{scale * found['mean']:{form}}{limits(found, form, scale)}"


def line(model: Trained, task: str, outcome: Outcome) -> str:
    """One model on one task."""
    found = outcome.summary()
    text = f"{model.name}  {task}  n {found['n']:,}  {_named(found['metric'], found['score'])}"
    if found["stderr"] is not None:
        text += f" ± {value(found['metric'], found['stderr'])} (standard error)"
    if found["normalised"] is not None:
        text += f"  normalised {value('acc', found['normalised'])}"
    return text + "".join(f"  {name} {extra:.4g}" for name, extra in found["extra"].items())


def _named(metric: str, score: float) -> str:
    text = value(metric, score)
    return f"accuracy {text} %" if metric == "acc" else f"{metric.replace('_', ' ')} {text}"


COLUMNS = ("task", "n", "arm", "score", "normalised", "difference", "normalised difference")


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The table by `COLUMNS`: a row for each task and arm, the averages last."""
    table = []
    arms = results["arms"]
    for task in [*results["tasks"], AVERAGE]:
        for i, (arm, found) in enumerate(arms.items()):
            cell = found[AVERAGE] if task == AVERAGE else found["tasks"][task]
            if cell is None or (task == AVERAGE and cell["tasks"] < 2):
                continue
            paired_with = results["differences"].get(arm, {}).get(task)
            table.append(_row(task, arm, cell, paired_with, first=i == 0))
    return table


def _row(
    task: str, arm: str, cell: dict[str, Any], gap: dict[str, Any] | None, *, first: bool
) -> list[str]:
    metric = cell.get("metric", "acc")
    score = value(metric, cell["score"])
    spread = cell.get("sd") if len(cell.get("seeds", ())) > 1 else cell.get("stderr")
    if spread is not None:
        score += f" ± {value(metric, spread)}"
    return [
        task + unit(metric) if first else "",
        f"{cell['n']:,}" if first and "n" in cell else "",
        arm,
        score,
        value("acc", cell["normalised"]),
        difference(metric, gap["score"]) if gap else "",
        difference(metric, gap["normalised"]) if gap and gap["normalised"] else "",
    ]


def sentences(results: dict[str, Any]) -> list[str]:
    """For each arm but the reference, what is known of its average (or its one accuracy), or if
    there is no accuracy of the first task."""
    found = []
    for arm, gaps in results["differences"].items():
        own = results["arms"][arm]
        said, metric, where = AVERAGE, "acc", "on average over tasks"
        if own[AVERAGE] is None:
            said, first = next(iter(own["tasks"].items()))
            metric, where = first["metric"], f"on {said}"
        elif own[AVERAGE]["tasks"] == 1:
            only = (task for task, each in own["tasks"].items() if each["metric"] in ACCURACIES)
            where = f"on {next(only)}"
        gap = gaps[said]
        if gap["score"] is None:
            found.append(f"{arm} shares no seed with {results['reference']}: not compared.")
            continue
        name = "accuracy" if metric == "acc" else metric.replace("_", " ")
        text = f"{name} {_interval(gap['score'], metric)}"
        sentence = f"{arm} {where}: {text} against {results['reference']}"
        if gap["normalised"] is not None:
            sentence += f"; normalised, {_interval(gap['normalised'], 'acc')}"
        found.append(f"{sentence}. {_seeds_and_items(gap['score'])}.{_diverged(results, arm)}")
    return found


def _diverged(results: dict[str, Any], arm: str) -> str:
    """Of an arm of a study: the seeds that its difference is without."""
    if not (seeds := results.get("diverged", {}).get(arm)):
        return ""
    return f" Without seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: a run diverged."


def _interval(gap: dict[str, Any], metric: str) -> str:
    """`+1.2 points (95 % interval -0.3 to +2.6, which includes no difference)`."""
    form, scale, unit = ("{:+.1f}", 100, " points") if metric in ACCURACIES else ("{:+.4f}", 1, "")
    mean, low, high = (
        None if gap[key] is None else form.format(scale * gap[key])
        for key in ("mean", "low", "high")
    )
    if low is None:
        return f"{mean}{unit} (interval not known)"
    none = ", which includes no difference" if gap["low"] <= 0 <= gap["high"] else ""
    return f"{mean}{unit} (95 % interval {low} to {high}{none})"


def _seeds_and_items(gap: dict[str, Any]) -> str:
    if gap["seeds"] == 1:
        return f"One seed, {gap['items']:,} items: the interval says nothing of other seeds"
    return f"{gap['seeds']} seeds, {gap['items']:,} items"


def _legend(results: dict[str, Any], table_rows: list[list[str]]) -> str | None:
    """What ± and brackets are."""
    cells = "".join(cell for row in table_rows for cell in row)
    tasks = [task for arm in results["arms"].values() for task in arm["tasks"].values()]
    several = {len(task["seeds"]) > 1 for task in tasks}
    seeds, items = "standard deviation over seeds", "standard error over items"
    spread = items if True not in several else seeds
    if len(several) > 1:
        spread += f" (of one model {items})"
    said = [f"±: {spread}"] if "±" in cells else []
    said += ["brackets: 95 % intervals of paired differences"] if "[" in cells else []
    return "; ".join(said) or None


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table and the sentences."""
    table = Table(title="Zero-shot", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        left = name in ("task", "arm")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    table_rows = rows(results)
    for row in table_rows:
        table.add_row(*(cell.replace(" [", "\n[").replace(" (", "\n(") for cell in row))
    table.caption, table.caption_justify = _legend(results, table_rows), "left"
    console.print()
    console.print(table, soft_wrap=False)
    notes = [
        f"{task}: {facts['note']}" for task, facts in results["tasks"].items() if facts["note"]
    ]
    for text in [*sentences(results), *notes]:
        console.print(text)
