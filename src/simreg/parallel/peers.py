"""The ranks of a process group, as the loss needs them: gather what is small, agree on the rest."""

import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simreg.loss import FLOATS

# Its name since torch 2.13, where the old one warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Peers(NamedTuple):
    """A process group; None is this process alone."""

    group: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes the group has."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """``[size, ...]``: the tensor of every rank, which all have the same shape."""
        if self.group is None:
            return tensor[None]
        out = tensor.new_empty(self.size * tensor.numel())
        _all_gather(out, tensor.flatten(), group=self.group)
        return out.view(self.size, *tensor.shape)


class Header(NamedTuple):
    """What ranks tell each other before anything else; integers all."""

    good: int = 0  # whether the arguments made sense here
    batch: int = 0
    length: int = 0
    dim: int = 0
    dtype: int = 0
    differentiable: int = 0
    segments: int = 0
    settings: int = 0


def header(hidden: Tensor, segments: Tensor | None, settings: tuple[object, ...]) -> Header:
    """Of hidden states ``[B, l, d]`` and arguments that were checked."""
    batch, length, dim = hidden.shape
    return Header(
        1,
        batch,
        length,
        dim,
        FLOATS.index(hidden.dtype),
        hidden.requires_grad and torch.is_grad_enabled(),
        segments is not None,
        zlib.crc32(repr(settings).encode()),
    )


def agree(
    peers: Peers, copies: Peers, own: Header, device: torch.device, error: ValueError | None
) -> list[int]:
    """Exchange headers, so that no rank waits for one that has given up.

    Args:
        peers: who hold other tokens of the same rows.
        copies: who hold the same tokens.
        own: the header of this rank.
        device: on which the ranks communicate.
        error: why this rank can't go on.

    Returns:
        The lengths of the rows of each of the peers.

    Raises:
        ValueError: `error`; on the other ranks one that names the rank; or if headers differ.
    """
    mine = torch.tensor(own, device=device, dtype=torch.int64)
    both = [(group, group.gather(mine).tolist()) for group in (peers, copies)]
    if error is not None:
        raise error
    for group, rows in both:
        for rank, row in enumerate(rows):
            _compare(own, Header(*row), group.rank, rank, alike=group is copies)
    return [Header(*row).length for row in both[0][1]]


def _compare(own: Header, other: Header, me: int, rank: int, alike: bool) -> None:
    if not other.good:
        raise ValueError(f"the loss was refused on rank {rank} of the group, see its error")
    for name, mine, theirs in zip(Header._fields, own, other, strict=True):
        if mine != theirs and (alike or name != "length"):
            raise ValueError(
                f"{_NAMES[name]}: expected the same on all ranks of the group, got {mine} on rank "
                f"{me} and {theirs} on rank {rank}"
            )


_NAMES = {
    "good": "arguments",
    "batch": "hidden: rows",
    "length": "hidden: tokens of a row",
    "dim": "hidden: width",
    "dtype": "hidden: dtype",
    "differentiable": "hidden: requires_grad",
    "segments": "segments: given or not",
    "settings": "temperature, variant, chunk_size or ignore_index (checksum)",
}
