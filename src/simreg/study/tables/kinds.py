"""The kinds of tables, by the names that markers give them."""

from collections.abc import Callable
from dataclasses import dataclass

from simreg.study.tables import cost, evaluated, headline, looks, pairs, ranking, sweep
from simreg.study.tables.request import Request


@dataclass(frozen=True)
class Kind:
    """How a table is drawn, and from what."""

    draw: Callable[[Request], str]
    needs: tuple[str, ...]
    """Keys of the JSON without which it is another kind of file."""
    options: tuple[str, ...] = ()
    several: bool = False
    """Whether it takes more than one file."""


_STUDY = ("study", "arms", "isoloss", "runs")

KINDS = {
    "headline": Kind(headline.table, _STUDY, ("arms",), several=True),
    "sentences": Kind(headline.sentences, _STUDY, ("arms",)),
    "seeds": Kind(headline.seeds, _STUDY, ("arms",)),
    "ranking": Kind(ranking.table, _STUDY, ("against", "arms", "top")),
    "looks": Kind(looks.table, _STUDY, ("against", "arms")),
    "pairs": Kind(pairs.table, _STUDY, ("pairs",), several=True),
    "sweep": Kind(sweep.table, _STUDY, ("arms", "metric", "look"), several=True),
    "zero-shot": Kind(evaluated.zero_shot, ("suite", "tasks", "arms", "differences"), several=True),
    "geometry": Kind(
        evaluated.geometry, ("means", "minus_reference", "text"), ("metrics", "groups")
    ),
    "step": Kind(cost.step, ("ratio", "ratio_quartiles", "config"), several=True),
    "loss": Kind(cost.loss, ("what", "records", "machine")),
}
