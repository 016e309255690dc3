"""Where the text comes from: the standard library, local files, Hugging Face datasets.

A source has a `key` (its identity by content), a `weight` (estimated bytes of text) and `read()`,
which streams its documents. `interleave` mixes sources so that every prefix is a fair sample.
"""

import contextlib
import dataclasses
import filecmp
import glob
import heapq
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

from simreg.recipe.errors import UserError
from simreg.recipe.files import LocalFile, expanded, one_line, text_of

STDLIB = "python-stdlib"
_NOT_STDLIB = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "site-packages",
    "test",
    "tests",
}
_LANES = 64  # files open at once
_PIECES, _SMALLEST = 256, 1 << 10  # of files of text: about how many, and of how many bytes
_UNKNOWN_WEIGHT = 1 << 30


class Source(Protocol):
    """Documents to read."""

    @property
    def title(self) -> str:
        """Names it for the user, without reading it."""

    @property
    def key(self) -> str:
        """Identity: equal keys hold the same documents."""

    @property
    def weight(self) -> int:
        """Estimated bytes of text."""

    def read(self) -> Iterator[str]:
        """The documents in order."""


def resolve(
    spec: str | list[str],
    field: str,
    *,
    split: str = "train",
    setting: str = "data.source",
) -> list[Source]:
    """The sources that `spec` names, in an order that depends on their content alone.

    UserError, which names the `setting` that `spec` comes from, where there is none.
    """
    sources: dict[str, Source] = {}
    for item in listed(spec):
        if item == STDLIB:
            found: list[Source] = list(standard_library())
        elif item.startswith("hf:"):
            found = [HubDataset.parse(item, field, split)]
        else:
            found = [LocalFile(path, field) for path in _paths(item, setting)]
        for source in found:  # a file that two patterns match counts once
            name = os.path.realpath(source.path) if isinstance(source, LocalFile) else source.key
            sources.setdefault(name, source)
    if not sources:
        raise UserError(f"{setting} names nothing: give python-stdlib, files, or hf:owner/name")
    return sorted(sources.values(), key=lambda source: source.key)


def listed(spec: str | list[str]) -> list[str]:
    """The items of a `data.source`."""
    return [spec] if isinstance(spec, str) else spec


def still_there(spec: str | list[str]) -> list[Source]:
    """The sources that `spec` named for training, none of them read; without files that are gone.

    No network is asked for those of the Hub.
    """
    found: list[Source] = []
    for item in listed(spec):
        with contextlib.suppress(UserError):
            if item == STDLIB:
                found += standard_library()
            elif item.startswith("hf:"):
                found.append(HubDataset.parse(item, "text", "train"))
            else:
                found += [LocalFile(path) for path in _paths(item, "data.source")]
    return found


def shared(sources: Iterable[Source], others: Iterable[Source]) -> Source | None:
    """One of `sources` that is also one of `others`: a file under whatever name, or a dataset's
    split at whatever commit."""
    by_size: dict[int, list[Path]] = {}
    of_hub: set[str] = set()
    for other in others:
        if isinstance(other, LocalFile):
            by_size.setdefault(other.path.stat().st_size, []).append(other.path)
        elif isinstance(other, HubDataset):
            of_hub.add(other.title)
    for file in sources:
        if isinstance(file, HubDataset) and file.title in of_hub:
            return file
        if not isinstance(file, LocalFile):
            continue
        alike = by_size.get(file.path.stat().st_size, ())  # others need not be read
        if any(filecmp.cmp(file.path, path, shallow=False) for path in alike):
            return file
    return None


