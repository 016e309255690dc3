import json
import logging
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from simreg.recipe import hub
from simreg.recipe import tokenizer as module
from simreg.recipe.data import prepare
from simreg.recipe.errors import UserError
from simreg.recipe.files import LocalFile
from simreg.recipe.tokenizer import (
    EOS,
    Encoder,
    as_trained,
    bounded,
    identity,
    load_tokenizer,
    train_bpe,
)
from simreg.recipe.train import train
from tests.recipe import tiny

TEXTS = ["def f(x):\n    return x + 1\n" * 3, "the cat and the other cat, and the hat " * 5]
BPE = train_bpe(TEXTS, 280)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    (ids,) = Encoder(BPE)([text])
    assert ids[-1] == BPE.eos_token_id
    assert BPE.decode(ids[:-1]) == text


def test_end_of_text_written_in_a_document_ends_nothing():
    (ids,) = Encoder(BPE)([f"a{EOS}b"])
    assert list(ids).count(BPE.eos_token_id) == 1
    assert BPE.decode(ids[:-1]) == f"a{EOS}b"


def test_size_and_compression():
    assert len(BPE) == 280
    assert BPE.eos_token == EOS
    assert BPE.eos_token_id == 279
    assert len(Encoder(BPE)([TEXTS[1]])[0]) < len(TEXTS[1]) / 2


def test_training_is_deterministic():
    assert identity(train_bpe(iter(TEXTS), 280)) == identity(BPE)
    assert identity(train_bpe(TEXTS, 279)) != identity(BPE)


def test_trained_once_and_loadable(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        return TEXTS

    first = load_tokenizer("bpe:280", texts, key="k", cache_dir=tmp_path)
    again = load_tokenizer("bpe:280", texts, key="k", cache_dir=tmp_path)
    assert len(calls) == 1
    assert identity(first) == identity(again) == identity(BPE)
    load_tokenizer("bpe:280", texts, key="other", cache_dir=tmp_path)
    load_tokenizer("bpe:270", texts, key="k", cache_dir=tmp_path)
    assert len(calls) == 3
    folder = tmp_path / "saved"
    first.save_pretrained(folder)
    loaded = load_tokenizer(str(folder), list, key="", cache_dir=tmp_path)
    assert identity(loaded) == identity(first)
    assert AutoTokenizer.from_pretrained(folder).eos_token == EOS


def test_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        small = load_tokenizer("bpe:4096", lambda: ["ab ab"], key="", cache_dir=tmp_path)
    assert 257 < len(small) < 300
    assert f"{len(small)} tokens, not 4096" in caplog.text


def test_training_reads_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 100)
    read = []

    def texts():
        for i in range(1000):
            read.append(i)
            yield "0123456789"

    load_tokenizer("bpe:280", texts, key="", cache_dir=tmp_path)
    assert len(read) == 10


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(1, 40))
def test_bounded_is_a_prefix(texts, limit):
    whole = "".join(texts).encode()
    got = "".join(bounded(texts, limit)).encode()
    assert whole.startswith(got)
    assert min(limit, len(whole)) - 3 <= len(got) <= limit


def test_ids_are_stored_as_small_as_they_fit():
    def encoder(size: int) -> Encoder:
        vocabulary = {f"w{i}": i for i in range(size)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1"))

    assert encoder(65536).dtype == np.uint16
    assert encoder(65537).dtype == np.uint32
    (ids,) = encoder(70_000)(["w69999"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [69_999, 1]


def test_ids_with_gaps_count_up_to_the_largest():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 999}, unk_token="a"))
    assert (
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")).vocab_size == 1000
    )


def test_padding_and_truncation_of_a_tokenizer_are_not_used():
    backend = Tokenizer.from_str(BPE.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    long, short = Encoder(tokenizer)(["xyz" * 30, "q"])
    assert tokenizer.decode(long[:-1]) == "xyz" * 30
    assert len(short) == 2
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4  # left as it was


def test_tokenizer_in_pure_python(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), list, key="", cache_dir=tmp_path)
    assert not tokenizer.is_fast
    (ids,) = Encoder(tokenizer)(["hi </s>"])
    assert ids.tolist() == [*(byte + 3 for byte in b"hi </s>"), tokenizer.eos_token_id]
    assert identity(tokenizer) == identity(
        load_tokenizer(str(tmp_path), list, key="", cache_dir=tmp_path)
    )
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    assert identity(load_tokenizer(str(moved), list, key="", cache_dir=tmp_path)) == identity(
        tokenizer
    )
    corpus = prepare(tiny.config(tmp_path, tiny.write_text(tmp_path), bytes_of(tmp_path)).data)
    assert corpus.tokenizer.decode(corpus.validation.tokens[:3].tolist())
    assert as_trained(tokenizer) is tokenizer


