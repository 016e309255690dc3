"""The loss in tiles of the similarity matrix with a closed-form gradient: O(block² + L·d) memory.

The loss does not depend on the order of tokens, so each row is first sorted by segment and label.
Then positives lie near the diagonal, segments are contiguous whatever they were, ignored tokens are
last, and most tiles need no mask or need not be visited at all. S is symmetric: only tiles on and
above the diagonal are computed, and each serves its rows and its columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels.reference import EPS


class Order(NamedTuple):
    """A row's tokens sorted by (ignored, segment, label); all ``[B, L]``, in sorted order."""

    position: Tensor  # in the unsorted row
    valid: Tensor
    segment: Tensor  # rank of the segment; ignored tokens have one of their own
    label: Tensor  # rank of (segment, label)
    positives: Tensor  # |P(i)|, 0 where ignored
    negatives: Tensor  # |A(i) ∖ P(i)|, 0 where ignored


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


def sort_tokens(labels: Tensor, segments: Tensor | None) -> Tensor:
    """The permutation ``[B, L]`` that sorts each row by (ignored, segment, label)."""
    index = labels.argsort(dim=1, stable=True)
    for key in (segments, (labels < 0).to(torch.uint8)):
        if key is not None:
            index = index.gather(1, key.gather(1, index).argsort(dim=1, stable=True))
    return index


def describe(index: Tensor, labels: Tensor, segments: Tensor | None) -> Order:
    """Ranks and counts of the sorted tokens."""
    label = labels.gather(1, index)
    valid = label >= 0
    new_segment = valid[:, 1:] != valid[:, :-1]
    if segments is not None:
        segment = segments.gather(1, index)
        new_segment |= segment[:, 1:] != segment[:, :-1]
    new_label = new_segment | (label[:, 1:] != label[:, :-1])
    segment_rank = F.pad(new_segment.cumsum(1), (1, 0))
    label_rank = F.pad(new_label.cumsum(1), (1, 0))
    of_label, of_segment = _sizes(label_rank), _sizes(segment_rank)
    positives = (of_label - 1).masked_fill(~valid, 0)
    negatives = (of_segment - of_label).masked_fill(~valid, 0)
    return Order(index, valid, segment_rank, label_rank, positives, negatives)


def _sizes(rank: Tensor) -> Tensor:
    """How many tokens of the row have each token's rank."""
    return torch.zeros_like(rank).scatter_add_(1, rank, torch.ones_like(rank)).gather(1, rank)


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
    """Sorted unit embeddings ``[B, L, d]`` (0 where ignored) and norms ``[B, L, 1]``."""
    h = hidden.flatten(0, 1).index_select(0, _flat(order.position)).view_as(hidden)
    h = h if h.dtype == torch.float64 else h.float()
    h.masked_fill_(~order.valid[..., None], 0)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return h.div_(norm.clamp_min(EPS)), norm


def _similarity(e: Tensor, tile: Tile, temperature: float) -> Tensor:
    left, right = e[tile.batch, tile.rows], e[tile.batch, tile.cols]
    return torch.bmm(left, right.mT).mul_(1 / temperature)


