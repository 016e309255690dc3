"""`simreg analyze`, of studies and of any models; what it left in a study, for its report."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from simreg.analysis import run, summary
from simreg.analysis.options import AnalyzeOptions
from simreg.recipe import outputs, progress, provenance
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.folder import RunFolder, storage_errors
from simreg.recipe.processes import warn
from simreg.study import models
from simreg.study.plan import Cell

FOLDER = "geometry"


def main(options: AnalyzeOptions) -> None:
    """Run the command; UserError for what cannot be read or compared."""
    run.check(options)
    console, command = progress.console(), outputs.command()
    studies = models.named(options.models)
    alone = models.alone(options.models)
    named = options.out or (alone and alone / FOLDER)
    if named is not None:
        place = outputs.folder(expanded(named), "positive_rate", "simreg analyze")
    else:
        place = outputs.unused(Path("runs", FOLDER), command)
    with place as out:
        found = models.find(options.models, series=options.series)
        if studies and options.reference is None:
            options = replace(options, reference=models.reference(studies, found))
        results = run.analyze(found, options, console, command=command)
        with storage_errors(out):
            run.write(results, out)
    summary.show(results, console)
    console.print(f"\nresults {out / 'results.json'}")


def load(study: Path) -> dict[str, Any] | None:
    """The results of an analysis of the study, or None if it was not analysed.

    None too, with a warning, if one of its models has changed since. Records are kept where the
    models are gone, or were analysed by a version that recorded no fingerprint.
    """
    path = study / FOLDER / "results.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        changed = any(_changed(study, model) for model in found["models"] if model["final"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete it, or run simreg analyze again") from None
    if changed:
        warn(f"{path} is of models that have changed since: left out, run simreg analyze again")
        return None
    return found


def _changed(study: Path, model: dict[str, Any]) -> bool:
    """Whether the study's model of this arm and seed is another one now."""
    if model["seed"] is None or model.get("fingerprint") is None:
        return False
    folder = RunFolder(study / Cell(model["arm"], 1.0, model["seed"]).folder).model
    return folder.is_dir() and provenance.fingerprint(folder) != str(model["fingerprint"])


def note(found: dict[str, Any], failures: Iterable[str] = ()) -> str:
    """On what, and how to read the table; `failures` are the paths of runs that diverged."""
    lost = ", ".join(path for path in failures if path.split("/")[1] == "1")  # the full budget
    text, models = found["text"], [m for m in found["models"] if m["compared"]]
    other = f" of {text['source']}" if text.get("source") else ""
    return (
        f"{len(models)} trained models on the same {text['tokens']:,} tokens of {text['split']} "
        f"text{other}; head, tail: the three tenths with the most frequent labels, and with the "
        f"rarest. Means over seeds; brackets hold {summary.intervals(found)}. Metrics of classes "
        f"take labels with at least {found['settings']['least']} tokens. Definitions: "
        "docs/analysis.md."
        + (f" Diverged, so not in them: {lost}; the rest is no sample of all." if lost else "")
    )
