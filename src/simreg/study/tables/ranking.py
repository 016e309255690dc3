"""The arms of a study in the order of their final loss."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from simreg.recipe.errors import UserError
from simreg.study import summary
from simreg.study.results import unpaired
from simreg.study.tables import markdown
from simreg.study.tables.headline import and_diverged, final_difference, final_losses
from simreg.study.tables.request import Request


@dataclass(frozen=True)
class Standing:
    """An arm beside the one that all are compared with."""

    arm: str
    losses: dict[int, float]
    """Seed -> final cross-entropy at the full budget."""
    gap: dict[str, Any]
    """Their paired difference."""
    unpaired: list[str]
    """What it changes so that it starts from other weights or sees other batches."""

    @property
    def name(self) -> str:
        """With a mark if it is unpaired."""
        return f"{self.arm} {markdown.UNPAIRED}" if self.unpaired else self.arm


def table(request: Request) -> str:
    """Arms by final loss: difference, what they change, what they cost.

    The column of step times is left out where none was measured.
    """
    results = request.source.content
    against, ranked = standings(request)
    shown, top = ranked, request.count("top")
    if top is not None:
        best = [each.arm for each in ranked if each.arm != against][:top]
        shown = [each for each in ranked if each.arm in (against, *best)]
    reference = results["study"]["reference"]
    head = [
        "arm",
        "changes",
        "final CE",
        f"minus {against} (nats)",
        "seeds",
        "clipped steps",
        f"step time over {reference}",
    ]
    rows = [_row(results, against, each) for each in shown]
    if not any(results["step_time"].get(each.arm, {}).get("n") for each in shown):
        head, rows = head[:-1], [row[:-1] for row in rows]  # nothing was measured
    drawn = markdown.table(head, rows, left=2)
    notes = [f"The best {top} of {len(ranked) - 1}."] if len(shown) < len(ranked) else []
    return markdown.with_notes(drawn, [*notes, *how_to_read(shown, against)])


def standings(request: Request) -> tuple[str, list[Standing]]:
    """The arm that others are compared with, and all arms asked for with it, the best first."""
    results = request.source.content
    arms = list(results["arms"])
    against, *more = request.names("against", arms) or [results["study"]["reference"]]
    if more:
        raise UserError(f"against: give one arm (got {', '.join([against, *more])})")
    wanted = request.names("arms", arms) or arms
    base = final_losses(results, against)
    if not base:
        raise UserError(f"against: {against!r} has no finished run at the full budget")
    found = []
    for arm in dict.fromkeys([against, *wanted]):
        losses = final_losses(results, arm)
        other = unpaired(request.source.study, against, arm)
        found.append(Standing(arm, losses, final_difference(results, arm, against), other))
    return against, sorted(found, key=lambda each: _order(each.gap["mean"]))


def _order(difference: float | None) -> float:
    """Arms without a run are last, not lost."""
    return float("inf") if difference is None else difference


def _changes(overrides: dict[str, Any]) -> str:
    """By section: `simreg.weight 0; optim.lr 0.006, warmup 0.3; auxiliary simctg: weight 1.0`."""
    groups = []
    for section, values in overrides.items():
        title = f"{section}."
        if section == "auxiliary":
            title = f"{section} {_value(values['name'])}: " if "name" in values else f"{section}: "
            own = {key: value for key, value in values.items() if key not in ("name", "options")}
            values = own | values.get("options", {})
        listed = ", ".join(f"{key} {_value(value)}" for key, value in values.items())
        groups.append(f"{title}{listed}".removesuffix(": "))
    return "; ".join(groups) or "nothing"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row(results: dict[str, Any], against: str, standing: Standing) -> list[str]:
    arm = standing.arm
    entry = results["arms"][arm]
    losses = list(standing.losses.values())
    clipped = entry["budgets"].get("1", {}).get("clipped")
    reference = arm == results["study"]["reference"]
    return [
        standing.name,
        _changes(entry["overrides"]),
        markdown.number(float(np.mean(losses)) if losses else None, ".4f"),
        gap_cell(standing, against),
        _seeds(results, standing),
        markdown.NONE if clipped is None else summary.percent(clipped),
        "1" if reference else markdown.step_time(results["step_time"].get(arm)),
    ]


def gap_cell(standing: Standing, against: str) -> str:
    """Its difference, 0 for the arm that it is taken from."""
    return "0" if standing.arm == against else markdown.difference(standing.gap)


def _seeds(results: dict[str, Any], standing: Standing) -> str:
    """Seeds that both arms have; if not all of the plan, of how many, and how many diverged."""
    n, planned = standing.gap["n"], len(results["seeds"])
    return and_diverged(str(n) if n == planned else f"{n} of {planned}", standing.gap)


def how_to_read(shown: list[Standing], against: str) -> list[str]:
    """How to read the differences."""
    gaps = [each.gap for each in shown if each.arm != against]
    notes = []
    if any(gap["low"] is not None for gap in gaps):
        notes = [
            "Brackets: 95 % Student-t intervals of differences paired by seed, not corrected for "
            "the number of arms."
        ]
    elif any(gap["n"] > 1 for gap in gaps):
        notes = ["No intervals: a run diverged, and the seeds that are left are no sample of all."]
    elif gaps:
        notes = ["One seed an arm: no intervals, no claim."]
    if fields := [field for each in shown for field in each.unpaired]:
        notes.append(markdown.unpaired_note(against, fields))
    return notes
