"""Tokens by the frequency of their label and by position, and means over such groups."""

import math

import torch
from torch import Tensor

DECILES = 10
PARTS = {"head": range(3), "torso": range(3, 7), "tail": range(7, 10)}
"""Part -> its deciles, counted from 0: frequent, middling and rare labels."""


def deciles(labels: Tensor, frequency: Tensor) -> Tensor:
    """`[T]` int64, 0 to 9: the decile of *token mass* of each token's label, 0 the most frequent.

    Labels are sorted by `frequency` `[V]` (counts in the training text), most frequent first, and
    cut where tenths of the tokens of the sample are reached. So each decile holds about a tenth of
    the tokens and has the same precision, but few classes at the head and many in the tail.
    (Deciles of classes would put nearly all tokens into the first one.) A label is never split: it
    goes where the middle of its mass falls, so a very frequent one can leave deciles empty.
    """
    counts = torch.bincount(labels, minlength=len(frequency))
    order = torch.argsort(frequency, descending=True, stable=True)
    mass = counts[order].cumsum(0) - counts[order] / 2
    place = (mass * DECILES / max(len(labels), 1)).long().clamp(0, DECILES - 1)
    return torch.empty_like(place).scatter_(0, order, place)[labels]


def position_bins(positions: Tensor, length: int, bins: int = 4) -> Tensor:
    """`[T]` int64: which of `bins` equal stretches of a row of `length` positions a token is in."""
    return (positions * bins // max(length, 1)).clamp_max(bins - 1)


def mean_se(values: Tensor, rows: Tensor) -> tuple[float, float, int]:
    """Mean over the values `[T]` that are not NaN, its standard error, their number.

    Tokens of a row are not independent, so the error is that of a ratio of sums over rows
    (linearized, clustered by row): √(R/(R − 1) Σ_r (Σ_{i∈r} (x_i − x̄))²) / n.
    """
    kept = ~values.isnan()
    x, n = values[kept], int(kept.sum())
    if not n:
        return math.nan, math.nan, 0
    mean = x.mean()
    clusters, place = torch.unique(rows[kept], return_inverse=True)
    sums = torch.zeros(len(clusters), dtype=x.dtype).index_add_(0, place, x - mean)
    return float(mean), se_of_rows(sums, n), n


def se_of_rows(moved: Tensor, n: int) -> float:
    """The standard error of a mean of `n` tokens that rows move by `moved` `[R]` / n each; NaN for
    one row."""
    r = len(moved)
    if r < 2 or not n:
        return math.nan
    return math.sqrt(r / (r - 1) * float(moved.square().sum())) / n
