"""Text and a tokenizer that need no download, for runs that only show that things work."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer

from simreg.integrations.torchtitan.trainer import SimRegTrainer

BOS, EOS, SIZE = 256, 257, 258


class ByteTokenizer(BaseTokenizer):
    """Bytes of UTF-8, and two marks around a document."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to configure."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__()
        self.bos_id, self.eos_id = BOS, EOS

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`."""
        return [BOS] * add_bos + list(text.encode(errors="replace")) + [EOS] * add_eos

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; marks are dropped."""
        return bytes(i for i in ids if i < BOS).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """258."""
        return SIZE


class StandardLibrary(IterableDataset[tuple[dict[str, Tensor], Tensor]]):
    """Source files of the running interpreter's standard library, packed into rows.

    Rows `[L]` as torchtitan packs them: input, labels, and positions that start at 0 in every
    document and in every row. Row r goes to the data-parallel rank r mod `ranks`.
    """

    def __init__(
        self, tokenizer: BaseTokenizer, length: int, rank: int, ranks: int, infinite: bool
    ) -> None:
        self.tokenizer, self.length, self.infinite = tokenizer, length, infinite
        self.rank, self.ranks = rank, ranks
        self.taken = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Rows of this rank, after those already taken."""
        first = self.rank + self.taken * self.ranks
        for row in islice(self._rows(), first, None, self.ranks):
            self.taken += 1
            yield row
        self.taken = 0  # the next pass begins at the start

    def _rows(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        tokens: list[tuple[int, int, bool]] = []
        place = torch.arange(self.length)
        for ids in self._documents():
            tokens += zip(ids[:-1], ids[1:], chain([True], repeat(False)), strict=False)
            while len(tokens) >= self.length:
                inputs, labels, starts = torch.tensor(tokens[: self.length]).T
                starts[0] = True
                begin = torch.where(starts > 0, place, 0).cummax(0).values
                yield {"input": inputs, "positions": place - begin}, labels
                tokens = tokens[self.length :]

    def _documents(self) -> Iterator[list[int]]:
        folder = Path(sysconfig.get_paths()["stdlib"])
        while True:
            for path in sorted(folder.glob("*.py")):
                text = path.read_text(errors="replace")
                yield self.tokenizer.encode(text, add_bos=True, add_eos=True)
            if not self.infinite:
                return

    def state_dict(self) -> dict[str, int]:
        """How many rows were taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after so many rows."""
        self.taken = state["taken"]


class StandardLibraryDataLoader(ParallelAwareDataloader):
    """Batches of `StandardLibrary`."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """That of torchtitan's text loaders, without the choice of a dataset."""

        infinite: bool = True
        """Begin again after the last file."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            StandardLibrary(tokenizer, seq_len, dp_rank, dp_world_size, config.infinite),
            dp_rank,
            dp_world_size,
            batch_size=local_batch_size,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )


def on_standard_library(config: SimRegTrainer.Config) -> SimRegTrainer.Config:
    """The config with this text and tokenizer, for models with a vocabulary of at least 258."""
    config.tokenizer = ByteTokenizer.Config()
    config.dataloader = StandardLibraryDataLoader.Config()
    config.validator.dataloader = StandardLibraryDataLoader.Config()
    return config
