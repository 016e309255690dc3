"""Tokenizers: a byte-level BPE trained on the corpus, or any from a local folder or the Hub."""

import copy
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from simreg.recipe import cache
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.folder import native_errors
from simreg.recipe.hub import told

EOS = "<|endoftext|>"
SAMPLE_BYTES = 16_000_000
_ENDLESS = re.compile(r"\S{1024}(?=\S)|\s{1024}(?=\s)")
_USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>")
_ENDINGS = {".json", ".model", ".spm", ".tiktoken"}  # of which a tokenizer has one, or vocab.txt
_SMALLEST = 257  # all bytes and the end-of-text token
_LARGEST = 2**24
_log = logging.getLogger(__name__)


def load_tokenizer(
    spec: str,
    texts: Callable[[], Iterable[str]],
    *,
    key: str,
    cache_dir: Path,
    confirm: Callable[[], None] = lambda: None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that `spec` names, with an eos token.

    `bpe:SIZE` trains on the first 16 MB of `texts()` once per `key` (the identity of the texts) and
    size; `confirm` raises afterwards if the texts are not these any more. A loaded tokenizer that
    names no eos token gets one: a special token of a usual name such as `<|endoftext|>`, else its
    sep or bos token.
    Raises UserError for what cannot be used.
    """
    mistaken = re.fullmatch(r"bpe(\W?\d+)?", spec) and not expanded(spec).exists()
    if not (spec.startswith("bpe:") or mistaken):
        return _with_eos(_load(spec), spec)
    size = _parse_size(spec)
    name = hashlib.blake2b(f"{key} {size} {SAMPLE_BYTES}".encode()).hexdigest()[:32]
    folder = cache_dir / "tokenizers" / name

    def build(target: Path) -> dict[str, Any]:
        trained = train_bpe(bounded(texts(), SAMPLE_BYTES), size)
        with native_errors(target):
            trained.save_pretrained(str(target))
        if len(trained) < size:
            _log.warning("the text gives a vocabulary of %d tokens, not %d", len(trained), size)
        return {"vocabulary": len(trained)}

    cache.entry(folder, build, confirm=confirm)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return tokenizer


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE of at most `size` tokens, the last of them `<|endoftext|>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _parts(text: str) -> Iterator[str]:
    """The text, cut where a word goes on and on (DNA, base64): training is quadratic in words."""
    start = 0
    for run in _ENDLESS.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def bounded(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until `limit` bytes have been passed on; the last one is cut."""
    left = limit
    for text in texts:
        data = text.encode()[:left]
        yield data.decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return


class Encoder:
    """Turns documents into ids, each ended by eos; special tokens in the text are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos: int = tokenizer.eos_token_id
        self.vocab_size = max(max(tokenizer.get_vocab().values()) + 1, len(tokenizer))
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._slow = None if tokenizer.is_fast else tokenizer
        if tokenizer.is_fast:
            # a copy, since padding, truncation and special tokens are state of the backend
            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_padding()
            self._fast.no_truncation()
            self._fast.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """One array of `dtype` per text."""
        if self._slow is not None:
            ids = self._slow(
                texts, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
        else:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
        return [np.array([*document, self.eos], dtype=self.dtype) for document in ids]


def as_trained(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer to go with a trained model: it puts nothing around a text, as in training.

    Many put a begin token before it, which no document had. Tokenizers in pure Python are left.
    """
    around = tokenizer.num_special_tokens_to_add()
    if not tokenizer.is_fast or not (around or tokenizer.bos_token_id is not None):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if around:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        tokenizer.bos_token = None
    return tokenizer


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides the ids of a text."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        rest = repr(tokenizer).replace(repr(tokenizer.name_or_path), "")  # wherever it lies
        content = f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())} {rest}"
    return hashlib.blake2b(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()[:32]


def _parse_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or not _SMALLEST <= int(size) <= _LARGEST:
        raise UserError(
            f"data.tokenizer {spec!r}: the size must be a whole number from {_SMALLEST} "
            f"(256 bytes and the end-of-text token) to {_LARGEST}, as in bpe:4096"
        )
    return int(size)


def _load(spec: str) -> PreTrainedTokenizerBase:
    path = expanded(spec)
    if spec.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"data.tokenizer: there is no folder {path}")
    if path.is_dir() and not any(
        file.suffix in _ENDINGS or file.name == "vocab.txt" for file in path.iterdir()
    ):
        raise UserError(f"data.tokenizer: there is no tokenizer in {path} (tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(
            str(path) if path.exists() else spec, trust_remote_code=False
        )
    except Exception as error:  # many kinds: unknown id, no network, missing or broken files
        raise UserError(
            f"cannot load the tokenizer {spec!r} (give bpe:SIZE, a folder with a tokenizer, or a "
            f"Hub id): {told(error)}"
        ) from None


def _with_eos(tokenizer: PreTrainedTokenizerBase, spec: str) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token_id is None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        usual = next((name for name in _USUAL_EOS if name in special), None)
        tokenizer.eos_token = usual or tokenizer.sep_token or tokenizer.bos_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {spec!r} has no eos, sep or bos token to end documents with; "
            "add one to it or use another"
        )
    return tokenizer
