"""The loss in tiles of the similarity matrix with a closed-form gradient: O(block² + L·d) memory.

Tokens are sorted (`order`). S is symmetric: only tiles on and above the diagonal are computed, and
each serves its rows and its columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels.order import Ends, Order, Sums, describe, ends, losses, sort_tokens
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

    @property
    def sides(self) -> list[tuple[slice, int]]:
        """Token slice and dimension to sum over: the rows and, off the diagonal, the columns."""
        both = [(self.rows, -1), (self.cols, -2)]
        return both[:1] if self.rows == self.cols else both


def tiles(order: Order, block: int) -> Iterator[Tile]:
    """Tiles that hold at least one pair of candidates, each unordered pair of tokens once."""
    batch, length = order.valid.shape
    if length <= block:  # several short rows share a tile
        group = max(1, block**2 // length**2)
        whole = slice(0, length)
        for start in range(0, batch, group):
            rows = slice(start, start + group)
            yield _tile(order, rows, whole, whole, masked=True, positives=True)
        return
    ends = order.valid.sum(1).tolist()
    for b, end in enumerate(ends):
        spans = [slice(i, min(i + block, end)) for i in range(0, end, block)]
        first, last = ([p.start for p in spans], [p.stop - 1 for p in spans])
        segment_lo, segment_hi = order.segment[b, first].tolist(), order.segment[b, last].tolist()
        label_lo, label_hi = order.label[b, first].tolist(), order.label[b, last].tolist()
        for i, rows in enumerate(spans):
            for j in range(i, len(spans)):
                if segment_hi[i] < segment_lo[j]:
                    break
                masked = segment_lo[i] != segment_hi[j]
                positives = label_hi[i] >= label_lo[j]
                yield _tile(order, slice(b, b + 1), rows, spans[j], masked, positives)


def _tile(
    order: Order, batch: slice, rows: slice, cols: slice, masked: bool, positives: bool
) -> Tile:
    def equal(rank: Tensor) -> Tensor:
        return rank[batch, rows, None] == rank[batch, None, cols]

    candidate = equal(order.segment) if masked else None
    positive = equal(order.label) if positives else None
    if rows == cols:
        if candidate is None:
            candidate = torch.ones_like(positive)  # type: ignore[arg-type]
        candidate.diagonal(dim1=-2, dim2=-1).fill_(False)
        positive.diagonal(dim1=-2, dim2=-1).fill_(False)  # type: ignore[union-attr]
    return Tile(batch, rows, cols, candidate, positive)


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
        return self.total.log() + self.top.masked_fill(self.top == -torch.inf, 0)


def _flat(index: Tensor) -> Tensor:
    """Positions among the flattened ``[B·L]`` tokens, so that moving embeddings copies rows."""
    batch, length = index.shape
    return (index + length * torch.arange(batch, device=index.device)[:, None]).flatten()


def _embed(hidden: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Sorted unit embeddings ``[B, L, d]`` (0 where ignored) and norms ``[B, L]``."""
    h = hidden.flatten(0, 1).index_select(0, _flat(order.position)).view_as(hidden)
    h = h if h.dtype == torch.float64 else h.float()
    h.masked_fill_(~order.valid[..., None], 0)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return h.div_(norm.clamp_min(EPS)), norm[..., 0]


def _similarity(e: Tensor, tile: Tile, temperature: float) -> Tensor:
    left, right = e[tile.batch, tile.rows], e[tile.batch, tile.cols]
    return torch.bmm(left, right.mT).mul_(1 / temperature)


