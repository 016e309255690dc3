"""The ranks of a process group, as the loss needs them: gather what is small, agree on the rest."""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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

    @property
    def members(self) -> list[int]:
        """Their ranks among all processes, in the order of the group."""
        return [] if self.group is None else dist.get_process_group_ranks(self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """``[size, ...]``: the tensor of every rank, which all have the same shape."""
        if self.group is None:
            return tensor[None]
        out = tensor.new_empty(self.size * tensor.numel())
        _all_gather(out, tensor.flatten(), group=self.group)
        return out.view(self.size, *tensor.shape)

    def exchange(self, tensor: Tensor) -> Tensor:
        """``[size, ...]``: what every rank has for this one, from what this one has for each."""
        if self.group is None:
            return tensor
        out = torch.empty_like(tensor)
        received, sent = (value.flatten().view(torch.uint8) for value in (out, tensor))
        dist.all_to_all_single(received, sent, group=self.group)  # of bytes, as gloo knows them
        return out


class Header(NamedTuple):
    """What ranks tell each other before anything else."""

    good: bool = False  # whether the arguments made sense here
    length: int = 0  # l, the tokens of a row on this rank
    tokens: int = 0  # a sum over labels, segments, positions: copies have the same
    rest: str = ""  # what must be the same on all ranks, in words with commas between

    def pack(self) -> list[int]:
        """As `_FIELDS` + `_TEXT` integers; a hash stands for what of the words is too long."""
        text = self.rest.encode()
        if len(text) > _TEXT:
            digest = hashlib.sha256(text).hexdigest()[:_DIGEST]
            text = text[: _TEXT - _DIGEST] + digest.encode()
        return [int(self.good), self.length, self.tokens, *text.ljust(_TEXT)]

    @classmethod
    def unpack(cls, values: list[int]) -> "Header":
        """From `pack`."""
        good, length, tokens, *text = values
        return cls(bool(good), length, tokens, bytes(text).decode(errors="replace").rstrip())


_FIELDS, _TEXT, _DIGEST = 3, 381, 16
HEADER_BYTES = 8 * (_FIELDS + _TEXT)


def agree(peers: Peers, copies: Peers, own: Header, device: torch.device) -> list[int]:
    """Exchange headers, so that no rank waits for one that has given up; lengths of the peers.

    First with the copies, then, whatever came of it, with the peers: so each rank of a grid hears
    of all.

    Args:
        peers: who hold other tokens of the same rows.
        copies: who hold the same tokens.
        own: the header of this rank.
        device: on which the ranks communicate.

    Raises:
        ValueError: if a rank has refused its arguments, or headers differ.
    """
    complaint = _compare(_exchange(copies, own, device), copies, alike=True)
    headers = _exchange(peers, own._replace(good=own.good and complaint is None), device)
    complaint = complaint or _compare(headers, peers, alike=False)
    if complaint is not None:
        raise ValueError(complaint)
    return [header.length for header in headers]


def _exchange(group: Peers, own: Header, device: torch.device) -> list[Header]:
    if group.group is None:
        return [own]
    packed = torch.tensor(own.pack(), device=device, dtype=torch.int64)
    return [Header.unpack(values) for values in group.gather(packed).tolist()]


def _compare(headers: list[Header], group: Peers, alike: bool) -> str | None:
    """What is wrong with the headers of a group, by ranks among all processes."""
    own, ranks = headers[group.rank], group.members or [0]
    me = ranks[group.rank]
    for rank, other in zip(ranks, headers, strict=True):
        if not other.good:
            return f"refused on rank {rank}: its own error says why"
    for rank, other in zip(ranks, headers, strict=True):
        if own.rest != other.rest:
            pairs = zip(own.rest.split(", "), other.rest.split(", "), strict=False)
            mine, theirs = next((pair for pair in pairs if pair[0] != pair[1]), (own, other))
            return (
                f"expected the same on all ranks of {'replicas' if alike else 'group'}, got {mine} "
                f"on rank {me} and {theirs} on rank {rank}"
            )
        if alike and own.length != other.length:
            return (
                f"replicas: expected the same tokens on all ranks, got rows of {own.length} on "
                f"rank {me} and of {other.length} on rank {rank}"
            )
        if alike and own.tokens != other.tokens:
            return (
                "replicas: expected the same labels, segments and positions on all ranks, rank "
                f"{rank} has others"
            )
    return None
