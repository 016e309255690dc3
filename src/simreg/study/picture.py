"""What the figures of a study are drawn from: runs, results, colours."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from simreg.study import plan
from simreg.study.records import Run
from simreg.study.results import Grid, grid, resolved
from simreg.theme import PRINT, Theme

_LINES: tuple[Literal["-"], Literal["-."]] = "-", "-."


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
    def shown(self) -> list[str]:
        """The arms that curves are drawn of: all, or the reference and the best that can be told
        apart, by final loss."""
        reference, *others = self.arms
        apart = len(_LINES) * (len(self.theme.series) - 1)
        best = sorted(others, key=self._final_ce)[:apart]
        return [reference, *(arm for arm in others if arm in best)]

    def _final_ce(self, arm: str) -> float:
        mean = self.results["arms"][arm]["final_ce"]["mean"]
        return float("inf") if mean is None else mean

    @property
    def colours(self) -> dict[str, str]:
        """Arm -> colour; none is another's but by line style, among those shown."""
        rest = [arm for arm in self.arms if arm not in self.shown]
        return self.theme.of([*self.shown, *rest])

    def line(self, arm: str) -> Literal["-", "-."]:
        """Line style of an arm that is shown: its own where its colour is another's too."""
        return _LINES[self.shown.index(arm) >= len(self.theme.series)]

    @property
    def several_seeds(self) -> bool:
        """Whether means over seeds are drawn, with each seed behind them."""
        return len(self.results["seeds"]) > 1

    def seconds_per_token(self) -> dict[str, float]:
        """Arm -> measured training seconds per token; empty if no step time was measured.

        Without arms whose measurement the results reject as noise.
        """
        study = plan.recorded(self.results["study"])
        times = {
            arm: found
            for arm, found in self.results["step_time"].items()
            if resolved(study, arm, found["ratio"])
        }
        measured = [t["base_s"] for t in times.values() if t["n"]]
        steps = {r["arm"]: r["steps"] / r["tokens"] for r in self.results["runs"]}
        if not measured:
            return {}
        # One time of a reference step for all, so that arms differ by their ratio alone.
        step = float(np.median(measured))
        ratios = {self.arms[0]: 1.0} | {a: times[a]["ratio"] for a in self.arms if a in times}
        return {arm: step * ratio * steps[arm] for arm, ratio in ratios.items() if arm in steps}
