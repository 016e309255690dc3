"""Which models are one arm, and what the arm is called."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simreg.recipe.errors import UserError


@dataclass(frozen=True)
class Member:
    """A run or another model, as far as arms go."""

    name: str
    """For messages."""
    seed: int | None
    kind: str
    """What members of one arm have in common; one of a study's differs from others in it."""
    path: tuple[str, ...]
    """The folder that the arm is called after, or the words that stand for one."""
    given: str = ""
    """The arm, where it was said."""
    study: bool = False
    """Of an arm of a study, which is the same for all in `path`."""


def path_of(folder: Path) -> tuple[str, ...]:
    """Its parts; never empty."""
    parts = Path(os.path.abspath(folder)).parts
    return parts[1:] or parts


@dataclass
class _Arm:
    first: Member
    study: bool
    seeds: set[int | None] = field(default_factory=set)

    def takes(self, group: list[Member]) -> bool:
        """Whether runs of another folder are further seeds of it."""
        apart = self.first.given or (self.study and _of_study(group))
        alike = self.first.kind == group[0].kind
        return alike and not apart and self.seeds.isdisjoint({member.seed for member in group})


def named(members: Sequence[Member]) -> list[str]:
    """The arm of each: runs that differ in seeds alone share one, and they alone.

    An arm is called as it was said, else by the end of its path, as long as it takes to tell it
    from others; with a number where paths are the same. Members of one path and kind stay together:
    a run made again in another folder is another arm. UserError for two of one arm and seed.
    """
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        same = (member.given,) if member.given else ("", member.kind, *member.path)
        groups.setdefault(same, []).append(member)
    arms: list[_Arm] = []
    of: dict[int, _Arm] = {}
    for group in groups.values():
        given = group[0].given
        arm = None if given else next((each for each in arms if each.takes(group)), None)
        if arm is None:
            arms.append(arm := _Arm(group[0], _of_study(group)))
        for member in group:
            if member.seed in arm.seeds:
                _refuse(member, next(m for m in group if m.seed == member.seed))
            arm.seeds.add(member.seed)
            of[id(member)] = arm
    names = dict(zip(map(id, arms), _names([arm.first for arm in arms]), strict=True))
    return [names[id(of[id(member)])] for member in members]


def _of_study(group: list[Member]) -> bool:
    return any(member.study for member in group)  # some may have been named alone


def _refuse(member: Member, other: Member) -> None:
    seed = "" if member.seed is None else f" and seed {member.seed}"
    arm = member.given or member.path[-1]
    raise UserError(
        f"{other.name} and {member.name} would both be of the arm {arm}{seed}: give them names of "
        "their own, as in ARM=PATH"
    )


def _names(firsts: list[Member]) -> list[str]:
    paths = {member.path for member in firsts if not member.given}
    said = [member.given for member in firsts if member.given]
    ends = Counter(path[-n:] for path in paths for n in range(1, len(path) + 1))
    ends.update((name,) for name in said)
    taken, names = set(said), []
    for member in firsts:
        if member.given:
            names.append(member.given)
            continue
        path = member.path
        lengths = range(1, len(path) + 1)
        length = next((n for n in lengths if ends[path[-n:]] == 1), len(path))
        name = wanted = "/".join(path[-length:])
        number = 2
        while name in taken:
            name, number = f"{wanted} ({number})", number + 1
        taken.add(name)
        names.append(name)
    return names