def _sum(s: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    return (s if mask is None else s.masked_fill(~mask, 0)).sum(dim)


def _block(device: torch.device) -> int:
    return 512 if device.type == "cpu" else 2048  # tiles fit the cache of a core, or fill a GPU


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, temperature: float, variant: str
) -> tuple[Tensor, ...]:
    """Per-token loss and mean cosines ``[B, L]``, and what `backward` needs (see `op.loss`)."""
    order = describe(sort_tokens(labels, segments), labels, segments)
    e, norm = _embed(hidden, order)
    zeros = torch.zeros_like(norm)
    positive, negative = zeros.clone(), zeros.clone()
    denominator, numerator = _LogSumExp(zeros), _LogSumExp(zeros)
    for tile in tiles(order, _block(hidden.device)):
        s = _similarity(e, tile, temperature)
        mask = tile.negative if variant == "decoupled" else tile.candidate
        for span, dim in tile.sides:
            denominator.add(tile.batch, span, s, mask, dim)
            negative[tile.batch, span] += _sum(s, tile.negative, dim)
            if tile.positive is not None:
                positive[tile.batch, span] += _sum(s, tile.positive, dim)
                if variant == "in":
                    numerator.add(tile.batch, span, s, tile.positive, dim)
    sums = Sums(denominator.value(), positive, negative)
    if variant == "in":
        sums = sums._replace(numerator=numerator.value())
    elif variant == "decoupled":
        softplus, slope = _decoupled(e, order, sums.lse, temperature)
        sums = sums._replace(softplus=softplus, slope=slope)
    *results, statistic = losses(sums, order, norm, temperature, variant)
    return (*results, order.position, norm, sums.lse, statistic)


def _decoupled(e: Tensor, order: Order, lse: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums over positives of softplus(lse − s) and of its slope: a pass that needs lse."""
    loss, slope = torch.zeros_like(lse), torch.zeros_like(lse)
    for tile in tiles(order, _block(e.device)):
        if tile.positive is None:
            continue
        s = _similarity(e, tile, temperature)
        for span, dim in tile.sides:
            gap = lse[tile.batch, span].unsqueeze(dim) - s
            softplus = -F.logsigmoid(-gap)
            loss[tile.batch, span] += softplus.masked_fill_(~tile.positive, 0).sum(dim)
            slope[tile.batch, span] += gap.sigmoid_().masked_fill_(~tile.positive, 0).sum(dim)
    return loss, slope


def _pair_gradient(s: Tensor, tile: Tile, both: Ends, variant: str) -> Tensor:
    """G = D + Dᵀ of design §2: the derivative by s_ij, through both of its ends."""
    push, pull = torch.zeros_like(s), torch.zeros_like(s)
    for span, dim in ((tile.rows, -1), (tile.cols, -2)):
        end = Ends(*(value[tile.batch, span].unsqueeze(dim) for value in both))
        push.addcmul_((s - end.lse).exp_(), end.push)
        if tile.positive is None:
            continue
        if variant == "out":
            pull += end.pull
        elif variant == "in":
            pull.addcmul_((s - end.numerator).exp_(), end.pull)
        else:
            pull.addcmul_((end.lse - s).sigmoid_(), end.pull)
    mask = tile.negative if variant == "decoupled" else tile.candidate
    if mask is not None:
        push.masked_fill_(~mask, 0)
    if tile.positive is not None:
        push -= pull.masked_fill_(~tile.positive, 0)
    return push


def _through_norm(grad_e: Tensor, e: Tensor, norm: Tensor) -> Tensor:
    """dL/dh from dL/de, in place: the part orthogonal to e, unless the norm was clamped.

    Args:
        grad_e, e: ``[B, L, d]``, float32 or float64.
        norm: ``[B, L, 1]``, before clamping.
    """
    radial = (grad_e * e).sum(-1, keepdim=True).masked_fill_(norm < EPS, 0)
    return grad_e.addcmul_(e, radial, value=-1).div_(norm.clamp_min(EPS))


def backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    saved: tuple[Tensor, ...],
    temperature: float,
    variant: str,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]`` (design §2)."""
    index, norm, lse, statistic = saved
    order = describe(index, labels, segments)
    e, _ = _embed(hidden, order)
    both = ends(grad, order, lse, statistic, temperature, variant)
    grad_e = torch.zeros_like(e)
    for tile in tiles(order, _block(hidden.device)):
        g = _pair_gradient(_similarity(e, tile, temperature), tile, both, variant)
        grad_e[tile.batch, tile.rows].baddbmm_(g, e[tile.batch, tile.cols])
        if tile.rows != tile.cols:
            grad_e[tile.batch, tile.cols].baddbmm_(g.mT, e[tile.batch, tile.rows])
    grad_h = _through_norm(grad_e, e, norm[..., None])
    out = hidden.new_empty(hidden.shape)
    out.flatten(0, 1).index_copy_(0, _flat(index), grad_h.flatten(0, 1).to(hidden.dtype))
    return out
