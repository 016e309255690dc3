"""The plan of a study: arms × token budgets × seeds, as typed data from YAML or from flags."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import field, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from rich.console import Console

from simreg.recipe import config as recipe
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError, describe
from simreg.recipe.folder import STUDY_FILE
from simreg.recipe.locks import locked_folder
from simreg.recipe.numbers import Positive, Whole, default_of
from simreg.study import checks

REFERENCE = "baseline"
REFERENCE_OVERRIDES: dict[str, Any] = {"simreg": {"weight": 0}}
DEMO_MINUTES = 5.0

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
            plain = recipe.merge(REFERENCE_OVERRIDES, self.arms.get(REFERENCE, {}))
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
        return recipe.with_overrides(self.base, recipe.merge(self.arms[cell.arm], own))

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
    with contextlib.ExitStack() as until_done:
        try:
            until_done.enter_context(locked_folder(out, waiting))
        except OSError as error:
            raise UserError(f"cannot write in the study folder {out}: {error.strerror}") from None
        yield


def recorded(values: dict[str, Any]) -> Study:
    """What `to_dict` gave, of this version or of one that lacked a field; UserError as there."""
    base = recipe.merge(recipe.BEFORE, _section(values, "base", "base"))
    return from_dict({**values, "base": base})


def load(path: str | Path) -> Study:
    """Read a file that `save` wrote; UserError names it if it is damaged."""
    values = recipe.read_yaml(path)
    try:
        if values:
            return recorded(values)
        error = "it is empty"
    except UserError as wrong:
        error = str(wrong)
    raise UserError(f"{path} is damaged ({error}): restore it, or delete it") from None


@dataclass
class CompareOptions:
    """Train with and without SimReg, and say how many tokens and how much time it saves.

    Without arguments: a small model on the source text of Python's own standard library, sized so
    that all of it takes about five minutes. The same command again continues where it stopped.
    """

    study: tyro.conf.Positional[Annotated[str | None, default_of("none: the demo")]] = None
    """A study file (YAML); flags override what it says."""
    out: Annotated[str | None, default_of("runs/NAME")] = None
    """Folder of the study."""
    scale: Annotated[str | None, default_of("as the file begins")] = None
    """Take the study at another size, one of those under `scales` in its file."""
    stop_after: float | None = None
    """Minutes after which to save and stop; the same command continues."""
    report: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train nothing: write the results and the report of the runs that are finished."""
    seeds: Annotated[list[int] | None, default_of("0")] = None
    """Seeds, such as `--seeds 0 1 2 3 4`."""
    budgets: Annotated[list[float] | None, default_of("0.6 0.8 1.0")] = None
    """Token budgets of the arms, as fractions of the reference's."""
    tokens: Annotated[Whole | None, default_of("sized by --minutes")] = None
    """Tokens of the full budget."""
    minutes: Annotated[float | None, default_of("5")] = None
    """Size the full budget so that the whole study takes about this long."""
    arm: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Add an arm, `NAME:section.key=value,...`, e.g. `--arm strong:simreg.weight=1`."""
    model: Annotated[str | None, default_of("llama-tiny")] = None
    """Model preset."""
    data: Annotated[list[str] | None, default_of("python-stdlib")] = None
    """Where the text comes from: files, globs, `python-stdlib` or `hf:owner/name`."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Change what all arms share, e.g. `--set optim.lr=1e-3`."""


def parse_assignments(text: str, flag: str) -> dict[str, Any]:
    """`section.key=value,...` as nested overrides; values are read as YAML."""
    nested: dict[str, Any] = {}
    for item in _split(text):
        path, equals, value = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"{flag}: {item!r} is not of the form section.key=value")
        try:
            leaf = recipe.parse_yaml(value)
        except yaml.YAMLError:
            raise UserError(f"{flag}: cannot read the value of {item!r}") from None
        for key in reversed(keys):
            leaf = {key: leaf}
        nested = recipe.merge(nested, leaf)
    return nested


def _split(text: str) -> list[str]:
    """The parts between commas, apart from commas inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1][-1:] in set("=[{, "):  # where a value begins
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _section(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping inside `values`, empty if it is left out."""
    section = values.get(key)
    if not isinstance(section, dict | None):
        raise UserError(f"study: {where} must be a mapping (got {section!r})")
    return section or {}


