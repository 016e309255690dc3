"""What the embeddings of a study's arms looked like at the end of training."""

import numpy as np

from simreg.recipe.errors import UserError
from simreg.recipe.progress import read_metrics
from simreg.study.tables import markdown
from simreg.study.tables.ranking import Standing, gap_cell, how_to_read, standings
from simreg.study.tables.request import Request, Source

METRICS = {
    "intra_cos": ".3f",
    "inter_cos": ".3f",
    "effective_rank": ".1f",
    "margin_p50": ".3f",
    "margin_cos_p50": ".3f",
}
"""Of a look, and how they are written."""
_LEAST_ARMS = 3


def table(request: Request) -> str:
    """Arms by final loss beside the last look at the geometry of their embeddings."""
    against, ranked = standings(request)
    found = {each.arm: looks_at(request.source, each.arm) for each in ranked}
    if not any(found.values()):
        raise UserError(
            f"{request.source.name}: no look at the geometry in the metrics.jsonl of its runs "
            "(train.analyze_every)"
        )
    head = ["arm", f"CE minus {against} (nats)", *METRICS]
    rows = [
        [
            each.name,
            gap_cell(each, against),
            *(
                markdown.number(mean_of(found[each.arm], metric), form)
                for metric, form in METRICS.items()
            ),
        ]
        for each in ranked
    ]
    drawn = markdown.table(head, rows)
    return markdown.with_notes(drawn, [*how_to_read(ranked, against), _correlations(ranked, found)])


def looks_at(source: Source, arm: str, which: int = -1) -> dict[int, dict[str, float | None]]:
    """Seed -> one look of the arm's run at the full budget, the last, where there is one."""
    found = {}
    for run in source.content["runs"]:
        if (run["arm"], run["budget"]) == (arm, 1.0):
            lines = read_metrics(source.path.parent / run["path"] / "metrics.jsonl")
            records = [line for line in lines if line["kind"] == "geometry"]
            if records:
                found[run["seed"]] = records[which]
    return found


def mean_of(looks: dict[int, dict[str, float | None]], metric: str) -> float | None:
    """The mean of a metric over seeds, None where no look has it."""
    values = [value for look in looks.values() if (value := look.get(metric)) is not None]
    return float(np.mean(values)) if values else None


def _correlations(
    ranked: list[Standing], found: dict[str, dict[int, dict[str, float | None]]]
) -> str:
    """Over arms, of the difference in loss with the difference in each metric.

    Over arms that share initial weights, the one they are compared with among them: it is a
    point like the others, and without it r would depend on which it is.
    """
    each = []
    for metric in METRICS:
        points = [
            (standing.gap["mean"], value)
            for standing in ranked
            if not standing.unpaired
            and standing.gap["mean"] is not None
            and (value := mean_of(found[standing.arm], metric)) is not None
        ]
        each.append(f"{metric} {_pearson(points)} (n = {len(points)})")
    left_out = (
        f", without those marked {markdown.UNPAIRED}" if any(s.unpaired for s in ranked) else ""
    )
    return (
        f"Pearson's r over arms{left_out}, of the change of CE with that of each: "
        f"{', '.join(each)}. The arms were chosen and are no sample: no intervals."
    )


def _pearson(points: list[tuple[float, float]]) -> str:
    if len(points) < _LEAST_ARMS:
        return markdown.NONE
    x, y = np.asarray(points).T
    if not (x.std() and y.std()):
        return markdown.NONE
    return markdown.number(float(np.corrcoef(x, y)[0, 1]), "+.2f")
