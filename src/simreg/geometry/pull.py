"""How hard an auxiliary loss pulls at the embeddings, beside cross-entropy."""

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.objectives import Objective


def gradient_ratio(
    hidden: Tensor,
    labels: Tensor,
    head: Tensor,
    bias: Tensor | None,
    objective: Objective,
    segments: Tensor | None = None,
) -> float | None:
    """Norm of the objective's gradient at the final embeddings over that of cross-entropy's.

    `hidden` `[R, L, d]`, shifted `labels` `[R, L]`, `head` `[V, d]`, `bias` `[V]`, `segments`
    `[R, L]` as in `simreg_loss`; the objective must read nothing else. Both losses are sums over
    the tokens, the objective's with its weight. None where either gradient is zero.
    """
    h = hidden.detach().float().requires_grad_()
    with torch.enable_grad():
        logits = F.linear(h, head.float(), None if bias is None else bias.float())
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss, _ = objective(h, labels, segments, num_items=1.0)
        if not loss.requires_grad:
            return None
        norms = [torch.autograd.grad(term, h)[0].norm() for term in (loss, cross_entropy)]
    ratio = float(norms[0] / norms[1])
    return ratio if 0 < ratio < float("inf") else None
