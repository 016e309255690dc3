"""z-loss: keeps the normaliser of the softmax near 1."""

from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.objectives import Reads


class ZLoss(Rival):
    """weight · Σ_t (logsumexp of the logits of t)².

    Source: PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5), there with weight 1e-4;
    OLMo 2 takes 1e-5.
    """

    reads = Reads(logits=True)

    def __init__(self, weight: float = 1e-4) -> None:
        super().__init__(weight)

    def losses(
        self, hidden: Tensor, labels: Tensor, segments: Tensor | None, *, logits: Tensor
    ) -> Tensor:
        """As `Rival`."""
        squares = terms.seen(logits, labels).logsumexp(-1).square()
        return squares.masked_fill(~terms.valid(labels), 0)
