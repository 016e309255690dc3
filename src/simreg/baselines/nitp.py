"""NITP: the final hidden state also predicts an early layer's state of the next token."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.kernels.reference import EPS
from simreg.objectives import Reads


class NITP(Rival):
    """weight · Σ_t (1 − cos(P(h_t), z_{t+1})), z a hidden state at a fraction `depth` of the depth.

    No gradient flows into z. P(h) = W_down (silu(W_gate h) · W_up h), `expansion` times as wide
    inside, is trained with the model and not needed after. A token has a target if the position
    after it is of its row and segment and both have a label (so the last of a row has none).

    Source: "NITP: Next Implicit Token Prediction for LLM Pre-training", arXiv 2605.24956: depth
    about 0.2, weight 1.0, falling to 0.6 as models grow. A reconstruction: its code was not out
    when this was written. The initialisation of P, normal(0, 0.02), taking z without a norm and the
    rule on labels are ours.
    """

    def __init__(
        self, weight: float = 1.0, depth: float = 0.2, expansion: int = 4, *, hidden_size: int
    ) -> None:
        super().__init__(weight)
        self.reads = Reads(depths=(terms.check("depth", depth, 0.001, 1),))
        inner = terms.check_count("expansion", expansion, 1) * hidden_size
        self.gate = nn.Linear(hidden_size, inner, bias=False)
        self.up = nn.Linear(hidden_size, inner, bias=False)
        self.down = nn.Linear(inner, hidden_size, bias=False)
        for layer in (self.gate, self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)

    def losses(
        self, hidden: Tensor, labels: Tensor, segments: Tensor | None, *, earlier: Sequence[Tensor]
    ) -> Tensor:
        """As `Rival`."""
        (shallow,) = earlier
        targets = terms.unit(shallow.detach(), labels)[:, 1:]
        states = terms.seen(hidden, labels)[:, :-1]
        guesses = F.normalize(self.project(states).to(states.dtype), dim=-1, eps=EPS)
        losses = 1 - (guesses * targets).sum(-1)
        return F.pad(losses.masked_fill(~terms.together(labels, segments, 1), 0), (0, 1))

    def project(self, states: Tensor) -> Tensor:
        """P, in the dtype of its weights or of autocast."""
        states = states.to(self.gate.weight.dtype)
        projected: Tensor = self.down(F.silu(self.gate(states)) * self.up(states))
        return projected
