"""Local files as streams of documents: .txt, .jsonl and .parquet, each also .gz, .xz or .zst."""

import codecs
import hashlib
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from simreg.recipe.errors import UserError

TEXT = (".txt", ".md")
FORMATS = (*TEXT, ".jsonl", ".parquet")
DECODERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}
_UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_BLOCK = 1 << 14  # small, since a block of zeros may expand a thousandfold
_PROBE = 1 << 22
DOCUMENT = 1 << 16
"""Characters of a text file after which it is cut at the next blank line."""


@dataclass(frozen=True)
class LocalFile:
    """A file of documents; text is cut after `piece` characters, unless it is to stay `whole`."""

    path: Path
    field: str = "text"
    whole: bool = False
    piece: int = DOCUMENT

    def __post_init__(self) -> None:
        if self.format not in FORMATS and not self.whole:
            raise UserError(
                f"cannot tell the format of {self.path}: its name must end in one of "
                f"{', '.join(FORMATS)} (JSON lines: .jsonl), optionally followed by one of "
                f"{', '.join(DECODERS)}"
            )

    @property
    def title(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def compression(self) -> str | None:
        """The last suffix if it is a known compression."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in DECODERS else None

    @property
    def format(self) -> str:
        """The suffix that names the format, without the compression."""
        return Path(self.path.stem if self.compression else self.path.name).suffix.lower()

    @property
    def is_text(self) -> bool:
        """Whether it is running text, which may be cut."""
        return self.format in TEXT and not self.whole

    @property
    def key(self) -> str:
        """Identity by content (and format), wherever the file lies and whatever its name."""
        return self._seen[0]

    @cached_property
    def _seen(self) -> tuple[str, tuple[int, ...]]:
        """The hash, and what changes with the file, from before it was read."""
        digest = hashlib.blake2b(f"{self.format}{self.compression}{self.whole}".encode())
        try:
            with open(self.path, "rb") as raw:
                stamp = _stamp(os.fstat(raw.fileno()))
                while block := raw.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        return digest.hexdigest()[:32], stamp

    def require_unchanged(self) -> None:
        """UserError if the file is another one than when `key` was asked for."""
        try:
            same = _stamp(self.path.stat()) == self._seen[1]
        except OSError:
            same = False
        if not same:
            raise UserError(f"{self.path} changed while it was read: try again when it is complete")

    @cached_property
    def weight(self) -> int:
        """Estimated bytes of text (uncompressed): the file's share of the mixture."""
        if self.format == ".parquet":
            with self._parquet() as table:
                self._require_column(table)
                return _column_bytes(table.metadata, self.field)
        size = self._uncompressed()
        return size * self._eighths_of_text() // 8 if self.format == ".jsonl" else size

    def _uncompressed(self) -> int:
        """Bytes, estimated if it is compressed."""
        size = self.path.stat().st_size
        if self.compression is None:
            return size
        given = 0
        with _explained(self.path), open(self.path, "rb") as raw:
            text = _Decompressed(raw, DECODERS[self.compression])
            while given < _PROBE and (piece := text.piece()):
                given += len(piece)
            taken = text.taken
        return size * given // max(taken, 1)

    def _eighths_of_text(self) -> int:
        """How much of a .jsonl file is text, not other fields or escapes, by how it begins.

        In eighths, lest an estimate sets the files of one dataset apart.
        """
        text = total = 0
        for where, line, record in self._records():
            text += len(text_of(record, self.field, where).encode())
            total += len(line)
            if total >= _PROBE:
                break
        return max(1, round(8 * text / max(1, total)))

    def read(self) -> Iterator[str]:
        """Its documents in order; UserError with the place of whatever is wrong."""
        if self.format == ".parquet":
            return self._read_parquet()
        return self._read_json() if self.format == ".jsonl" else self._read_text()

    def _read_text(self) -> Iterator[str]:
        """One document, or several of one to two times `piece` characters, cut at blank lines."""
        with _explained(self.path), self._open() as stream:
            pending = ""
            for piece in _decoded(stream, self.path):
                pending += piece
                while len(pending) >= 2 * self.piece and not self.whole:
                    cut = _cut(pending, self.piece)
                    yield pending[:cut]
                    pending = pending[cut:]
            yield pending

    def _read_json(self) -> Iterator[str]:
        for where, _, record in self._records():
            yield text_of(record, self.field, where)

    def records(self) -> Iterator[dict[str, Any]]:
        """The objects of a .jsonl file in order; UserError with the place of whatever is wrong."""
        for where, _, record in self._records():
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object, not {type(record).__name__}")
            yield record

    def _records(self) -> Iterator[tuple[str, bytes, Any]]:
        """Each line's place, the line and its value."""
        with _explained(self.path), self._open() as stream:
            for number, line in enumerate(stream, 1):
                where = f"{self.path}:{number}"
                if line.isspace():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{where}: invalid UTF-8 at byte {error.start} of the line; "
                        "convert the file to UTF-8"
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not a JSON object on one line ({error})") from None
                yield where, line, record

    def _read_parquet(self) -> Iterator[str]:
        number = 0
        with self._parquet() as table:
            self._require_column(table)
            for batch in table.iter_batches(batch_size=64, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield text_of({self.field: text}, self.field, f"{self.path}, row {number}")

    def _require_column(self, table: Any) -> None:
        names: list[str] = table.schema_arrow.names
        if self.field not in names:
            raise UserError(_no_field(self.field, str(self.path), names))

    @contextmanager
    def _parquet(self) -> Iterator[Any]:
        """The opened table; a compressed file is unpacked first, since parquet needs seeking."""
        import pyarrow
        import pyarrow.parquet

        with _explained(self.path), tempfile.TemporaryFile() as unpacked, self._open() as stream:
            if self.compression:
                shutil.copyfileobj(stream, unpacked, 1 << 20)
                unpacked.seek(0)
            try:
                yield pyarrow.parquet.ParquetFile(unpacked if self.compression else stream)
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise UserError(
                    f"{self.path} is not a whole parquet file: {one_line(error)}"
                ) from None

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with open(self.path, "rb") as raw:
            if self.compression is None:
                yield raw
            else:
                yield io.BufferedReader(_Decompressed(raw, DECODERS[self.compression]), 1 << 18)


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file of one or more members; EOFError if the last one is cut off.

    The libraries' own readers differ here: zstandard's ends silently on a truncated file.
    """

    def __init__(self, raw: BinaryIO, make_decoder: Callable[[], Any]) -> None:
        self._raw = raw
        self._make_decoder = make_decoder
        self._decoder = make_decoder()
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    @property
    def taken(self) -> int:
        """Bytes of the file that have been decompressed."""
        return self._raw.tell() - len(self._input)

    def piece(self) -> bytes:
        """The next bytes, as many as come of one block; none at the end."""
        while True:
            data = self._input or self._raw.read(_BLOCK)
            self._input = b""
            if not data:
                if self._decoder is not None:
                    raise EOFError("it ends in the middle of the compressed data")
                return b""
            if self._decoder is None:
                data = data.lstrip(b"\0")  # padding between members
                if not data:
                    continue
                self._decoder = self._make_decoder()
            output: bytes = self._decoder.decompress(data)
            if self._decoder.eof:
                self._input = self._decoder.unused_data
                self._decoder = None
            if output:
                return output

    def readinto(self, buffer: Any) -> int:
        if not self._output:
            self._output = memoryview(self.piece())
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def text_of(record: Any, field: str, where: str) -> str:
    """The text of one record, checked; `where` begins the error message."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with the field {field!r}")
    if field not in record:
        raise UserError(_no_field(field, where, list(record)))
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {field!r} is half of a surrogate pair, "
            "which is not valid text"
        ) from None
    return text


