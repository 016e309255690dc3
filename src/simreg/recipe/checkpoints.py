"""Checkpoints that are whole or absent: written aside, fsynced, renamed; verified before use.

A checkpoint is a folder `step-0000123` with a `manifest.json` that names every file with its size
and SHA-256, so that a truncated or altered one is found out and its predecessor taken.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_ASIDE = re.compile(rf"\.{_NAME.pattern}\.partial")  # of `new_folder`
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.partial")  # of `write_atomically`


def folder_name(step: int) -> str:
    """The name of the checkpoint of a step; sorts by step."""
    return f"step-{step:07d}"


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first, whether intact or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)[::-1]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named like a checkpoint")
    return int(match.group(1))


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a finished folder: `facts` and every file's size and hash."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({**facts, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of an intact checkpoint; ValueError says what is wrong with another."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = [(name, own["size"], own["sha256"]) for name, own in manifest["files"].items()]
        if not (files and isinstance(manifest["step"], int) and manifest["corpus"]):
            raise ValueError
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{MANIFEST} is missing or unreadable") from None
    for name, size, sha256 in files:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, not {size}")
        try:
            same = _sha256(path) == sha256
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from None
        if not same:
            raise ValueError(f"{name} was altered (its hash differs)")
    return manifest


def prune(folder: Path, step: int, keep: int) -> None:
    """Keep the `keep` newest up to `step`; later ones were found corrupt and passed over."""
    kept = [path for path in found(folder) if step_of(path) <= step][:keep]
    for path in found(folder):
        if path not in kept:
            _remove(path)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of checkpoints; nobody may be writing one."""
    for path in folder.glob(".*"):
        if _ASIDE.fullmatch(path.name):
            _remove(path)


def sweep_files(folder: Path) -> None:
    """Remove what killed processes left of `write_atomically`."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()


def _remove(folder: Path) -> None:
    """Of one that lies elsewhere, behind a link, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` if the block succeeds, else disappears."""
    partial = aside(target)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _fsync(path)
        _fsync(partial)
        if target.exists() or target.is_symlink():
            _remove(target)
        partial.rename(target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def aside(target: Path) -> Path:
    """Where `target` is written before it takes its name."""
    return target.with_name(f".{target.name}.partial")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that a reader finds the old or the new, never a part.

    Of several processes that write it at once, the last one's stays.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _fsync(partial)
        partial.replace(path)
        _fsync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
