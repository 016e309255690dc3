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
            into[self.batch, span].add_(pairs.sum(dim))


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

    def add(self, s: Tensor, tile: Tile) -> Tensor | None:
        """Add similarities ``[B', rows, cols]``, which are changed.

        With a push they become max(0, s − edge), 0 where no candidate is, without one −∞ where
        `Tile.exclude` makes them. Returns exp(s − 1/τ), 0 where no candidate is, if the form is
        `bounded`.
        """
        if tile.diagonal:
            s.diagonal(dim1=-2, dim2=-1).fill_(0)
        negative, positive = _parts(s, tile)
        tile.add(self.negative, negative)
        if positive is not None:
            tile.add(self.positive, positive)
        del negative, positive
        tile.exclude(s)
        e = tile.within(_exponential(s, self.form)) if self.form.bounded else None
        decoupled = self.form.variant == "decoupled"
        self.denominator.add(tile, s, e, tile.negative if decoupled else None)
        if tile.positive is not None and self.form.variant == "in":
            self.numerator.add(tile, s, e, tile.positive)
        if self.excess is not None:
            tile.add(self.excess, tile.within(s.sub_(self.form.edge).relu_()))
        return e

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
            softplus = _only(F.logsigmoid(-gap), tile.positive).sum(dim)
            self.softplus[tile.batch, span].sub_(softplus)
            self.slope[tile.batch, span].add_(_only(gap.sigmoid_(), tile.positive).sum(dim))


def _parts(s: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Similarities of negatives and of positives, 0 elsewhere."""
    if tile.positive is None:
        return _only(s, tile.inside), None
    positive = _only(s, tile.positive)
    if tile.floating:
        return tile.within(s - positive), positive
    return _only(s, tile.negative), positive


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


def fold(ends: Ends, form: Form) -> Ends:
    """Ends for `gradient`: where the form is `bounded` weights are those of exp(s − 1/τ)."""
    if not form.bounded:
        return ends

    def weight(lse: Tensor, of: Tensor) -> Tensor:
        return _finite(lse).neg_().add_(form.largest).exp_().mul_(of)

    pull = weight(ends.numerator, ends.pull) if form.variant == "in" else ends.pull
    return ends._replace(softmax=weight(ends.lse, ends.softmax), pull=pull)


def gradient(
    s: Tensor, tile: Tile, left: Ends, right: Ends, form: Form, e: Tensor | None = None
) -> Tensor:
    """G = D + Dᵀ of `reference`: the derivative by s_ij, through both of its ends.

    Args:
        s: ``[B', rows, cols]``, which is changed.
        tile: which pairs count.
        left, right: from `fold`, of the tokens of the rows, ``[B', rows, 1]``, and of the columns,
            ``[B', 1, cols]``.
        form: which loss.
        e: if `Running.add` has seen the tile, what it returned; s as it left it. Only for dL/dloss
            that is the same of all tokens, and not for "decoupled".
    """
    seen = e is not None

    def both(one: Tensor, other: Tensor) -> Tensor:
        return 2 * one if seen else one + other  # of pairs that count, then the same

    if not seen:
        tile.exclude(s)
        e = tile.within(_exponential(s, form)) if form.bounded else None
    if e is None:
        g = _softmax(s, (left.lse, left.softmax), (right.lse, right.softmax))
    else:
        g = (left.softmax + right.softmax).mul_(e)
    if tile.positive is not None:
        if form.variant == "decoupled":
            g = _only(g, tile.negative)
        if form.variant == "out":
            pull = both(left.pull, right.pull)
        else:
            pull = _pull(s, e, form, left, right)
        _add_only(g, pull, tile.positive, -1)
    if left.hinge is not None and right.hinge is not None:
        e = None  # if nobody else has it its memory is that of the next
        edge = 0.0 if seen else form.edge
        beyond = tile.within(s.gt_(edge)) if tile.floating else s > edge
        _add_only(g, both(left.hinge, right.hinge), beyond)
    return g


def _pull(s: Tensor, e: Tensor | None, form: Form, left: Ends, right: Ends) -> Tensor:
    if form.variant == "in":
        if e is not None:
            return (left.pull + right.pull).mul_(e)
        return _softmax(s, (left.numerator, left.pull), (right.numerator, right.pull))
    lowest = torch.finfo(s.dtype).min  # −∞ without negatives; on the diagonal s is −∞ too
    pull = (left.lse.clamp_min(lowest) - s).sigmoid_().mul_(left.pull)
    return pull.addcmul_((right.lse.clamp_min(lowest) - s).sigmoid_(), right.pull)


def _softmax(s: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Σ over both ends (lse, weight) of weight · exp(s − lse), 0 where s is −∞."""
    total = (s - _finite(left[0])).exp_().mul_(left[1])
    return total.addcmul_((s - _finite(right[0])).exp_(), right[1])


def _finite(lse: Tensor) -> Tensor:
    """Where there is no pair to sum over it is −∞, and the weight 0."""
    return lse.masked_fill(lse == -torch.inf, 0)


def through_norm(grad_e: Tensor, e: Tensor, norm: Tensor) -> Tensor:
    """dL/dh from dL/de, in place: the part orthogonal to e, unless the norm was clamped.

    Args:
        grad_e, e: ``[..., d]``, float32 or float64.
        norm: ``[..., 1]``, before clamping.
    """
    radial = (grad_e * e).sum(-1, keepdim=True).masked_fill_(norm < EPS, 0)
    return grad_e.addcmul_(e, radial, value=-1).div_(norm.clamp_min(EPS))
