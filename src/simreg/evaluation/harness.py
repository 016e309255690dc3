"""Benchmarks by lm-evaluation-harness: its own task definitions, on its data or on local files."""

import contextlib
import difflib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simreg.evaluation.local import Local
from simreg.evaluation.outcome import ACCURACIES, Outcome
from simreg.evaluation.scoring import Scorer
from simreg.recipe.errors import UserError, to_install
from simreg.recipe.files import expanded, one_line

PAPER = (
    *("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
    *("openbookqa", "boolq", "sciq", "lambada_openai"),
)
SMALL = ("blimp", "lambada_openai", "hellaswag", "piqa", "arc_easy", "sciq")
# Where the harness keeps these; to find a task anywhere it reads 14,000 files.
_FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue",
    "copa": "super_glue",
    "lambada_openai": "lambada",
}
_FEWSHOT_SEED = 1234  # the harness's default


@dataclass
class Benchmark:
    """A task of the harness (or a group of them, scored as one), with its data loaded."""

    name: str
    tasks: dict[str, Any]
    limit: int | None
    source: str
    """`hub`, or the names of the local files."""
    note: str = ""
    """What differs from the harness's own evaluation."""

    @cached_property
    def _items(self) -> str:
        """Of a digest; once for all models, as the harness processes a whole task to list it."""
        digest = hashlib.blake2b()
        with _silence():
            for name, task in sorted(self.tasks.items()):
                for _, doc in task.doc_iterator(limit=self.limit):
                    digest.update(json.dumps([name, doc], sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    def key(self) -> dict[str, Any]:
        """What its result depends on besides the model: items, definition, version."""
        return {
            "task": self.name,
            "items": self._items,
            "lm_eval": version("lm-eval"),
            "versions": sorted({str(task.VERSION) for task in self.tasks.values()}),
        }

    def run(self, scorer: Scorer, tokenizer: Any, advance: Callable[[int], None]) -> Outcome:
        """Score a model."""
        from lm_eval import evaluate

        with _silence():
            found = evaluate(
                lm=_language_model(scorer, tokenizer, advance),
                task_dict={"tasks": self.tasks},
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        return _outcome(self.name, found)


def _outcome(name: str, found: dict[str, Any]) -> Outcome:
    """The harness's metrics of each item, in the order of tasks and items."""
    items: list[dict[str, Any]] = []
    for task in sorted(found["samples"]):
        samples = found["samples"][task]
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        items += sorted(first, key=lambda sample: sample["doc_id"])
    metrics = {
        metric: [float(item[metric]) for item in items]
        for metric in items[0]["metrics"]
        if all(isinstance(item.get(metric), int | float | bool) for item in items)
    }
    if not metrics:
        raise UserError(f"the harness gives no number for each item of {name}: leave the task out")
    primary = next((metric for metric in ACCURACIES if metric in metrics), next(iter(metrics)))
    normalised = metrics.get("acc_norm") if primary == "acc" else None
    extra = {}
    if len(found["results"]) == 1:  # of a whole task only, such as perplexity
        for key, value in next(iter(found["results"].values())).items():
            metric = key.removesuffix(",none")
            if metric not in (key, primary, "acc_norm") and not metric.endswith("_stderr"):
                extra[metric] = float(value)
    return Outcome(primary, metrics[primary], normalised, extra=extra)


def _language_model(scorer: Scorer, tokenizer: Any, advance: Callable[[int], None]) -> Any:
    """The harness's model of transformers with our batches: tokenisation and truncation are its."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]
        """Generation, for tasks that need it, is the harness's own."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return scorer(pairs, advance)

    return Model(
        pretrained=scorer.model, tokenizer=tokenizer, max_length=scorer.max_length, batch_size=1
    )


def require() -> None:
    """UserError unless lm-evaluation-harness is installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            f"benchmarks need lm-evaluation-harness: {to_install('eval')} (--suite offline does "
            "without it)"
        )


def load(names: Sequence[str], data_dir: Path | None, limit: int | None) -> list[Benchmark]:
    """The benchmarks of these names, in their order, from local files if `data_dir` is given.

    UserError for an unknown name, missing or unfit files, or data that cannot be downloaded.
    """
    require()
    with _silence():
        manager = _manager(names)
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            close = difflib.get_close_matches(unknown[0], manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(
                f"lm-evaluation-harness {version('lm-eval')} has no task {', '.join(unknown)}{hint}"
                " (`lm-eval ls tasks` lists them)"
            )
        local = None if data_dir is None else Local(expanded(data_dir), manager.task_index, limit)
        if local is not None:
            local.require(names)
        return [_benchmark(manager, name, local, limit) for name in names]


def _benchmark(manager: Any, name: str, local: Local | None, limit: int | None) -> Benchmark:
    try:
        loaded = manager.load([name if local is None else local.spec(name)])
    except UserError:
        raise
    except Exception as error:  # the network's, the format's, or of a template without its field
        where = (
            "cannot load the data of"
            if local is None
            else f"{', '.join(local.files(name))} does not fit the harness's"
        )
        advice = (
            "; name a folder of local files with --data-dir"
            if local is None
            else " (docs/evaluation.md has the fields of each)"
        )
        raise UserError(f"{where} task {name}: {one_line(error)}{advice}") from None
    tasks = loaded["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(_FEWSHOT_SEED)
    if local is None:
        return Benchmark(name, tasks, limit, "hub")
    return Benchmark(name, tasks, limit, ", ".join(local.files(name)), local.note(name))


def _manager(names: Sequence[str]) -> Any:
    """The harness's index of tasks: of the few folders that hold `names`, else of all."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = {_folder(root, name) for name in names}
    if all(folder.is_dir() for folder in folders):
        manager = TaskManager(include_defaults=False, include_path=sorted(map(str, folders)))
        if all(name in manager.task_index for name in names):
            return manager
    return TaskManager()


def _folder(root: Path, name: str) -> Path:
    """Where a task probably stands: in a folder of its name, or of the name's beginning."""
    folder = root / _FOLDERS.get(name, name)
    return folder if folder.is_dir() else root / name.partition("_")[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness's and datasets' own bars and remarks out of the output."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars have no switch
            yield
    finally:
        logger.setLevel(level)
        if not hidden:
            datasets.enable_progress_bars()
