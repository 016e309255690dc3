"""What a marker asks for: the recorded files, read, and the options."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simreg.recipe.errors import UserError
from simreg.study import plan
from simreg.study.plan import Study


@dataclass(frozen=True)
class Source:
    """A recorded JSON file."""

    name: str
    """Its path as the marker has it."""
    path: Path
    content: dict[str, Any]

    @cached_property
    def study(self) -> Study:
        """Of a results.json."""
        return plan.recorded(self.content["study"])


@dataclass(frozen=True)
class Request:
    """A table to be drawn."""

    sources: list[Source]
    options: dict[str, str]

    @property
    def source(self) -> Source:
        """The only one, of kinds that take one."""
        (only,) = self.sources
        return only

    def names(self, option: str, known: Collection[str]) -> list[str] | None:
        """The value `a,b,c` of an option, None without; UserError for one that is not `known`."""
        if option not in self.options:
            return None
        names = self.options[option].split(",")
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{option}: unknown {unknown[0]!r} (there are {', '.join(known)})")
        return names

    def count(self, option: str) -> int | None:
        """The value of an option that is a number from 1 up, None without."""
        if option not in self.options:
            return None
        if not self.options[option].isdecimal() or int(self.options[option]) < 1:
            raise UserError(f"{option} must be 1 or more (got {self.options[option]!r})")
        return int(self.options[option])
