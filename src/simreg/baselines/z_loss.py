"""z-loss: keeps the normaliser of the softmax near 1."""

from torch import Tensor, nn

from simreg.baselines import terms
from simreg.objectives import Reads


class ZLoss(nn.Module):
    """weight · mean_t (logsumexp of the logits of t)².

    Source: PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5), there with weight 1e-4;
    OLMo 2 takes 1e-5.
    """

    reads = Reads(logits=True)

    def __init__(self, weight: float = 1e-4) -> None:
        super().__init__()
        self.weight = terms.check("weight", weight, 0)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        logits: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `objectives.Objective`."""
        squares = terms.seen(logits, labels).logsumexp(-1).square()
        losses = squares.masked_fill(~terms.valid(labels), 0)
        return terms.weigh(self.weight, losses, labels, num_items)
