"""Text to rows of tokens: tokenised once into a memory-mapped cache, then packed and ordered."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from simreg.recipe import cache
from simreg.recipe.config import DataConfig
from simreg.recipe.errors import UserError
from simreg.recipe.files import DOCUMENT, LocalFile, expanded
from simreg.recipe.processes import warn
from simreg.recipe.sources import Source, in_pieces, interleave, resolve, shared
from simreg.recipe.tokenizer import Encoder, identity, load_tokenizer

_DTYPES = ("uint16", "uint32")
_LAYOUT = 4  # of the cache; a new number makes old entries invisible
_BATCH_BYTES = 1 << 20


class Rows(Dataset[dict[str, Tensor]]):
    """Documents, each ended by eos, concatenated and cut into rows of `seq_len` tokens.

    Row i is a dict of int64 tensors [seq_len]: `input_ids`, `labels` (the same, unshifted) and
    `segments` (0 for the row's first document, 1 for the next, ...). The last, partial row is
    dropped. Reads from the disk as needed and may be sent to other processes.
    """

    def __init__(self, stem: Path, dtype: str, seq_len: int) -> None:
        if dtype not in _DTYPES:  # others can be had to read files as pointers
            raise UserError(f"{stem.parent} is damaged (tokens of dtype {dtype!r}): delete it")
        self._stem = stem
        self._dtype = np.dtype(dtype)
        self.seq_len = seq_len
        self._open()

    def _open(self) -> None:
        # an empty file cannot be mapped
        self.tokens = _mapped(self._stem.with_suffix(".tokens"), self._dtype)
        self.ends = _mapped(self._stem.with_suffix(".ends"), np.dtype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {"_stem": self._stem, "_dtype": self._dtype, "seq_len": self.seq_len}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index % len(self) * self.seq_len
        stop = start + self.seq_len
        ids = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
        # a document's end is the position after its eos
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        segments = np.searchsorted(self.ends[first:last], np.arange(start, stop), side="right")
        return {"input_ids": ids, "labels": ids.clone(), "segments": torch.from_numpy(segments)}


class Ordered(Dataset[dict[str, Tensor]]):
    """Exactly `count` rows: all rows in the random order of epoch 0, then of epoch 1, and so on.

    The order follows from `seed`: a longer run begins with the rows of a shorter one.
    """

    def __init__(self, rows: Rows, seed: int, count: int) -> None:
        self.rows = rows
        self.seed = seed
        self.count = count
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def epochs(self) -> float:
        """How many times the rows are gone through."""
        return self.count / len(self.rows)

    def __len__(self) -> int:
        return self.count

    def index(self, position: int) -> int:
        """The row at a position of the order."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of {self.count}")
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            # sorting raw bits: numpy promises the stream of PCG64, not that of `permutation`
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            self._order = np.argsort(bits.random_raw(len(self.rows)), kind="stable")
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.rows[self.index(position)]


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready to train on."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    validation: Rows
    vocab_size: int
    """What a model must hold: the largest id plus one."""
    fingerprint: str
    """Hash of all tokens, document ends, the tokenizer and the row length."""

    @property
    def tokens(self) -> int:
        """Training tokens in the cache."""
        return len(self.train.tokens)

    def require_batch(self, batch_rows: int) -> None:
        """Raise UserError if the training rows do not fill one batch."""
        if len(self.train) < batch_rows:
            raise UserError(
                f"the training text fills {len(self.train)} rows of {self.train.seq_len} tokens, "
                f"fewer than one batch of {batch_rows}: give more text, or lower "
                "train.batch_rows or data.seq_len"
            )


def prepare(config: DataConfig, *, seed_of_split: int = 0, progress: bool = True) -> Corpus:
    """Tokenise what `config` names, or reuse the cache; UserError if the text cannot be used.

    Documents are held out for validation by a hash of their content and `seed_of_split`, so copies
    of a document fall on the same side. If `config.validation` names other text instead, training
    documents that stand in it too are left out.
    """
    cache_dir = expanded(config.cache_dir)
    source = resolve(config.source, config.text_field)
    if config.validation is None:
        source = in_pieces(source)
    validation: list[Source] | None = None
    if config.validation is not None:
        validation = resolve(
            config.validation, config.text_field, split="validation", setting="data.validation"
        )
        keys = {s.key for s in source}
        both = next((s for s in validation if s.key in keys), None) or shared(validation, source)
        if both is not None:
            raise UserError(
                f"{both.title} is in data.validation and in data.source, so the loss would be "
                "wrong: move it out of the one or the other"
            )
    held_out = (
        _held_out(config.validation_fraction, seed_of_split)
        if validation is None
        else _copies(validation)
    )
    text_key = {
        "layout": _LAYOUT,
        "source": [s.key for s in source],
        "field": config.text_field,
        "held_out": [config.validation_fraction, seed_of_split]
        if validation is None
        else [s.key for s in validation],
    }
    cut = {s.piece for s in source if isinstance(s, LocalFile)} - {DOCUMENT}
    if cut and len(source) > 1:  # of a single file it follows from the key
        text_key["cut"] = sorted(cut)

    def training_texts() -> Iterator[str]:
        return (text for text in interleave(source) if not held_out(text))

    def confirm() -> None:  # the cache would give the tokens for the text that the key is of
        for file in (*source, *(validation or ())):
            if isinstance(file, LocalFile):
                file.require_unchanged()

    with _Progress(progress) as bar:
        bar.say("tokenizer")
        tokenizer = load_tokenizer(
            config.tokenizer,
            training_texts,
            key=cache.name(text_key),
            cache_dir=cache_dir,
            confirm=confirm,
        )
        key = cache.name(
            text_key
            | {
                "tokenizer": identity(tokenizer),
                "max_tokens": config.max_tokens,
            }
        )
        folder = cache_dir / "tokens" / key
        writer = _Builder(Encoder(tokenizer), source, validation, held_out, config.max_tokens, bar)
        facts = cache.entry(folder, writer, confirm=confirm)
    return _corpus(config, folder, facts, tokenizer)


