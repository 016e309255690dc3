"""The definition of the loss as an L×L matrix: slow, hungry, and the truth for tests.

All backends compute the gradient in closed form. In a row, with e_i = h_i / max(‖h_i‖, ε),
s_ij = e_i·e_j / τ and w_i the gradient of the result by ℓ_i, that of w_i·ℓ_i by e_i·e_j is

    out        D_ij = w_i/τ · (softmax_A(s_i)_j − [j ∈ P(i)] / |P(i)|)
    in         D_ij = w_i/τ · (softmax_A(s_i)_j − softmax_P(s_i)_j)
    decoupled  D_ij = w_i/τ · mean_P(σ_i) · softmax_N(s_i)_j    for j in N(i)
               D_ij = −w_i/τ · σ_ij / |P(i)|                    for j in P(i)
               where σ_ij = sigmoid(log Σ_N exp(s_in) − s_ij)
    push       adds push · w_i · [e_i·e_j > push_above] / |A(i)|

and 0, but for the push, where P(i) is empty. Each product is of two tokens, so with G = D + Dᵀ

    dL/de_i = Σ_j G_ij e_j
    dL/dh_i = (dL/de_i − (e_i·dL/de_i) e_i) / ‖h_i‖, below ε: dL/de_i / ε

G is symmetric: one tile of S that is computed again serves both of its ends.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels.order import Form

EPS = 1e-6  # norms below this divide by it instead, so that zero vectors have a finite gradient


class Pairs(NamedTuple):
    """Embeddings and the similarities of all pairs of tokens, with the pairs that count."""

    e: Tensor  # [B, L, d]
    norm: Tensor  # [B, L, 1]
    cos: Tensor  # [B, L, L], like the masks
    candidate: Tensor
    positive: Tensor
    negative: Tensor


def pairs(hidden: Tensor, labels: Tensor, segments: Tensor | None) -> Pairs:
    """All pairs of a row's tokens."""
    valid = labels >= 0
    h = hidden.masked_fill(~valid[..., None], 0)
    h = h if h.dtype == torch.float64 else h.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    e = h / norm.clamp_min(EPS)

    candidate = valid[:, :, None] & valid[:, None, :]
    candidate &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    if segments is not None:
        candidate &= segments[:, :, None] == segments[:, None, :]
    positive = candidate & (labels[:, :, None] == labels[:, None, :])
    return Pairs(e, norm, e @ e.mT, candidate, positive, candidate & ~positive)


def reference(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token SimReg loss, differentiable by autograd through the full similarity matrix.

    Args:
        hidden: ``[B, L, d]`` floating. Positions with a negative label are never read.
        labels: ``[B, L]`` int64; negative where ignored.
        segments: ``[B, L]`` int or None; tokens interact only within equal ids of a row.
        form: which loss.

    Returns:
        ``(loss, pos_cos, neg_cos)``, each ``[B, L]`` in float32 (float64 for float64 input): the
        loss of each token and, without gradient, its mean cosine to its positives and negatives
        (NaN where it has none).
    """
    _, norm, cos, candidate, positive, negative = pairs(hidden, labels, segments)
    s = cos / form.temperature
    count = positive.sum(-1).clamp_min(1)
    if form.variant == "out":
        loss = _lse(s, candidate) - s.masked_fill(~positive, 0).sum(-1) / count
    elif form.variant == "in":
        loss = _lse(s, candidate) - _lse(s, positive) + count.to(s.dtype).log()
    else:
        gap = _lse(s, negative)[..., None] - s
        loss = (-F.logsigmoid(-gap)).masked_fill(~positive, 0).sum(-1) / count
    loss = torch.where(positive.any(-1), loss, 0)
    if form.push:
        excess = (cos - form.push_above).relu().masked_fill(~candidate, 0).sum(-1)
        loss = loss + form.push * excess / candidate.sum(-1).clamp_min(1)
    # A token that is NaN or infinite is NaN in the result, even if it has no positive.
    loss = loss.masked_fill((labels >= 0) & ~norm.isfinite().squeeze(-1), torch.nan)
    with torch.no_grad():
        pos_cos = cos.masked_fill(~positive, 0).sum(-1) / positive.sum(-1)  # 0 / 0 = NaN: none
        neg_cos = cos.masked_fill(~negative, 0).sum(-1) / negative.sum(-1)
    return loss, pos_cos, neg_cos


def _lse(s: Tensor, mask: Tensor) -> Tensor:
    return torch.logsumexp(s.masked_fill(~mask, -torch.inf), dim=-1)


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """`reference` and, since it saves nothing for `backward`, zeros in the place of that."""
    results = reference(hidden, labels, segments, form)
    nothing = (torch.zeros_like(results[0]) for _ in range(3))
    return (*results, labels.new_zeros(labels.shape), *nothing)


def backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    saved: tuple[Tensor, ...],
    form: Form,
) -> Tensor:
    """dL/dhidden from dL/dloss ``[B, L]``: the closed form, D pair by pair."""
    e, norm, cos, candidate, positive, negative = pairs(hidden, labels, segments)
    s = cos / form.temperature
    count = positive.sum(-1, keepdim=True)
    weight = (grad[..., None] / form.temperature).masked_fill(count == 0, 0)
    pull = positive.to(s.dtype) / count.clamp_min(1)
    if form.variant == "out":
        d = _softmax(s, candidate) - pull
    elif form.variant == "in":
        d = _softmax(s, candidate) - _softmax(s, positive)
    else:
        sigmoid = (_lse(s, negative)[..., None] - s).sigmoid() * pull
        d = sigmoid.sum(-1, keepdim=True) * _softmax(s, negative) - sigmoid
    d = d * weight
    if form.push:
        share = form.push * grad[..., None] / candidate.sum(-1, keepdim=True).clamp_min(1)
        d = d + share.masked_fill(~candidate | (cos <= form.push_above), 0)
    grad_e = (d + d.mT) @ e
    radial = (grad_e * e).sum(-1, keepdim=True).masked_fill(norm < EPS, 0)
    return ((grad_e - radial * e) / norm.clamp_min(EPS)).to(hidden.dtype)


def _softmax(s: Tensor, mask: Tensor) -> Tensor:
    return (s - _lse(s, mask)[..., None]).exp().masked_fill(~mask, 0)
