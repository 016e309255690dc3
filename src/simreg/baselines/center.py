"""Centre loss: embeddings near the running centre of those with their label."""

import torch
from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import Rival


class Center(Rival):
    """weight · Σ_t ½ ‖e_t − c_y‖², e the embedding divided by its norm, c_y its label's centre.

    After each call in training mode the centre of a label that n tokens of it have moves by
    alpha · Σ (e − c) / (1 + n): most of the way, by alpha, to their mean. Centres get no gradient,
    start at 0 (where they do not pull yet) and are saved with the state.

    Source: Wen et al. 2016, "A Discriminative Feature Learning Approach for Deep Face Recognition"
    (ECCV), equations 2 to 4, alpha 0.5. Adapted: embeddings are normalised, so that the loss runs
    from 0 to 2 whatever the scale of the model's norm; the centres, being means, stay inside the
    sphere. Centres are of the whole run, not of a row, and those that a call sees depend on the
    calls before: accumulation is exact only for given centres. Under DDP, which broadcasts buffers,
    all processes see those of the first, which its rows alone have moved.
    """

    by_rows = False  # the centres that a call sees are those that the calls before it left
    centers: Tensor

    def __init__(
        self, weight: float = 0.1, alpha: float = 0.5, *, hidden_size: int, vocab_size: int
    ) -> None:
        super().__init__(weight)
        self.alpha = terms.check("alpha", alpha, 0, 1)
        self.register_buffer("centers", torch.zeros(vocab_size, hidden_size))

    def losses(self, hidden: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """As `Rival`."""
        units = terms.unit(hidden, labels)
        here = terms.valid(labels)
        away = units - self.centers[labels.clamp_min(0)].to(units.dtype)
        away = away.masked_fill(~here.unsqueeze(-1), 0)
        if self.training:
            self._move(away.detach(), labels.clamp_min(0), here)
        return 0.5 * away.square().sum(-1)

    def _move(self, away: Tensor, labels: Tensor, here: Tensor) -> None:
        index = labels.flatten()
        counts = away.new_zeros(len(self.centers)).index_add(0, index, here.flatten().to(away))
        steps = self.alpha * away.flatten(0, 1) / (1 + counts[index]).unsqueeze(-1)
        self.centers.index_add_(0, index, steps.to(self.centers))
