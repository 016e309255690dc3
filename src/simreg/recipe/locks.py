"""One process at a time in a folder: advisory locks, which end with the process."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock that is the file `path`; yields whether it is held.

    Args:
        path: made if it is not there, and left.
        waiting: called before it is waited for; without, another's lock is not waited for.
    """
    with path.open("w") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if held := waiting is not None:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield held