def _corpus(
    config: DataConfig, folder: Path, facts: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    train = Rows(folder / "train", facts["dtype"], config.seq_len)
    validation = Rows(folder / "validation", facts["dtype"], config.seq_len)
    if not len(train):
        few = f"{len(train.tokens)} training tokens, fewer than one row of {config.seq_len}"
        held = ""
        if config.validation is None and len(validation.ends):
            held = f", or lower data.validation_fraction ({_by_chance(validation, train, config)})"
        raise UserError(f"data.source holds {few}: give more text, or lower data.seq_len{held}")
    if not len(validation):
        ways = ["lower data.seq_len"] if len(validation.tokens) else []
        held = ""
        if config.validation is None:
            held = f" ({_by_chance(validation, train, config)})"
            ways += ["give more documents", "raise data.validation_fraction"]
        if config.max_tokens is not None:
            ways.append("raise data.max_tokens")
        ways.append("or name other text as data.validation")
        raise UserError(
            f"the validation text holds {len(validation.tokens)} tokens, fewer than one row of "
            f"{config.seq_len}{held}: {', '.join(ways)}"
        )
    fingerprint = cache.name([facts, identity(tokenizer), config.seq_len])
    return Corpus(tokenizer, train, validation, facts["vocab_size"], fingerprint)


def _by_chance(validation: Rows, train: Rows, config: DataConfig) -> str:
    """How many documents are held out, and why."""
    total = len(validation.ends) + len(train.ends)
    return (
        f"{len(validation.ends)} of {total} documents are held out, each with a chance of "
        f"{config.validation_fraction:.3g} that a hash of its text decides"
    )


class _Builder:
    """Writes the token files of a corpus into a folder; see `cache.entry`."""

    def __init__(
        self,
        encoder: Encoder,
        source: list[Source],
        validation: list[Source] | None,
        held_out: Callable[[str], bool],
        max_tokens: int | None,
        bar: "_Progress",
    ) -> None:
        self.encoder = encoder
        self.source = source
        self.validation = validation
        self.held_out = held_out
        self.max_tokens = max_tokens or float("inf")
        self.bar = bar

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.bar.say("tokenising")
        with _Writer(folder / "train") as train, _Writer(folder / "validation") as validation:
            total = sum(source.weight for source in self.source)
            taken = copies = 0
            for text, ids in self._encoded(interleave(self.source)):
                if not self.held_out(text):
                    train.add(ids)
                elif self.validation is None:
                    validation.add(ids)
                else:
                    copies += 1
                taken += len(text.encode())
                self.bar.at(max(taken / max(total, 1), train.size / self.max_tokens))
                if train.size >= self.max_tokens:
                    break
            for _, ids in self._encoded(interleave(self.validation or [])):
                validation.add(ids)
        if copies:
            warn(f"{copies} documents of the training text stand in the validation text: left out")
        return {
            "dtype": self.encoder.dtype.name,
            "vocab_size": self.encoder.vocab_size,
            "train": train.digest.hexdigest()[:32],
            "validation": validation.digest.hexdigest()[:32],
        }

    def _encoded(self, texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_BYTES:
                yield from zip(batch, self.encoder(batch), strict=True)
                batch, size = [], 0
        if batch:  # some tokenizers refuse none
            yield from zip(batch, self.encoder(batch), strict=True)


class _Writer:
    """Appends documents to STEM.tokens and their end offsets to STEM.ends (int64)."""

    def __init__(self, stem: Path) -> None:
        self.tokens: BinaryIO = open(stem.with_suffix(".tokens"), "wb")  # noqa: SIM115
        self.ends: BinaryIO = open(stem.with_suffix(".ends"), "wb")  # noqa: SIM115
        self.size = 0
        self.digest = hashlib.blake2b()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.tokens.close()
        self.ends.close()

    def add(self, ids: np.ndarray) -> None:
        self.size += len(ids)
        end = np.int64(self.size).tobytes()
        self.tokens.write(ids.tobytes())
        self.ends.write(end)
        self.digest.update(ids.tobytes() + end)


class _Progress:
    """A bar on the standard error, if asked for and if that is a terminal."""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        shown = shown and console.is_terminal
        self._bar = Progress(console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """Name the work that begins."""
        self._bar.update(self._task, description=what, total=None, completed=0)

    def at(self, fraction: float) -> None:
        """Show how far it is."""
        self._bar.update(self._task, total=1.0, completed=min(fraction, 1.0))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _held_out(fraction: float, seed: int) -> Callable[[str], bool]:
    """Whether a document is for validation, by a hash of its content."""
    limit = int(fraction * 2**64)
    salt = seed.to_bytes(16, "little", signed=True)

    def decide(text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
        return int.from_bytes(digest, "little") < limit

    return decide


def _copies(validation: list[Source]) -> Callable[[str], bool]:
    """Whether a document is also one of the validation text, which is read when first asked.

    White space around it does not count.
    """

    def content(text: str) -> bytes:
        return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()

    known = functools.cache(lambda: frozenset(map(content, interleave(validation))))
    return lambda text: content(text) in known()
