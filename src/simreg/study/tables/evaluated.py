"""What was found of trained models: zero-shot scores, geometry of embeddings."""

from typing import Any

from simreg.analysis import summary as described
from simreg.evaluation import run as evaluation
from simreg.evaluation import summary as scores
from simreg.evaluation.outcome import unit
from simreg.intervals import limits
from simreg.recipe.errors import UserError
from simreg.study import geometry as analysed
from simreg.study.tables import markdown
from simreg.study.tables.request import Request

_FORMS = {"effective_rank": ".2f"}
"""How metrics are written that are not of the order of 1."""


def zero_shot(request: Request) -> str:
    """Tasks × arms, and differences; a table for each file."""
    drawn = []
    for source in request.sources:
        found = source.content
        arms, others = list(found["arms"]), list(found["differences"])
        head = ["task", "items", *arms, *(f"{arm} minus {found['reference']}" for arm in others)]
        tasks = [*found["tasks"], scores.AVERAGE]
        rows = [row for task in tasks if (row := _task(found, task)) is not None]
        drawn.append(markdown.with_notes(markdown.table(head, rows), [_note(found)]))
    return "\n\n".join(drawn)


def _task(found: dict[str, Any], task: str) -> list[str] | None:
    """A row; None for an average over fewer than two tasks."""
    whole = task == scores.AVERAGE
    cells = [own[task] if whole else own["tasks"][task] for own in found["arms"].values()]
    if whole and (cells[0] is None or cells[0]["tasks"] < 2):
        return None
    metric = cells[0].get("metric", "acc")
    gaps = [scores.difference(metric, own[task]["score"]) for own in found["differences"].values()]
    return [
        task + unit(metric),
        f"{cells[0]['n']:,}" if "n" in cells[0] else "",
        *(scores.value(metric, cell["score"]) for cell in cells),
        *(markdown.minus(gap) for gap in gaps),
    ]


def _note(found: dict[str, Any]) -> str:
    """What scores and brackets are."""
    gaps = [
        gap
        for own in found["differences"].values()
        for entry in own.values()
        if (gap := entry["score"]) is not None
    ]
    seeds = max((gap["seeds"] for gap in gaps), default=0)
    limits = "95 % Student-t intervals over seeds and items"
    if found["schema"] != evaluation.SCHEMA:
        limits = "95 % bootstrap intervals over seeds and items, too narrow with few seeds"
    if seeds == 1:
        limits += ", of the items alone: one seed says nothing of others"
    notes = [f"{task}: {facts['note']}." for task, facts in found["tasks"].items() if facts["note"]]
    return " ".join([f"Accuracies in per cent; seeds: {seeds}; brackets: {limits}.", *notes])


def geometry(request: Request) -> str:
    """Metrics × arms, and differences with their intervals."""
    found = request.source.content
    labels = dict(described.ROWS)
    metrics = request.names("metrics", labels) or list(labels)
    # Whatever the analysis told apart: head and tail, deciles of frequency, quarters of the row.
    groups = request.names("groups", found["means"][found["reference"]]) or ["all"]
    others = list(found["minus_reference"])
    named = ["metric", "tokens"] if len(groups) > 1 else ["metric"]
    head = [*named, *found["means"], *(f"{arm} minus {found['reference']}" for arm in others)]
    rows = []
    for metric in metrics:
        for group in groups:
            cells = _measured(found, metric, group)
            if any(cell != markdown.NONE for cell in cells):
                rows.append([*[labels[metric], group][: len(named)], *cells])
    if not rows:
        raise UserError("none of these metrics and groups was measured")
    drawn = markdown.table(head, rows, left=len(named))
    return markdown.with_notes(drawn, [analysed.note(found)])


def _measured(found: dict[str, Any], metric: str, group: str) -> list[str]:
    """The mean of each arm, then the difference of each to the reference."""
    form = _FORMS.get(metric, ".4f")

    def of(part: str, arm: str) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = found.get(part, {}).get(arm, {}).get(group, {}).get(metric)
        return None if entry is None or entry["mean"] is None else entry

    def gap(arm: str) -> str:
        entry = of("minus_reference", arm)
        if entry is None:
            return markdown.NONE
        # One seed has no interval over seeds, but one over tokens; the note says so.
        known = entry if entry["low"] is not None else of("over_tokens", arm)
        return markdown.minus(f"{entry['mean']:+{form}}{limits(known, f'+{form}')}")

    means = [of("means", arm) for arm in found["means"]]
    return [
        *(markdown.number(entry["mean"] if entry else None, form) for entry in means),
        *(gap(arm) for arm in found["minus_reference"]),
    ]
