"""One process at a time in a folder: advisory locks, which end with the process."""

import contextlib
import errno
import fcntl
import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from simreg.recipe.processes import warn

Wait = Callable[[], object] | None
"""Called before another's lock is waited for; None: it is not waited for."""
_TRIES = 100
_WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of file systems that have no locks, such as Lustre where it is mounted so."""


@contextmanager
def locked(path: Path, waiting: Wait = None) -> Iterator[bool]:
    """Hold the lock that is the file `path`, which is there as long as it is held; yields whether
    it is. OSError where something else has that name: a file with content, a link."""
    while True:
        with _opened(path) as file:
            _require_lock(path, file.fileno())
            held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if held := waiting is not None:
                    waiting()
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _WITHOUT:
                    raise
                _without_locks(str(error.strerror))
            if held and not _is_still(path, file.fileno()):
                continue  # who held it has removed it: another process may make it anew
            try:
                yield held
            finally:
                if held:
                    with contextlib.suppress(OSError):  # the folder may have gone
                        path.unlink()
            return


@contextmanager
def locked_folder(folder: Path, waiting: Wait = None) -> Iterator[bool]:
    """Make a folder and hold its lock, `.lock` in it; yields whether it is held.

    If what follows fails and has left nothing there, the folders that were made for it go again.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with locked(folder / ".lock", waiting) as held:
            yield held
    except BaseException:
        with contextlib.suppress(OSError):  # others are in it
            for path in made:
                path.rmdir()
        raise


@functools.cache
def _without_locks(why: str) -> None:
    """Said once."""
    warn(f"the file system has no locks ({why}): let no two commands write into one folder")


def _opened(path: Path) -> BinaryIO:
    """The file, made with the folders above it, which another process may be removing.

    What is there stays as it is, and no link is followed: the folder may be one that others share.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.fdopen(os.open(path, flags, 0o666), "rb+", buffering=0)
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
        except PermissionError:  # another user's, which may be held all the same
            with contextlib.suppress(FileNotFoundError):  # it has just been let go
                if path.is_file():
                    read = os.open(path, flags & ~(os.O_RDWR | os.O_CREAT))
                    return os.fdopen(read, "rb", buffering=0)
            if not left:
                raise
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
                raise
            raise _no_lock(path) from None
    raise AssertionError


def _require_lock(path: Path, descriptor: int) -> None:
    """OSError unless the file is one of ours, which are empty."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        raise _no_lock(path)


def _no_lock(path: Path) -> OSError:
    return OSError(errno.EEXIST, "in the place of a lock, and is none", str(path))


def _is_still(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False
