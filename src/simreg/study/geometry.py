"""What `simreg analyze` left in the folder of a study, for its report."""

import json
from pathlib import Path
from typing import Any

from simreg.recipe.errors import UserError

FOLDER = "geometry"


def load(study: Path) -> dict[str, Any] | None:
    """The results of an analysis of the study, or None if it was not analysed."""
    path = study / FOLDER / "results.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: delete it, or run simreg analyze again") from None
    return found


def note(found: dict[str, Any]) -> str:
    """On what, and how to read the table."""
    text, models = found["text"], [m for m in found["models"] if m["compared"]]
    return (
        f"{len(models)} trained models on the same {text['tokens']:,} tokens of {text['split']} "
        "text; head, tail: the three tenths with the most frequent labels, and with the rarest. "
        "Means over seeds; brackets hold 95 % Student-t intervals of paired "
        "differences. Metrics of classes take labels with at least "
        f"{found['settings']['least']} tokens. Definitions: docs/analysis.md."
    )
