"""Reading finished runs from their folders (`result.json`, `metrics.jsonl`)."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simreg.recipe.errors import UserError
from simreg.recipe.folder import RunFolder
from simreg.recipe.progress import read_metrics
from simreg.study.plan import Cell, Study


@dataclass(frozen=True)
class Run:
    """A finished run: its result and its curves."""

    cell: Cell
    result: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Training tokens (whole steps)."""
        return int(self.result["tokens"])

    @property
    def final_ce(self) -> float:
        """Final validation cross-entropy, nats per token."""
        return float(self.result["final_ce"])

    def mean(self, key: str) -> float | None:
        """Mean over the run's steps of a training quantity, which each line gives for the steps
        since the last one, however many; None if it was never logged."""
        total, steps, before = 0.0, 0, 0
        for line in self.train:
            if line.get(key) is not None:
                total += line[key] * (line["step"] - before)
                steps += line["step"] - before
            before = line["step"]
        return total / steps if steps else None


def read(folder: Path, cell: Cell) -> Run | None:
    """The finished run in `folder`, or None while it has no result."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        lines = read_metrics(folder / "metrics.jsonl")
        run = Run(
            cell,
            result,
            [line for line in lines if line["kind"] == "train"],
            [line for line in lines if line["kind"] == "eval"],
        )
        if not (math.isfinite(run.final_ce) and run.tokens > 0):  # no run ends so
            raise ValueError("result.json: tokens and final_ce must be finite numbers")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read the run in {folder} ({error}): delete the folder to repeat it"
        ) from None
    return run


def collect(study: Study) -> list[Run]:
    """The study's finished runs, in the order of its plan; none that is in `failures`."""
    lost = failures(study)
    cells = [cell for cell in study.cells() if cell.folder not in lost]
    found = (read(Path(study.out) / cell.folder, cell) for cell in cells)
    return [run for run in found if run is not None]


def failures(study: Study) -> dict[str, str]:
    """The runs that diverged (path -> message)."""
    said = {cell.folder: failure(study, cell) for cell in study.cells()}
    return {path: message for path, message in said.items() if message is not None}


def failure(study: Study, cell: Cell) -> str | None:
    """Why a run diverged, if it did, whatever was made of its folder since."""
    config = study.config(cell)
    return RunFolder(config.out).diverged(config)
