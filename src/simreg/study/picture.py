"""What the figures of a study are drawn from: runs, results, colours."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from simreg.study.records import Run
from simreg.study.results import Grid, grid


@dataclass(frozen=True)
class Theme:
    """Colours: of text, of the grid, of the reference and then of each other arm in turn."""

    text: str
    grid: str
    series: tuple[str, ...]
    background: str = "none"

    def of(self, arms: Iterable[str]) -> dict[str, str]:
        """Arm -> colour; the first arm is the reference, later ones share the rest in turn."""
        first, *others = arms
        rest = self.series[1:]
        return {first: self.series[0]} | {a: rest[i % len(rest)] for i, a in enumerate(others)}

    @property
    def rc(self) -> Any:
        """matplotlib settings (untyped: its stubs list every key as a literal)."""
        return {
            "figure.facecolor": self.background,
            "axes.facecolor": "none",
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "axes.edgecolor": self.text,
            "xtick.color": self.text,
            "ytick.color": self.text,
            "grid.color": self.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.linewidth": 0.6,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "font.size": 9.5,
            "legend.frameon": False,
        }


PRINT = Theme(
    text="#1f2328",
    grid="#d9dee4",
    series=("#5b6470", "#0b6bcb", "#c2410c", "#0f8a5f", "#8b3fc7", "#a16207"),
    background="#ffffff",
)


@dataclass(frozen=True)
class Picture:
    """What is drawn: the runs, the results computed from them, the colours."""

    runs: list[Run]
    results: dict[str, Any]
    theme: Theme = PRINT

    @property
    def grid(self) -> Grid:
        """Runs by arm, budget and seed."""
        return grid(self.runs)

    @property
    def arms(self) -> list[str]:
        """The reference, then the others in the order of the plan."""
        reference = self.results["study"]["reference"]
        return [reference, *(arm for arm in self.results["arms"] if arm != reference)]

    @property
    def colours(self) -> dict[str, str]:
        """Arm -> colour."""
        return self.theme.of(self.arms)

    def line(self, arm: str) -> Literal["-", "-."]:
        """Line style of the arm at the full budget: its own where its colour is another's too."""
        return "-" if self.arms.index(arm) < len(self.theme.series) else "-."

    @property
    def several_seeds(self) -> bool:
        """Whether means over seeds are drawn, with each seed behind them."""
        return len(self.results["seeds"]) > 1

    def seconds_per_token(self) -> dict[str, float]:
        """Arm -> measured training seconds per token; empty if no step time was measured."""
        times = self.results["step_time"]
        measured = [t["base_s"] for t in times.values() if t["n"]]
        one = next((r for r in self.results["runs"] if r["steps"]), None)
        if not measured or one is None:
            return {}
        # One time of a reference step for all, so that arms differ by their ratio alone.
        step = float(np.median(measured)) * one["steps"] / one["tokens"]
        ratios = {arm: times[arm]["ratio"] for arm in self.arms if arm in times}
        return {self.arms[0]: step} | {arm: step * ratio for arm, ratio in ratios.items()}
