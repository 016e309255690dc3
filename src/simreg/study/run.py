"""Running a study: what is missing is trained, what is finished is reused, then the report."""

import contextlib
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from simreg.recipe import assemble, data, models, progress, timing, train
from simreg.recipe import config as recipe
from simreg.recipe.config import RunConfig, TrainConfig
from simreg.recipe.data import Corpus
from simreg.recipe.errors import Diverged, Locked, UserError
from simreg.recipe.folder import (
    FREE_FIELDS,
    STUDY_FILE,
    RunFolder,
    flat,
    storage_errors,
)
from simreg.recipe.outputs import check_results
from simreg.recipe.processes import warn, world_size
from simreg.study import plan, records, report, sizing, summary, zeroshot
from simreg.study.options import CompareOptions, from_options
from simreg.study.plan import Cell, Study

POLL_SECONDS = 5.0
"""How often to look again at runs that another process is training."""
SLOW = 1.4
"""A first run that takes this many times its prediction is worth a warning."""
REPORT = "--report"


def main(options: CompareOptions) -> None:
    """`simreg compare`."""
    study = from_options(options)
    command = shlex.join(["simreg", *(each for each in sys.argv[1:] if each != REPORT)])
    if options.report:
        redraw(study, command=command)
        return
    with _stopping_after(options.stop_after):
        compare(study, command=command)


@contextlib.contextmanager
def _stopping_after(minutes: float | None) -> Iterator[None]:
    """As if Ctrl-C were pressed then: a run that is in progress saves first."""
    if minutes is None:
        yield
        return
    if not 0 < minutes < math.inf:
        raise UserError(f"--stop-after {minutes:g}: expected minutes above 0")
    timer = threading.Timer(60 * minutes, os.kill, [os.getpid(), signal.SIGINT])
    timer.daemon = True
    # A script's background jobs begin with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def compare(
    study: Study, *, command: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is missing of the study, write results.json and the report; returns the results.

    UserError if the study's folder holds one with another base configuration or other data, or in
    one of several processes of a launcher.
    """
    console = console or progress.console()
    if world_size() > 1:
        raise UserError(
            "simreg compare trains each run in one process: start it without torchrun, once for "
            "each GPU if you like; commands with the same --out share the runs"
        )
    out = Path(study.out)
    began = time.monotonic()
    _check_folder(out)
    with plan.exclusive(out, console):
        study = _settled(study)
        _check_models(study)
        unsized = study.minutes is not None and not (out / STUDY_FILE).exists()
        if unsized:
            _check_unbegun(study)
        corpus, step_time = _measure(study, console, unsized=unsized)
        if unsized and corpus is not None:
            study = _sized(study, corpus, step_time, began, console)
        with storage_errors(out):
            plan.save(study, out / STUDY_FILE)
    if corpus is None and (out / "results.json").exists():
        command = None  # which adds nothing to what is on record
    try:
        failures = _run_missing(study, corpus, sizing.TimeLeft(study, step_time), console)
    except KeyboardInterrupt:
        if _finished(study):
            console.print(f"{REPORT} writes the report of the runs that are finished")
        raise
    with plan.exclusive(out, console):  # who shares the study finds the models evaluated
        found = _write(study, step_time, command, failures)  # before what may fail
        if zeroshot.after_training(study, corpus, step_time, console):
            found = _write(study, step_time, command, failures)
    _show(out, found, console)
    return found


def redraw(
    study: Study, *, command: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Write results.json and the report of the runs that are finished, whoever trains the rest.

    UserError if none is, or if the study's folder holds another one, or more finished runs of it.
    """
    console = console or progress.console()
    out = Path(study.out)
    _check_folder(out)
    if not out.is_dir():
        raise UserError(f"no study has begun in {out}: leave out {REPORT} to begin it")
    with plan.exclusive(out, console):
        study = _settled(study, dropping=False)
        cells, finished = study.cells(), _finished(study)
        if not finished:
            raise UserError(f"none of the {len(cells)} runs of the study in {out} is finished yet")
        failures = records.failures(study)
        step_time = sizing.cached_step_times(study, any_machine=True)
        if not (out / STUDY_FILE).exists():
            with storage_errors(out):
                plan.save(study, out / STUDY_FILE)
        found = _write(study, step_time, command, failures)
    console.print(f"{len(finished)} of {len(cells)} runs are finished")
    _show(out, found, console)
    return found


def _check_folder(out: Path) -> None:
    """UserError if the results of something else are there."""
    check_results(out / "results.json", "study", "simreg compare")
    if RunFolder(out).config.exists():
        raise UserError(f"{out} is the folder of a run: give another --out")


def _write(
    study: Study, step_time: sizing.StepTimes, command: str | None, failures: dict[str, str]
) -> dict[str, Any]:
    """Write what is known now, and return it."""
    zero_shot = zeroshot.recorded(study, failures)
    return report.publish(study, step_time, zero_shot, failures, command)


