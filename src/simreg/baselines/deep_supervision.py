"""Deep supervision: the LM head also reads a layer within the model."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.objectives import Reads


class DeepSupervision(Rival):
    """weight · Σ_t −log softmax(head(h_t / rms(h_t)))_y, h the hidden states at `depth`.

    Source: Lee et al. 2015, "Deeply-Supervised Nets", arXiv 1409.5185; with the model's own head,
    as the early exits of LayerSkip have it (Elhoushi et al. 2024, arXiv 2404.16710). Adapted: one
    layer and one weight throughout, and a norm without gain in place of the model's final norm.
    """

    def __init__(self, weight: float = 0.3, depth: float = 0.5) -> None:
        super().__init__(weight)
        self.reads = Reads(head=True, depths=(terms.check("depth", depth, 0.001, 1),))

    def losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        *,
        head: nn.Module,
        earlier: Sequence[Tensor],
    ) -> Tensor:
        """As `Rival`; the logits are computed in the dtype of the head, or of autocast."""
        (states,) = earlier
        units = F.rms_norm(terms.seen(states, labels), states.shape[-1:], eps=terms.EPS)
        logits: Tensor = head(units.to(next(head.parameters()).dtype))
        return terms.cross_entropy(logits, labels)
