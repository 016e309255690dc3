"""SimCTG: other tokens at least a margin less similar to a token than it is to itself."""

from collections.abc import Sequence

from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import OfLayers


class SimCTG(OfLayers):
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
        super().__init__(weight, depths)
        self.margin = terms.check("margin", margin, 0, 2)

    def of_layer(self, states: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """As `OfLayers`; takes memory for L × L cosines of each row."""
        units = terms.unit(states, labels)
        cosines = terms.products(units)
        own = units.square().sum(-1, keepdim=True)
        others = terms.pairs(labels, segments)
        excess = (self.margin - own + cosines).relu().masked_fill(~others, 0)
        return excess.sum(-1) / others.sum(-1).clamp_min(1)
