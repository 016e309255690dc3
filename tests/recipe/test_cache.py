"""The cache of tokenised text: made once, whole or not at all; what cannot be used is named."""

import hashlib
import json
import logging
import lzma
import multiprocessing
import os
import pkgutil
import re
import resource
import signal
from pathlib import Path

import pytest

from simreg.recipe import cache, data, sources
from simreg.recipe.data import prepare
from simreg.recipe.errors import UserError
from simreg.recipe.tokenizer import Encoder
from tests.recipe.corpora import (
    DOCUMENTS,
    bytes_tokenizer,
    make,
    message_of,
    prepared,
    text_of,
    val,
    write,
)

FORK = multiprocessing.get_context("fork")


def test_tokenised_once(config, tmp_path, monkeypatch):
    first = prepared(config)

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Encoder, "__call__", fail)
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    assert prepared(make(tmp_path, source=str(moved))).fingerprint == first.fingerprint
    # the row length is a matter of reading
    assert prepared(make(tmp_path, source=str(moved), seq_len=8)).tokens == first.tokens


def test_fingerprint_follows_content_and_settings(config, tmp_path):
    seen = [prepared(config).fingerprint]
    for changes in (
        {"seq_len": 8},
        {"tokenizer": "bpe:270"},
        {"validation_fraction": 0.4},
        {"max_tokens": 500},
        {"validation": val(tmp_path)},
    ):
        seen.append(prepared(make(tmp_path, **changes)).fingerprint)
    seen.append(prepared(config, seed_of_split=1).fingerprint)
    source = tmp_path / "train.jsonl"
    times = source.stat()
    source.write_text(source.read_text().replace("number", "NUMBER", 1))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and time
    seen.append(prepared(config).fingerprint)
    assert len(set(seen)) == len(seen)


def test_each_tokenizer_has_its_own_tokens(tmp_path):
    for spec in ("bpe:280", "bpe:270", bytes_tokenizer(tmp_path)):
        corpus = prepared(make(tmp_path, tokenizer=spec, validation=val(tmp_path)))
        assert text_of(corpus, corpus.train) == DOCUMENTS


def entry_of(folder: Path) -> Path:
    (entry,) = [path for path in (folder / "cache" / "tokens").iterdir() if path.is_dir()]
    return entry


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


@pytest.mark.parametrize("name", ["train.tokens", "validation.ends", "entry.json"])
@pytest.mark.parametrize("damage", ["shorter", "flipped", "gone"])
def test_damaged_entry_is_made_again(config, tmp_path, caplog, name, damage):
    prepared(config)
    entry = entry_of(tmp_path)
    right = digest(entry)
    content = bytearray((entry / name).read_bytes())
    if damage == "gone":
        (entry / name).unlink()
    else:
        content[5] ^= 0xFF
        (entry / name).write_bytes(content if damage == "flipped" else content[:-2])
    with caplog.at_level(logging.WARNING):
        prepared(config)
    assert digest(entry) == right
    assert "damaged" in caplog.text


