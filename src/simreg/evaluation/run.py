"""`simreg eval`: every model on every task, from the cache where it can be, to results.json."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simreg.evaluation import harness, offline, scoring, summary
from simreg.evaluation.options import EvalOptions
from simreg.evaluation.outcome import Outcome
from simreg.evaluation.scoring import Scorer
from simreg.recipe import assemble, cache, hub, outputs, progress, provenance
from simreg.recipe.data import Corpus
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.trained import Trained

SUITES = {"paper": harness.PAPER, "small": harness.SMALL, "offline": offline.OFFLINE}
SCHEMA = 2
"""Of results.json; before 2, `low` and `high` were those of the bootstrap."""
_LAYOUT = 2  # of cached outcomes; a new number makes old ones invisible


class Task(Protocol):
    """What a model is scored on."""

    name: str
    source: str
    note: str

    def key(self) -> dict[str, Any]:
        """Everything that a result depends on, but for the model and how it is run."""

    def run(self, scorer: Scorer, tokenizer: Any, advance: Any) -> Outcome:
        """Score a model; `advance` is told of every request that is done."""


def suite_of(options: EvalOptions) -> str:
    """The suite's name, "tasks" for single ones."""
    return "tasks" if options.tasks else options.suite


def write(results: dict[str, Any], out: Path, console: Console) -> None:
    """Print what was found, and write results.json."""
    summary.show(results, console)
    path = out / "results.json"
    outputs.write(path, results)
    console.print(f"\nresults {path}")


def evaluate(
    found: Sequence[Trained],
    options: EvalOptions,
    console: Console,
    *,
    command: str | None = None,
    corpus: Corpus | None = None,
) -> dict[str, Any]:
    """Score the models on the tasks; returns the content of results.json (docs/evaluation.md).

    Args:
        found: the models; the first one's arm is the reference.
        options: tasks, data and limit; `models` and `out` are not read.
        console: gets a line for each model and task; the progress bar goes to the standard error.
        command: that was typed, for the record.
        corpus: the prepared data of the runs, if the caller has it.
    """
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be 1 or more (got {options.limit})")
    names = list(dict.fromkeys(options.tasks or SUITES[options.suite]))
    tasks = load(names, found, options, corpus)
    outcomes: summary.Outcomes = {}
    models = [_Model(each) for each in found]
    with hub.quiet(), _Bar(len(found) * len(tasks)) as bar:
        for model in models:
            for task in tasks:
                outcome = _cached(model, task, expanded(options.cache_dir), bar)
                outcomes[model.trained.name, task.name] = outcome
                line = summary.line(model.trained, task.name, outcome)
                with bar.aside():
                    console.print(line)
            model.unload()
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": suite_of(options),
        "limit": options.limit,
        "command": command,
        "precision": "bf16" if assemble.use_bf16("auto") else "fp32",
        "versions": provenance.versions() | _harness_version(names),
        "machine": provenance.machine(),
        "tasks": {task.name: {"source": task.source, "note": task.note} for task in tasks},
    }
    results = facts | summary.build(found, [task.name for task in tasks], outcomes)
    for model, entry in zip(models, results["models"], strict=True):
        entry["fingerprint"] = model.key()["model"]
    return results


def load(
    names: Sequence[str],
    found: Sequence[Trained],
    options: EvalOptions,
    corpus: Corpus | None = None,
) -> list[Task]:
    """The tasks of these names in their order; UserError for what is unknown or missing."""
    own = [name for name in names if name in offline.OFFLINE]
    benchmarks = [name for name in names if name not in offline.OFFLINE]
    tasks: list[Task] = []
    if benchmarks:
        tasks += harness.load(benchmarks, options.data_dir, options.limit)
    if own:
        tasks += offline.load(own, found, options.text, options.limit, corpus=corpus)
    return sorted(tasks, key=lambda task: names.index(task.name))


def _harness_version(names: Sequence[str]) -> dict[str, str]:
    if all(name in offline.OFFLINE for name in names):
        return {}
    from importlib.metadata import version

    return {"lm_eval": version("lm-eval")}


class _Model:
    """Weights that are read when a task is not in the cache."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.bf16 = assemble.use_bf16("auto")
        config = trained.config
        self._row = None if config is None else config.data.seq_len
        self._loaded: tuple[Scorer, Any] | None = None
        self._key: dict[str, Any] | None = None

    def key(self) -> dict[str, Any]:
        """The weights and how they are run."""
        if self._key is None:
            self._key = {
                "layout": _LAYOUT,
                "model": self.trained.fingerprint(),
                "max_length": self._row,
                "bf16": self.bf16,
            }
        return self._key

    def loaded(self) -> tuple[Scorer, Any]:
        """The model and its tokenizer."""
        if self._loaded is None:
            self._loaded = scoring.load(
                self.trained.model, self._row, bf16=self.bf16, name=self.trained.name
            )
        return self._loaded

    def unload(self) -> None:
        """Make room for the next one."""
        self._loaded = None


def _cached(model: _Model, task: Task, cache_dir: Path, bar: "_Bar") -> Outcome:
    """The outcome from the cache, or by running the task."""
    bar.say(f"{model.trained.name} · {task.name}")
    folder = cache_dir / "eval" / cache.name(model.key() | task.key())
    facts = cache.stored(folder)
    if facts is None:
        scorer, tokenizer = model.loaded()
        facts = asdict(task.run(scorer, tokenizer, bar.advance))
        made = facts  # what mypy knows not to be None
        cache.entry(folder, lambda _: made, setting="--cache-dir")
    bar.next()
    return Outcome(**facts)


class _Bar:
    """Progress on the standard error, if that is a terminal."""

    def __init__(self, runs: int) -> None:
        # This very file: the harness's bars are redirected.
        console = progress.console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[requests]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=runs, requests="")
        self._done = 0

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """Name the work that begins."""
        self._done = 0
        self._bar.update(self._task, description=what, requests="")

    def advance(self, count: int) -> None:
        """So many more requests are answered."""
        self._done += count
        self._bar.update(self._task, requests=f"{self._done:,} requests")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something is printed."""
        self._bar.stop()
        yield
        self._bar.start()

    def next(self) -> None:
        """One model is done with one task."""
        self._bar.advance(self._task)
