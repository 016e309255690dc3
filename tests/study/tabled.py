"""Records of studies written by hand, and tables drawn of them, cell by cell."""

import json

from simreg.study import plan, results
from simreg.study.plan import Cell
from simreg.study.records import Run
from simreg.study.tables import document
from tests.study.fakes import TIMES

ARMS = {
    "baseline": {"optim": {"warmup": 0.5}},
    "good": {"simreg": {"weight": 1.0}},
    "best": {"auxiliary": {"name": "z-loss", "options": {"weight": 0.0001}}},
    "tied": {"model": {"tie_embeddings": True}},
    "fails": {"optim": {"lr": 0.1}},
}
LOSSES = {
    "baseline": {1: 4.5, 2: 4.6},
    "good": {1: 4.48, 2: 4.56},
    "best": {1: 4.4, 2: 4.5},
    "tied": {1: 4.55, 2: 4.65},
}


def record(folder, losses=LOSSES, arms=ARMS, failures=None, **values):
    """Write results.json of a study whose runs at N have these losses; returns its content."""
    base = {"train": {"tokens": 1_000_000}, **values.pop("base", {})}
    values = {"seeds": [1, 2], "budgets": [1.0], **values}
    study = plan.from_dict({"name": "s", "out": str(folder), "base": base, "arms": arms, **values})
    facts = {"tokens": 1_000_000, "steps": 244, "seconds": 1.0, "corpus": {"fingerprint": "f"}}
    facts["params"] = {"total": 2_000_000, "active": 1_000_000}
    runs = [
        Run(Cell(arm, 1.0, seed), {"final_ce": ce, **facts}, [{"step": 244, "clipped": 0.25}], [])
        for arm, by_seed in losses.items()
        for seed, ce in by_seed.items()
    ]
    times = {"good": TIMES, "best": {**TIMES, "n": 0}}
    found = results.build(study, runs, times, [], failures)
    write(folder, found)
    return found


def write(folder, found):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))


def cells(request, folder):
    """The cells of a table's lines, and what stands below it."""
    table, _, below = document.draw(request, folder).partition("\n\n")
    return [line.strip("| ").split(" | ") for line in table.splitlines()], below


def rows(folder, kind, options=""):
    """The same without the lines of the head."""
    lines, below = cells(f"{kind} results.json {options}", folder)
    return lines[2:], below


def head(folder, kind, options=""):
    return cells(f"{kind} results.json {options}", folder)[0][0]
