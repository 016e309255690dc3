"""Text to rows: content, packing, split, order."""

import gzip
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simreg.recipe import data
from simreg.recipe.data import Ordered, Rows
from simreg.recipe.errors import UserError
from tests.recipe.corpora import (
    DOCUMENTS,
    bytes_tokenizer,
    make,
    prepared,
    text_of,
    val,
    write,
)

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


@given(documents, st.integers(2, 20))
@settings(max_examples=60)
def test_packing_equals_brute_force(contents, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "train"
        with data._Writer(stem) as writer:
            for ids in contents:
                writer.add(np.array([*ids, 0], dtype=np.uint32))
        rows = Rows(stem, "uint32", seq_len)
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


def test_given_validation_holds_nothing_out(tmp_path):
    corpus = prepared(make(tmp_path, validation=val(tmp_path)))
    assert text_of(corpus, corpus.train) == DOCUMENTS
    assert text_of(corpus, corpus.validation) == ["validation text " * 5, "more of it " * 9]


def test_training_text_that_is_validated_on_is_left_out(tmp_path, monkeypatch, capfd):
    seen = []
    load = data.load_tokenizer
    monkeypatch.setattr(
        data, "load_tokenizer", lambda s, texts, **o: (seen.extend(texts()), load(s, texts, **o))[1]
    )
    packed = tmp_path / "val.jsonl.gz"  # another file, so only its content gives it away
    with gzip.open(packed, "wt") as file:
        file.writelines(json.dumps({"text": f"{text}\n"}) + "\n" for text in DOCUMENTS[::10])
    corpus = prepared(make(tmp_path, validation=str(packed)))
    rest = [text for i, text in enumerate(DOCUMENTS) if i % 10]
    assert text_of(corpus, corpus.train) == seen == rest
    assert text_of(corpus, corpus.validation) == [f"{text}\n" for text in DOCUMENTS[::10]]
    dropped = len(DOCUMENTS[::10])
    assert f"warning: {dropped} documents of the training text stand in" in capfd.readouterr().err


def test_a_file_of_text_that_is_validated_on_is_left_out_whole(tmp_path):
    """It is cut into documents only where it is the one text there is to hold some of them out."""
    long = "".join(f"paragraph {i} of a document\n\n" for i in range(400))
    (tmp_path / "val.txt").write_text(long)
    source = str(write(tmp_path / "some.jsonl", [*DOCUMENTS[:50], long]))
    corpus = prepared(make(tmp_path, source=source, validation=str(tmp_path / "val.txt")))
    assert text_of(corpus, corpus.validation) == [long]
    assert text_of(corpus, corpus.train) == DOCUMENTS[:50]
    copy = str(write(tmp_path / "copy.jsonl", [long]))
    with pytest.raises(UserError, match="holds 0 training tokens"):
        prepared(make(tmp_path, source=str(tmp_path / "val.txt"), validation=copy))
    alone = prepared(make(tmp_path, source=str(tmp_path / "val.txt"), validation_fraction=0.5))
    assert len(alone.train.ends) + len(alone.validation.ends) > 5


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


# ---- order


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 60))
@settings(max_examples=50)
def test_order(size, seed, count, more):
    rows = list(range(size))
    order = Ordered(rows, seed, count)
    got = [order[i] for i in range(len(order))]
    longer = Ordered(rows, seed, count + more)
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
    order = list(map(Ordered(rows, 7, 100).index, range(100)))
    assert order[:50] != order[50:]
    assert order[:50] != list(map(Ordered(rows, 8, 50).index, range(50)))
    assert order[:50] != rows


def test_order_is_the_same_everywhere():
    """Literal values: whatever version of numpy runs this."""
    order = Ordered(range(8), 3, 12)
    assert list(map(order.index, range(12))) == [0, 4, 7, 1, 5, 6, 3, 2, 0, 6, 2, 1]


def test_ordered_rows_are_rows(config):
    rows = prepared(config).train
    order = Ordered(rows, 0, 5)
    assert order[2]["input_ids"].equal(rows[order.index(2)]["input_ids"])


def test_the_digest_knows_where_documents_end(tmp_path):
    digests = set()
    for name, documents in (("a", [[1, 2], [3]]), ("b", [[1], [2, 3]])):
        with data._Writer(tmp_path / name) as writer:
            for ids in documents:
                writer.add(np.array(ids, dtype=np.uint16))
        digests.add(writer.digest.hexdigest())
    assert len(digests) == 2
