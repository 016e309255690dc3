"""The weight of an objective in training, step by step: what all integrations share."""

from simreg.depths import AtDepths
from simreg.loss import SimRegLoss
from simreg.objectives import Sum
from simreg.schedule import Schedule


class Following:
    """Lets λ of a regularizer follow a schedule during a run, from what it is now.

    From where something else has set it to another value it is left alone.
    """

    def __init__(self, regularizer: SimRegLoss, schedule: Schedule) -> None:
        self._regularizer, self._schedule = regularizer, schedule
        self._whole = self._last = regularizer.weight

    def at(self, done: float) -> None:
        """Set the weight for a step before which `done` (0 to 1) of the run is done."""
        if self._regularizer.weight == self._last:
            self._last = self._regularizer.weight = self._whole * self._schedule(done)

    def end(self) -> None:
        """Give the regularizer the weight again that it had."""
        if self._regularizer.weight == self._last:
            self._regularizer.weight = self._whole


def regularizer(objective: object) -> SimRegLoss | None:
    """The part of an objective whose weight is λ: itself, or what an `AtDepths` or a `Sum` has,
    compiled or not."""
    inner = getattr(objective, "_orig_mod", objective)
    if isinstance(inner, SimRegLoss):
        return inner
    if isinstance(inner, AtDepths):
        return regularizer(inner.simreg)
    parts = (inner.simreg, inner.auxiliary) if isinstance(inner, Sum) else ()
    return next((found for part in parts if (found := regularizer(part)) is not None), None)


def as_schedule(schedule: object) -> Schedule:
    """A `Schedule`, or the one of that name; ValueError for anything else."""
    return schedule if isinstance(schedule, Schedule) else Schedule(schedule)  # type: ignore[arg-type]
