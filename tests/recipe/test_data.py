import gzip
import hashlib
import json
import logging
import lzma
import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simreg.recipe import cache, data
from simreg.recipe.config import DataConfig
from simreg.recipe.data import Rows, ordered, prepare
from simreg.recipe.errors import UserError
from simreg.recipe.tokenizer import EOS, Encoder

FORK = multiprocessing.get_context("fork")
DOCUMENTS = [f"Document {i}: the number {i * i} é\n" * (1 + i % 7) for i in range(120)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return make(tmp_path)


def make(folder: Path, **changes) -> DataConfig:
    source = folder / "train.jsonl"
    if not source.exists():
        write(source, DOCUMENTS)
    defaults = {
        "source": str(source),
        "validation_fraction": 0.2,
        "tokenizer": "bpe:280",
        "seq_len": 16,
        "cache_dir": str(folder / "cache"),
    }
    return DataConfig(**(defaults | changes))


def prepared(config: DataConfig, **options) -> data.Corpus:
    return prepare(config, progress=False, **options)


def text_of(corpus: data.Corpus, rows: Rows) -> list[str]:
    """The documents of some rows, from all their tokens."""
    text = corpus.tokenizer.decode(rows.tokens, clean_up_tokenization_spaces=False)
    assert text == "" or text.endswith(EOS)
    return text.split(EOS)[:-1]


# ---- content


def test_rows_hold_the_documents_joined_by_eos(config):
    corpus = prepared(config)
    train, validation = text_of(corpus, corpus.train), text_of(corpus, corpus.validation)
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert [d for d in DOCUMENTS if d in set(train)] == train  # the order of the file
    assert 8 <= len(validation) <= 40
    assert corpus.tokens == len(corpus.train.tokens)
    assert corpus.vocab_size == len(corpus.tokenizer) == 280
    for rows in (corpus.train, corpus.validation):
        assert len(rows) == len(rows.tokens) // 16 > 0
        joined = torch.cat([rows[i]["input_ids"] for i in range(len(rows))])
        assert joined.tolist() == rows.tokens[: len(rows) * 16].tolist()
        assert rows.tokens.dtype == np.uint16


documents = st.lists(st.lists(st.integers(0, 70_000), max_size=9), min_size=1, max_size=30)


@given(documents, st.integers(2, 20), st.sampled_from(["uint32", "int64"]))
@settings(max_examples=60)
def test_packing_equals_brute_force(contents, seq_len, dtype):
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "train"
        with data._Writer(stem) as writer:
            for ids in contents:
                writer.add(np.array([*ids, 0], dtype=dtype))
        rows = Rows(stem, dtype, seq_len)
        flat = [(token, n) for n, ids in enumerate(contents) for token in [*ids, 0]]
        assert len(rows) == len(flat) // seq_len
        for i in range(len(rows)):
            row = flat[i * seq_len : (i + 1) * seq_len]
            assert {value.dtype for value in rows[i].values()} == {torch.int64}
            assert rows[i]["input_ids"].tolist() == [token for token, _ in row]
            assert rows[i]["labels"].tolist() == [token for token, _ in row]
            assert rows[i]["segments"].tolist() == [n - row[0][1] for _, n in row]
        with pytest.raises(IndexError):
            rows[len(rows)]


def test_items_are_independent_of_each_other_and_of_the_cache(config):
    rows = prepared(config).train
    first = rows[0]
    first["input_ids"][:] = -1
    assert first["labels"].min() >= 0
    assert rows[0]["input_ids"].min() >= 0
    assert rows[-1]["input_ids"].equal(rows[len(rows) - 1]["input_ids"])


def test_rows_travel_to_other_processes_as_paths(config):
    rows = prepared(config).train
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert all(again[3][name].equal(rows[3][name]) for name in rows[3])


def test_max_tokens_keeps_a_prefix_and_rounds_up_to_a_document(config, tmp_path):
    whole = prepared(config)
    ends = whole.train.ends
    for limit in (1, int(ends[5]), int(ends[5]) + 1):
        part = prepared(make(tmp_path, max_tokens=limit, seq_len=2, validation=val(tmp_path)))
        full = prepared(make(tmp_path, seq_len=2, validation=val(tmp_path)))
        expected = full.train.ends[np.searchsorted(full.train.ends, limit)]
        assert part.tokens == expected
        assert part.train.tokens.tolist() == full.train.tokens[:expected].tolist()
        assert part.train.ends[-1] == expected


def val(folder: Path) -> str:
    return str(write(folder / "val.jsonl", ["validation text " * 5, "more of it " * 9]))


def test_given_validation_holds_nothing_out(tmp_path):
    corpus = prepared(make(tmp_path, validation=val(tmp_path)))
    assert text_of(corpus, corpus.train) == DOCUMENTS
    assert text_of(corpus, corpus.validation) == ["validation text " * 5, "more of it " * 9]


def test_training_text_that_is_validated_on_is_left_out(tmp_path, monkeypatch):
    seen = []
    load = data.load_tokenizer
    monkeypatch.setattr(
        data, "load_tokenizer", lambda s, texts, **o: (seen.extend(texts()), load(s, texts, **o))[1]
    )
    packed = tmp_path / "val.jsonl.gz"  # another file, so only its content gives it away
    with gzip.open(packed, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[::10])
    corpus = prepared(make(tmp_path, validation=str(packed)))
    rest = [text for i, text in enumerate(DOCUMENTS) if i % 10]
    assert text_of(corpus, corpus.train) == seen == rest
    assert text_of(corpus, corpus.validation) == DOCUMENTS[::10]


def test_split_goes_by_content_and_seed(tmp_path):
    def held_out(texts: list[str], seed: int = 0) -> set[str]:
        config = make(tmp_path, source=str(write(tmp_path / "some.jsonl", texts)))
        corpus = prepared(config, seed_of_split=seed)
        inside = set(text_of(corpus, corpus.validation))
        assert not inside & set(text_of(corpus, corpus.train))
        return inside

    base = held_out(DOCUMENTS)
    assert held_out(DOCUMENTS[::-1]) == base
    assert held_out(DOCUMENTS * 2) == base  # copies stay on one side
    assert held_out(DOCUMENTS[:60]) == base & set(DOCUMENTS[:60])
    assert held_out(DOCUMENTS, seed=1) != base


def test_tokenizer_sees_no_validation_text(config, monkeypatch):
    seen = []
    load = data.load_tokenizer

    def spy(spec, texts, **options):
        seen.extend(texts())
        return load(spec, texts, **options)

    monkeypatch.setattr(data, "load_tokenizer", spy)
    corpus = prepared(config)
    assert seen == text_of(corpus, corpus.train)


def test_slices_of_the_encoder_do_not_matter(config, tmp_path, monkeypatch):
    whole = prepared(config)
    monkeypatch.setattr(data, "_BATCH_BYTES", 100)
    again = prepared(make(tmp_path, cache_dir=str(tmp_path / "other")))
    assert again.fingerprint == whole.fingerprint


def test_python_stdlib(tmp_path):
    tokenizer = bytes_tokenizer(tmp_path)
    given = {"source": "python-stdlib", "max_tokens": 20_000, "tokenizer": tokenizer}
    corpus = prepared(make(tmp_path, validation=val(tmp_path), **given))
    assert corpus.tokens >= 20_000
    assert "import" in corpus.tokenizer.decode(corpus.train.tokens)


def bytes_tokenizer(folder: Path) -> str:
    """A folder with a tokenizer, so that nothing is trained."""
    from simreg.recipe.tokenizer import train_bpe

    train_bpe(["the self.return import def"] * 2, 270).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


# ---- order


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 60))
@settings(max_examples=50)
def test_order(size, seed, count, more):
    rows = list(range(size))
    order = ordered(rows, seed, count)
    got = [order[i] for i in range(len(order))]
    longer = ordered(rows, seed, count + more)
    assert [longer[i] for i in range(count)] == got
    for epoch in range(0, count - count % size, size):
        assert sorted(got[epoch : epoch + size]) == rows
    assert order.epochs == count / size
    for position in reversed(range(count)):  # any order of access
        assert order[position] == got[position]
    with pytest.raises(IndexError):
        order[count]


