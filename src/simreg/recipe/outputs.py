"""Where a command writes what it finds: no other command's results are replaced."""

import contextlib
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.errors import UserError
from simreg.recipe.folder import storage_errors
from simreg.recipe.locks import Wait, locked_folder


def command() -> str:
    """The command line that this process was called with."""
    return shlex.join(["simreg", *sys.argv[1:]])


@contextlib.contextmanager
def folder(out: Path, key: str, writer: str) -> Iterator[Path]:
    """`out`, made and held until the end; UserError, before any work, where results can't be
    written, another command writes its own, or others would be replaced (see `check_results`)."""
    check_results(out / "results.json", key, writer)
    with held(out) as ours:
        if not ours:
            raise UserError(f"another command is at work in {out}: wait for it, or give --out")
        check_results(out / "results.json", key, writer)  # of one that has ended meanwhile
        yield out


@contextlib.contextmanager
def held(folder: Path, waiting: Wait = None) -> Iterator[bool]:
    """As `locked_folder`; UserError where the folder can't be written in."""
    with contextlib.ExitStack() as until_done:
        try:
            with storage_errors(folder):
                ours = until_done.enter_context(locked_folder(folder, waiting))
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}") from None
        yield ours


def write(path: Path, values: dict[str, Any]) -> None:
    """Write JSON for people and programs, whole or not at all."""
    with storage_errors(path):
        write_atomically(path, json.dumps(values, indent=1) + "\n")


def check_results(path: Path, key: str, writer: str) -> None:
    """UserError before work whose results would replace a file that another command wrote.

    Args:
        path: the file.
        key: what results of this command have and no other's.
        writer: the command's name.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, IsADirectoryError):
            values = None
        if not isinstance(values, dict) or key not in values:
            raise UserError(
                f"there is a {path} that `{writer}` did not write and would replace: give another "
                "--out"
            )


@contextlib.contextmanager
def unused(default: Path, command: str) -> Iterator[Path]:
    """`default`, made and held until the end; or one with a number, where it is another's.

    Another's is a folder with `results.json` of another command line, or one that a command is
    about to write its own into.
    """
    for number in itertools.count(1):
        place = default if number == 1 else default.with_name(f"{default.name}-{number}")
        if _of_another(place, command):
            continue
        with held(place) as ours:
            if ours and not _of_another(place, command):  # nor has it become one meanwhile
                yield place
                return


def _of_another(folder: Path, command: str) -> bool:
    if not (folder / "results.json").exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        written = json.loads((folder / "results.json").read_text(encoding="utf-8"))["command"]
        return bool(written != command)
    return True
