"""What the streaming kernels share: tokens sorted by label, and what is known of a token alone.

The loss does not depend on the order of tokens, so rows are sorted by segment and label (short
ones of "blockwise" only to describe them).
Then positives lie near the diagonal of the similarity matrix, segments are contiguous whatever
they were, ignored tokens are last, and most tiles need no mask or need not be visited at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Order(NamedTuple):
    """A row's tokens sorted by (ignored, segment, label); all ``[B, L]``, in that order.

    Or, from `in_rows`, in that of the row; then too `segment` and `label` are as in the first.
    """

    position: Tensor  # in the unsorted row
    valid: Tensor
    segment: Tensor  # index of its segment's first token; an ignored token's means nothing
    label: Tensor  # index of the first token of its segment with its label
    positives: Tensor  # |P(i)|, 0 where ignored
    negatives: Tensor  # |A(i) ∖ P(i)|, 0 where ignored

    @property
    def candidates(self) -> Tensor:
        """|A(i)|."""
        return self.positives + self.negatives

    def in_rows(self) -> "Order":
        """The same of the tokens in the order of the row."""
        place = torch.arange(self.position.shape[1], device=self.position.device)
        return Order(place.expand_as(self.position), *map(self.unsort, self[1:]))

    def unsort(self, values: Tensor) -> Tensor:
        """Sorted per-token values ``[B, L]`` at their tokens' positions in the row."""
        return torch.empty_like(values).scatter_(1, self.position, values)


def sort_tokens(labels: Tensor, segments: Tensor | None) -> Tensor:
    """The permutation ``[B, L]`` that sorts each row by (ignored, segment, label)."""
    index = labels.argsort(dim=1, descending=True, stable=True)  # negative, so ignored, last
    if segments is not None:
        for key in (segments, (labels < 0).to(torch.uint8)):
            index = index.gather(1, key.gather(1, index).argsort(dim=1, stable=True))
    return index.contiguous()


def describe(index: Tensor, labels: Tensor, segments: Tensor | None) -> Order:
    """Runs and counts of the sorted tokens."""
    label = labels.gather(1, index)
    valid = label >= 0
    new_segment = valid[:, 1:] != valid[:, :-1]
    if segments is not None:
        segment = segments.gather(1, index)
        new_segment = new_segment | (segment[:, 1:] != segment[:, :-1])
    new_label = new_segment | (label[:, 1:] != label[:, :-1])
    of_segment, of_label = _starts(new_segment), _starts(new_label)
    same_label, same_segment = _sizes(of_label), _sizes(of_segment)
    positives = (same_label - 1).masked_fill(~valid, 0)
    negatives = (same_segment - same_label).masked_fill(~valid, 0)
    return Order(index, valid, of_segment, of_label, positives, negatives)


def _starts(new: Tensor) -> Tensor:
    """Index of the first token of each token's run; a run begins at 0 and after each `new`."""
    index = torch.arange(1, new.shape[1] + 1, device=new.device)
    return F.pad(torch.where(new, index, 0).cummax(1).values, (1, 0))


def _sizes(run: Tensor) -> Tensor:
    """How many tokens of the row are in each token's run."""
    return torch.zeros_like(run).scatter_add_(1, run, torch.ones_like(run)).gather(1, run)


BOUNDED = 0.05
"""The temperature from which on e^(−2/τ) is far from what float32 cannot hold."""


class Form(NamedTuple):
    """Which loss: the options of `simreg_loss` that say so."""

    temperature: float
    variant: str
    push: float = 0.0
    push_above: float = 0.5

    @property
    def largest(self) -> float:
        """1/τ, which no similarity exceeds."""
        return 1 / self.temperature

    @property
    def bounded(self) -> bool:
        """Whether exponentials of s − 1/τ keep clear of float32's limits."""
        return self.temperature >= BOUNDED

    @property
    def edge(self) -> float:
        """`push_above` on the scale of similarities."""
        return self.push_above / self.temperature


class Sums(NamedTuple):
    """Over the pairs of each token; all ``[B, L]``, sorted."""

    lse: Tensor  # logsumexp of s over candidates ("decoupled": over negatives)
    positive: Tensor  # Σ s over positives
    negative: Tensor  # Σ s over negatives
    numerator: Tensor | None = None  # "in": logsumexp of s over positives
    softplus: Tensor | None = None  # "decoupled": Σ softplus(lse − s) over positives
    slope: Tensor | None = None  # "decoupled": Σ sigmoid(lse − s) over positives
    excess: Tensor | None = None  # with a push: Σ max(0, s − edge) over candidates


def losses(
    sums: Sums, order: Order, norm: Tensor, form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, mean positive and negative cosine, and what backward needs; ``[B, L]``, sorted.

    The last is with "in" the logsumexp of the positives, with "decoupled" their mean sigmoid.
    """
    count = order.positives.clamp_min(1)
    if form.variant == "out":
        statistic = torch.zeros_like(sums.lse)
        loss = sums.lse - sums.positive / count
    elif form.variant == "in":
        assert sums.numerator is not None
        statistic = sums.numerator
        loss = sums.lse - statistic + count.to(sums.lse.dtype).log()
    else:
        assert sums.softplus is not None
        assert sums.slope is not None
        statistic = sums.slope / count
        loss = sums.softplus / count
    loss = loss.masked_fill(order.positives == 0, 0)
    if form.push:
        assert sums.excess is not None
        mean = form.temperature * sums.excess / order.candidates
        loss = loss + form.push * mean.masked_fill(order.candidates == 0, 0)
    loss = loss.masked_fill(order.valid & ~norm.isfinite(), torch.nan)
    pos_cos = sums.positive * form.temperature / order.positives  # 0 / 0 = NaN: none
    neg_cos = sums.negative * form.temperature / order.negatives
    return loss, pos_cos, neg_cos, statistic


class Ends(NamedTuple):
    """What the gradient of a pair needs to know of its two tokens; all ``[B, L]``, sorted."""

    lse: Tensor  # of the denominator
    softmax: Tensor  # weight of exp(s − lse)
    numerator: Tensor  # logsumexp of the positives ("in")
    pull: Tensor  # weight of the positive's term
    hinge: Tensor | None = None  # with a push: weight of a candidate beyond the edge

    def map(self, change: Callable[[Tensor], Tensor]) -> "Ends":
        """Each of them changed."""
        return Ends(*(change(value) for value in self if value is not None))

    def stack(self) -> Tensor:
        """``[4 or 5, B, L]``, for `Ends(*stacked)`."""
        return torch.stack([value for value in self if value is not None])


def ends(grad: Tensor, order: Order, lse: Tensor, statistic: Tensor, form: Form) -> Ends:
    """From dL/dloss ``[B, L]`` in the order of the row."""
    grad = grad.gather(1, order.position)
    weight = (grad / form.temperature).masked_fill(order.positives == 0, 0)
    hinge = form.push * grad / order.candidates.clamp_min(1) if form.push else None
    return Ends(
        lse=lse,
        softmax=weight * statistic if form.variant == "decoupled" else weight,
        numerator=statistic,
        pull=weight if form.variant == "in" else weight / order.positives.clamp_min(1),
        hinge=None if hinge is None else hinge.masked_fill(order.candidates == 0, 0),
    )
