"""A tile of pairs of tokens in plain PyTorch: what it adds to each token's sums, its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels.order import Ends, Form, Sums
from simreg.kernels.reference import EPS


class Tile(NamedTuple):
    """The pairs (rows × cols) of some batch rows, and which of them count."""

    batch: slice
    rows: slice
    cols: slice
    candidate: Tensor | None  # None: every pair is one
    positive: Tensor | None  # None: no pair is one

    @property
    def negative(self) -> Tensor | None:
        """The candidates that are not positives; None: every pair is one."""
        if self.positive is None:
            return self.candidate
        return ~self.positive if self.candidate is None else self.candidate & ~self.positive

    def denominator(self, variant: str) -> Tensor | None:
        """The pairs in the denominator; None: every pair."""
        return self.negative if variant == "decoupled" else self.candidate


def block(device: torch.device) -> int:
    """Tokens on each side of a tile, which fits the cache of a core, or fills a GPU."""
    return 512 if device.type == "cpu" else 2048


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which similarities, exponentials and sums are computed."""
    return torch.promote_types(dtype, torch.float32)


class _LogSumExp:
    """A logsumexp over columns that arrive tile by tile; exact at any temperature."""

    def __init__(self, like: Tensor) -> None:
        self.top = torch.full_like(like, -torch.inf)
        self.total = torch.zeros_like(like)

    def add(self, batch: slice, span: slice, s: Tensor, mask: Tensor | None, dim: int) -> None:
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf)
        top, total = self.top[batch, span], self.total[batch, span]
        new = torch.maximum(top, s.amax(dim))
        finite = new.masked_fill(new == -torch.inf, 0)
        total.mul_((top - finite).exp_()).add_((s - finite.unsqueeze(dim)).exp_().sum(dim))
        top.copy_(new)

    def value(self) -> Tensor:
        return logarithm(self.top, self.total)


def logarithm(top: Tensor, total: Tensor) -> Tensor:
    """Of a sum of exponentials below the largest exponent; −inf without any."""
    return total.log() + top


class Running:
    """`Sums` over the pairs of each token, whose tiles arrive one by one."""

    def __init__(self, like: Tensor, form: Form) -> None:
        """`like`: ``[B, L]``, a value for each token."""
        self.form = form
        self.excess = torch.zeros_like(like) if form.push else None
        self.positive, self.negative = torch.zeros_like(like), torch.zeros_like(like)
        self.denominator, self.numerator = _LogSumExp(like), _LogSumExp(like)

    def add(self, s: Tensor, tile: Tile, span: slice, dim: int) -> None:
        """Add similarities ``[B', rows, cols]`` to the tokens of `span`, summed over `dim`."""
        self.denominator.add(tile.batch, span, s, tile.denominator(self.form.variant), dim)
        self.negative[tile.batch, span] += _sum(s, tile.negative, dim)
        if self.excess is not None:
            above = (s - self.form.edge).relu_()
            self.excess[tile.batch, span] += _sum(above, tile.candidate, dim)
        if tile.positive is not None:
            self.positive[tile.batch, span] += _sum(s, tile.positive, dim)
            if self.form.variant == "in":
                self.numerator.add(tile.batch, span, s, tile.positive, dim)

    def sums(self) -> Sums:
        """What was added; "decoupled" lacks what `Gaps` sums."""
        numerator = self.numerator.value() if self.form.variant == "in" else None
        lse = self.denominator.value()
        return Sums(lse, self.positive, self.negative, numerator, excess=self.excess)


class Gaps:
    """Over positives: Σ softplus(lse − s) and Σ sigmoid(lse − s), for "decoupled"."""

    def __init__(self, lse: Tensor) -> None:
        self.lse = lse
        self.both = lse.new_zeros(2, *lse.shape)
        self.softplus, self.slope = self.both

    def add(self, s: Tensor, tile: Tile, span: slice, dim: int) -> None:
        """As `Running.add`, of a tile that has positives."""
        assert tile.positive is not None
        gap = self.lse[tile.batch, span].unsqueeze(dim) - s
        softplus = (-F.logsigmoid(-gap)).masked_fill_(~tile.positive, 0)
        self.softplus[tile.batch, span] += softplus.sum(dim)
        self.slope[tile.batch, span] += gap.sigmoid_().masked_fill_(~tile.positive, 0).sum(dim)


def _sum(s: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    return (s if mask is None else s.masked_fill(~mask, 0)).sum(dim)


def gradient(s: Tensor, tile: Tile, rows: Ends, cols: Ends, form: Form) -> Tensor:
    """G = D + Dᵀ of design §2: the derivative by s_ij, through both of its ends.

    Args:
        s: ``[B', rows, cols]``.
        tile: which pairs count.
        rows, cols: ends of all tokens on each side, from which the tile takes its own.
        form: which loss.
    """
    softmax, pull = torch.zeros_like(s), torch.zeros_like(s)
    hinge = torch.zeros_like(s) if form.push else None
    for ends, span, dim in ((rows, tile.rows, -1), (cols, tile.cols, -2)):
        end = ends.map(lambda value: value[tile.batch, span].unsqueeze(dim))  # noqa: B023
        softmax.addcmul_((s - end.lse).exp_(), end.softmax)
        if hinge is not None and end.hinge is not None:
            hinge += end.hinge
        if tile.positive is None:
            continue
        if form.variant == "out":
            pull += end.pull
        elif form.variant == "in":
            pull.addcmul_((s - end.numerator).exp_(), end.pull)
        else:
            pull.addcmul_((end.lse - s).sigmoid_(), end.pull)
    mask = tile.denominator(form.variant)
    if mask is not None:
        softmax.masked_fill_(~mask, 0)
    if tile.positive is not None:
        softmax -= pull.masked_fill_(~tile.positive, 0)
    if hinge is not None:
        hinge.masked_fill_(s <= form.edge, 0)
        softmax += hinge if tile.candidate is None else hinge.masked_fill_(~tile.candidate, 0)
    return softmax


def through_norm(grad_e: Tensor, e: Tensor, norm: Tensor) -> Tensor:
    """dL/dh from dL/de, in place: the part orthogonal to e, unless the norm was clamped.

    Args:
        grad_e, e: ``[..., d]``, float32 or float64.
        norm: ``[..., 1]``, before clamping.
    """
    radial = (grad_e * e).sum(-1, keepdim=True).masked_fill_(norm < EPS, 0)
    return grad_e.addcmul_(e, radial, value=-1).div_(norm.clamp_min(EPS))
