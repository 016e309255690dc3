"""Deep supervision: the LM head also reads a layer within the model."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.kernels.reference import EPS
from simreg.objectives import Reads


class DeepSupervision(Rival):
    """weight · Σ_t −log softmax(head(h_t / rms(h_t)))_y, h the hidden states at `depth`.

    Source: Lee et al. 2015, "Deeply-Supervised Nets", arXiv 1409.5185; with the model's own head,
    as the early exits of LayerSkip have it (Elhoushi et al. 2024, arXiv 2404.16710). Adapted: one
    layer and one weight throughout, and a norm without gain in place of the model's final norm.
    Logits are those of the head itself, before a scale or a soft cap that the model gives its own.
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
        """As `Rival`; logits of half precision where the states are, as the model's own are.

        ValueError for a head that takes states of another width.
        """
        (states,) = earlier
        if states.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"depth: the LM head takes states of width {hidden.shape[-1]}, those of the layer "
                f"have {states.shape[-1]}"
            )
        units = F.rms_norm(terms.seen(states, labels), states.shape[-1:], eps=EPS)
        half = states.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(states.device.type, states.dtype) if half else nullcontext():
            logits: Tensor = head(units)
        return terms.cross_entropy(logits, labels)
