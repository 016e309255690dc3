"""Cache entries that are either whole or absent: crash-safe, and shared between processes."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simreg.recipe.checkpoints import new_folder
from simreg.recipe.errors import NO_ROOM, UserError
from simreg.recipe.locks import locked

_log = logging.getLogger(__name__)
_MANIFEST = "entry.json"
_HASHED = 1 << 26  # files up to this many bytes are verified by content, larger ones by size


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
        if all(_measure(folder / name) == value for name, value in manifest["files"].items()):
            facts: dict[str, Any] = manifest["facts"]
            return facts
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def _measure(path: Path) -> list[Any]:
    size = path.stat().st_size
    return [size, hashlib.blake2b(path.read_bytes()).hexdigest()[:32] if size <= _HASHED else ""]
