"""Zero-shot evaluation of a study's runs, kept beside them for the report."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from simreg.evaluation import offline, run, summary
from simreg.evaluation.options import EvalOptions
from simreg.recipe import outputs, progress
from simreg.recipe.data import Corpus
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.processes import warn
from simreg.recipe.trained import Trained
from simreg.study import models, plan, records, report
from simreg.study.plan import Study
from simreg.study.results import seeds_diverged
from simreg.study.sizing import StepTimes, cached_step_times, reference_step

FOLDER = "zero-shot"
ITEMS, FEWEST_ITEMS, SECONDS = 250, 50, 20.0
"""What `simreg compare` evaluates by itself: so many cloze items, fewer if they would take longer
than this in a study that was sized to a time."""
_TOKENS = 550  # of text for a cloze item, with its share of bits per byte
_FORWARD = 0.4  # of the time of a training step on as many tokens
_KEPT = ("limit", "tasks", "reference", "arms", "differences")


def main(options: EvalOptions) -> None:
    """`simreg eval`: of a study's folder its runs at N, for its report; else of any models."""
    folder = models.alone(options.models)
    default = folder / FOLDER / _suite(options) if folder else Path("runs", "eval")
    console, command = progress.console(), outputs.command()
    # A suite's in the study's folder make way; others have a folder each.
    if options.out is None and (options.tasks or folder is None):
        place = outputs.unused(default, command)
    else:
        place = outputs.folder(expanded(options.out or default), "suite", "simreg eval")
    with place as out:
        found = models.find(options.models)
        if folder is not None:
            found = [replace(each, name=_within(folder, each)) for each in found]
            _check_fuller(out, options, found)
        results = run.evaluate(found, options, console, command=command)
        run.write(results, out, console)
    if folder is not None and options.out is None and (folder / "results.json").is_file():
        with plan.exclusive(folder, console):
            _redraw(models.load(folder))
        console.print(f"report  {folder / 'report.html'}")


def _within(folder: Path, model: Trained) -> str:
    """The path of a run inside the folder of its study."""
    return str(model.run.relative_to(folder)) if model.run is not None else model.name


def _check_fuller(out: Path, options: EvalOptions, found: list[Trained]) -> None:
    """UserError before scores of few items replace those of many, of the same models."""
    earlier = _read(out / "results.json")
    if earlier is None or options.limit is None or _models(earlier) != _prints(found):
        return
    of_all = offline.ITEMS if earlier["suite"] == "offline" else None
    had = earlier["limit"] or of_all
    if had is None or had > options.limit:
        raise UserError(
            f"{out} has scores of the same models on {'all' if had is None else had} items of a "
            f"task, which --limit {options.limit} would replace: raise it, or give --out"
        )


def _suite(options: EvalOptions) -> str:
    """Names the folder; scores on other text than the study's own have one to themselves."""
    names = options.tasks or run.SUITES[options.suite]
    other = options.text and any(name in offline.OFFLINE for name in names)
    return run.suite_of(options) + ("-text" if other else "")


def after_training(
    study: Study, corpus: Corpus | None, step_time: StepTimes, console: Console
) -> bool:
    """Evaluate the offline suite, unless that is recorded already or cannot be done here.

    Returns whether there is something new.
    """
    out = Path(study.out) / FOLDER / "offline"
    found = models.of_study(study)
    if not found:
        return False
    limit = _items(study, step_time, len(found))
    waiting = partial(console.print, "waiting for another process that evaluates the study ...")
    with outputs.held(out, waiting):
        earlier = _read(out / "results.json")
        if earlier and _covers(earlier, study, _prints(found), limit):
            return False
        options = EvalOptions([study.out], limit=limit)
        options.cache_dir = Path(study.base.data.cache_dir)
        console.print("\nzero-shot, on held-out documents:")
        try:
            results = run.evaluate(found, options, console, corpus=corpus)
        except UserError as error:  # a report can be drawn from records alone, without their data
            console.print(f"left out: {error}")
            return False
        outputs.write(out / "results.json", results)
    return True


def _covers(
    earlier: dict[str, Any], study: Study, prints: set[tuple[str, str]], limit: int
) -> bool:
    """Whether an evaluation is of the same models and tasks, with as many items or more.

    Models whose weights are gone since stay in it; arms and seeds that the study dropped do not.
    """
    planned = {cell.folder for cell in study.cells() if cell.budget == 1.0}
    return (
        earlier.get("schema") == run.SCHEMA
        and list(earlier["tasks"]) == list(run.SUITES["offline"])
        and (earlier["limit"] or offline.ITEMS) >= limit
        and _models(earlier) >= prints
        and {name for name, _ in _models(earlier)} <= planned
    )


def _items(study: Study, step_time: StepTimes, count: int) -> int:
    step_s = reference_step(step_time)
    if study.minutes is None or step_s is None:
        return ITEMS
    an_item = count * _TOKENS * _FORWARD * step_s / study.base.tokens_per_step
    return max(FEWEST_ITEMS, min(ITEMS, int(SECONDS / an_item)))


def recorded(study: Study, failures: dict[str, str]) -> dict[str, Any]:
    """Suite -> what is known of it, for the study's results.json.

    `failures` are the paths of runs that diverged. Without what was found of other models than
    those that are there now (records are kept where there are none), without the limits of records
    that hold nothing but a bootstrap's, and of differences of which a run diverged.
    """
    found, now = {}, dict(_prints(models.of_study(study)))
    pairs = {arm: [(arm, 1.0), (study.reference, 1.0)] for arm in study.others}
    lost = {arm: seeds_diverged(study.seeds, pair, failures) for arm, pair in pairs.items()}
    lost = {arm: seeds for arm, seeds in lost.items() if seeds}
    for path in sorted((Path(study.out) / FOLDER).glob("*/results.json")):
        if (results := _read(path)) is None:
            continue
        if any(now.get(name, fingerprint) != fingerprint for name, fingerprint in _models(results)):
            warn(f"{path} is of models that have changed since: left out, run simreg eval again")
        else:
            if results.get("schema") != run.SCHEMA:
                warn(f"{path} has bootstrap intervals alone: not shown, run simreg eval again")
                for gap in _gaps(results["differences"].values()):
                    limits = None if gap["low"] is None else [gap["low"], gap["high"]]
                    gap.update(low=None, high=None, bootstrap=limits)
            # The seeds that are left are no sample of all.
            for gap in _gaps(own for arm, own in results["differences"].items() if arm in lost):
                gap.update(low=None, high=None, bootstrap=None)
            found[path.parent.name] = {key: results[key] for key in _KEPT} | {"diverged": lost}
    return found


def _gaps(differences: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    kinds = (kind for tasks in differences for kind in tasks.values())
    return (gap for kind in kinds for gap in kind.values() if gap is not None)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results if all(key in results for key in (*_KEPT, "models")) else None
    except (OSError, ValueError, TypeError):
        return None


def _prints(found: Iterable[Trained]) -> set[tuple[str, str]]:
    return {(model.name, model.fingerprint()) for model in found}


def _models(results: dict[str, Any]) -> set[tuple[str, str]]:
    return {(model["name"], model["fingerprint"]) for model in results["models"]}


def _redraw(study: Study) -> None:
    """Put what is recorded into the study's results and its report."""
    failures = records.failures(study)
    step_time = cached_step_times(study, any_machine=True)
    report.publish(study, step_time, recorded(study, failures), failures)


def show(results: dict[str, Any], console: Console) -> None:
    """Print each suite's table and sentences."""
    for suite in results["zero_shot"].values():
        summary.show(suite, console)
