"""The same arms in several studies, say one of each size: a row a study, a column an arm."""

from simreg.intervals import paired_difference
from simreg.recipe.errors import UserError
from simreg.study.tables import markdown
from simreg.study.tables.headline import final_losses
from simreg.study.tables.looks import last_looks, mean_of
from simreg.study.tables.request import Request, Source


def table(request: Request) -> str:
    """Final loss minus that of the study's reference, with a metric of the last look in brackets.

    Studies are called by their folders, which tell the scales of one file apart.
    """
    arms = _arms(request)
    notes = ["Nats, minus the reference of the same study."]
    metric = request.options.get("metric")
    if metric is not None:
        looks = [last_looks(source, arm) for source in request.sources for arm in arms]
        if all(mean_of(found, metric) is None for found in looks):
            raise UserError(f"metric: no look at the geometry has {metric!r} (train.analyze_every)")
        notes.append(f"In brackets: {metric} at the last look.")
    drawn = markdown.table(
        ["study", "CE of its reference", *arms],
        [_row(source, arms, metric) for source in request.sources],
    )
    if all(len(source.content["seeds"]) == 1 for source in request.sources):
        notes.append("One seed: no intervals, no claim.")
    return markdown.with_notes(drawn, notes)


def _arms(request: Request) -> list[str]:
    """Those asked for, else all that are the reference of no study, in the order of the files."""
    contents = [source.content for source in request.sources]
    known = dict.fromkeys(arm for results in contents for arm in results["arms"])
    references = {results["study"]["reference"] for results in contents}
    arms = request.names("arms", known) or [arm for arm in known if arm not in references]
    if not arms:
        raise UserError("sweep: the studies have no arm but their references")
    return arms


def _row(source: Source, arms: list[str], metric: str | None) -> list[str]:
    base = final_losses(source.content, source.content["study"]["reference"])
    return [
        source.path.resolve().parent.name,
        markdown.number(sum(base.values()) / len(base) if base else None, ".4f"),
        *(_cell(source, arm, base, metric) for arm in arms),
    ]


def _cell(source: Source, arm: str, base: dict[int, float], metric: str | None) -> str:
    found = paired_difference(final_losses(source.content, arm), base)
    cell = markdown.number(found["mean"], "+.4f")
    if metric is None or found["mean"] is None:
        return cell
    return f"{cell} ({markdown.number(mean_of(last_looks(source, arm), metric), '.3f')})"
