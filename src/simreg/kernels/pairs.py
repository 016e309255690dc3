"""A tile of pairs of tokens in plain PyTorch: what it adds to each token's sums, its gradient."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels.order import Ends, Form, Sums
from simreg.kernels.reference import EPS

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """The pairs (rows × cols) of some batch rows, and which of them count."""

    batch: slice
    rows: slice
    cols: slice
    inside: Tensor | None  # pairs that are candidates; None: all are
    positive: Tensor | None  # None: no pair is one
    symmetric: bool = False
    """Whether it serves the tokens of its columns too."""
    diagonal: bool = False
    """Whether pairs on the diagonal, none of them a positive, are no candidates, besides."""
    floating: bool = False
    """Masks are floating, 0 and 1, and multiplied by: faster on the CPU, but what they hide must be
    finite, so embeddings and dL/dloss must, and the form `bounded`. Else they are of bool."""

    @cached_property
    def negative(self) -> Tensor | None:
        """The pairs `inside` that are no positives; None: all are."""
        if self.positive is None:
            return self.inside
        if self.floating:
            return (1 if self.inside is None else self.inside) - self.positive
        return ~self.positive if self.inside is None else self.inside & ~self.positive

    def exclude(self, s: Tensor) -> None:
        """Make similarities −∞ where a pair is no candidate, except what `within` is for."""
        if self.inside is not None and not self.floating:
            s.masked_fill_(~self.inside, -torch.inf)
        if self.diagonal:
            s.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)

    def within(self, values: Tensor) -> Tensor:
        """Values that are 0 where similarities are −∞, in place: 0 wherever no candidate is."""
        return values.mul_(self.inside) if self.floating and self.inside is not None else values

    def sides(self) -> list[tuple[slice, int]]:
        """Token slice and dimension to sum over: the rows and, if it serves them, the columns."""
        return [(self.rows, -1), (self.cols, -2)][: 1 + self.symmetric]

    def add(self, into: Tensor, pairs: Tensor) -> None:
        """Sum a value of each pair for the tokens ``[B, L]`` that the tile serves."""
        for span, dim in self.sides():
            into[self.batch, span] += pairs.sum(dim)


def block(device: torch.device) -> int:
    """Tokens on each side of a tile, which fits the cache of a core, or fills a GPU."""
    return 512 if device.type == "cpu" else 2048


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which similarities, exponentials and sums are computed."""
    return torch.promote_types(dtype, torch.float32)


class _Exponentials:
    """A logsumexp over pairs that arrive tile by tile."""

    def __init__(self, like: Tensor, form: Form) -> None:
        self.total = torch.zeros_like(like)
        self.top = form.largest if form.bounded else torch.full_like(like, -torch.inf)

    def add(self, tile: Tile, s: Tensor, e: Tensor | None, mask: Tensor | None) -> None:
        """`s` or, if it is there, `e` = exp(s − 1/τ); s is −∞ where a pair is no candidate."""
        if e is not None:
            tile.add(self.total, _only(e, mask))
            return
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf)
        assert isinstance(self.top, Tensor)
        for span, dim in tile.sides():
            top, total = self.top[tile.batch, span], self.total[tile.batch, span]
            new = torch.maximum(top, s.amax(dim))
            finite = new.masked_fill(new == -torch.inf, 0)
            total.mul_((top - finite).exp_()).add_((s - finite.unsqueeze(dim)).exp_().sum(dim))
            top.copy_(new)

    def value(self) -> Tensor:
        """−∞ without any pair."""
        return logarithm(self.top, self.total)


def logarithm(top: Tensor | float, total: Tensor) -> Tensor:
    """Of a sum of exponentials below `top`; −∞ without any."""
    return total.log() + top


class Running:
    """`Sums` over the pairs of each token, whose tiles arrive one by one."""

    def __init__(self, like: Tensor, form: Form) -> None:
        """`like`: ``[B, L]``, a value for each token."""
        self.form = form
        self.excess = torch.zeros_like(like) if form.push else None
        self.positive, self.negative = torch.zeros_like(like), torch.zeros_like(like)
        self.denominator, self.numerator = _Exponentials(like, form), _Exponentials(like, form)

    def add(self, s: Tensor, tile: Tile) -> None:
        """Add similarities ``[B', rows, cols]``, which are changed."""
        if tile.diagonal:
            s.diagonal(dim1=-2, dim2=-1).fill_(0)
        tile.add(self.negative, _only(s, tile.negative))
        if tile.positive is not None:
            tile.add(self.positive, _only(s, tile.positive))
        tile.exclude(s)
        e = tile.within(_exponential(s, self.form)) if self.form.bounded else None
        decoupled = self.form.variant == "decoupled"
        self.denominator.add(tile, s, e, tile.negative if decoupled else None)
        if tile.positive is not None and self.form.variant == "in":
            self.numerator.add(tile, s, e, tile.positive)
        if self.excess is not None:
            tile.add(self.excess, tile.within(s.sub_(self.form.edge).relu_()))

    def sums(self) -> Sums:
        """What was added; "decoupled" lacks what `Gaps` sums."""
        numerator = self.numerator.value() if self.form.variant == "in" else None
        lse = self.denominator.value()
        return Sums(lse, self.positive, self.negative, numerator, excess=self.excess)


