"""What is evaluated: run folders, folders of runs, Hugging Face models; and of which arm it is."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simreg.evaluation.scoring import Scorer, prefix_token
from simreg.recipe import assemble, hub, provenance
from simreg.recipe import config as recipe
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.folder import FREE_FIELDS, SEED_FOLDER, RunFolder, warn

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str
    """As shown: the run's folder, or the model as it was named."""
    model: Path
    """The folder in Hugging Face format."""
    arm: str
    """Subjects of one arm differ in their seeds alone."""
    seed: int | None = None
    config: RunConfig | None = None
    """Of the run, if it is one."""
    corpus: str | None = None
    """Fingerprint of the data that the run was trained on."""

    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer."""
        return provenance.fingerprint(self.model)

    def load(self, *, bf16: bool) -> tuple[Scorer, Any]:
        """The model, ready to score, and its tokenizer; UserError if they cannot be loaded."""
        tokenizer = hub.tokenizer(self.model)
        model = hub.load(self.model)
        if prefix_token(tokenizer) is None:
            raise UserError(f"the tokenizer in {self.model} has no bos or eos token: add one to it")
        model.to(assemble.device()).train(False)  # type: ignore[arg-type]
        return Scorer(model, max_length=self.max_length(model.config), bf16=bf16), tokenizer

    def max_length(self, config: Any) -> int:
        """Positions to use: those that a run was trained with, else what the model allows."""
        limit = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 2048)
        return limit if self.config is None else min(limit, self.config.data.seq_len)


def find(names: Sequence[str]) -> list[Subject]:
    """The models that the names stand for, each once, arms in the order of their first mention.

    A name is a run's folder, a folder with finished runs below, a folder in Hugging Face format or
    a model id of the Hub. UserError for what is none of these.
    """
    found: dict[Path, Subject] = {}
    for name in names:
        for subject in _resolve(name):
            found.setdefault(subject.model.resolve(), subject)
    return _arms(list(found.values()))


def _resolve(name: str) -> Iterator[Subject]:
    path = expanded(name)
    if not path.exists():
        yield Subject(name, _from_hub(name), name)
    elif (path / "config.yaml").is_file():
        yield run(path)
    elif (path / "config.json").is_file():
        yield Subject(name, path, name)
    else:
        below = sorted(path.glob("**/config.yaml"), key=lambda p: _natural(str(p)))
        if not below:
            raise UserError(
                f"{path} is neither a run's folder (config.yaml, model/) nor a model in Hugging "
                "Face format (config.json)"
            )
        yield from _trained(path, [config.parent for config in below])


def _from_hub(name: str) -> Path:
    """The files of a model; weights as safetensors where it has them, else as torch saves them."""
    folder = hub.folder(name, _HUB_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return hub.folder(name, [*_HUB_FILES, "pytorch_model*.bin"])


def _trained(folder: Path, paths: list[Path]) -> list[Subject]:
    """The runs that are finished; UserError if none is."""
    found = []
    for path in paths:
        try:
            found.append(run(path))
        except UserError as error:
            warn(f"{error}; left out")
    if not found:
        raise UserError(f"no run below {folder} has a trained model")
    return found


def _natural(text: str) -> list[Any]:
    """Sorts seed-2 before seed-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def run(path: Path) -> Subject:
    """The finished run in a folder; UserError if it holds no model."""
    folder = RunFolder(path)
    config = recipe.recorded(folder.config)
    corpus = folder.corpus()
    if corpus is None or not (folder.model / "config.json").is_file():
        way = "finish it" if corpus is None else f"remove {folder.result} and finish it again"
        raise UserError(
            f"the run in {path} has no trained model: {way} by the command that began it"
        )
    parts = [part for part in path.resolve().parts if not SEED_FOLDER.fullmatch(part)]
    return Subject(str(path), folder.model, "/".join(parts[-2:]), config.train.seed, config, corpus)


def _arms(subjects: list[Subject]) -> list[Subject]:
    """The same with names of arms such that runs share one if and only if seeds alone differ."""
    names: dict[str, str] = {}  # what an arm is -> its name
    seen: set[tuple[str, int | None]] = set()
    named = []
    for subject in subjects:
        kind = subject.name if subject.config is None else _apart_from_seed(subject.config)
        while (kind, subject.seed) in seen:  # the same run made again
            kind += " again"
        seen.add((kind, subject.seed))
        if kind not in names:
            name, number = subject.arm, 2
            while name in names.values():
                name, number = f"{subject.arm} ({number})", number + 1
            names[kind] = name
        named.append(replace(subject, arm=names[kind]))
    return named


def _apart_from_seed(config: RunConfig) -> str:
    values = recipe.to_dict(config)
    for field in (*FREE_FIELDS, "train.seed"):
        section, _, key = field.rpartition(".")
        (values[section] if section else values).pop(key)
    return json.dumps(values, sort_keys=True)
