from typing import Any

from rich.console import Console

from simreg.analysis import run
from simreg.analysis.options import AnalyzeOptions
from simreg.study import models


def analyze(options: AnalyzeOptions) -> dict[str, Any]:
    """What `simreg analyze` finds, without writing it."""
    found = models.find(options.models, series=options.series)
    return run.analyze(found, options, Console(quiet=True), command="simreg analyze study")
