"""Neural collapse: how near classes come to points, and their means to a simplex and to the head.

Papyan, Han, Donoho (2020), doi:10.1073/pnas.2015509117, as applied to language models by Wu and
Papyan, "Linguistic Collapse" (arXiv 2405.17767). μ_c are class means, m_c = μ_c − (1/K) Σ μ_c.
Norms of K×K matrices are taken from d×d ones: ‖A Bᵀ‖²_F = ⟨AᵀA, BᵀB⟩.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from simreg.geometry.classes import Classes
from simreg.geometry.sample import Sample, unit

_LEAST = 3
"""Classes that NC2 and NC3 take: of two, centred means are opposite and equal whatever they are."""
PAIRS = 20_000
"""Pairs of classes that CDNV is estimated from, where there are more."""
_TILE = 256


class Estimate(NamedTuple):
    """A mean over pairs of classes; `se` is its sampling error, 0 if all pairs were taken."""

    mean: float
    se: float
    median: float
    pairs: int


def nc1(found: Classes) -> float:
    """Collapse of variability: tr(Σ_W Σ_B⁺) / K, Σ_B = (1/K) Σ m_c m_cᵀ (Papyan et al.)."""
    if len(found) < 2:
        return math.nan
    m = found.centred
    between = m.T @ m / len(found)
    inverse = torch.linalg.pinv(between, hermitian=True)
    return float((inverse * found.within).sum()) / len(found)


def cdnv(found: Classes, pairs: int = PAIRS, seed: int = 0) -> Estimate:
    """Class-distance normalized variance: the mean over pairs of classes of
    (v_i + v_j) / (2 ‖μ_i − μ_j‖²) (Galanti, György, Hutter, arXiv 2112.15121).

    All pairs if there are at most `pairs`, else so many drawn independently.
    """
    k = len(found)
    if k < 2:
        return Estimate(math.nan, math.nan, math.nan, 0)
    exact = k * (k - 1) // 2 <= pairs
    if exact:
        i, j = torch.triu_indices(k, k, 1)
    else:
        draw = torch.Generator().manual_seed(seed)
        i = torch.randint(k, (pairs,), generator=draw)
        j = (i + torch.randint(1, k, (pairs,), generator=draw)) % k  # never i
    spread = (found.variance[i] + found.variance[j]) / 2
    distances = [
        (found.mean[a] - found.mean[b]).square().sum(-1)
        for a, b in zip(torch.split(i, _TILE), torch.split(j, _TILE), strict=True)
    ]
    values = spread / torch.cat(distances)
    se = 0.0 if exact else float(values.std()) / math.sqrt(len(values))
    return Estimate(float(values.mean()), se, float(values.median()), len(values))


def equinorm(found: Classes) -> float:
    """NC2, equal norms: the standard deviation of ‖m_c‖ over their mean (population)."""
    norms = found.centred.norm(dim=-1)
    return float(norms.std(correction=0) / norms.mean()) if len(found) >= _LEAST else math.nan


def equiangular(found: Classes) -> tuple[float, float]:
    """NC2, equal angles: mean and standard deviation of cos(m_i, m_j) over pairs i ≠ j.

    A simplex has −1/(K − 1) and 0. With u_c = m_c/‖m_c‖, the sum of cosines over ordered pairs is
    ‖Σ u_c‖² − K and that of their squares ‖UᵀU‖²_F − K.
    """
    k = len(found)
    if k < _LEAST:
        return math.nan, math.nan
    u = unit(found.centred)
    own = u.square().sum(-1)
    mean = float(u.sum(0).square().sum() - own.sum()) / (k * (k - 1))
    square = float((u.T @ u).square().sum() - own.square().sum()) / (k * (k - 1))
    return mean, math.sqrt(max(square - mean * mean, 0.0))


def etf_error(found: Classes) -> float:
    """NC2, distance to a simplex: ‖M Mᵀ/‖M Mᵀ‖_F − (I − J/K)/√(K − 1)‖_F, rows of M the m_c.

    Kothapalli (arXiv 2206.04041). 0 for a simplex equiangular tight frame, at most √2.
    """
    return _structure_error(found.centred, found.centred)


def duality_error(found: Classes, head: Tensor) -> float:
    """NC3, the same distance for W Mᵀ: W `[K, d]` holds the LM-head rows of the classes."""
    return _structure_error(head.double(), found.centred)


def _structure_error(a: Tensor, b: Tensor) -> float:
    """√(2 − 2⟨A Bᵀ, E⟩ / ‖A Bᵀ‖_F), where E = (I − J/K)/√(K − 1) has norm 1; `b` is centred."""
    k = len(a)
    if k < _LEAST:
        return math.nan
    inner = float((a * b).sum()) / math.sqrt(k - 1)  # J adds nothing: the rows of b sum to 0
    norm = math.sqrt(float(((a.T @ a) * (b.T @ b)).sum()))
    return math.sqrt(max(2 - 2 * inner / norm, 0.0)) if norm else math.nan


def alignment(found: Classes, head: Tensor) -> Tensor:
    """NC3, `[K]`: cos(m_c, w_c − w̄), w̄ the mean of the classes' rows of the head `[K, d]`.

    Softmax does not change if a vector is added to all rows, so rows are compared without theirs.
    """
    rows = head.double()
    return (unit(found.centred) * unit(rows - rows.mean(0))).sum(-1)


def nearest_other(found: Classes, others: Classes, centre: Tensor | None = None) -> Tensor:
    """`[K]`: the greatest cosine of a class mean μ_c to that of another class.

    `centre` `[d]` is subtracted from the means first: those that share a direction are alike
    whatever their class. Tiles of `others` are compared and dropped; NaN if there is no other
    class.
    """
    shift = 0 if centre is None else centre
    own, theirs = unit(found.mean - shift), unit(others.mean - shift)
    best = torch.full((len(found),), -torch.inf, dtype=torch.float64)
    for start in range(0, len(found), _TILE):
        part = slice(start, start + _TILE)
        for first in range(0, len(others), _TILE):
            columns, ids = theirs[first : first + _TILE], others.ids[first : first + _TILE]
            cosines = own[part] @ columns.T
            cosines[found.ids[part, None] == ids] = -torch.inf
            best[part] = torch.maximum(best[part], cosines.amax(1))
    return best.where(best > -torch.inf, torch.nan)


@torch.no_grad()
def agreement(sample: Sample, found: Classes, head: Tensor, bias: Tensor | None = None) -> Tensor:
    """NC4, `[T]` float64, 0 or 1: does the head choose the class whose mean is nearest?

    Both choose among the K classes of `found`: argmax_c w_c·h + b_c against
    argmin_c ‖h − μ_c‖. `head` `[K, d]`, `bias` `[K]`.
    """
    centres, rows = found.mean.float(), head.float()
    half = centres.square().sum(-1) / 2
    agree = torch.empty(len(sample), dtype=torch.float64)
    for part, hidden in sample.blocks(max(64, min(512, rows.shape[-1]))):
        h = hidden.float()
        scores = h @ rows.T
        chosen = (scores if bias is None else scores + bias.float()).argmax(1)
        agree[part] = (chosen == (h @ centres.T - half).argmax(1)).double()
    return agree