def _show(out: Path, found: dict[str, Any], console: Console) -> None:
    summary.show(found, console)
    zeroshot.show(found, console)
    console.print(f"\nreport  {out / 'report.html'}\nresults {out / 'results.json'}")


def _settled(study: Study, *, dropping: bool = True) -> Study:
    """The study with the size that its folder already has; UserError if the folder's is another, or
    has finished runs that this one is not of, unless they may be dropped."""
    path = Path(study.out) / STUDY_FILE
    if not path.exists():
        return study
    stored = plan.load(path)
    if not recipe.as_written(path):
        raise UserError(
            f"{path} is not as `simreg compare` writes it (has it comments?), and the study's own "
            "would replace it: give another --out"
        )
    advice = "give another --out, or delete the folder to start again"
    if study.minutes is not None:
        if stored.minutes != study.minutes:
            size = f"{stored.base.train.tokens} tokens"
            made = f"for {stored.minutes:g} minutes, {size}" if stored.minutes else f"with {size}"
            raise UserError(f"the study in {study.out} was made {made}: say the same, or {advice}")
        sized = replace(study.base.train, tokens=stored.base.train.tokens)
        if sized.eval_tokens is None:
            sized = replace(sized, eval_tokens=stored.base.train.eval_tokens)
            if sized.evals == TrainConfig().evals:
                sized = replace(sized, evals=stored.base.train.evals)
        study = replace(study, base=replace(study.base, train=sized))
        study.check_size()  # budgets may have been added
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
    planned = {cell.folder for cell in study.cells()}
    if dropped := [c.folder for c in stored.cells() if c.folder not in planned]:
        runs = f"{len(dropped)} runs, such as {dropped[0]}" if len(dropped) > 1 else dropped[0]
        if not dropping and any(RunFolder(path.parent / name).result.exists() for name in dropped):
            raise UserError(
                f"the study in {study.out} is of {runs} too, and its report would be without: for "
                f"all of it `simreg compare {path} --out {study.out} {REPORT}`"
            )
        warn(f"the study in {study.out} has been of {runs} too: its results are without now")
    return study


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """`optim.lr: 0.003 -> 0.001`, for every value that differs."""
    new = flat(after)
    return "; ".join(
        f"{name}: {old} -> {new[name]}"
        for name, old in flat(before).items()
        if old != new[name] and name not in (*FREE_FIELDS, "train.seed")
    )


def _check_unbegun(study: Study) -> None:
    """UserError if runs are there, of a size that is not known: another would not fit them."""
    begun = (RunFolder(study.config(cell).out).config for cell in study.cells())
    if (there := next((path for path in begun if path.exists()), None)) is not None:
        raise UserError(
            f"{study.out} has runs, but no {STUDY_FILE} that says how large they are: restore it, "
            f"give --tokens as in {there}, or delete the folder to start again"
        )


def _check_models(study: Study) -> None:
    """UserError for a config that cannot be trained, before any text is read."""
    for arm in study.arms:
        models.of_run(study.arm_config(arm), vocab_size=1)


def _finished(study: Study) -> dict[Cell, dict[str, Any]]:
    """Results of the finished runs; UserError if a folder holds the run of another config.

    Not of one that diverged before: see `records.failures`.
    """
    lost = records.failures(study)
    configs = {cell: study.config(cell) for cell in study.cells() if cell.folder not in lost}
    found = {cell: RunFolder(config.out).finished(config) for cell, config in configs.items()}
    return {cell: result for cell, result in found.items() if result is not None}


def _measure(
    study: Study, console: Console, *, unsized: bool
) -> tuple[Corpus | None, sizing.StepTimes]:
    """The corpus (None if nothing is left to train or time) and the arms' step times."""
    finished = {} if unsized else _finished(study)
    lost = records.failures(study)
    done = all(cell in finished or cell.folder in lost for cell in study.cells())
    # A study that is over can be drawn again anywhere, with the times that are on record.
    known = sizing.cached_step_times(study, any_machine=done)
    untimed = [arm for arm in study.others if study.times(arm) and arm not in known]
    if done and not untimed:
        return None, known
    corpus = data.prepare(study.base.data)
    _require_batches(study, corpus)
    for cell, result in finished.items():
        if (before := result["corpus"]["fingerprint"]) != corpus.fingerprint:
            raise UserError(
                f"the data have changed since {cell.folder} of the study in {study.out} was "
                f"trained ({before} then, {corpus.fingerprint} now): restore them, or give another "
                "--out"
            )
        now = assemble.precision(study.config(cell))
        if (precision := result.get("precision", now)) != now:
            raise UserError(
                f"{cell.folder} of the study in {study.out} was trained in {precision}; what is "
                f"missing would be in {now} on this machine: give another --out"
            )
    if untimed:
        console.print("timing the steps of each arm, interleaved with the reference's ...")
    with storage_errors(Path(study.out)):
        return corpus, sizing.step_times(study, corpus)


