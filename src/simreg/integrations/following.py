"""The weight of an objective in training, step by step: what all integrations share."""

from typing import Any

from simreg.depths import AtDepths
from simreg.loss import SimRegLoss
from simreg.objectives import Sum
from simreg.schedule import Schedule


class Following:
    """Lets the weight of an objective follow a schedule during a run, from what it is now.

    From where something else has set it to another value it is left alone.
    """

    def __init__(self, regularizer: Any, schedule: Schedule) -> None:
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


def collapsed(neg_cos: float | None, done: float) -> str | None:
    """What is wrong if, `done` (0 to 1) of a run being done, all embeddings point one way.

    At the start of training they nearly do. In all runs under docs/results with a warm-up and
    clipping the mean cosine of tokens with different labels is below 0.94 from a quarter of the run
    on.
    """
    if neg_cos is None or neg_cos < 0.99 or done < 0.25:
        return None
    return (
        f"embeddings have collapsed: after {done:.0%} of the steps tokens with different labels "
        f"have a mean cosine of {neg_cos:.3f}; lengthen the warm-up, lower the learning rate, or "
        "clip gradients"
    )


def as_schedule(schedule: object) -> Schedule:
    """A `Schedule`, or the one of that name; ValueError for anything else."""
    return schedule if isinstance(schedule, Schedule) else Schedule(schedule)  # type: ignore[arg-type]
