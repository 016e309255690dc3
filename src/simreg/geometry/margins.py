"""The classification margin of each token, and its loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from simreg.geometry.sample import Sample, unit


class Margins(NamedTuple):
    """`[T]` float64 each, of z = W h + b and the label y.

    loss: cross-entropy, nats. raw: z_y − max_{j≠y} z_j. cosine: the same of cos(w_j, h), without
    bias, so that the lengths of hidden states and rows count for nothing: −2 to 2. A token is
    classified rightly where its raw margin is positive.
    """

    loss: Tensor
    raw: Tensor
    cosine: Tensor


@torch.no_grad()
def margins(sample: Sample, head: Tensor, bias: Tensor | None = None) -> Margins:
    """Margins over the whole vocabulary; `head` `[V, d]`, `bias` `[V]`.

    Logits are made in float32 for at most d tokens at a time, so that memory stays within O(V·d).
    """
    rows, directions = head.float(), unit(head.float())
    loss, raw, cosine = torch.empty(3, len(sample), dtype=torch.float64, device=head.device)
    for part, hidden in sample.blocks(max(64, min(512, rows.shape[-1]))):
        h, labels = hidden.float(), sample.labels[part, None]
        logits = h @ rows.T
        if bias is not None:
            logits += bias.float()
        loss[part] = (logits.logsumexp(-1) - logits.gather(1, labels)[:, 0]).double()
        raw[part] = _margin(logits, labels)
        cosine[part] = _margin(unit(h) @ directions.T, labels)
    return Margins(loss, raw, cosine)


def _margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Own score minus the best other one; `scores` is overwritten."""
    own = scores.gather(1, labels)[:, 0]
    scores.scatter_(1, labels, -torch.inf)
    return (own - scores.amax(1)).double()
