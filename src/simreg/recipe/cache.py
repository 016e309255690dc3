"""Cache entries that are either whole or absent: crash-safe, and shared between processes."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from simreg.recipe.checkpoints import new_folder
from simreg.recipe.errors import NO_ROOM, UserError
from simreg.recipe.locks import locked

_log = logging.getLogger(__name__)
_MANIFEST = "entry.json"
_BLOCK = 1 << 18
_BLOCKS = 256  # that are verified of a file; of 64 MiB and less, all


def entry(
    folder: Path,
    build: Callable[[Path], dict[str, Any]],
    *,
    setting: str = "data.cache_dir",
    confirm: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make sure that the cache entry `folder` is there; return the facts that `build` gave.

    `build` writes files into the folder it is given and returns facts (JSON). It runs only if there
    is no whole entry, in one process at a time, in a temporary folder that is renamed at the end,
    unless `confirm`, called before that, raises.
    Raises UserError if the cache cannot be written; it names `setting`, which says where it is.
    """
    facts = stored(folder)
    if facts is not None:
        return facts
    try:
        say = functools.partial(
            _log.warning, "waiting for another process that is writing %s", folder
        )
        with locked(folder.with_suffix(".lock"), say):
            facts = stored(folder)  # another process may have made it meanwhile
            if facts is None:
                if folder.exists():
                    _log.warning("the cache entry %s is damaged: making it again", folder)
                with new_folder(folder) as partial:
                    facts = build(partial)
                    files = {path.name: _measure(path) for path in sorted(partial.iterdir())}
                    manifest = json.dumps({"files": files, "facts": facts})
                    (partial / _MANIFEST).write_text(manifest)
                    confirm()
            return facts
    except OSError as error:  # what the sources raise is a UserError already
        full = error.errno in NO_ROOM
        raise UserError(
            f"cannot write the cache in {folder.parent}: {error.strerror or error}; "
            f"{'free some space or ' if full else ''}set {setting} to another folder"
        ) from None


def name(key: Any) -> str:
    """A name for the entry of a JSON-like key."""
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def stored(folder: Path) -> dict[str, Any] | None:
    """The facts of the entry `folder` if it is there and whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if all(_is_whole(folder / name, value) for name, value in manifest["files"].items()):
            facts: dict[str, Any] = manifest["facts"]
            return facts
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def _is_whole(path: Path, value: list[Any]) -> bool:
    size, digest = value
    if digest == "":  # of a version that noted of large files the size alone
        return bool(path.stat().st_size == size)
    return _measure(path) == value


def _measure(path: Path) -> list[Any]:
    """Size and hash of the content: of a large file, of its size and blocks all over it."""
    size = path.stat().st_size
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        for at in _starts(size):
            file.seek(at)
            digest.update(file.read(_BLOCK))
    return [size, digest.hexdigest()[:32]]


def _starts(size: int) -> Iterable[int]:
    """Where the blocks begin that are verified; the last ends with the file."""
    if size <= _BLOCKS * _BLOCK:
        return range(0, size, _BLOCK)
    return (number * (size - _BLOCK) // (_BLOCKS - 1) for number in range(_BLOCKS))