def bytes_of(folder):
    return {"data": {"tokenizer": str(folder)}}


def test_what_stands_around_a_text_is_not_exported_for_no_document_had_it(tmp_path):
    source = tiny.write_text(tmp_path)
    plain = train_bpe(LocalFile(source).read(), 300)
    assert as_trained(plain)("a river").input_ids == plain("a river").input_ids
    plain.add_special_tokens({"bos_token": "<s>"})
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.bos_token_id)]
    )
    assert as_trained(plain).bos_token is None
    assert plain("a river").input_ids[0] == plain.bos_token_id  # left as it was
    plain.save_pretrained(tmp_path / "own")
    changes = {"out": str(tmp_path / "run"), **bytes_of(tmp_path / "own")}
    train(tiny.config(tmp_path, source, changes), on_step=lambda record: None)
    found = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert found.get_vocab() == plain.get_vocab()
    assert (found.bos_token, found.eos_token) == (None, EOS)
    assert found("a river").input_ids == plain("a river", add_special_tokens=False).input_ids


def saved(folder, **special: str) -> str:
    backend = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1, "<s>": 2}, unk_token="a"))
    if "usual" in special:
        backend.add_special_tokens([special.pop("usual")])
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "eos"),
    [
        ({"usual": EOS, "sep_token": "[SEP]"}, EOS),
        ({"sep_token": "[SEP]", "bos_token": "<s>"}, "[SEP]"),
        ({"bos_token": "<s>"}, "<s>"),
    ],
)
def test_tokenizer_without_eos_gets_one(tmp_path, special, eos):
    spec = saved(tmp_path, **special)
    assert load_tokenizer(spec, list, key="", cache_dir=tmp_path).eos_token == eos


def test_unusable_tokenizers(tmp_path, monkeypatch):
    def message(spec: str) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(spec, list, key="", cache_dir=tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no eos, sep or bos" in message(saved(tmp_path / "bare"))
    for spec in (
        "bpe",
        "bpe4096",
        "bpe-4096",
        "bpe:256",
        "bpe:",
        "bpe:-5",
        "bpe:4k",
        f"bpe:{10**20}",
    ):
        assert "a whole number from 257" in message(spec)
    assert "there is no folder" in message(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "there is no tokenizer in" in message(str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer" in message(str(tmp_path / "empty"))

    def fail(name, **settings):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    assert "'owner/name'" in message("owner/name")
    assert "connect to the Hub" in message("owner/name")


def test_code_that_comes_with_a_model_or_tokenizer_is_neither_run_nor_offered(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    own = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": own}))
    own = {"AutoTokenizer": ["evil.T", None]}
    named = {"tokenizer_class": "T", "auto_map": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    for loads in (
        lambda: load_tokenizer(str(tmp_path), list, key="", cache_dir=tmp_path),
        lambda: hub.tokenizer(tmp_path),
        lambda: hub.load(tmp_path),
    ):
        with pytest.raises(
            UserError, match=r"cannot load the .*: it needs code of its own, which is never run"
        ):
            loads()
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_words_without_an_end_are_cut_for_training():
    """Training takes time with the square of the longest word."""
    word = "x" * 1023 + "a" + ("b" + "x" * 1022 + "a") * 50
    assert "ab" not in train_bpe([word], 300).get_vocab()
    for text, count in ((word, 51), (" " * 3000 + word[:1500], 4), ("a word " * 3000, 1), ("", 1)):
        parts = list(module._parts(text))
        assert "".join(parts) == text
        assert len(parts) == count


def test_another_end_of_documents_is_another_tokenizer():
    one, other = (train_bpe(["some text"], 300) for _ in range(2))
    assert identity(one) == identity(other)
    for each in (one, other):
        each.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert identity(one) == identity(other)
    other.eos_token = "<end>"
    assert other.eos_token_id != one.eos_token_id
    assert one.eos_token == EOS
    assert identity(one) != identity(other)