def _read(path: str) -> dict[str, Any]:
    """A study's file; UserError for a folder and for the config of a run."""
    if Path(path).is_dir():
        there = Path(path, STUDY_FILE).is_file()
        way = f"; go on with the study in it by simreg compare {path}/{STUDY_FILE} --out {path}"
        raise UserError(f"{path} is a folder: name a study's file{way if there else ''}")
    values = recipe.read_yaml(path)
    of_runs = {each.name for each in fields(RunConfig)} - {each.name for each in fields(Study)}
    if of_runs & values.keys():
        raise UserError(
            f"{path} holds settings of one run ({', '.join(sorted(of_runs & values.keys()))}): "
            "put them under `base:`"
        )
    return values


def _scaled(values: dict[str, Any], scale: str | None) -> dict[str, Any]:
    """A study file's values at one of its `scales`, in a folder named for it unless it says one."""
    values = dict(values)
    scales = _section({"scales": values.pop("scales", None)}, "scales", "scales")
    scales = {str(name): own for name, own in scales.items()}  # YAML reads 1 as a number
    if scale is None:
        return values
    if scale not in scales:
        raise UserError(f"--scale {scale}: the study has {', '.join(scales) or 'no scales'}")
    out = values.get("out") or f"runs/{values['name']}"
    own = _section(scales, scale, f"scales.{scale}")
    return recipe.merge({**values, "out": f"{out}-{scale}"}, own)


def _parse_arm(text: str, reference: str) -> tuple[str, dict[str, Any]]:
    name, colon, rest = text.partition(":")
    if not colon or not name:
        raise UserError(f"--arm {text!r} is not of the form NAME:section.key=value,...")
    if name == reference:
        raise UserError(f"--arm {name}: the reference arm can be changed in a study file only")
    return name, parse_assignments(rest, f"--arm {name}") if rest else {}


def from_options(options: CompareOptions) -> Study:
    """The study that the command line asks for."""
    if options.tokens is not None and options.minutes is not None:
        raise UserError("--tokens and --minutes both size the study: give one of them")
    # The demo's folder is the demo's: on other text it would be refused there.
    values: dict[str, Any] = {"name": "demo" if options.data is None else "compare"}
    if options.study is not None:
        values = {"name": Path(options.study).stem, **_read(options.study)}
    values = _scaled(values, options.scale)
    base = _section(values, "base", "base")
    shared: dict[str, Any] = {}
    for text in options.set:
        shared = recipe.merge(shared, parse_assignments(text, "--set"))
    if "out" in shared:
        raise UserError("--set out: each run has a folder of its own in that of the study: --out")
    if "tokens" in _section(shared, "train", "--set train"):
        if options.minutes is not None:
            raise UserError("--set train.tokens and --minutes both size the study: give one")
        values.pop("minutes", None)
    base = recipe.merge(base, shared)
    if options.model is not None:
        base = recipe.merge(base, {"model": {"preset": options.model}})
    if options.data is not None:
        source = options.data[0] if len(options.data) == 1 else options.data
        base = recipe.merge(base, {"data": {"source": source}})
    train = _section(base, "train", "base.train")
    if options.tokens is not None:
        base = recipe.merge(base, {"train": {"tokens": options.tokens}})
        values.pop("minutes", None)
    elif options.minutes is not None:
        values["minutes"] = options.minutes
    elif "tokens" not in train:
        values.setdefault("minutes", DEMO_MINUTES)
    if options.out is not None:
        values["out"] = options.out
    if options.seeds is not None:
        values["seeds"] = options.seeds
    if options.budgets is not None:
        values["budgets"] = options.budgets
    if options.arm:
        reference = values.get("reference", REFERENCE)
        parsed = [_parse_arm(text, reference) for text in options.arm]
        added = dict(parsed)
        if len(added) < len(parsed):
            raise UserError("--arm: two of them have the same name")
        values["arms"] = {**(_section(values, "arms", "arms") or {"simreg": {}}), **added}
    return from_dict({**values, "base": base})
