"""Small corpora that the tests of the data share."""

import json
from pathlib import Path

import pytest

from simreg.recipe import data
from simreg.recipe.config import DataConfig
from simreg.recipe.data import Rows, prepare
from simreg.recipe.errors import UserError
from simreg.recipe.tokenizer import EOS

DOCUMENTS = [f"Document {i}: the number {i * i} é\n" * (1 + i % 7) for i in range(120)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


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


def val(folder: Path) -> str:
    return str(write(folder / "val.jsonl", ["validation text " * 5, "more of it " * 9]))


def bytes_tokenizer(folder: Path) -> str:
    """A folder with a tokenizer, so that nothing is trained."""
    from simreg.recipe.tokenizer import train_bpe

    train_bpe(["the self.return import def"] * 2, 270).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def message_of(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        prepared(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)
