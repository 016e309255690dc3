"""What a plan may not say: each check raises ValueError with what is wrong and what to do."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from simreg.recipe.config import RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]*")
# An arm's folder lies beside the files that the study writes.
_FILE = re.compile(r".*\.(yaml|json|html|png|svg)", re.IGNORECASE)
# What an arm may not change: the study sets it, or the comparison would no longer be paired.
_FIXED = (
    ("out",),
    ("data",),
    ("train", "tokens"),
    ("train", "seed"),
    ("train", "evals"),
    ("train", "eval_tokens"),
)


def names(study: str, arms: Iterable[str]) -> None:
    """Names of the study and its arms become folders."""
    for name in (study, *arms):
        if not _NAME.fullmatch(name):
            raise ValueError(f"name {name!r}: use letters, digits and _ . = + - only")
    for arm in arms:
        if _FILE.fullmatch(arm):
            raise ValueError(f"arm {arm!r} is named like a file of the study: leave out the ending")


def seeds(seeds: Sequence[int], base: RunConfig) -> None:
    """Seeds differ, and come from the study alone."""
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {list(seeds)} repeat")
    if base.train.seed:
        raise ValueError(
            f"base.train.seed={base.train.seed} would be ignored: name the seeds of the study in "
            f"`seeds: [{base.train.seed}]`"
        )


def overrides(arm: str, changes: dict[str, Any]) -> None:
    """An arm leaves alone what all arms must share."""
    for *sections, key in _FIXED:
        node: Any = changes
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and key in node:
            path = ".".join((*sections, key))
            raise ValueError(f"arm {arm!r} may not set {path}: all arms of a comparison share it")


def budgets(arm: str, fractions: Sequence[float]) -> None:
    """Ascending budgets have folders of their own."""
    for each in fractions:
        if f"{each:g}" == "1" and each != 1:
            raise ValueError(f"budget {each!r} of arm {arm!r} would pass for 1.0")
    for one, other in pairwise(fractions):
        if f"{one:g}" == f"{other:g}":
            raise ValueError(
                f"budgets {one!r} and {other!r} of arm {arm!r} are too alike: leave out one"
            )


def steps(arm: str, fractions: Sequence[float], counts: Sequence[int]) -> None:
    """Ascending budgets come to different numbers of whole steps."""
    for i in range(1, len(counts)):
        if counts[i - 1] == counts[i]:
            raise ValueError(
                f"budgets {fractions[i - 1]:g} and {fractions[i]:g} of arm {arm!r} both come to "
                f"{counts[i]} steps: raise base.train.tokens, or leave out one of them"
            )
