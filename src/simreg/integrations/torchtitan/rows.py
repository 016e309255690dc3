"""Where the tokens of a batch belong: their documents, and their places in the row."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed.context_parallel.api import cp_shard


class Rows(NamedTuple):
    """Beside labels `[B, l]`: the document of each token, its place in its row, and the labels that
    it is compared by within the model, one for each of the depths; or None."""

    documents: Tensor | None = None
    places: Tensor | None = None
    within: tuple[Tensor, ...] | None = None


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

    def part(value: Tensor | None) -> Any:
        return None if value is None else cp_shard(mesh, (value,), None, balancer)[0][0]

    within = None if rows.within is None else tuple(map(part, rows.within))
    return Rows(part(rows.documents), part(rows.places), within)


def places_of(labels: Tensor) -> Tensor:
    """The place of each token `[B, L]` in its row."""
    return torch.arange(labels.shape[1], device=labels.device).expand(labels.shape).contiguous()
