"""Which settings of the loss keep its cost under a bound."""

from collections.abc import Iterator
from typing import NamedTuple

from simreg.plan.costs import Job, Setting, Shares, shares

SMALLEST_CHUNK = 256


class Option(NamedTuple):
    """A setting and what it costs."""

    setting: Setting
    shares: Shares


def options(job: Job, variant: str, *, tflops: float, link: float) -> list[Option]:
    """Every setting worth trying, widest span first; of equal ones `variant`, then the cheapest.

    Whole rows (or documents), then chunks of half, a quarter, … of a row, as long as they cost
    less; with tensor parallelism the work shared or repeated; beside "decoupled" also "out".
    """
    found: dict[tuple[str, bool, Shares], Option] = {}
    for setting in _settings(job, variant):
        cost = shares(job, setting, tflops=tflops, link=link)
        found.setdefault((setting.variant, setting.split, cost), Option(setting, cost))
    return sorted(
        found.values(),
        key=lambda o: (-o.setting.span(job), o.setting.variant != variant, o.shares.time),
    )


def within(found: list[Option], bound: float) -> Option | None:
    """The first whose time is at most `bound` of the model's; None if there is none."""
    return next((option for option in found if option.shares.time <= bound), None)


def _settings(job: Job, variant: str) -> Iterator[Setting]:
    variants = (variant, "out") if variant == "decoupled" else (variant,)
    for chunk in (None, *_chunks(job)):
        for split in (True, False) if job.tp > 1 else (True,):
            for name in variants:
                yield Setting(name, chunk, split)


def _chunks(job: Job) -> Iterator[int]:
    chunk = 1 << ((job.context - 1).bit_length() - 1) if job.context > 1 else 0
    while chunk >= SMALLEST_CHUNK:  # powers of two, so that chunks and shards divide each other
        yield chunk
        chunk //= 2
