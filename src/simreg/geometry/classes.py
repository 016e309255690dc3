"""A class is the set of tokens with one label: counts, means, variances and cosines."""

from dataclasses import dataclass

import torch
from torch import Tensor

from simreg.geometry.sample import Sample, unit


@dataclass(frozen=True)
class Classes:
    """Statistics of K classes, all float64 but the integers.

    `ids`, `count`: `[K]` int64. `mean` `[K, d]`: μ_c of the hidden states. `variance` `[K]`: the
    mean of ‖h − μ_c‖² over the class (not divided by n − 1). `within` `[d, d]`: Σ_W, the mean of
    (h − μ_c)(h − μ_c)ᵀ over the tokens of all K classes. `centre` `[d]`: μ, their
    mean; `total`: the mean of ‖h − μ‖² over them.
    """

    ids: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor
    within: Tensor
    centre: Tensor
    total: float

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def centred(self) -> Tensor:
        """`[K, d]`: class means minus their own mean (every class counts once)."""
        return self.mean - self.mean.mean(0)

    @property
    def intra_variance(self) -> float:
        """tr Σ_W: the mean over tokens of ‖h − μ_c‖²; NaN without tokens."""
        return float(self.within.trace()) if len(self) else float("nan")

    @property
    def variance_share(self) -> float:
        """tr Σ_W / tr Σ_T, the part of all variance that lies within classes: 0 to 1, scale-free.

        The rest lies between them (law of total variance)."""
        return self.intra_variance / self.total if self.total else float("nan")


def classes(sample: Sample, least: int = 1) -> Classes:
    """The classes that have at least `least` tokens, in two passes; memory O(K·d + d²)."""
    labels, counts = torch.unique(sample.labels, return_counts=True)
    ids, count = labels[counts >= least], counts[counts >= least]
    sample = sample.where(torch.isin(sample.labels, ids))
    place = torch.searchsorted(ids, sample.labels)
    d = sample.hidden.shape[-1]
    sums = torch.zeros(len(ids), d, dtype=torch.float64)
    for part, hidden in sample.blocks():
        sums.index_add_(0, place[part], hidden)
    mean = sums / count[:, None]
    centre = sums.sum(0) / max(len(sample), 1)
    variance = torch.zeros(len(ids), dtype=torch.float64)
    within, total = torch.zeros(d, d, dtype=torch.float64), 0.0
    for part, hidden in sample.blocks():
        apart = hidden - mean[place[part]]
        variance.index_add_(0, place[part], apart.square().sum(-1))
        within += apart.T @ apart
        total += float((hidden - centre).square().sum())
    n = max(len(sample), 1)
    return Classes(ids, count, mean, variance / count, within / n, centre, total / n)


def unit_sums(sample: Sample, centre: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(place, count, sums)`: of each token its class `[T]`, of each class its tokens `[K]` and the
    sum `[K, d]` float64 of their unit vectors, `centre` being subtracted before."""
    ids, place, count = torch.unique(sample.labels, return_inverse=True, return_counts=True)
    device, shift = sample.hidden.device, 0 if centre is None else centre
    sums = torch.zeros(len(ids), sample.hidden.shape[-1], dtype=torch.float64, device=device)
    for part, hidden in sample.blocks():
        sums.index_add_(0, place[part], unit(hidden - shift))
    return place, count, sums


def token_cosines(sample: Sample, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(intra, inter)`, each `[T]` float64: a token's mean cosine to the others of its class, and
    to the tokens of all other classes; NaN where there are none. `centre` `[d]` is subtracted from
    hidden states first: embeddings that share a direction are alike whatever their class.

    From sums of unit vectors s_c = Σ e_j, S = Σ_c s_c, exactly and without pairs:
    intra_i = (e_i·s_c − e_i·e_i) / (n_c − 1), inter_i = e_i·(S − s_c) / (T − n_c).
    """
    place, count, sums = unit_sums(sample, centre)
    device, shift = sample.hidden.device, 0 if centre is None else centre
    everything = sums.sum(0)
    intra, inter = torch.empty(2, len(sample), dtype=torch.float64, device=device)
    for part, hidden in sample.blocks():
        e, own, n = unit(hidden - shift), sums[place[part]], count[place[part]]
        same = (e * own).sum(-1)
        intra[part] = (same - e.square().sum(-1)) / (n - 1)  # 0/0 = NaN for a class of one
        inter[part] = (e @ everything - same) / (len(sample) - n)
    intra[count[place] == 1] = torch.nan  # rounding may leave x/0 = ±inf
    inter[count[place] == len(sample)] = torch.nan
    return intra, inter
