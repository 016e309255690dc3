"""The folder of a run: who may write in it, what it holds, where a stopped run continues."""

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from simreg.recipe import checkpoints
from simreg.recipe import config as run_config
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import NO_ROOM, Diverged, Locked, UserError
from simreg.recipe.files import expanded
from simreg.recipe.locks import locked_folder
from simreg.recipe.processes import is_main_process, warn

STUDY_FILE = "study.yaml"  # in the folder of a study, which is none of a run
SEED_FOLDER = re.compile(r"seed-\d+")  # the name of a run's folder in a study

# A run may continue with these changed: they alter neither its weights nor its evaluations
# (`accumulate`, as the number of processes: by rounding, by what a router loss balances over, and
# by what an objective sees that is not `by_rows`).
FREE_FIELDS = (
    "out",
    "data.cache_dir",
    "train.accumulate",
    "train.gradient_checkpointing",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.analyze_every",
    "train.report_to",
    "train.timeout",
)
_STORAGE_ERRORS = NO_ROOM | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_STORAGE_ERRORS |= {errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `model/`, `result.json`.

    Of a study also `diverged.json`, where the run diverged.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.model = self.root / "model"
        self.result = self.root / "result.json"
        self.failure = self.root / "diverged.json"

    def corpus(self) -> str | None:
        """Fingerprint of the data of the finished run; None without a readable result."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            result = json.loads(self.result.read_text(encoding="utf-8"))
            return str(result["corpus"]["fingerprint"])
        return None

    def finished(self, config: RunConfig) -> dict[str, Any] | None:
        """The recorded result, if the run of this config is finished here."""
        if not self.result.exists():
            return None
        self.check(config)
        with contextlib.suppress(ValueError):
            result = json.loads(self.result.read_text(encoding="utf-8"))
            if isinstance(result, dict) and "final_ce" in result:
                return result
        if not self.config.exists():
            raise UserError(_not_ours(self.result))
        raise UserError(f"{self.result} is damaged: delete it; the same command completes the run")

    def diverged(self, config: RunConfig) -> str | None:
        """What `record_divergence` was told, if the run of this config diverged here."""
        if not self.failure.exists():
            return None
        self.check(config)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(self.failure.read_text(encoding="utf-8"))["message"])
        raise UserError(f"{self.failure} is damaged: delete it; the same command repeats the run")

    def record_divergence(self, message: str) -> None:
        """Keep that the run diverged: one that is tried until it passes is another claim."""
        record = json.dumps({"message": message}) + "\n"
        checkpoints.write_atomically(self.failure, record)

    def check(self, config: RunConfig) -> None:
        """UserError if the folder holds a run of another config."""
        if not self.config.exists() or not self._begun():
            return  # a command that failed before its first step claims nothing
        saved = run_config.recorded(self.config)
        there, here = (flat(run_config.to_dict(each)) for each in (saved, config))
        idle = set()  # fields that nothing reads
        one, other = saved.simreg, config.simreg
        if one.weight == other.weight == 0:
            idle = {name for name in here if name.startswith("simreg.")}
            if config.auxiliary.name is not None:  # which has the same scope
                idle.remove("simreg.scope")
        elif one.weight == other.weight and one.offsets == other.offsets:  # said, or by default
            idle.add("simreg.depths_offset")
        differing = [
            f"{name} is {_short(there[name])} there and {_short(here[name])} now"
            for name in here
            if here[name] != there[name] and name not in {*FREE_FIELDS, *idle}
        ]
        if differing:
            raise UserError(
                f"{self.root} holds a run of another config ({'; '.join(differing)}): "
                "give it the values of there, choose another `out` folder, or delete this one"
            )

    @contextlib.contextmanager
    def claimed(self, config: RunConfig) -> Iterator[None]:
        """Hold the folder's lock; the main process of several holds it for all."""
        if not is_main_process():
            yield
            return
        with locked_folder(self.root) as held:
            if not held:
                raise Locked(
                    f"another process is training in {self.root}: wait for it, or choose another "
                    "`out`"
                )
            self.check(config)
            self._keep_what_is_not_ours()
            checkpoints.sweep(self.checkpoints)
            checkpoints.sweep_files(self.root)
            found = self.config.exists()
            checkpoints.write_atomically(self.config, run_config.to_yaml(config))
            try:
                yield
            except Diverged:  # it has begun, whatever is written of it
                raise
            except BaseException:
                if not found and not self._begun():  # by text that can't be read, for one
                    self.config.unlink(missing_ok=True)
                raise

    def _keep_what_is_not_ours(self) -> None:
        """UserError before a run begins where something would be overwritten that no run wrote."""
        if (self.root / STUDY_FILE).exists():
            raise UserError(f"{self.root} is the folder of a study: choose another `out`")
        if self._begun():
            if self.config.exists():  # `check` was content
                return
            computed = self.metrics, self.result, self.checkpoints
            raise UserError(_not_ours(next(path for path in computed if path.exists())))
        if self.model.exists():
            raise UserError(_not_ours(self.model))
        if self.config.exists() and not run_config.of_run(self.config):
            raise UserError(_not_ours(self.config))
        if (self.root / "config.json").exists():
            raise UserError(f"{self.root} is the folder of a model: choose another `out`")
        below = (path.parent for path in self.root.glob("*/config.yaml") if run_config.of_run(path))
        if (run := next(below, None)) is not None:  # which whatever reads this folder would miss
            raise UserError(f"{self.root} holds runs, {run.name} for one: choose another `out`")

    def _begun(self) -> bool:
        """Whether there is anything that a run has computed."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        ended = self.result.exists() or self.failure.exists()
        return logged or ended or bool(checkpoints.found(self.checkpoints))

    def resume_point(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest intact checkpoint and its manifest, or (None, {}) to start afresh."""
        for checkpoint in checkpoints.found(self.checkpoints):
            try:
                return checkpoint, checkpoints.verify(checkpoint)
            except ValueError as error:
                warn(f"checkpoint {checkpoint} is corrupt ({error}); going back to the one before")
        if checkpoints.found(self.checkpoints):
            warn(f"no checkpoint in {self.checkpoints} is intact; starting again from step 0")
        return None, {}


def _not_ours(path: Path) -> str:
    return (
        f"there is a {path} already; no run of simreg wrote it, and this one would replace it: "
        "choose another `out`"
    )


@contextlib.contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Turn what the file system refuses under `root` into a UserError."""
    try:
        yield
    except OSError as error:
        path = Path(str(error.filename))  # of the folder, or of one above that is missing?
        inside = path.is_relative_to(root) or (root.is_relative_to(path) and not path.exists())
        if error.errno not in _STORAGE_ERRORS and not (error.errno == errno.ENOENT and inside):
            raise
        advice = "make room or choose" if error.errno in NO_ROOM else "choose"
        saved = "; the same command continues from the last checkpoint"
        raise UserError(
            f"cannot write {error.filename or f'in {root}'}: {error.strerror}; {advice} another "
            f"`out`{saved if _has_checkpoints(root) else ''}"
        ) from None


@contextlib.contextmanager
def native_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, which writers outside Python report in ways of their own, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = str(error)
        told = re.search(r"\(os error (\d+)\)", text)  # tokenizers raises a bare Exception
        writer = "PytorchStreamWriter", "inline_container.cc"  # torch
        if not (told or isinstance(error, SafetensorError) or any(each in text for each in writer)):
            raise
        code = int(told[1]) if told else errno.ENOSPC
        reason = f"no room, or not writable ({text.splitlines()[0]})"
        raise OSError(code, reason, str(target)) from None


def _has_checkpoints(root: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(checkpoints.found(RunFolder(root).checkpoints))
    return False


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """`section.field` -> value; a field that is a mapping itself is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inside = isinstance(value, dict)
        flat |= {f"{key}.{name}": x for name, x in value.items()} if inside else {key: value}
    return flat


def _short(value: Any) -> Any:
    """A long list by its length and its beginning."""
    if isinstance(value, list) and len(value) > 3:
        return f"a list of {len(value)} that begins with {value[0]}"
    return value
