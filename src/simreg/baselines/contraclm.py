"""ContraCLM, token level: a token is found again among all others under another dropout."""

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.baselines import terms
from simreg.baselines.rival import Rival


class ContraCLM(Rival):
    """weight · Σ_i ½ Σ_v −log(exp(s(v_i, v'_i)) / Σ exp(s(v_i, ·))), s the cosine over temperature.

    v and v' are the two views of the final embeddings, each with a dropout of its own, and every
    token of either view is an anchor. The sum in the denominator runs over its positive (the same
    token in the other view) and over the other tokens of its row and segment in both views.

    Source: Jain et al. 2023, "ContraCLM", arXiv 2210.01185, L_Tok; temperature 0.05. There the
    views come from two forward passes of a model with dropout. LLaMA has none, so here, as under
    `functional_dropout` in their code (amazon-science/ContraCLM), both come from one pass: two
    dropout masks on its final hidden states, from torch's global generator. Rows count by their
    tokens; there each sequence counts the same. The sequence-level loss is left out. In evaluation
    mode nothing is dropped.
    """

    by_rows = False  # the masks of a row follow from the rows drawn for before it

    def __init__(
        self, weight: float = 1.0, temperature: float = 0.05, dropout: float = 0.1
    ) -> None:
        super().__init__(weight)
        self.temperature = terms.check("temperature", temperature, 1e-3)
        self.dropout = terms.check("dropout", dropout, 0, 0.9)

    def losses(self, hidden: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """As `Rival`; takes memory for 2L × 2L cosines of each row."""
        states = terms.seen(hidden, labels)
        views = [F.dropout(states, self.dropout, self.training) for _ in range(2)]
        units = torch.cat([terms.unit(view, labels) for view in views], 1)
        scores = terms.products(units) / self.temperature

        length = labels.shape[1]
        # The positive is met by ignored tokens too, whose loss then is 0 and not log 0.
        positive = torch.eye(2 * length, dtype=torch.bool, device=labels.device).roll(length, 0)
        met = terms.pairs(labels, segments).repeat(1, 2, 2) | positive
        normalisers = scores.masked_fill(~met, -torch.inf).logsumexp(-1)
        return normalisers.view(-1, 2, length).mean(1) - scores.diagonal(length, 1, 2)
