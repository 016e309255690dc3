"""The command line of `simreg eval`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simreg.recipe.numbers import Whole, default_of


@dataclass
class EvalOptions:
    """Say what models can do without training on the task, and compare arms with intervals.

    Runs that differ in their seed alone are one arm, as are models with the same ARM= before them;
    arms are compared with the first, paired over seeds and items. Results are cached.
    """

    models: tyro.conf.Positional[list[str]]
    """Folders of runs, of studies or models (or above runs), or Hub ids, as in `simreg eval
    baseline=runs/a simreg=runs/b`; the first arm is the reference."""
    suite: Literal["offline", "small", "paper"] = "offline"
    """`offline`: cloze items and bits per byte from held-out text, no download. `small`: BLiMP,
    LAMBADA, HellaSwag, PIQA, ARC-Easy, SciQ, where models under 200 M differ from chance. `paper`:
    ARC-Easy, ARC-Challenge, HellaSwag, PIQA, WinoGrande, OpenBookQA, BoolQ, SciQ, LAMBADA."""
    tasks: list[str] = field(default_factory=list)
    """Instead of a suite: heldout-cloze, heldout-bits, or any task of lm-evaluation-harness."""
    data_dir: Path | None = None
    """Folder of TASK.jsonl files (or .xz, .gz, .zst) with the harness's field names: no network."""
    text: list[str] = field(default_factory=list)
    """Held-out text for the offline tasks: files, in place of the runs' own validation split."""
    limit: Whole | None = None
    """Items a task at most (of a group such as BLiMP: for each of its tasks)."""
    out: Annotated[Path | None, default_of("runs/eval, or the study's folder")] = None
    """Folder for results.json; runs/eval gets a number where it holds another command line's."""
    cache_dir: Path = Path("~/.cache/simreg")
    """Where results of a model on a task are kept."""
