"""Loss-based reweighting: how much a token counts follows from its loss."""

import torch
from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.objectives import Reads

STRATEGIES = ("linupper", "quadratic", "extremes")
UNITS = ("token", "sequence")


class Reweighting(Rival):
    """weight · Σ_t (w_t − 1) · CE_t, so that at weight 1 the whole objective is Σ_t w_t · CE_t.

    w_t = exp(strength · f(l_t)), divided by its mean, without gradient; l_t is CE_t scaled to run
    from −1 to 1, and f the strategy:

    - "linupper": min(l + 1, 1): low losses count less, from the middle up all the same;
    - "quadratic": 1 − l²: the middle counts most;
    - "extremes": |l|: the middle counts least.

    Source: Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language
    Model Pretraining", arXiv 2502.06733, and its code; strength is 1 / r of theirs (there near 0
    in a warm-up, here constant unless the run has a schedule). As there with `unit` "sequence": l_t
    is the mean loss of the row, scaled over the rows of the call. With "token" it is adapted: the
    scaling and the mean of w are over the tokens of a row that have a label, whatever their
    segments, so that rows stay independent and accumulation over whole rows is exact. But the label
    itself then decides how much a token counts, so that the best predictions are no longer the
    probabilities (cross-entropy so weighted is no proper scoring rule).
    """

    reads = Reads(logits=True)

    def __init__(
        self,
        weight: float = 1.0,
        strategy: str = "linupper",
        strength: float = 1.0,
        unit: str = "token",
    ) -> None:
        super().__init__(weight)
        self.strength = terms.check("strength", strength, 0, 50)
        self.strategy = terms.check_word("strategy", strategy, STRATEGIES)
        self.unit = terms.check_word("unit", unit, UNITS)
        self.by_rows = unit == "token"

    def losses(
        self, hidden: Tensor, labels: Tensor, segments: Tensor | None, *, logits: Tensor
    ) -> Tensor:
        """As `Rival`."""
        losses, valid = terms.cross_entropy(logits, labels), terms.valid(labels)
        known = losses.detach()
        if self.unit == "token":
            return (self.weights(known, valid) - 1) * losses
        count = valid.sum(1)
        means = (known * valid).sum(1) / count.clamp_min(1)
        weights = self.weights(means[None], (count > 0)[None], count[None])
        return (weights.T - 1) * losses

    def weights(self, losses: Tensor, valid: Tensor, counts: Tensor | None = None) -> Tensor:
        """w `[B, L]`, of mean 1 over the `valid` entries of each row, each `counts` times; 1
        elsewhere."""
        high = losses.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        low = losses.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        scaled = (2 * losses - high - low) / (high - low).clamp_min(1e-6)
        if self.strategy == "linupper":
            chosen = (scaled + 1).clamp_max(1)
        elif self.strategy == "quadratic":
            chosen = 1 - scaled.square()
        else:
            chosen = scaled.abs()
        raw = (self.strength * (chosen - 1)).exp().masked_fill(~valid, 0)
        times = valid if counts is None else counts
        mean = (raw * times).sum(1, keepdim=True) / times.sum(1, keepdim=True)
        return (raw / mean).masked_fill(~valid, 1)
