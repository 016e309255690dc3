"""SimReg with changes that are under study and not part of the loss itself."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.kernels.order import Form
from simreg.kernels.reference import EPS
from simreg.loss import TEMPERATURE, WEIGHT, check_options, simreg_loss
from simreg.objectives import Reads, labels_at

CENTRES = ("none", "row", "batch")


class SimRegVariant(Rival):
    """weight · SimReg without a push, changed in one respect or several; unchanged by default.

    Args:
        weight, temperature, variant, chunk_size: as in `SimRegLoss`.
        centre: take the mean embedding of the valid tokens of the row, or of the batch, out of the
            hidden states first. SimReg itself does not change if all similarities of a row rise by
            the same amount, so it is blind to a direction that all embeddings share.
        batch: compare all tokens of the batch, not those of a row alone; without `chunk_size`.
        depths: regularize the hidden states at these fractions of the depth instead of the final
            ones (with `final`: besides), and average.
        rarity: weigh anchors by (count of their label in the row, or the batch)^-rarity, scaled
            to a mean of 1 over the valid tokens there.
        normalise: False takes h_i·h_j / τ for the similarity; choose τ near √d.
        learn_temperature: train log τ with the model; `temperature` is where it starts.
        shuffle: deal the labels of a row out again at random before they are compared, within its
            segments and chunks if there are any: as many positives, without meaning. The control
            for what the labels are worth.
        offset: compare tokens by the label so many positions later (earlier, if negative: −1 is
            the token itself); those that have none in their row and segment are left out.
        unlabelled: give all tokens the same label, so that all others are positives: what is left
            of variant "out" is log of the sum less the mean, lowest where similarities are equal.
        pull: how much the positives' term counts; 0 leaves the spreading of all tokens alone.
    """

    def __init__(
        self,
        weight: float = WEIGHT,
        temperature: float = TEMPERATURE,
        variant: str = "out",
        chunk_size: int | None = None,
        *,
        centre: str = "none",
        batch: bool = False,
        depths: Sequence[float] = (),
        final: bool = False,
        rarity: float = 0.0,
        normalise: bool = True,
        learn_temperature: bool = False,
        shuffle: bool = False,
        offset: int = 0,
        unlabelled: bool = False,
        pull: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.temperature = terms.check("temperature", temperature, 1e-6)
        check_options(Form(self.temperature, variant), chunk_size, "auto")
        self.variant, self.chunk_size = variant, chunk_size
        self.centre = terms.check_word("centre", centre, CENTRES)
        self.batch = terms.check_flag("batch", batch)
        self.reads = Reads(depths=terms.check_depths("depths", depths))
        self.final = terms.check_flag("final", final) or not depths
        self.rarity = terms.check("rarity", rarity, 0)
        self.normalise = terms.check_flag("normalise", normalise)
        self.log_temperature: nn.Parameter | None = None
        if terms.check_flag("learn_temperature", learn_temperature):
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.shuffle = terms.check_flag("shuffle", shuffle)
        self.unlabelled = terms.check_flag("unlabelled", unlabelled)
        self.by_rows = not (batch or centre == "batch" or shuffle)
        self.offset, self.pull = terms.check_whole("offset", offset), terms.check("pull", pull, 0)
        self.plain = not normalise or learn_temperature or pull != 1
        if final and not depths:
            raise ValueError("final: goes with depths; without them the final states are taken")
        if batch and chunk_size is not None:
            raise ValueError("batch: not with chunk_size, whose chunks are of one row")
        if self.plain and (variant != "out" or chunk_size is not None):
            raise ValueError(
                'normalise, learn_temperature, pull: only with variant="out", no chunk_size'
            )

    def losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        *,
        earlier: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """As `Rival`."""
        layers = [*earlier, hidden] if self.final else list(earlier)
        labels = labels_at(labels, segments, self.offset)
        if self.unlabelled:
            labels = labels.clamp_max(0)
        if self.shuffle:
            labels = _shuffled(labels, segments, self.chunk_size)
        return torch.stack([self._of(h, labels, segments) for h in layers]).mean(0)

    def _of(self, hidden: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """Per-token losses `[B, L]` of one layer."""
        h, y, g = self._centred(hidden, labels), labels, segments
        if self.batch:
            h, y = h.flatten(0, 1)[None], y.flatten()[None]
            g = None if g is None else _apart(g).flatten()[None]
        if self.plain:
            losses = self._plain(h, y, g)
        else:
            losses = simreg_loss(
                h,
                y,
                temperature=self.temperature,
                variant=self.variant,
                segments=g,
                chunk_size=self.chunk_size,
                reduction="none",
            )
        return (losses * self._weights(y)).view(labels.shape)

    def _centred(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.centre == "none":
            return hidden
        over = (0, 1) if self.centre == "batch" else (1,)
        h = terms.seen(hidden, labels)
        count = terms.valid(labels).sum(over, keepdim=True).clamp_min(1).unsqueeze(-1)
        return (h - h.sum(over, keepdim=True) / count).to(hidden.dtype)

    def _weights(self, labels: Tensor) -> Tensor:
        """What an anchor's loss counts, `[B, L]`; 1 on average over the valid ones."""
        valid = terms.valid(labels)
        if not self.rarity:
            return valid.float()
        same = (labels.unsqueeze(2) == labels.unsqueeze(1)) & valid.unsqueeze(1)
        weights = same.sum(-1).clamp_min(1).float().pow(-self.rarity).masked_fill(~valid, 0)
        count = valid.sum(-1, keepdim=True)
        return weights * (count / weights.sum(-1, keepdim=True).clamp_min(EPS))

    def _plain(self, hidden: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """Variant "out" in plain PyTorch, L×L, so that it can differ in what kernels fix."""
        tau: Tensor | float = self.temperature
        if self.log_temperature is not None:
            tau = self.log_temperature.exp()
        states = (terms.unit if self.normalise else terms.seen)(hidden, labels)
        s = terms.products(states) / tau
        pairs = terms.pairs(labels, segments)
        positives = pairs & (labels.unsqueeze(2) == labels.unsqueeze(1))
        count = positives.sum(-1)
        mean = s.masked_fill(~positives, 0).sum(-1) / count.clamp_min(1)
        # A token without candidates has no logsumexp: give it one, then drop it.
        total = s.masked_fill(~pairs & pairs.any(-1, keepdim=True), -math.inf).logsumexp(-1)
        return (total - self.pull * mean).masked_fill(count == 0, 0)


def _shuffled(
    labels: Tensor, segments: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """Labels permuted within each row, segment and chunk; ignored positions stay.

    Drawn from the labels themselves: the same batch is dealt alike after a resume, and the
    random numbers of the training are those of an unshuffled run.
    """
    generator = torch.Generator("cpu").manual_seed(int(labels.sum()) % 2**32)
    dealt = labels.clone()
    for row, pools in zip(dealt, _pools(labels, segments, chunk_size), strict=True):
        where = terms.valid(row).nonzero().squeeze(1)
        order = torch.randperm(len(where), generator=generator, device="cpu").to(row.device)
        source, pool = where[order], pools[where]
        # Sorted by pool, the places and what is dealt to them stand side by side.
        row[where[pool.argsort(stable=True)]] = row[source[pools[source].argsort(stable=True)]]
    return dealt


def _pools(labels: Tensor, segments: Tensor | None, chunk_size: int | None) -> Tensor:
    """`[B, L]`: numbers alike where labels of a row may meet: one segment, one chunk."""
    length = labels.shape[1]
    chunks = torch.arange(length, device=labels.device) // (chunk_size or length or 1)
    if segments is None:
        return chunks.expand_as(labels)
    return segments.long() * length + chunks


def _apart(segments: Tensor) -> Tensor:
    """Segment ids that no two rows share."""
    rows = torch.arange(len(segments), device=segments.device)
    return segments.long() * len(segments) + rows[:, None]
