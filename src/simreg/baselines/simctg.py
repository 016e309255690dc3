"""SimCTG: other tokens at least a margin less similar to a token than it is to itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.objectives import Reads


class SimCTG(Rival):
    """weight · Σ_i mean_{j≠i} max(0, margin − s_ii + s_ij), s the cosine of final embeddings.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417,
    equation 2 and its code (yxuansu/SimCTG), with margin 0.5 and weight 1. Adapted: the mean is
    over the tokens of the row and segment that have a label, and rows count by their tokens; there
    all pairs of a batch have one mean. With `depths`, not in the source, the mean of the loss of
    the final embeddings and of those of these fractions of the depth.
    """

    def __init__(
        self, weight: float = 1.0, margin: float = 0.5, depths: Sequence[float] = ()
    ) -> None:
        super().__init__(weight)
        self.margin = terms.check("margin", margin, 0, 2)
        self.reads = Reads(depths=terms.check_depths("depths", depths))

    def losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        *,
        earlier: Sequence[Tensor] = (),
    ) -> Tensor:
        """As `Rival`; takes memory for L × L cosines of each row and layer."""
        layers = [self._excess(states, labels, segments) for states in (hidden, *earlier)]
        return torch.stack(layers).mean(0)

    def _excess(self, states: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """What each token's loss is in one layer, `[B, L]`."""
        units = terms.unit(states, labels)
        cosines = terms.products(units)
        own = units.square().sum(-1, keepdim=True)
        others = terms.pairs(labels, segments)
        excess = (self.margin - own + cosines).relu().masked_fill(~others, 0)
        return excess.sum(-1) / others.sum(-1).clamp_min(1)