def test_order_depends_on_seed_and_epoch():
    rows = list(range(50))
    order = list(map(ordered(rows, 7, 100).index, range(100)))
    assert order[:50] != order[50:]
    assert order[:50] != list(map(ordered(rows, 8, 50).index, range(50)))
    assert order[:50] != rows


def test_order_is_the_same_everywhere():
    """Literal values: whatever version of numpy runs this."""
    order = ordered(range(8), 3, 12)
    assert list(map(order.index, range(12))) == [0, 4, 7, 1, 5, 6, 3, 2, 0, 6, 2, 1]


def test_ordered_rows_are_rows(config):
    rows = prepared(config).train
    order = ordered(rows, 0, 5)
    assert order[2]["input_ids"].equal(rows[order.index(2)]["input_ids"])


# ---- cache


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


# ---- bad input


def message_of(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        prepared(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    monkeypatch.setattr(cache, "_locked", forbidden)
    prepared(config)


@pytest.mark.parametrize("texts", [[], ["", ""], ["short"]])
def test_too_little_text(tmp_path, texts):
    source = str(write(tmp_path / "few.jsonl", texts))
    assert "fewer than one row of 16" in message_of(
        make(tmp_path, source=source, validation=val(tmp_path))
    )
    assert "fewer than one row of 16" in message_of(make(tmp_path, validation=source))


def test_too_little_held_out(tmp_path):
    message = message_of(make(tmp_path, validation_fraction=1e-6))
    assert "the validation text holds 0 tokens" in message
    assert "data.validation_fraction" in message


def test_too_little_for_a_batch(config):
    corpus = prepared(config)
    corpus.require_batch(len(corpus.train))
    with pytest.raises(UserError, match="fewer than one batch of 10000"):
        corpus.require_batch(10_000)


def test_validation_that_is_trained_on(tmp_path):
    write(tmp_path / "copy.jsonl", DOCUMENTS)
    assert "share a file" in message_of(make(tmp_path, validation=str(tmp_path / "copy.jsonl")))


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
