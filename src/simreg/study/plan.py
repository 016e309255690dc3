"""The plan of a study: arms × token budgets × seeds, as typed data."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from rich.console import Console

from simreg.recipe import config as recipe
from simreg.recipe import outputs
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError, describe
from simreg.recipe.numbers import Positive, Whole
from simreg.recipe.values import merge, read_yaml
from simreg.study import checks

REFERENCE = "baseline"
REFERENCE_OVERRIDES: dict[str, Any] = {"simreg": {"weight": 0}}

Budgets = Annotated[list[Positive], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    budget: float
    seed: int

    @property
    def folder(self) -> str:
        """Path of the run inside the study folder."""
        return f"{self.arm}/{self.budget:g}/seed-{self.seed}"


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class Study:
    """A comparison: every arm trained on its own full schedule at each of its budgets, per seed."""

    name: str = "demo"
    """Names the study, and its folder unless `out` does."""
    out: str = ""
    """Folder of the study; empty: runs/NAME."""
    base: RunConfig = field(default_factory=RunConfig)
    """What all arms share; `base.train.tokens` is the full budget N."""
    reference: str = REFERENCE
    """The arm that the others are compared with."""
    arms: dict[str, dict[str, Any]] = field(default_factory=lambda: {"simreg": {}})
    """Arm -> overrides of `base`, nested as in a run's config. `baseline` always has weight 0, and
    is added where it is the reference."""
    budgets: Budgets | dict[str, Budgets] = field(default_factory=lambda: [0.6, 0.8, 1.0])
    """Fractions of N for all arms but the reference (which has [1.0]), or a list for each arm."""
    seeds: Annotated[list[Annotated[Whole, Field(ge=0, lt=2**32)]], Field(min_length=1)] = field(
        default_factory=lambda: [0]
    )
    """Each seed fixes initialisation and batches in every arm alike."""
    timed: list[str] | None = None
    """Arms whose step time is measured against the reference's; None: all."""
    minutes: Positive | None = None
    """Size N to the machine so that the whole study takes about this long."""

    def __post_init__(self) -> None:
        if REFERENCE in (self.reference, *self.arms):
            plain = merge(REFERENCE_OVERRIDES, self.arms.get(REFERENCE, {}))
            object.__setattr__(self, "arms", {REFERENCE: plain} | self.arms | {REFERENCE: plain})
        object.__setattr__(self, "out", os.path.expanduser(self.out or f"runs/{self.name}"))
        checks.names(self.name, self.arms)
        checks.seeds(self.seeds, self.base)
        if self.reference not in self.arms:
            raise ValueError(
                f"reference {self.reference!r} is not among the arms {list(self.arms)}"
            )
        if isinstance(self.budgets, dict) and (unknown := self.budgets.keys() - self.arms.keys()):
            raise ValueError(f"budgets for unknown arms: {', '.join(sorted(unknown))}")
        if unknown := set(self.timed or ()) - self.arms.keys():
            raise ValueError(f"timed: unknown arms {', '.join(sorted(unknown))}")
        if 1.0 not in self.budgets_of(self.reference):
            raise ValueError(f"the reference arm {self.reference!r} needs the budget 1.0")
        self._check_each(self._check)
        if self.minutes is None:  # else the size is found later, such that budgets differ
            self._check_each(self._check_steps)

    def _check_each(self, check: Callable[[str], None]) -> None:
        for arm in self.arms:
            try:
                check(arm)
            except UserError as error:
                raise ValueError(f"arm {arm!r}: {error}") from None

    def _check(self, arm: str) -> None:
        """What can be known of an arm's runs before any text is read."""
        checks.overrides(arm, self.arms[arm])
        weight = self.arm_config(arm).simreg.weight
        if arm == REFERENCE and weight:
            raise ValueError(
                f"arm {REFERENCE!r} may not set simreg.weight={weight:g}: it is the one without "
                "SimReg; give the arm another name"
            )
        checks.budgets(arm, self.budgets_of(arm))

    def _check_steps(self, arm: str) -> None:
        budgets = self.budgets_of(arm)
        cells = [Cell(arm, budget, self.seeds[0]) for budget in budgets]
        checks.steps(arm, budgets, [self.config(cell).steps for cell in cells])

    def check_size(self) -> None:
        """UserError if budgets of an arm come to the same number of steps."""
        try:
            for arm in self.arms:
                self._check_steps(arm)
        except ValueError as error:
            raise UserError(f"study: {error}") from None

    def budgets_of(self, arm: str) -> list[float]:
        """The arm's budgets in ascending order."""
        if isinstance(self.budgets, dict):
            return sorted(set(self.budgets.get(arm, [1.0])))
        return [1.0] if arm == self.reference else sorted(set(self.budgets))

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the reference."""
        return [arm for arm in self.arms if arm != self.reference]

    def steps_over_reference(self, arm: str) -> float:
        """Steps that the arm takes for each of the reference, for the same tokens."""
        reference, own = (self.arm_config(a).train.batch_rows for a in (self.reference, arm))
        return reference / own

    def times(self, arm: str) -> bool:
        """Whether the arm's step time is to be measured."""
        return self.timed is None or arm in self.timed

    def cells(self) -> list[Cell]:
        """All runs in order: a seed's arms together, the reference first."""
        arms = [self.reference, *self.others]
        return [
            Cell(arm, budget, seed)
            for seed, arm in product(self.seeds, arms)
            for budget in self.budgets_of(arm)
        ]

    def config(self, cell: Cell) -> RunConfig:
        """The config of one run."""
        own = {
            "out": str(Path(self.out) / cell.folder),
            "train": {"tokens": round(cell.budget * self.base.train.tokens), "seed": cell.seed},
        }
        return recipe.with_overrides(self.base, merge(self.arms[cell.arm], own))

    def arm_config(self, arm: str) -> RunConfig:
        """The arm's config at the full budget, for measurements outside of any run."""
        return recipe.with_overrides(self.base, self.arms[arm])


