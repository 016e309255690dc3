"""Peers in plain PyTorch with products in the dtype of the embeddings."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from simreg.kernels.pairs import wide
from simreg.kernels.reference import EPS
from simreg.loss import TEMPERATURE

CPU_PAIRS, ACCELERATOR_PAIRS = 2**20, 2**25
"""Similarities held at a time: on the CPU what was fastest of 2^16 to 2^22."""


def pairs_at_a_time(device: torch.device) -> int:
    """How many similarities `chunked_recompute` holds at a time."""
    return CPU_PAIRS if device.type == "cpu" else ACCELERATOR_PAIRS


def chunked_recompute(hidden: Tensor, labels: Tensor, pairs: int | None = None) -> Tensor:
    """The "out" loss, a chunk of the rows of S at a time; backward computes each chunk again.

    Products are in the dtype of `hidden`, as under autocast (in bfloat16 that rounds s, which the
    kernels of simreg do not); everything else is in float32.

    Args:
        hidden: ``[B, L, d]``.
        labels: ``[B, L]``, negative where ignored.
        pairs: similarities held at a time; None: what suits the device.

    Returns:
        The mean over valid labels, a scalar.
    """
    length = labels.shape[1]
    pairs = pairs or pairs_at_a_time(hidden.device)
    step = max(1, min(length, pairs // length))
    group = max(1, pairs // (step * length))  # rows of the batch that share a chunk
    e = _normalised(hidden, labels)
    total = e.new_zeros((), dtype=wide(e.dtype))
    # `split` gathers gradients once; a slice each would add a whole-size tensor for each chunk.
    for e_group, y_group in zip(torch.split(e, group), torch.split(labels, group), strict=True):
        for k, e_chunk in enumerate(torch.split(e_group, step, dim=1)):
            total = total + checkpoint(
                _chunk_loss,
                e_chunk,
                e_group,
                y_group,
                k * step,
                TEMPERATURE,
                use_reentrant=False,
                preserve_rng_state=False,
            )
    return total / (labels >= 0).sum().clamp_min(1)


def at_once(hidden: Tensor, labels: Tensor) -> Tensor:
    """As `chunked_recompute`, all of S at a time and kept."""
    e = _normalised(hidden, labels)
    return _chunk_loss(e, e, labels, 0, TEMPERATURE) / (labels >= 0).sum().clamp_min(1)


def _normalised(hidden: Tensor, labels: Tensor) -> Tensor:
    e = hidden.masked_fill((labels < 0)[..., None], 0)
    e = e if e.dtype == torch.float64 else e.float()
    return F.normalize(e, dim=-1, eps=EPS).to(hidden.dtype)


def _chunk_loss(chunk: Tensor, e: Tensor, labels: Tensor, start: int, temperature: float) -> Tensor:
    """Sum of the losses of ``[b, r, d]``, the tokens from `start`, against all ``[b, L, d]``."""
    s = torch.bmm(chunk, e.mT)
    s = (s if s.dtype == torch.float64 else s.float()) / temperature
    own, other = labels[:, start : start + chunk.shape[1], None], labels[:, None]
    candidate = (own >= 0) & (other >= 0)
    candidate.diagonal(start, dim1=1, dim2=2).fill_(False)
    positive = candidate & (own == other)
    count = positive.sum(-1)
    lse = torch.logsumexp(s.masked_fill(~candidate, -torch.inf), dim=-1)
    loss = lse - s.masked_fill(~positive, 0).sum(-1) / count.clamp_min(1)
    return torch.where(count > 0, loss, 0).sum()
