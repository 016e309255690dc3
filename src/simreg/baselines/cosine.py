"""Cosine regularisation: embeddings less similar to each other on average."""

from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import Rival


class Cosine(Rival):
    """weight · Σ_i mean_{j≠i} cos(h_i, h_j), over the row and segment of i; linear in L, by sums.

    With a `threshold`, max(0, mean − threshold): the push of `SimCTG` on means, not on pairs, which
    leaves alone what is spread already. That is this project's own.

    Source: Gao et al. 2019, "Representation Degeneration Problem in Training Natural Language
    Generation Models", arXiv 1907.12009, there of the word embeddings, all against all.
    Adapted to final hidden states, as later work compares with (NITP, arXiv 2605.24956).
    """

    def __init__(self, weight: float = 1.0, threshold: float | None = None) -> None:
        super().__init__(weight)
        self.threshold = None if threshold is None else terms.check("threshold", threshold, 0, 1)

    def losses(self, hidden: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """As `Rival`."""
        units = terms.unit(hidden, labels)
        here = terms.valid(labels).to(units.dtype)
        others = terms.share(here.unsqueeze(-1), segments).squeeze(-1) - 1
        sums = (units * (terms.share(units, segments) - units)).sum(-1)
        mean = sums / others.clamp_min(1)
        if self.threshold is not None:
            mean = (mean - self.threshold).relu()
        return mean.masked_fill(others < 1, 0)
