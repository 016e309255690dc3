"""Cosine regularisation: embeddings less similar to each other on average."""

from torch import Tensor, nn

from simreg.baselines import terms


class Cosine(nn.Module):
    """weight · Σ_i mean_{j≠i} cos(h_i, h_j), over the row and segment of i; linear in L, by sums.

    Source: Gao et al. 2019, "Representation Degeneration Problem in Training Natural Language
    Generation Models", arXiv 1907.12009, there of the word embeddings, all against all.
    Adapted to final hidden states, as later work compares with (NITP, arXiv 2605.24956).
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = terms.check("weight", weight, 0)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `objectives.Objective`."""
        units = terms.unit(hidden, labels)
        here = terms.valid(labels).to(units.dtype)
        others = terms.share(here.unsqueeze(-1), segments).squeeze(-1) - 1
        sums = (units * (terms.share(units, segments) - units)).sum(-1)
        losses = (sums / others.clamp_min(1)).masked_fill(others < 1, 0)
        return terms.weigh(self.weight, losses, labels, num_items)
