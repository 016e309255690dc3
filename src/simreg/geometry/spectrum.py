"""How many directions embeddings use, from their covariance: one pass, memory O(d²)."""

import math
from typing import NamedTuple

import torch

from simreg.geometry.sample import Sample, unit


class Spectrum(NamedTuple):
    """Measures of isotropy of a sample of T hidden states of width d.

    effective_rank: exp of the entropy of λ/Σλ, the eigenvalues of the centred covariance, 1 to d
        (Roy and Vetterli, EUSIPCO 2007, there of singular values; of the covariance as in NITP).
    isoscore: (P − 1)/(d − 1) with the participation ratio P = (Σλ)²/Σλ², to which IsoScore
        (Rudman et al., arXiv 2108.07344) reduces: 0 for a line, 1 for a sphere.
    pair_cos: the mean cosine of two different tokens, over all pairs: (‖Σe‖² − Σ‖e‖²)/(T(T − 1)).
    """

    effective_rank: float
    isoscore: float
    pair_cos: float


def spectrum(sample: Sample) -> Spectrum:
    """The spectrum of a sample; NaN where it has fewer than two tokens or no spread."""
    n, d = len(sample), sample.hidden.shape[-1]
    if n < 2:
        return Spectrum(math.nan, math.nan, math.nan)
    sums, directions = torch.zeros(2, d, dtype=torch.float64)
    lengths = 0.0
    for _, hidden in sample.blocks():
        e = unit(hidden)
        sums += hidden.sum(0)
        directions += e.sum(0)
        lengths += float(e.square().sum())
    mean = sums / n
    covariance = torch.zeros(d, d, dtype=torch.float64)
    for _, hidden in sample.blocks():  # a second pass: differences of large squares would cancel
        apart = hidden - mean
        covariance += apart.T @ apart
    pair = (float(directions.square().sum()) - lengths) / (n * (n - 1))
    values = torch.linalg.eigvalsh(covariance / n).clamp_min(0)
    total = float(values.sum())
    if total == 0:
        return Spectrum(math.nan, math.nan, pair)
    entropy = float(torch.special.entr(values / total).sum())
    ratio = total**2 / float(values.square().sum())
    return Spectrum(math.exp(entropy), (ratio - 1) / (d - 1) if d > 1 else math.nan, pair)
