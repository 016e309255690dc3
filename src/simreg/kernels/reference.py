"""The definition of the loss as an L×L matrix: slow, hungry, and the truth for tests."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # norms below this divide by it instead, so that zero vectors have a finite gradient


def reference(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, temperature: float, variant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token SimReg loss by autograd through the full similarity matrix (design §2).

    Args:
        hidden: ``[B, L, d]`` floating. Positions with a negative label are never read.
        labels: ``[B, L]`` int64; negative where ignored.
        segments: ``[B, L]`` int or None; tokens interact only within equal ids of a row.
        temperature: τ > 0.
        variant: ``"out"``, ``"in"`` or ``"decoupled"``.

    Returns:
        ``(loss, pos_cos, neg_cos)``, each ``[B, L]`` in float32 (float64 for float64 input): the
        loss of each token and, without gradient, its mean cosine to its positives and negatives
        (NaN where it has none).
    """
    valid = labels >= 0
    h = hidden.masked_fill(~valid[..., None], 0)
    h = h if h.dtype == torch.float64 else h.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    e = h / norm.clamp_min(EPS)
    cos = e @ e.mT
    s = cos / temperature

    candidate = valid[:, :, None] & valid[:, None, :]
    candidate &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    if segments is not None:
        candidate &= segments[:, :, None] == segments[:, None, :]
    positive = candidate & (labels[:, :, None] == labels[:, None, :])
    negative = candidate & ~positive
    count = positive.sum(-1).clamp_min(1)

    if variant == "out":
        loss = _lse(s, candidate) - s.masked_fill(~positive, 0).sum(-1) / count
    elif variant == "in":
        loss = _lse(s, candidate) - _lse(s, positive) + count.to(s.dtype).log()
    else:
        gap = _lse(s, negative)[..., None] - s
        loss = (-F.logsigmoid(-gap)).masked_fill(~positive, 0).sum(-1) / count
    loss = torch.where(positive.any(-1), loss, 0)
    # A token that is NaN or infinite is NaN in the result, even if it has no positive.
    loss = loss.masked_fill(valid & ~norm.isfinite().squeeze(-1), torch.nan)
    with torch.no_grad():
        pos_cos = cos.masked_fill(~positive, 0).sum(-1) / positive.sum(-1)  # 0 / 0 = NaN: none
        neg_cos = cos.masked_fill(~negative, 0).sum(-1) / negative.sum(-1)
    return loss, pos_cos, neg_cos


def _lse(s: Tensor, mask: Tensor) -> Tensor:
    return torch.logsumexp(s.masked_fill(~mask, -torch.inf), dim=-1)