def from_dict(values: dict[str, Any]) -> Study:
    """Build a validated study from nested plain values; UserError names every wrong field."""
    try:
        return TypeAdapter(Study).validate_python(values)
    except ValidationError as error:
        raise UserError(f"study: {_described(error)}") from None


def _described(error: ValidationError) -> str:
    """The study's own findings if there are any, else pydantic's."""
    findings = error.errors()
    if own := [str(e["ctx"]["error"]) for e in findings if e["type"] == "value_error"]:
        return "; ".join(own)
    if bad := [e["input"] for e in findings if e["loc"][:1] == ("budgets",)]:
        return f"budgets: a list of fractions above 0, or one for each arm (got {bad[0]!r})"
    return describe(error, Study)


def to_dict(study: Study) -> dict[str, Any]:
    """Nested plain values, as saved in `study.yaml`."""
    plain: dict[str, Any] = TypeAdapter(Study).dump_python(study)
    return plain


def save(study: Study, path: str | Path) -> None:
    """Write the study as YAML, if that changes the file."""
    text = yaml.safe_dump(to_dict(study), sort_keys=False)
    path = Path(path)
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_atomically(path, text)


@contextlib.contextmanager
def exclusive(out: Path, console: Console) -> Iterator[None]:
    """One process at a time settles the size of a study, times its steps, and ends it."""
    waiting = partial(console.print, "waiting for another process that measures or evaluates ...")
    with outputs.held(out, waiting):
        yield


def recorded(values: dict[str, Any]) -> Study:
    """What `to_dict` gave, of this version or of one that lacked a field; UserError as there."""
    base = merge(recipe.BEFORE, section(values, "base", "base"))
    return from_dict({**values, "base": base})


def load(path: str | Path) -> Study:
    """Read a file that `save` wrote; UserError names it if it is damaged."""
    values = read_yaml(path)
    try:
        if values:
            return recorded(values)
        error = "it is empty"
    except UserError as wrong:
        error = str(wrong)
    raise UserError(f"{path} is damaged ({error}): restore it, or delete it") from None


def section(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping inside `values`, empty if it is left out."""
    found = values.get(key)
    if not isinstance(found, dict | None):
        raise UserError(f"study: {where} must be a mapping (got {found!r})")
    return found or {}
