"""Tokens of a corpus with their final hidden states, read block by block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simreg.kernels.reference import EPS

BLOCK = 2048
"""Tokens read at once."""


@dataclass(frozen=True)
class Sample:
    """T labelled tokens.

    `hidden` `[T', d]` (any float dtype, may be memory-mapped) holds the inputs of the LM head;
    `index` `[T]` int64 says which of its rows belong to the sample. `labels`, `rows`, `positions`:
    `[T]` int64, the next token, the sequence it stands in and its place there.
    """

    hidden: Tensor
    labels: Tensor
    rows: Tensor
    positions: Tensor
    index: Tensor

    @classmethod
    def of(cls, hidden: Tensor, labels: Tensor, rows: Tensor | None = None) -> "Sample":
        """All of `hidden` `[T, d]`; without `rows` it is one sequence."""
        place = torch.arange(len(labels), device=labels.device)
        if rows is None:
            return cls(hidden, labels, torch.zeros_like(labels), place, place)
        starts = torch.searchsorted(rows, rows)  # rows ascend
        return cls(hidden, labels, rows, place - starts, place)

    def __len__(self) -> int:
        return len(self.index)

    def where(self, chosen: Tensor) -> "Sample":
        """The tokens that the mask `[T]` keeps; hidden states are not copied."""
        parts = (self.labels, self.rows, self.positions, self.index)
        return Sample(self.hidden, *(part[chosen] for part in parts))

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """`(slice into the sample, hidden states [b, d] in float64)`, in order."""
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield part, self.hidden[self.index[part]].double()


def mean(sample: Sample) -> Tensor:
    """The mean of all hidden states, `[d]` float64."""
    total = torch.zeros(sample.hidden.shape[-1], dtype=torch.float64)
    for _, hidden in sample.blocks():
        total += hidden.sum(0)
    return total / max(len(sample), 1)


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1: `v / max(‖v‖, 1e-6)`."""
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(EPS)
