"""Standard errors of mean cosines over pairs of tokens, of which each is in many pairs.

The mean of a token's mean cosine to others of the sample is a U-statistic: a row moves it by its
own tokens, and by being what those of other rows are compared with. Errors of the tokens' means
alone are too small, by half where all pairs count alike (Hoeffding 1948).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from simreg.geometry.classes import unit_sums
from simreg.geometry.sample import Sample, unit


def of_rows(
    sample: Sample,
    cosines: tuple[Tensor, Tensor],
    masks: Mapping[str, Tensor],
    centre: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Group -> how the rows move its mean intra and inter cosine, times its tokens with a value.

    Each `[R]` float64 with sum 0, R the rows of the sample: derivatives by the weight of a row (the
    infinitesimal jackknife). `centre`, which moves them little, is taken as given.

    Args:
        cosines: `token_cosines(sample, centre)`.
        masks: bool `[T]`, of whole classes: all tokens of a label or none.
        centre: `[d]`.
    """
    place, count, sums = unit_sums(sample, centre)
    total, shift = len(sample), 0 if centre is None else centre
    intra, inter = (x.nan_to_num(0) for x in cosines)
    rows, row = torch.unique(sample.rows, return_inverse=True)
    own_intra, own_inter = (
        torch.zeros(len(count), dtype=torch.float64).index_add_(0, place, x) for x in (intra, inter)
    )
    others = (total - count).double()  # tokens of other classes
    share = torch.where(others > 0, 1 / others, 0)
    member = torch.zeros(len(masks), len(count), dtype=torch.float64)
    for g, mask in enumerate(masks.values()):
        member[g, place[mask]] = 1
    towards = (member * share) @ sums  # [G, d]
    level = (member * share) @ own_inter  # [G]
    inside = [(mask & (count[place] > 1), mask & (others[place] > 0)) for mask in masks.values()]
    means = [(intra[a].mean(), inter[b].mean()) for a, b in inside]
    found = torch.zeros(len(masks), 2, len(rows), dtype=torch.float64)
    for part, hidden in sample.blocks():
        e, c, to = unit(hidden - shift), place[part], row[part]
        alone = (own_intra[c] - intra[part]) / (count[c] - 1).clamp_min(1)
        partner = (own_inter[c] - (e * sums[c]).sum(-1)) * share[c]
        for g, ((same, other), (m_intra, m_inter)) in enumerate(zip(inside, means, strict=True)):
            moved = 2 * intra[part] - m_intra - alone
            found[g, 0].index_add_(0, to, torch.where(same[part], moved, 0))
            own = torch.where(other[part], inter[part] - m_inter + partner, 0)
            found[g, 1].index_add_(0, to, e @ towards[g] - level[g] + own)
    return {name: (found[g, 0], found[g, 1]) for g, name in enumerate(masks)}