def in_pieces(sources: list[Source]) -> list[Source]:
    """Files of text, if they are all there is, in many pieces, so that some can be held out."""
    files = [source for source in sources if isinstance(source, LocalFile) and source.is_text]
    if len(files) < len(sources):
        return sources
    piece = max(_SMALLEST, sum(file.weight for file in files) // _PIECES)
    return [dataclasses.replace(file, piece=min(file.piece, piece)) for file in files]


def interleave(sources: Sequence[Source]) -> Iterator[str]:
    """All documents, each source progressing in proportion to its weight; empty ones are dropped.

    The next document comes from the source of which the smallest share has been read. Beyond 64
    sources, those of similar weight share a lane, one after the other.
    """
    lanes = _lanes(sources)
    streams = [chain.from_iterable(source.read() for source in lane) for lane in lanes]
    weights = [max(1, sum(source.weight for source in lane)) for lane in lanes]
    taken = [0] * len(lanes)
    queue = [(0.0, lane) for lane in range(len(lanes))]
    while queue:
        lane = queue[0][1]
        text = next(streams[lane], None)
        if text is None:
            heapq.heappop(queue)
            continue
        taken[lane] += len(text.encode())
        heapq.heapreplace(queue, (taken[lane] / weights[lane], lane))
        if text:
            yield text


def _lanes(sources: Sequence[Source]) -> list[list[Source]]:
    """At most 64 groups of similar weight, each in an order by content.

    A small source in line with large ones would come early or late, never in the middle.
    """
    ranked = sorted(sources, key=lambda source: (source.weight, source.key))
    count = min(_LANES, len(ranked))
    bounds = [lane * len(ranked) // count for lane in range(count + 1)] if count else []
    groups = [ranked[start:stop] for start, stop in pairwise(bounds)]
    return [sorted(group, key=lambda source: source.key) for group in groups]


def standard_library() -> Iterator[LocalFile]:
    """The modules of the running interpreter's standard library, without its tests."""
    root = sysconfig.get_path("stdlib")
    found = False
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_STDLIB)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py" and _is_utf8(path):
                found = True
                yield LocalFile(path, whole=True)
    if not found:
        raise UserError(
            f"this Python has no source text of its standard library in {root}; "
            "set data.source to files of your own"
        )


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, streamed in its published order."""

    name: str
    config: str | None
    split: str
    field: str

    @classmethod
    def parse(cls, spec: str, field: str, split: str) -> "HubDataset":
        """From `hf:owner/name[:config]`."""
        name, _, config = spec.removeprefix("hf:").partition(":")
        if not name:
            raise UserError(
                f"{spec!r} names no dataset: write hf:owner/name or hf:owner/name:config"
            )
        return cls(name, config or None, split, field)

    @cached_property
    def revision(self) -> str | None:
        """The commit that is read, so that a changed dataset is another source."""
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.name).sha
        except Exception as error:  # many kinds: unknown id, no network, gated, no permission
            raise self._failed(error) from None

    @property
    def title(self) -> str:
        """Id, config and split."""
        return f"hf:{self.name}:{self.config}:{self.split}"

    @property
    def key(self) -> str:
        """The same and the commit."""
        return f"{self.title}:{self.revision}"

    @cached_property
    def weight(self) -> int:
        """Bytes of the split, other columns among them, if the dataset says so, else 1 GiB."""
        info = (self._dataset.info.splits or {}).get(self.split)
        return getattr(info, "num_bytes", None) or _UNKNOWN_WEIGHT

    def read(self) -> Iterator[str]:
        """The field of each record."""
        records = enumerate(self._dataset, 1)
        while True:
            try:
                number, record = next(records)
            except StopIteration:
                return
            except Exception as error:  # whatever the network and the format's reader raise
                raise self._failed(error) from None
            yield text_of(record, self.field, f"{self.name} ({self.split}), record {number}")

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, streaming=True, revision=self.revision
            )
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> UserError:
        what = f"{self.name}{f', config {self.config}' if self.config else ''}"
        return UserError(
            f"cannot read the {self.split} split of the Hugging Face dataset {what} "
            f"(check its name, its config and the network): {one_line(error)}"
        )


def _paths(item: str, setting: str) -> list[Path]:
    """The files that a path or a pattern names; at least one."""
    path = expanded(item)
    try:
        if path.is_dir():
            example = path / f"*{_commonest_ending(path)}"
            raise UserError(f"{path} is a folder: name its files, for example '{example}'")
        if path.exists():
            return [path]
    except OSError as error:
        raise UserError(f"cannot read {item!r}: {error.strerror}") from None
    matches = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [match for match in matches if not match.is_dir()]
    if not files:
        pattern = glob.has_magic(item)
        kind = "no file matches" if pattern else "there is no file"
        flags = " (simreg compare --data, simreg analyze --source)" * (setting == "data.source")
        hub = not pattern and item.count("/") == 1 and not path.suffix
        hint = f"; a Hugging Face dataset is written hf:{item}" if hub else ""
        raise UserError(f"{kind} {item!r}: check {setting}{flags}{hint}")
    return files


def _commonest_ending(folder: Path) -> str:
    """Of the files there that can be read, such as `.jsonl.xz`."""
    endings: Counter[str] = Counter()
    for path in folder.iterdir():
        with contextlib.suppress(UserError):
            file = LocalFile(path)
            endings[path.name[-len(file.format + (file.compression or "")) :]] += 1
    return endings.most_common(1)[0][0] if endings else ".jsonl"


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    return True