def _require_batches(study: Study, corpus: Corpus) -> None:
    """UserError, before any run, if the training text does not fill one batch of some arm."""
    for arm in (study.reference, *study.others):
        try:
            corpus.require_batch(study.arm_config(arm).train.batch_rows)
        except UserError as error:
            raise UserError(f"arm {arm!r}: {error}") from None


def _sized(
    study: Study, corpus: Corpus, step_time: sizing.StepTimes, began: float, console: Console
) -> Study:
    """The study with N such that it ends `minutes` after it began, and no token is seen twice."""
    assert study.minutes is not None
    config = study.arm_config(study.reference)
    step_s = sizing.reference_step(step_time)
    if step_s is None:
        step_s = config.tokens_per_step / timing.throughput(config, corpus)
    spent, wanted = time.monotonic() - began, 60 * study.minutes
    seconds = max(wanted - spent, wanted / 2)
    study = sizing.fit(study, step_s, step_time, seconds, len(corpus.train))
    if (needed := spent + sizing.total(study, step_s, step_time)) > 1.1 * wanted:
        console.print(
            f"this will take about {progress.duration(needed)} in all, more than the "
            f"{study.minutes:g} minutes asked for"
        )
    return study


def _run_missing(
    study: Study, corpus: Corpus | None, left: sizing.TimeLeft, console: Console
) -> dict[str, str]:
    """Train what is missing; a run that another process trains is looked at again at the end.

    Returns the runs that diverged, now or before (path -> message): they must not end a study.
    """
    cells, finished = study.cells(), _finished(study)
    todo = [cell for cell in cells if cell not in finished]
    if finished:
        console.print(f"{len(finished)} of {len(cells)} runs are finished already")
    if not todo:
        console.print(f"nothing to train: this is on record in {study.out}, train anew with --out")
    if todo and corpus is not None:
        console.print(_setting(study.arm_config(study.reference), corpus))
    failures: dict[str, str] = {}
    announced: set[Cell] = set()
    waiting = False
    while todo:
        postponed: list[Cell] = []
        for i, cell in enumerate(todo):
            rest = todo[i + 1 :] + postponed
            if cell not in announced:
                announced.add(cell)
                number = f"[{cells.index(cell) + 1}/{len(cells)}]"
                title = f"{number} {_title(study, cell)}{_about(left.of([cell, *rest]))}"
                console.print(title, style="bold")
            first = left.slowdown is None
            if before := records.failure(study, cell):
                failures[cell.folder] = before
                again = f"delete {Path(study.out) / cell.folder} to try again"
                console.print(f"diverged before: {before}; {again}")
                continue
            try:
                _train(study, cell, corpus, left, console)
            except Locked:
                postponed.append(cell)
            except Diverged as error:
                failures[cell.folder] = str(error)
                with storage_errors(Path(study.out)):
                    RunFolder(study.config(cell).out).record_divergence(str(error))
                console.print(f"diverged: {error}")
            if first and study.minutes is not None and (left.slowdown or 0) > SLOW:
                slow = f"slower than timed by a factor of {left.slowdown:.1f}"
                console.print(f"{slow}{_about(left.of(rest))}")
        if postponed and len(postponed) == len(todo):
            if not waiting:
                waiting = True
                console.print(f"waiting for another process to finish {len(todo)} run(s) ...")
            time.sleep(POLL_SECONDS)
        todo = postponed
    return failures


def _train(
    study: Study, cell: Cell, corpus: Corpus | None, left: sizing.TimeLeft, console: Console
) -> None:
    """Train a run, each line named; its time counts if all of it passed here."""
    config = study.config(cell)
    afresh, stepped = not RunFolder(config.out).metrics.exists(), False

    def tell(record: dict[str, Any]) -> None:
        nonlocal stepped
        stepped = True
        line = progress.log_line(record, total=record["steps"])
        console.print(f"{cell.arm} · {cell.budget:g} N  {line}")

    began = time.monotonic()
    train.train(config, corpus=corpus, on_step=tell)
    if afresh and stepped:
        left.ended(cell, time.monotonic() - began)


def _setting(config: RunConfig, corpus: Corpus) -> str:
    """What all runs have in common: `llama-tiny: 1.84M parameters, cpu fp32, ...`."""
    model = models.of_run(config, vocab_size=config.model.vocab_size or corpus.vocab_size)
    what = assemble.described(config, *models.count_parameters(model))
    return f"{what}, a corpus of {corpus.tokens:,} tokens"


def _title(study: Study, cell: Cell) -> str:
    config = study.config(cell)
    tokens = config.steps * config.tokens_per_step
    continues = " · continues" if RunFolder(config.out).metrics.exists() else ""
    return (
        f"{cell.arm} · {cell.budget:g} N · seed {cell.seed} · {config.steps} steps, "
        f"{summary.count(tokens)} tokens{continues}"
    )


def _about(seconds: float | None) -> str:
    return f" · about {progress.duration(seconds)} left in all" if seconds else ""
