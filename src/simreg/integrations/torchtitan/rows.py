"""Where the tokens of a batch belong: their documents, and their places in the row."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed.context_parallel.api import cp_shard


class Rows(NamedTuple):
    """Beside labels `[B, l]`: the document of each token, its place in its row, and the label that
    it is compared by within the model; or None."""

    documents: Tensor | None = None
    places: Tensor | None = None
    within: Tensor | None = None


def documents_of(positions: Tensor | None) -> Tensor:
    """Document ids `[B, L]` of whole rows, from positions that start at 0 in every document.

    ValueError if there are none.
    """
    if positions is None:
        raise ValueError("loss.scope: 'document' needs a dataloader that gives positions")
    return (positions == 0).cumsum(1)


def shard(rows: Rows, mesh: DeviceMesh, balancer: str | None) -> Rows:
    """The part of whole rows that this rank of context parallelism holds.

    Raises:
        ValueError: for the balancer "ptrr", which follows the attention mask.
    """
    if all(value is None for value in rows):
        return rows
    if balancer == "ptrr":
        raise ValueError(
            "context_parallel_load_balancer: 'ptrr' permutes tokens by the attention mask, which "
            "loss.scope='document', loss.chunk_size and loss.depths_offset can't follow; use "
            "'headtail'"
        )

    def part(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        parts, _ = cp_shard(mesh, (value,), None, balancer)
        local: Tensor = parts[0]
        return local

    return Rows(*map(part, rows))


def places_of(labels: Tensor) -> Tensor:
    """The place of each token `[B, L]` in its row."""
    return torch.arange(labels.shape[1], device=labels.device).expand(labels.shape).contiguous()