def _exponential(s: Tensor, form: Form) -> Tensor:
    """exp(s − 1/τ), by powers of 2, which take torch a third of the time on a CPU."""
    return (s - form.largest).mul_(_LOG2_E).exp2_()


class Gaps:
    """Over positives: Σ softplus(lse − s) and Σ sigmoid(lse − s), for "decoupled"."""

    def __init__(self, lse: Tensor) -> None:
        self.lse = lse
        self.both = lse.new_zeros(2, *lse.shape)
        self.softplus, self.slope = self.both

    def add(self, s: Tensor, tile: Tile) -> None:
        """As `Running.add`, of a tile that has positives."""
        for span, dim in tile.sides():
            gap = self.lse[tile.batch, span].unsqueeze(dim) - s
            self.softplus[tile.batch, span] -= _only(F.logsigmoid(-gap), tile.positive).sum(dim)
            self.slope[tile.batch, span] += _only(gap.sigmoid_(), tile.positive).sum(dim)


def _only(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values where the mask is, if there is one, and 0 elsewhere."""
    if mask is None:
        return values
    return torch.where(mask, values, 0) if mask.dtype == torch.bool else values * mask


def _add_only(into: Tensor, values: Tensor, mask: Tensor, sign: int = 1) -> None:
    """Add values where the mask is."""
    if mask.dtype == torch.bool:
        into.add_(_only(values, mask), alpha=sign)
    else:
        into.addcmul_(values, mask, value=sign)


def gradient(s: Tensor, tile: Tile, rows: Ends, cols: Ends, form: Form) -> Tensor:
    """G = D + Dᵀ of design §2: the derivative by s_ij, through both of its ends.

    Args:
        s: ``[B', rows, cols]``, which is changed.
        tile: which pairs count.
        rows, cols: ends of all tokens on each side, from which the tile takes its own.
        form: which loss.
    """
    left, right = (
        ends.map(lambda value: value[tile.batch, span].unsqueeze(dim))  # noqa: B023
        for ends, span, dim in ((rows, tile.rows, -1), (cols, tile.cols, -2))
    )
    tile.exclude(s)
    e = tile.within(_exponential(s, form)) if form.bounded else None
    g = _softmax(s, e, form, (left.lse, left.softmax), (right.lse, right.softmax))
    if tile.positive is not None:
        if form.variant == "decoupled":
            g = _only(g, tile.negative)
        _add_only(g, _pull(s, e, form, left, right), tile.positive, -1)
    if left.hinge is not None and right.hinge is not None:
        e = None  # its memory is that of the next
        beyond = tile.within(s.gt_(form.edge)) if tile.floating else s > form.edge
        _add_only(g, left.hinge + right.hinge, beyond)
    return g


def _pull(s: Tensor, e: Tensor | None, form: Form, left: Ends, right: Ends) -> Tensor:
    if form.variant == "out":
        return left.pull + right.pull
    if form.variant == "in":
        return _softmax(s, e, form, (left.numerator, left.pull), (right.numerator, right.pull))
    lowest = torch.finfo(s.dtype).min  # −∞ without negatives; on the diagonal s is −∞ too
    pull = (left.lse.clamp_min(lowest) - s).sigmoid_().mul_(left.pull)
    return pull.addcmul_((right.lse.clamp_min(lowest) - s).sigmoid_(), right.pull)


def _softmax(s: Tensor, e: Tensor | None, form: Form, *ends: tuple[Tensor, Tensor]) -> Tensor:
    """Σ over both ends (lse, weight) of weight · exp(s − lse), 0 where s is −∞."""
    # Where there is no pair to sum over the weight is 0, and lse −∞.
    (left, of_left), (right, of_right) = (
        (lse.masked_fill(lse == -torch.inf, 0), weight) for lse, weight in ends
    )
    if e is None:
        return ((s - left).exp_().mul_(of_left)).addcmul_((s - right).exp_(), of_right)
    of_left, of_right = (
        (form.largest - left).exp_() * of_left,
        (form.largest - right).exp_() * of_right,
    )
    return (of_left + of_right).mul_(e)


def through_norm(grad_e: Tensor, e: Tensor, norm: Tensor) -> Tensor:
    """dL/dh from dL/de, in place: the part orthogonal to e, unless the norm was clamped.

    Args:
        grad_e, e: ``[..., d]``, float32 or float64.
        norm: ``[..., 1]``, before clamping.
    """
    radial = (grad_e * e).sum(-1, keepdim=True).masked_fill_(norm < EPS, 0)
    return grad_e.addcmul_(e, radial, value=-1).div_(norm.clamp_min(EPS))