def expanded(path: str | Path) -> Path:
    """With a user's folder for `~`; unlike Path.expanduser it leaves an unknown user alone."""
    return Path(os.path.expanduser(path))


def one_line(error: BaseException) -> str:
    """The beginning of an exception's message, without line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _no_field(field: str, where: str, names: list[str]) -> str:
    found = ", ".join(map(repr, names)) or "none"
    return (
        f"{where}: no field {field!r} (found: {found}); data.text_field names the right one "
        "(simreg compare: --set data.text_field=NAME; simreg eval --text and simreg analyze "
        "--source read 'text')"
    )


def _column_bytes(metadata: Any, name: str) -> int:
    """Uncompressed bytes of a column, which schema and file number differently after a struct."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    leaves = (group.column(k) for group in groups for k in range(group.num_columns))
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == name)


def _cut(text: str, size: int) -> int:
    """Where to cut a long text, after so many characters: at a blank line, a line, or anywhere."""
    for end in ("\n\n", "\r\n\r\n", "\n"):
        at = text.find(end, size, 2 * size)
        if at >= 0:
            return at + len(end)
    return 2 * size


def _decoded(stream: BinaryIO, path: Path) -> Iterator[str]:
    """UTF-8 text in pieces, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    while True:
        block = stream.read(_BLOCK)
        held = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: invalid UTF-8 at byte {offset - held + error.start}; "
                "convert the file to UTF-8"
            ) from None
        offset += len(block)
        yield piece
        if not block:
            return


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Reading errors as UserError."""
    try:
        yield
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot read {path}, it is damaged or not readable: {reason}") from None
