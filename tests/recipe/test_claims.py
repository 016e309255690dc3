"""What a run's folder may be continued with, what its disk refuses, who waits for it."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest

from simreg.recipe import checkpoints, outputs
from simreg.recipe import config as run_config
from simreg.recipe.config import with_overrides
from simreg.recipe.errors import UserError
from simreg.recipe.folder import RunFolder, native_errors, storage_errors
from simreg.recipe.locks import locked_folder
from tests.recipe.tiny import Make


def test_what_may_change_in_a_folder(make: Make) -> None:
    """Each field of `train` is either free or refused, as docs/training.md says."""
    config = make()
    folder = RunFolder(config.out)
    folder.root.mkdir(parents=True)
    folder.metrics.write_text('{"step": 1}\n')
    folder.config.write_text(run_config.to_yaml(config))
    free = {"accumulate": 2, "gradient_checkpointing": True, "timeout": 9, "log_every": 7}
    free |= {"save_every": 5, "keep_checkpoints": 4, "analyze_every": 2}
    free |= {"report_to": "tensorboard"}
    elsewhere = {"out": "moved", "data": {"cache_dir": "another"}}
    folder.check(with_overrides(config, elsewhere | {"train": free}))
    refused = {"tokens": 5, "batch_rows": 8, "seed": 2, "precision": "bf16", "compile": True}
    refused |= {"evals": 5, "eval_tokens": 64}
    assert {each.name for each in fields(config.train)} == free.keys() | refused.keys()
    for name, value in refused.items():
        with pytest.raises(UserError, match=rf"another config \(train\.{name} is "):
            folder.check(with_overrides(config, {"train": {name: value}}))


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG"])
def test_what_a_disk_refuses_is_said(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)
    full = name in ("ENOSPC", "EDQUOT", "EFBIG")
    advice = "make room or choose another" if full else "; choose another"
    with pytest.raises(UserError, match=advice), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["link", "dangling", "content", "pipe", "socket"])
def test_what_has_the_name_of_a_lock_and_is_none_stays(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, lock = tmp_path / "other", tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    other.write_text("mine")
    if kind == "link":
        lock.symlink_to(other)
    elif kind == "dangling":
        lock.symlink_to(tmp_path / "nowhere")
    elif kind == "content":
        lock.write_text("of another tool")
    elif kind == "socket":
        monkeypatch.chdir(lock.parent)  # its name would be too long
        socket.socket(socket.AF_UNIX).bind(".lock")
    else:
        os.mkfifo(lock)
    before = lock.lstat()
    with pytest.raises(UserError, match="cannot write "), outputs.held(lock.parent):
        raise AssertionError("held")
    with pytest.raises(FileExistsError), locked_folder(lock.parent):
        raise AssertionError("held")
    assert other.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert (lock.lstat().st_ino, lock.lstat().st_size) == (before.st_ino, before.st_size)


def test_a_lock_of_another_user_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be read, and not be written in."""
    given, lock = os.open, tmp_path / ".lock"

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return given(path, flags, mode)

    lock.touch()
    with lock.open() as other:
        monkeypatch.setattr(os, "open", refuse)
        fcntl.flock(other, fcntl.LOCK_EX)
        with locked_folder(tmp_path) as held:
            assert not held
    with locked_folder(tmp_path) as held:
        assert held
    with pytest.raises(PermissionError), locked_folder(tmp_path):
        raise AssertionError("there is none any more")


@pytest.mark.parametrize("at", ["to look", "to read"])
def test_a_lock_of_another_user_may_vanish_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    lock, opened = tmp_path / ".lock", os.open
    lock.touch()

    def others(path: Path, flags: int, *rest: int) -> int:
        if path == lock and lock.exists():
            writes = flags & os.O_RDWR
            if not writes or at == "to look":
                lock.unlink()
            if writes:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", others)
    with locked_folder(tmp_path) as held:
        monkeypatch.setattr(os, "open", opened)
        assert held
        assert lock.exists()
    assert not lock.exists()


def test_what_a_native_writer_was_refused_is_no_full_disk(tmp_path: Path) -> None:
    words = pytest.raises(UserError, match=r"cannot write .*; choose another")
    with words, storage_errors(tmp_path), native_errors(tmp_path / "x"):
        raise Exception("Permission denied (os error 13)")


def test_a_command_line_is_told_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/simreg", "eval", "my runs/a", "--limit", "5"])
    assert outputs.command() == "simreg eval 'my runs/a' --limit 5"


def test_one_of_several_that_wait_comes_next(tmp_path: Path) -> None:
    """Who held the folder has been killed, and the file of its lock is still there."""
    ready, both, met = threading.Semaphore(0), threading.Barrier(2), []

    def other() -> None:
        broken = contextlib.suppress(threading.BrokenBarrierError)
        with locked_folder(tmp_path, ready.release), broken:
            both.wait(0.2)
            met.append("inside at once")

    threads = [threading.Thread(target=other) for _ in range(2)]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for thread in threads:
            thread.start()
            assert ready.acquire(timeout=30)
        time.sleep(0.05)  # till both are waiting
    for thread in threads:
        thread.join(30)
    assert not met


def test_what_a_killed_process_was_writing_is_swept(make: Make) -> None:
    config = make()
    folder = RunFolder(config.out)
    left, other = (
        folder.checkpoints / ".step-0000003.partial",
        folder.checkpoints / ".step-mine.partial",
    )
    left.mkdir(parents=True)
    other.mkdir()
    (folder.checkpoints / ".step-0000004.partial").symlink_to(other)
    (folder.root / ".model.partial").mkdir()  # the next export's to replace
    checkpoint, ours = "step-0000002", f".result.json.{'0f' * 16}.partial"
    others = {".film.mkv.partial", ".a.0f.partial"}  # of whoever else writes there
    for name in (ours, *others):
        (folder.root / name).touch()
    with folder.claimed(config):
        assert [*folder.checkpoints.iterdir()] == [other]
        found = {path.name for path in folder.root.glob(".*")}
        assert found == {".lock", ".model.partial", *others}
    (folder.root / checkpoint).mkdir()  # moved to another disk, and linked
    (folder.checkpoints / checkpoint).symlink_to(folder.root / checkpoint)
    checkpoints.prune(folder.checkpoints, 9, 0)
    assert [*folder.checkpoints.iterdir()] == [other]
    assert (folder.root / checkpoint).is_dir()
