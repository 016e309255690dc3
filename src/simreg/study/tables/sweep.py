"""The same arms in several studies, say one of each size: a row a study, a column an arm."""

from simreg.recipe.errors import UserError
from simreg.study.tables import markdown
from simreg.study.tables.headline import and_diverged, final_difference, final_losses
from simreg.study.tables.looks import looks_at, mean_of
from simreg.study.tables.request import Request, Source

_LOOKS = {"first": 0, "last": -1}


def table(request: Request) -> str:
    """Final loss minus that of the study's reference, with a metric of a look in brackets.

    That look is the last, or with `look=first` the first, which knows of the start of training.
    Studies are called by their folders, which tell the scales of one file apart.
    """
    arms = _arms(request)
    notes = ["Nats, minus the reference of the same study."]
    metric, look = request.options.get("metric"), request.options.get("look", "last")
    if look not in _LOOKS:
        raise UserError(f"look: expected {' or '.join(_LOOKS)}, got {look!r}")
    if metric is not None:
        looks = [looks_at(source, arm, _LOOKS[look]) for source in request.sources for arm in arms]
        if all(mean_of(found, metric) is None for found in looks):
            raise UserError(f"metric: no look at the geometry has {metric!r} (train.analyze_every)")
        notes.append(f"In brackets: {metric} at the {look} look.")
    drawn = markdown.table(
        ["study", "CE of its reference", *arms],
        [_row(source, arms, metric, _LOOKS[look]) for source in request.sources],
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


def _row(source: Source, arms: list[str], metric: str | None, look: int) -> list[str]:
    reference = source.content["study"]["reference"]
    base = final_losses(source.content, reference)
    return [
        source.path.resolve().parent.name,
        markdown.number(sum(base.values()) / len(base) if base else None, ".4f"),
        *(_cell(source, arm, reference, metric, look) for arm in arms),
    ]


def _cell(source: Source, arm: str, reference: str, metric: str | None, look: int) -> str:
    found = final_difference(source.content, arm, reference)
    cell = and_diverged(markdown.number(found["mean"], "+.4f"), found)
    if metric is None or found["mean"] is None:
        return cell
    return f"{cell} ({markdown.number(mean_of(looks_at(source, arm, look), metric), '.3f')})"
