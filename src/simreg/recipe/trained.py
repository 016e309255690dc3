"""Trained models: what a command is given, runs, models and ids of the Hub, to a list of them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simreg.recipe import arms, checkpoints, hub, provenance
from simreg.recipe import config as recipe
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.folder import FREE_FIELDS, SEED_FOLDER, STUDY_FILE, RunFolder
from simreg.recipe.processes import warn

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


@dataclass(frozen=True)
class Trained:
    """A model, perhaps of a run."""

    name: str
    """As shown: the folder of the run, of a checkpoint or a model, or the id."""
    model: Path
    """A folder with config.json and weights."""
    arm: str = ""
    """Models of one arm differ in their seeds alone, and in their steps."""
    seed: int | None = None
    """None: no run, whose seed is not known."""
    step: int | None = None
    tokens: int | None = None
    final: bool = True
    """Not a checkpoint on the way; only such models enter comparisons."""
    run: Path | None = None
    config: RunConfig | None = None
    """Of the run, if it is one."""
    corpus: str | None = None
    """Fingerprint of the data that the run was trained on, once it is finished."""

    @property
    def title(self) -> str:
        """By its arm: `simreg, seed 3, step 750`."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        step = "" if self.final else f", step {self.step}"
        return f"{self.arm}{seed}{step}"

    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer."""
        return provenance.fingerprint(self.model)


_Runs = Callable[[Path, bool], list[Trained]]


def find(
    names: Sequence[str], *, series: bool = False, of_study: _Runs | None = None
) -> list[Trained]:
    """The models that `names` stand for, each once, with their arms.

    A name is the folder of a run, a folder with runs below, a folder in Hugging Face format or an
    id of the Hub; `ARM=` before it says of which arm it is. Runs that differ in their seed alone
    are one arm otherwise; an arm is called as its folder, with folders above it where others are
    called so too. `series` adds the checkpoints that runs have kept. `of_study(folder, series)`
    gives the models of a folder with study.yaml, with the study's own arms.

    Raises:
        UserError: no name, one that is none of these, a model of two arms, or an arm with two
            models of one seed.
    """
    if not names:
        raise UserError("name a model: the folder of a run, a study or a model, or a Hub id")
    found: dict[Path, Trained] = {}
    given: dict[Path, str] = {}  # arms that were said
    for name in names:
        arm, rest = _split(name)
        for model in _resolve(rest, series, of_study):
            path = model.model.resolve()
            if arm and given.setdefault(path, arm) != arm:
                raise UserError(f"{model.name} is named as {given[path]} and as {arm}")
            if path not in found or model.arm:  # a study knows the arms of its runs
                found[path] = model
    runs = {model.run or path: (path, model) for path, model in found.items()}
    members = [_member(model, given.get(path, "")) for path, model in runs.values()]
    names_of = dict(zip(runs, arms.named(members), strict=True))
    return [replace(m, arm=names_of[m.run or path]) for path, m in found.items()]


def parts_of(name: str) -> tuple[str, Path]:
    """The arm and the path in `ARM=PATH`; no arm is the empty text."""
    arm, rest = _split(name)
    return arm, expanded(rest)


def _split(name: str) -> tuple[str, str]:
    """Arms and paths may have an = themselves: what is after it is there, or is no path."""
    splits = [(name[:i], name[i + 1 :]) for i, letter in enumerate(name) if letter == "=" and i]
    above = [path for path in expanded(name).parents if "=" in path.name and path.exists()]
    if not splits or above or expanded(name).exists():
        return "", name
    there = ((arm, rest) for arm, rest in splits if rest and expanded(rest).exists())
    arm, rest = next(there, splits[0])
    return (arm, rest) if rest and "/" not in arm else ("", name)


def _resolve(name: str, series: bool, of_study: _Runs | None) -> list[Trained]:
    path = expanded(name)
    if not path.exists():
        return [Trained(name, _from_hub(name))]
    if of_study is not None and (path / STUDY_FILE).is_file():
        return of_study(path, series)
    if (path / "config.yaml").is_file():
        return of_run(path, series=series)
    if (path / "config.json").is_file():
        return [Trained(name, path)]
    below = sorted(path.glob("**/config.yaml"), key=lambda file: _natural(str(file)))
    if not below:
        raise UserError(
            f"{path} is no run (config.yaml), no model in Hugging Face format (config.json), and "
            "has no runs below it"
        )
    found = of_runs([config.parent for config in below], series=series)
    if not found:
        raise UserError(f"no run below {path} has a trained model")
    return found


def _from_hub(name: str) -> Path:
    """The files of a model; weights as safetensors where it has them, else as torch saves them."""
    folder = hub.folder(name, _HUB_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return hub.folder(name, [*_HUB_FILES, "pytorch_model*.bin"])


def of_runs(paths: Sequence[Path], *, series: bool = False) -> list[Trained]:
    """Their models; a warning for each run that has none."""
    found = []
    for path in paths:
        try:
            found += of_run(path, series=series)
        except UserError as error:
            warn(f"{error}; left out")
    return found


def of_run(path: Path, *, series: bool = False) -> list[Trained]:
    """The model of a finished run, after its checkpoints if `series`; UserError without any."""
    folder = RunFolder(path)
    config, corpus = recipe.recorded(folder.config), folder.corpus()

    def trained(name: Path, model: Path, step: int, final: bool) -> Trained:
        seed, tokens = config.train.seed, step * config.tokens_per_step
        return Trained(str(name), model, "", seed, step, tokens, final, path, config, corpus)

    finished = corpus is not None and (folder.model / "config.json").is_file()
    kept = checkpoints.found(folder.checkpoints)[::-1]
    steps = [(checkpoints.step_of(checkpoint), checkpoint) for checkpoint in kept]
    before = [(step, each) for step, each in steps if not finished or step < config.steps]
    found = [trained(each, each, step, False) for step, each in before if series]
    if finished:
        found.append(trained(path, folder.model, config.steps, True))
    if not found and folder.failure.exists():
        raise UserError(f"the run in {path} diverged, so it has no trained model")
    if not found:
        way = "finish it" if corpus is None else f"remove {folder.result} and finish it again"
        other = "; simreg analyze --series looks at the checkpoints it has kept" if kept else ""
        raise UserError(
            f"the run in {path} has no trained model: {way} by the command that began it{other}"
        )
    return found


def _natural(text: str) -> list[Any]:
    """Sorts seed-2 before seed-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _member(model: Trained, arm: str) -> arms.Member:
    if model.config is None:
        there = expanded(model.name).exists()
        path = arms.path_of(model.model) if there else (model.name,)
        return arms.Member(model.name, None, str(model.model), path, arm)
    assert model.run is not None
    path, study = arms.path_of(model.run), bool(model.arm)
    if SEED_FOLDER.fullmatch(path[-1]) and len(path) > 1:
        path = path[:-1]
        if re.fullmatch(r"[\d.]+", path[-1]) and len(path) > 1:  # ARM/BUDGET/seed-N
            whole = path[-1] == "1"
            path = path[:-1] if whole else (*path[:-2], "/".join(path[-2:]))
    kind = _apart_from_seed(model.config)
    return arms.Member(str(model.run), model.seed, kind, path, arm, study)


def _apart_from_seed(config: RunConfig) -> str:
    values = recipe.to_dict(config)
    for field in (*FREE_FIELDS, "train.seed"):
        section, _, key = field.rpartition(".")
        (values[section] if section else values).pop(key)
    return json.dumps(values, sort_keys=True)
