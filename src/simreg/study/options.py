"""The command line of `simreg compare`: the study that a file and its flags ask for."""

from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic.dataclasses import dataclass

from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError
from simreg.recipe.folder import STUDY_FILE
from simreg.recipe.numbers import Whole, default_of
from simreg.recipe.values import merge, parse_assignments, read_yaml
from simreg.study.plan import REFERENCE, Study, from_dict, section

DEMO_MINUTES = 5.0


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
    """Where the text comes from, that for validation too (some is held out): files, globs,
    `python-stdlib` or `hf:owner/name`."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Change what all arms share, e.g. `--set optim.lr=1e-3`."""


def _read(path: str) -> dict[str, Any]:
    """A study's file; UserError for a folder and for the config of a run."""
    if Path(path).is_dir():
        there = Path(path, STUDY_FILE).is_file()
        way = f"; go on with the study in it by simreg compare {path}/{STUDY_FILE} --out {path}"
        raise UserError(f"{path} is a folder: name a study's file{way if there else ''}")
    values = read_yaml(path)
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
    scales = section({"scales": values.pop("scales", None)}, "scales", "scales")
    scales = {str(name): own for name, own in scales.items()}  # YAML reads 1 as a number
    if scale is None:
        return values
    if scale not in scales:
        raise UserError(f"--scale {scale}: the study has {', '.join(scales) or 'no scales'}")
    out = values.get("out") or f"runs/{values['name']}"
    own = section(scales, scale, f"scales.{scale}")
    return merge({**values, "out": f"{out}-{scale}"}, own)


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
    base = section(values, "base", "base")
    shared: dict[str, Any] = {}
    for text in options.set:
        shared = merge(shared, parse_assignments(text, "--set"))
    if "out" in shared:
        raise UserError("--set out: each run has a folder of its own in that of the study: --out")
    if "tokens" in section(shared, "train", "--set train"):
        if options.minutes is not None:
            raise UserError("--set train.tokens and --minutes both size the study: give one")
        values.pop("minutes", None)
    base = merge(base, shared)
    if options.model is not None:
        base = merge(base, {"model": {"preset": options.model}})
    if options.data is not None:
        source = options.data[0] if len(options.data) == 1 else options.data
        other: dict[str, Any] = {"source": source}
        if "validation" not in section(shared, "data", "--set data"):
            other["validation"] = None  # the file's is of the file's text
        base = merge(base, {"data": other})
    train = section(base, "train", "base.train")
    if options.tokens is not None:
        base = merge(base, {"train": {"tokens": options.tokens}})
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
        values["arms"] = {**(section(values, "arms", "arms") or {"simreg": {}}), **added}
    return from_dict({**values, "base": base})
