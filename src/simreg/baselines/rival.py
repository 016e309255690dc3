"""What all rival objectives are: a weight, and a loss for each token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simreg.baselines import terms
from simreg.loss import check_tensors, per_item
from simreg.objectives import Reads


class Rival(nn.Module):
    """weight · Σ_t of the losses that a subclass gives, as `objectives.Objective`.

    A subclass that reads more than final hidden states says so in `reads`, and its `losses` takes
    that as keywords.
    """

    by_rows: bool = True
    """Whether the loss of a row, in training, depends on that row alone."""
    losses: Callable[..., Tensor]
    """(hidden, labels, segments, **read) to `[B, L]`, without the weight; 0 where the label is
    ignored or nothing applies."""

    def __init__(self, weight: float, highest: float = float("inf")) -> None:
        """ValueError for a `weight` that is no finite number from 0 to `highest`."""
        super().__init__()
        self.weight, self._highest = terms.check("weight", weight, 0, highest), highest

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        **read: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum divided by `num_items`, or by the valid labels of this call.

        `loss` among the metrics is without `weight`, over the valid labels of this call.
        """
        terms.check("weight", self.weight, 0, self._highest)  # which trainers set
        check_tensors(hidden, labels, segments)
        if hidden.dim() != 3:
            raise ValueError(f"hidden: expected [B, L, d], got {tuple(hidden.shape)}")
        some = labels.numel() > 0
        total = (self.losses(hidden, labels, segments, **read) if some else hidden).sum()
        count = terms.valid(labels).sum().clamp_min(1)
        loss = self.weight * per_item(total, count, num_items)
        return loss, {"loss": total.detach() / count}


class OfLayers(Rival):
    """A rival that is the mean of one loss of the final hidden states and of those at `depths`.

    A subclass gives that loss, `of_layer`.
    """

    of_layer: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(states, labels, segments) to `[B, L]`, as `losses` of one layer."""

    def __init__(self, weight: float, depths: Sequence[float]) -> None:
        """ValueError for depths that are no fractions (`Reads.depths`); none: the final alone."""
        super().__init__(weight)
        self.reads = Reads(depths=terms.check_depths("depths", depths))

    def losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        *,
        earlier: Sequence[Tensor] = (),
    ) -> Tensor:
        """As `Rival`."""
        layers = [self.of_layer(states, labels, segments) for states in (hidden, *earlier)]
        return torch.stack(layers).mean(0)
