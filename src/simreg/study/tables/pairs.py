"""What one change does wherever two arms differ by it: a row for each such pair of arms."""

from collections.abc import Iterator
from typing import Any

from simreg.recipe.errors import UserError
from simreg.study import summary
from simreg.study.results import unpaired
from simreg.study.tables import markdown
from simreg.study.tables.headline import and_diverged, final_difference
from simreg.study.tables.request import Request, Source


def table(request: Request) -> str:
    """Final loss of the first arm minus that of the second, for `pairs=first:second,...`.

    Studies are called by their folders. A pair stands for every study that has both of its arms;
    UserError where the same seed does not pair them.
    """
    pairs = _pairs(request)
    rows, differences = [], []
    for source in request.sources:
        present = [pair for pair in pairs if set(pair) <= source.content["arms"].keys()]
        if not present:
            raise UserError(f"pairs: {source.name} has both arms of none")
        for pair in present:
            if changed := unpaired(source.study, *pair):
                raise UserError(
                    f"pairs: in {source.name} {':'.join(pair)} differ in {', '.join(changed)}, so "
                    "that the same seed starts from other weights or sees other batches"
                )
            found = final_difference(source.content, *pair)
            if not found["n"] and not found["diverged"]:
                continue  # of an unfinished study
            differences.append(found)
            rows.append(_row(source, pair, found))
    head = ["study", "arms", "tokens N", "difference (nats)", "seeds", "lower in"]
    return markdown.with_notes(markdown.table(head, rows, left=2), list(_notes(differences)))


def _pairs(request: Request) -> list[tuple[str, str]]:
    known = [source.content["arms"].keys() for source in request.sources]
    found = []
    for text in request.options.get("pairs", "").split(","):
        first, colon, second = text.partition(":")
        if not colon or first == second:
            raise UserError(f"pairs: give arms as first:second,... (got {text!r})")
        if not any({first, second} <= arms for arms in known):
            raise UserError(f"pairs: no file has both arms of {text}")
        found.append((first, second))
    return found


def _row(source: Source, pair: tuple[str, str], found: dict[str, Any]) -> list[str]:
    lower = sum(entry["difference"] < 0 for entry in found["per_seed"])
    return [
        source.path.resolve().parent.name,
        " minus ".join(pair),
        summary.count(source.content["study"]["base"]["train"]["tokens"]),
        markdown.difference(found),
        and_diverged(str(found["n"]), found),
        f"{lower} of {found['n']}",
    ]


def _notes(differences: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Brackets: 95 % Student-t intervals of differences paired by seed, not corrected for their "
        "number."
    )
    means = [found["mean"] for found in differences if found["mean"] is not None]
    below = [found for found in differences if found["high"] is not None and found["high"] < 0]
    seeds = [entry["difference"] for found in differences for entry in found["per_seed"]]
    lower = sum(difference < 0 for difference in seeds)
    yield (
        f"The mean is lower in {sum(mean < 0 for mean in means)} of {len(means)} comparisons, with "
        f"the interval below 0 in {len(below)}; {lower} of {len(seeds)} pairs of one "
        "seed are lower."
    )