def test_a_large_file_is_verified_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 8)
    monkeypatch.setattr(cache, "_BLOCKS", 4)
    for size in (32, 33, 200):  # four blocks and a little more, which are read whole, and many
        folder = tmp_path / str(size)
        content = bytes(range(size))
        cache.entry(folder, lambda to, content=content: {"n": (to / "x").write_bytes(content)})
        assert cache.stored(folder) == {"n": size}
        seen = []
        for at in range(size):
            (folder / "x").write_bytes(content[:at] + b"\xff" + content[at + 1 :])
            seen.append(cache.stored(folder) is None)
        assert sum(seen) == 32
        assert seen[0]
        assert seen[-1]
        assert all(any(seen[at : at + size // 3]) for at in range(0, size - size // 3))
        (folder / "x").write_bytes(bytes(size))  # the size that it had, and nothing in it
        assert cache.stored(folder) is None
        old = {"files": {"x": [size, ""]}, "facts": 5}  # of large files, before: the size alone
        (folder / "entry.json").write_text(json.dumps(old))
        assert cache.stored(folder) == 5
        (folder / "x").write_bytes(content[1:])
        assert cache.stored(folder) is None


def test_what_tokens_are_read_as_is_not_for_the_cache_to_choose(config, tmp_path):
    prepared(config)
    manifest = entry_of(tmp_path) / "entry.json"
    found = json.loads(manifest.read_text())
    assert found["facts"]["dtype"] == "uint16"
    found["facts"]["dtype"] = "O"  # pointers, that numpy would follow
    manifest.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"is damaged \(tokens of dtype 'O'\): delete it"):
        prepare(config)


def in_child(function) -> None:
    """Run in a forked process and wait for its end."""
    child = FORK.Process(target=function)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    in_child.exitcode = child.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["first document", "later document", "before the rename"])
def test_killed_while_writing(config, tmp_path, monkeypatch, moment):
    right = prepared(make(tmp_path, cache_dir=str(tmp_path / "other")))
    prepared(make(tmp_path, max_tokens=1, seq_len=2))  # trains the tokenizer

    def run():
        add, count = data._Writer.add, iter(range(1000))

        def add_or_die(self, ids):
            add(self, ids)
            self.tokens.flush()
            if moment != "before the rename" and next(count) == (50 if "later" in moment else 0):
                die()

        data._Writer.add = add_or_die
        if moment == "before the rename":
            Path.rename = lambda self, target: die()
        prepared(config)

    in_child(run)
    assert in_child.exitcode == -signal.SIGKILL
    assert list((tmp_path / "cache" / "tokens").glob("*.partial"))
    corpus = prepared(config)
    assert corpus.fingerprint == right.fingerprint
    assert corpus.train.tokens.tolist() == right.train.tokens.tolist()
    assert not list((tmp_path / "cache" / "tokens").glob("*.partial"))


def test_two_processes_at_once(config, tmp_path):
    """The second comes while the first is writing: it waits, then takes what the first made."""
    prepared(make(tmp_path, max_tokens=1, seq_len=2))  # trains the tokenizer
    writing, waiting, results = FORK.Event(), FORK.Event(), FORK.SimpleQueue()
    build = data._Builder.__call__

    def run():
        built = []

        def slow_build(self, folder):
            built.append(folder)
            writing.set()
            assert waiting.wait(30)
            return build(self, folder)

        data._Builder.__call__ = slow_build
        cache._log.warning = lambda *message: waiting.set()
        results.put((prepared(config).fingerprint, len(built)))

    first, second = FORK.Process(target=run), FORK.Process(target=run)
    first.start()
    assert writing.wait(30)
    second.start()
    first.join(60)
    second.join(60)
    assert first.exitcode == second.exitcode == 0
    (one, built_one), (two, built_two) = results.get(), results.get()
    assert one == two == prepared(config).fingerprint
    assert built_one + built_two == 1


@pytest.mark.parametrize("meanwhile", ["data._Builder.__call__", "tokenizer.train_bpe"])
def test_a_file_that_changes_while_it_is_read_leaves_no_entry(
    config, tmp_path, monkeypatch, meanwhile
):
    path = tmp_path / "train.jsonl"
    before, target = path.read_bytes(), f"simreg.recipe.{meanwhile}"
    build = pkgutil.resolve_name(target)

    def grows(*arguments):
        with open(path, "ab") as file:
            file.write(b'{"text": "zzxy zzxy zzxy"}\n' * 300)
        return build(*arguments)

    monkeypatch.setattr(target, grows)
    assert "train.jsonl changed while it was read" in message_of(config)
    monkeypatch.undo()
    path.write_bytes(before)
    elsewhere = make(tmp_path, cache_dir=str(tmp_path / "another"))
    assert prepared(config).fingerprint == prepared(elsewhere).fingerprint


# ---- bad input


def test_full_disk(config, tmp_path):
    """A real limit: the kernel refuses to write files beyond 4 KiB."""
    write(tmp_path / "train.jsonl", DOCUMENTS * 5)
    prepared(make(tmp_path, max_tokens=1, seq_len=2))
    results = FORK.SimpleQueue()

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        results.put(message_of(config))

    in_child(run)
    assert in_child.exitcode == 0
    message = results.get()
    assert "cannot write the cache" in message
    assert "free some space or set data.cache_dir" in message
    assert not list((tmp_path / "cache" / "tokens").glob("*.partial"))
    assert prepared(config).tokens > 4096


def test_no_space_left(config, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device; free some space" in message_of(config)
    monkeypatch.undo()
    prepared(config)


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/absent")):
        message = message_of(make(tmp_path, cache_dir=str(place)))
        assert f"cannot write the cache in {place}" in message
        assert "free" not in message


def test_whole_cache_need_not_be_writable(config, monkeypatch):
    prepared(config)

    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    monkeypatch.setattr(cache, "locked", forbidden)
    prepared(config)


@pytest.mark.parametrize("texts", [[], ["", ""], ["short"]])
def test_too_little_text(tmp_path, texts):
    source = str(write(tmp_path / "few.jsonl", texts))
    assert "fewer than one row of 16" in message_of(
        make(tmp_path, source=source, validation=val(tmp_path))
    )
    assert "fewer than one row of 16" in message_of(make(tmp_path, validation=source))


def test_texts_that_are_cut_otherwise_are_another_corpus(tmp_path, monkeypatch):
    for name in "ab":
        text = "".join(f"note {name} {i}\n\n" for i in range(2000))
        (tmp_path / f"{name}.txt").write_text(text)
    config = make(tmp_path, source=str(tmp_path / "*.txt"))
    many = prepared(config)
    monkeypatch.setattr(sources, "_PIECES", 4)
    few = prepared(config)
    documents = [len(corpus.train.ends) + len(corpus.validation.ends) for corpus in (many, few)]
    assert documents[0] > 2 * documents[1]
    assert few.fingerprint != many.fingerprint


def test_too_little_held_out(config, tmp_path):
    message = message_of(make(tmp_path, validation_fraction=1e-6))
    assert "the validation text holds 0 tokens" in message
    held = re.search(r"\(0 of (\d+) documents are held out, each with a chance of 1e-06", message)
    assert held is not None
    assert int(held[1]) > 10
    assert "give more documents, raise data.validation_fraction, or name other text" in message
    assert "data.max_tokens" not in message
    assert "data.seq_len" not in message
    longer = len(prepared(config).validation.tokens) + 1
    message = message_of(make(tmp_path, seq_len=longer))
    assert "decides): lower data.seq_len, give more" in message
    message = message_of(make(tmp_path, validation_fraction=1e-6, max_tokens=300))
    assert "raise data.max_tokens" in message
    message = message_of(make(tmp_path, validation_fraction=0.999999))
    assert "training tokens" in message
    assert "lower data.validation_fraction" in message


def test_too_little_for_a_batch(config):
    corpus = prepared(config)
    corpus.require_batch(len(corpus.train))
    with pytest.raises(UserError, match="fewer than one batch of 10000"):
        corpus.require_batch(10_000)


def test_validation_that_is_trained_on(tmp_path):
    write(tmp_path / "copy.jsonl", DOCUMENTS)
    copy = str(tmp_path / "copy.jsonl")
    both = "is in data.validation and in data.source"
    assert f"{copy} {both}" in message_of(make(tmp_path, validation=copy))
    for name in ("notes.txt", "copy.md"):  # which are read alike
        (tmp_path / name).write_text("some text\n\n" * 50)
    same = make(tmp_path, source=str(tmp_path / "notes.txt"), validation=str(tmp_path / "copy.md"))
    assert f"{tmp_path / 'copy.md'} {both}" in message_of(same)


def test_bad_line_late_in_the_file_leaves_no_entry(tmp_path):
    source = write(tmp_path / "bad.jsonl", DOCUMENTS)
    with source.open("a") as stream:
        stream.write('{"title": "no text"}\n')
    message = message_of(make(tmp_path, source=str(source), tokenizer=bytes_tokenizer(tmp_path)))
    assert f"{source}:121: no field 'text'" in message
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_truncated_file_leaves_no_entry(tmp_path):
    write(tmp_path / "train.jsonl", DOCUMENTS)
    packed = lzma.compress((tmp_path / "train.jsonl").read_bytes())
    source = tmp_path / "cut.jsonl.xz"
    source.write_bytes(packed[:-30])
    assert "cut.jsonl.xz" in message_of(
        make(tmp_path, source=str(source), tokenizer=bytes_tokenizer(tmp_path))
    )
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_progress_only_if_asked_and_only_on_a_terminals_stderr(tmp_path, capfd, monkeypatch):
    def output(number: int, **options) -> tuple[str, str]:
        prepare(make(tmp_path, cache_dir=str(tmp_path / f"cache{number}")), **options)
        return tuple(capfd.readouterr())

    assert output(0, progress=True) == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    assert output(1, progress=False) == ("", "")
    out, shown = output(2, progress=True)
    assert out == ""
    assert "tokenising" in shown
