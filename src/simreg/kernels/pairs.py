"""A tile of pairs of tokens in plain PyTorch: what it adds to each token's sums, its gradient."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels.order import Ends, Form, Sums
from simreg.kernels.reference import EPS


@dataclass(frozen=True)
class Tile:
    """The pairs (rows × cols) of some batch rows, and which of them count."""

    batch: slice
    rows: slice
    cols: slice
    outside: Tensor | None  # pairs that are no candidates; None: all are
    positive: Tensor | None  # None: no pair is one
    symmetric: bool = False
    """Whether it serves the tokens of its columns too."""

    @cached_property
    def not_positive(self) -> Tensor:
        """The pairs that are not positives, if any pair is one."""
        assert self.positive is not None
        return ~self.positive

    @cached_property
    def not_negative(self) -> Tensor | None:
        """The pairs that are not negatives; None: all are."""
        if self.positive is None or self.outside is None:
            return self.outside if self.positive is None else self.positive
        return self.outside | self.positive

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

    def add(self, tile: Tile, s: Tensor, e: Tensor | None, excluded: Tensor | None) -> None:
        """`s` or, if it is there, `e` = exp(s − 1/τ); s is −∞ where a pair is no candidate."""
        if e is not None:
            tile.add(self.total, e if excluded is None else e.masked_fill(excluded, 0))
            return
        if excluded is not None:
            s = s.masked_fill(excluded, -torch.inf)
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
        tile.add(self.negative, _only(s, tile.not_negative))
        if tile.positive is not None:
            tile.add(self.positive, _only(s, tile.not_positive))
        if tile.outside is not None:
            s.masked_fill_(tile.outside, -torch.inf)
        e = (s - self.form.largest).exp_() if self.form.bounded else None
        decoupled = self.form.variant == "decoupled"
        self.denominator.add(tile, s, e, tile.positive if decoupled else None)
        if tile.positive is not None and self.form.variant == "in":
            self.numerator.add(tile, s, e, tile.not_positive)
        if self.excess is not None:
            tile.add(self.excess, s.sub_(self.form.edge).relu_())

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

    def add(self, s: Tensor, tile: Tile) -> None:
        """As `Running.add`, of a tile that has positives."""
        for span, dim in tile.sides():
            gap = self.lse[tile.batch, span].unsqueeze(dim) - s
            softplus = (-F.logsigmoid(-gap)).masked_fill_(tile.not_positive, 0)
            self.softplus[tile.batch, span] += softplus.sum(dim)
            self.slope[tile.batch, span] += (
                gap.sigmoid_().masked_fill_(tile.not_positive, 0).sum(dim)
            )


def _only(s: Tensor, excluded: Tensor | None) -> Tensor:
    return s if excluded is None else s.masked_fill(excluded, 0)


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
    if tile.outside is not None:
        s.masked_fill_(tile.outside, -torch.inf)
    e = (s - form.largest).exp_() if form.bounded else None
    g = _softmax(s, e, form, (left.lse, left.softmax), (right.lse, right.softmax))
    if tile.positive is not None:
        if form.variant == "decoupled":
            g.masked_fill_(tile.positive, 0)
        g -= _pull(s, e, form, left, right).masked_fill_(tile.not_positive, 0)
    if left.hinge is not None and right.hinge is not None:
        e = None  # its memory is that of the next
        g += (left.hinge + right.hinge).masked_fill_(s <= form.edge, 0)
    return g


def _pull(s: Tensor, e: Tensor | None, form: Form, left: Ends, right: Ends) -> Tensor:
    if form.variant == "out":
        return left.pull + right.pull
    if form.variant == "in":
        return _softmax(s, e, form, (left.numerator, left.pull), (right.numerator, right.pull))
    pull = (left.lse - s).sigmoid_().mul_(left.pull)
    return pull.addcmul_((right.lse - s).sigmoid_(), right.pull)


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
