"""Which document each token of a packed row is of, as batches for transformers say it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def documents(inputs: dict[str, Any]) -> Tensor | None:
    """Ids of documents `[B, L]`, of what padding-free collators say of them."""
    ids = inputs.get("input_ids")
    known, positions, ends = (inputs.get(k) for k in ("seq_idx", "position_ids", "cu_seq_lens_q"))
    if not isinstance(ids, Tensor):
        return None
    if isinstance(known, Tensor) and known.shape == ids.shape:
        return known
    if isinstance(positions, Tensor) and positions.shape in (ids.shape, (1, *ids.shape[1:])):
        # Models with pictures give several tokens one position: a document begins at a lower one,
        # or after a document of one token (rows may begin within one: then at 0).
        first = (positions[:, 1:] == positions[:, :1]) | (positions[:, 1:] == 0)
        step = positions.diff()
        return F.pad((step < 0) | ((step == 0) & first), (1, 0)).cumsum(-1).expand_as(ids)
    if isinstance(ends, Tensor) and len(ids) == 1:
        places = torch.arange(ids.shape[1], device=ids.device)
        return torch.bucketize(places, ends[1:].to(ids.device), right=True)[None]
    return None
