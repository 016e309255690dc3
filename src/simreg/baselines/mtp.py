"""Multi-token prediction without heads of its own: the logits also score later tokens."""

from torch import Tensor, nn

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.objectives import Reads


class MTP(Rival):
    """weight · Σ_t mean_{k=2..horizon} −log p_t(y_{t+k−1}), 0 for what lies beyond the segment.

    p_t is the model's one distribution at t, asked for the next token and, less, for those after.
    The target y_{t+k−1} is the token at position t + k: that position is in the row, and of the
    segment of t. So the label of a row's last position, of a token beyond the row, is no target.

    Source: modded-nanogpt (KellerJordan/modded-nanogpt, pull request 178), where the tokens two and
    three ahead have weights 0.5 and 0.25 beside 1 for the next, gone after two thirds and one third
    of the run, on a stream that runs on across documents. Adapted: one weight for all of them, and
    never across segments. While it is above 0 the best p_t is not the distribution of the next
    token, so let it go to 0 (`auxiliary.schedule: decay` in a run). Not the heads or modules of
    Gloeckle et al. 2024 (arXiv 2404.19737) and DeepSeek-V3.
    """

    reads = Reads(logits=True)

    def __init__(self, weight: float = 0.3, horizon: int = 3) -> None:
        super().__init__(weight)
        self.horizon = terms.check_count("horizon", horizon, 2)

    def losses(
        self, hidden: Tensor, labels: Tensor, segments: Tensor | None, *, logits: Tensor
    ) -> Tensor:
        """As `Rival`."""
        wide = terms.seen(logits, labels)
        normaliser = wide.logsumexp(-1)
        losses = 0 * normaliser  # rows of two tokens have no more, and their gradient is 0
        for k in range(2, min(self.horizon, labels.shape[1] - 1) + 1):
            known = terms.together(labels, segments, k - 1)[:, :-1]
            if segments is not None:  # the label may be the first token of the next one
                known = known & (segments[:, :-k] == segments[:, k:])
            later = normaliser[:, :-k] - terms.pick(wide[:, :-k], labels[:, k - 1 : -1])
            later = later.masked_fill(~known, 0) / (self.horizon - 1)
            losses = losses + nn.functional.pad(later, (0, k))
        return losses
