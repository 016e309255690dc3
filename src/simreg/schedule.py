"""How λ changes over a run: trainers set the weight of their `SimRegLoss` by it, step by step."""

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

ScheduleName = Literal["constant", "warmup", "decay", "stop"]
SCHEDULE: ScheduleName = "decay"
"""The default (docs/results.md, "Which defaults, and why?")."""


@dataclass(frozen=True)
class Schedule:
    """The share of λ at each moment of a run: `0.3 * Schedule("decay")(step / steps)`.

    Args:
        name: "constant"; "warmup", up from 0 over the first `fraction` of the steps; "decay", down
            to 0 over the last; "stop", 0 after it.
        fraction: in (0, 1]; None: 1 for "decay", else 0.5.

    Raises:
        ValueError: another name or fraction.
    """

    name: ScheduleName = SCHEDULE
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            names = ", ".join(map(repr, get_args(ScheduleName)))
            raise ValueError(f"schedule: expected one of {names}, got {self.name!r}")
        fraction: Any = self.fraction
        number = isinstance(fraction, Real) and not isinstance(fraction, bool)
        if not (fraction is None or (number and 0 < fraction <= 1)):
            raise ValueError(f"fraction: expected a number above 0, up to 1; got {self.fraction!r}")

    @property
    def share(self) -> float:
        """`fraction`, or what stands for None."""
        if self.fraction is None:
            return 1.0 if self.name == "decay" else 0.5
        return self.fraction

    def __call__(self, done: float) -> float:
        """The share of λ, 0 to 1, when `done` (0 to 1) of the steps are done."""
        if self.name == "stop":
            return float(done < self.share)
        if self.name == "constant":
            return 1.0
        passed = done if self.name == "warmup" else 1 - done
        return min(1.0, max(0.0, passed) / self.share)
