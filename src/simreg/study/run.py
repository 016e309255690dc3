"""Running a study: what is missing is trained, what is finished is reused, then the report."""

import contextlib
import fcntl
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from simreg.recipe import config as recipe
from simreg.recipe import data, timing, train
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.data import Corpus
from simreg.recipe.errors import Diverged, Locked, UserError
from simreg.recipe.folder import FREE_FIELDS, RunFolder
from simreg.recipe.progress import duration
from simreg.study import plan, records, report, results, sizing, summary
from simreg.study.plan import Cell, CompareOptions, Study

STUDY_FILE = "study.yaml"
POLL_SECONDS = 5.0
"""How often to look again at runs that another process is training."""


def main(options: CompareOptions) -> None:
    """`simreg compare`."""
    compare(plan.from_options(options), command=shlex.join(["simreg", *sys.argv[1:]]))


def compare(
    study: Study, *, command: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is missing of the study, write results.json and the report; returns the results.

    UserError if the study's folder holds one with another base configuration.
    """
    console = console or Console(highlight=False)
    out = Path(study.out)
    began = time.monotonic()
    with _exclusive(out):
        study = _settled(study)
        corpus, step_time = _measure(study, console)
        if study.minutes is not None and not (out / STUDY_FILE).exists():
            study = _sized(study, corpus or data.prepare(study.base.data), step_time, began)
        plan.save(study, out / STUDY_FILE)
    failures = _run_missing(study, corpus, sizing.TimeLeft(study, step_time), console)
    runs = records.collect(study)
    found = results.build(study, runs, step_time, [command] if command else [], failures)
    write_atomically(out / "results.json", json.dumps(found, indent=1) + "\n")
    report.write(out, runs, found)
    summary.show(found, console)
    console.print(f"\nreport  {out / 'report.html'}\nresults {out / 'results.json'}")
    return found


@contextlib.contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """One process at a time settles the size of a study and times its steps."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in the study folder {out}: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _settled(study: Study) -> Study:
    """The study with the size that its folder already has; UserError if the folder's is another."""
    path = Path(study.out) / STUDY_FILE
    if not path.exists():
        return study
    stored = plan.load(path)
    advice = "give another --out, or delete the folder to start again"
    if study.minutes is not None:
        if stored.minutes != study.minutes:
            size = f"{stored.base.train.tokens} tokens"
            made = f"for {stored.minutes:g} minutes, {size}" if stored.minutes else f"with {size}"
            raise UserError(f"the study in {study.out} was made {made}: say the same, or {advice}")
        sized = replace(study.base.train, tokens=stored.base.train.tokens)
        if sized.eval_tokens is None:
            sized = replace(sized, eval_tokens=stored.base.train.eval_tokens)
        study = replace(study, base=replace(study.base, train=sized))
    changes = _changes(recipe.to_dict(stored.base), recipe.to_dict(study.base))
    if changes:
        raise UserError(f"the study in {study.out} has another base ({changes}): {advice}")
    for arm in stored.arms.keys() & study.arms.keys():
        before, after = (recipe.to_dict(s.arm_config(arm)) for s in (stored, study))
        if changes := _changes(before, after):
            raise UserError(
                f"arm {arm!r} of the study in {study.out} is another one ({changes}): "
                f"give the arm another name, or {advice}"
            )
    return study


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> str:
    """`optim.lr: 0.003 -> 0.001`, for every value that differs."""
    found = []
    for key, old in before.items():
        new = after[key]
        if isinstance(old, dict):
            found.append(_changes(old, new, f"{prefix}{key}."))
        elif old != new and f"{prefix}{key}" not in (*FREE_FIELDS, "train.seed"):
            found.append(f"{prefix}{key}: {old} -> {new}")
    return "; ".join(filter(None, found))


def _missing(study: Study) -> list[Cell]:
    """Runs without a result; UserError if a folder holds the run of another config."""

    def finished(cell: Cell) -> bool:
        config = study.config(cell)
        return RunFolder(config.out).finished(config) is not None

    return [cell for cell in study.cells() if not finished(cell)]


def _measure(study: Study, console: Console) -> tuple[Corpus | None, dict[str, dict[str, Any]]]:
    """The corpus (None if nothing is left to train or time) and the arms' step times."""
    known = sizing.cached_step_times(study)
    if len(known) == len(study.others) and not _missing(study):
        return None, known
    corpus = data.prepare(study.base.data)
    corpus.require_batch(study.base.train.batch_rows)
    if len(known) < len(study.others):
        console.print("timing the steps of each arm, interleaved with the reference's ...")
    return corpus, sizing.step_times(study, corpus)


def _sized(
    study: Study, corpus: Corpus, step_time: dict[str, dict[str, Any]], began: float
) -> Study:
    """The study with N such that it ends `minutes` after it began, and no token is seen twice."""
    assert study.minutes is not None
    tokens_per_s = timing.throughput(study.arm_config(study.reference), corpus)
    ratios = {arm: times["ratio"] for arm, times in step_time.items()}
    total = 60 * study.minutes
    left = max(total - (time.monotonic() - began), total / 2)
    base = sizing.fit(study, tokens_per_s, ratios, left)
    if base.train.tokens > corpus.tokens:
        base = replace(base, train=replace(base.train, tokens=corpus.tokens))
    return replace(study, base=base)


def _run_missing(
    study: Study, corpus: Corpus | None, left: sizing.TimeLeft, console: Console
) -> dict[str, str]:
    """Train what is missing; a run that another process trains is looked at again at the end.

    Returns the runs that diverged (path -> message): they must not end a whole study.
    """
    cells = study.cells()
    todo = _missing(study)
    if reused := len(cells) - len(todo):
        console.print(f"{reused} of {len(cells)} runs are finished already")
    failures: dict[str, str] = {}
    while todo:
        postponed: list[Cell] = []
        for i, cell in enumerate(todo):
            remaining = left.of(todo[i:] + postponed)
            about = f" · about {duration(remaining)} left in all" if remaining else ""
            number = f"[{cells.index(cell) + 1}/{len(cells)}]"
            title = f"{number} {cell.arm} · {cell.budget:g} N · seed {cell.seed}{about}"
            console.print(title, style="bold", markup=False)
            began = time.monotonic()
            try:
                train.train(study.config(cell), corpus=corpus)
            except Locked:
                postponed.append(cell)
            except Diverged as error:
                failures[cell.folder] = str(error)
                console.print(f"diverged: {error}", markup=False)
            else:
                left.ended(cell, time.monotonic() - began)
        if postponed and len(postponed) == len(todo):
            console.print(f"waiting for another process to finish {len(postponed)} run(s) ...")
            time.sleep(POLL_SECONDS)
        todo = postponed
    return failures