def _sum(s: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    return (s if mask is None else s.masked_fill(~mask, 0)).sum(dim)


def _unsort(values: Tensor, order: Order) -> Tensor:
    return torch.empty_like(values).scatter_(1, order.position, values)


def _block(device: torch.device) -> int:
    return 512 if device.type == "cpu" else 2048  # tiles fit the cache of a core, or fill a GPU


@torch.library.custom_op("simreg::blockwise", mutates_args=())
def blockwise(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, temperature: float, variant: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-token SimReg loss; arguments and the first three results as in `reference.reference`.

    The other results are what the backward pass needs, ``[B, L]`` in sorted order: the sorting
    permutation (int64), the logsumexp of each row, and a statistic of its positives ("in": their
    logsumexp, "decoupled": their mean sigmoid). Differentiable once.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        order = describe(sort_tokens(labels, segments), labels, segments)
        e, norm = _embed(hidden, order)
        zeros = torch.zeros_like(norm[..., 0])
        pos_sum, neg_sum = zeros.clone(), zeros.clone()
        denominator, numerator = _LogSumExp(zeros), _LogSumExp(zeros)
        for tile in tiles(order, _block(hidden.device)):
            s = _similarity(e, tile, temperature)
            negative = tile.negative
            mask = negative if variant == "decoupled" else tile.candidate
            for span, dim in tile.sides:
                denominator.add(tile.batch, span, s, mask, dim)
                neg_sum[tile.batch, span] += _sum(s, negative, dim)
                if tile.positive is not None:
                    pos_sum[tile.batch, span] += _sum(s, tile.positive, dim)
                    if variant == "in":
                        numerator.add(tile.batch, span, s, tile.positive, dim)
        lse = denominator.value()
        count = order.positives.clamp_min(1)
        statistic = torch.zeros_like(zeros)
        if variant == "out":
            loss = lse - pos_sum / count
        elif variant == "in":
            statistic = numerator.value()
            loss = lse - statistic + count.to(lse.dtype).log()
        else:
            loss, statistic = _decoupled(e, order, lse, temperature)
        loss.masked_fill_(order.positives == 0, 0)
        loss.masked_fill_(order.valid & ~norm[..., 0].isfinite(), torch.nan)
        pos_cos = pos_sum.mul_(temperature) / order.positives  # 0 / 0 = NaN: none
        neg_cos = neg_sum.mul_(temperature) / order.negatives
        loss, pos_cos, neg_cos = (_unsort(value, order) for value in (loss, pos_cos, neg_cos))
        return loss, pos_cos, neg_cos, order.position, lse, statistic


def _decoupled(e: Tensor, order: Order, lse: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Means over positives of softplus(lse − s) and of its slope: a pass that needs lse."""
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
    count = order.positives.clamp_min(1)
    return loss / count, slope / count


@blockwise.register_fake
def _(hidden, labels, segments, temperature, variant):  # type: ignore[no-untyped-def]
    values = hidden.new_empty(
        labels.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32
    )
    per_token = [torch.empty_like(values) for _ in range(3)]
    return (*per_token, torch.empty_like(labels), values, torch.empty_like(values))


class Statistics(NamedTuple):
    """What the gradient of a pair needs to know of its two tokens; all ``[B, L]``, sorted."""

    lse: Tensor  # of the denominator
    push: Tensor  # weight of exp(s − lse)
    numerator: Tensor  # logsumexp of the positives ("in")
    pull: Tensor  # weight of the positive's term


def _pair_gradient(s: Tensor, tile: Tile, stats: Statistics, variant: str) -> Tensor:
    """G = D + Dᵀ of design §2: the derivative by s_ij, through both of its ends."""
    push, pull = torch.zeros_like(s), torch.zeros_like(s)
    for span, dim in ((tile.rows, -1), (tile.cols, -2)):
        end = Statistics(*(value[tile.batch, span].unsqueeze(dim) for value in stats))
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


@torch.library.custom_op("simreg::blockwise_backward", mutates_args=())
def blockwise_backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    index: Tensor,
    lse: Tensor,
    statistic: Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]`` (design §2)."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        order = describe(index, labels, segments)
        e, norm = _embed(hidden, order)
        weight = (grad.gather(1, index) / temperature).masked_fill(order.positives == 0, 0)
        stats = Statistics(
            lse=lse,
            push=weight * statistic if variant == "decoupled" else weight,
            numerator=statistic,
            pull=weight if variant == "in" else weight / order.positives.clamp_min(1),
        )
        grad_e = torch.zeros_like(e)
        for tile in tiles(order, _block(hidden.device)):
            g = _pair_gradient(_similarity(e, tile, temperature), tile, stats, variant)
            grad_e[tile.batch, tile.rows].baddbmm_(g, e[tile.batch, tile.cols])
            if tile.rows != tile.cols:
                grad_e[tile.batch, tile.cols].baddbmm_(g.mT, e[tile.batch, tile.rows])
        # Through the normalisation: only the part orthogonal to e, unless the norm was clamped.
        radial = (grad_e * e).sum(-1, keepdim=True).masked_fill_(norm < EPS, 0)
        grad_h = grad_e.addcmul_(e, radial, value=-1).div_(norm.clamp_min(EPS))
        out = hidden.new_empty(hidden.shape)
        out.flatten(0, 1).index_copy_(0, _flat(index), grad_h.flatten(0, 1).to(hidden.dtype))
        return out


@blockwise_backward.register_fake
def _(grad, hidden, *rest):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, labels, segments, temperature, variant = inputs
    ctx.temperature, ctx.variant = temperature, variant
    ctx.save_for_backward(hidden, labels, segments, *output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None
    grad_hidden = blockwise_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.variant)
    return grad_hidden, None, None, None, None


def _refuse(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("simreg_loss: double backward is not supported")


blockwise.register_autograd(_backward, setup_context=_save)
blockwise_backward.register_autograd(_refuse)
