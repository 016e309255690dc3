"""The loss in tiles of the similarity matrix with a closed-form gradient: O(block² + L·d) memory.

Tokens are sorted (`order`). S is symmetric: only tiles on and above the diagonal are computed, and
each serves its rows and its columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from simreg.kernels.order import Form, Order, describe, ends, losses, sort_tokens
from simreg.kernels.pairs import Gaps, Running, Tile, block, gradient, through_norm, wide
from simreg.kernels.reference import EPS


def tiles(order: Order, size: int) -> Iterator[Tile]:
    """Tiles that hold at least one pair of candidates, each unordered pair of tokens once."""
    batch, length = order.valid.shape
    if length <= size:  # several short rows share a tile
        group = max(1, size**2 // length**2)
        whole = slice(0, length)
        for start in range(0, batch, group):
            rows = slice(start, start + group)
            yield _tile(order, rows, whole, whole, masked=True, positives=True)
        return
    ends = order.valid.sum(1).tolist()
    for b, end in enumerate(ends):
        spans = [slice(i, min(i + size, end)) for i in range(0, end, size)]
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

    positive = equal(order.label) if positives else None
    outside = ~equal(order.segment) if masked else None
    if rows == cols:
        if outside is None:
            outside = torch.zeros_like(positive)  # type: ignore[arg-type]
        outside.diagonal(dim1=-2, dim2=-1).fill_(True)
        positive.diagonal(dim1=-2, dim2=-1).fill_(False)  # type: ignore[union-attr]
    return Tile(batch, rows, cols, outside, positive, symmetric=rows != cols)


def _flat(index: Tensor) -> Tensor:
    """Positions among the flattened ``[B·L]`` tokens, so that moving embeddings copies rows."""
    batch, length = index.shape
    return (index + length * torch.arange(batch, device=index.device)[:, None]).flatten()


def _embed(hidden: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Sorted unit embeddings ``[B, L, d]`` (0 where ignored) and norms ``[B, L]``."""
    h = hidden.flatten(0, 1).index_select(0, _flat(order.position)).view_as(hidden)
    h = h.to(wide(h.dtype))
    h.masked_fill_(~order.valid[..., None], 0)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return h.div_(norm.clamp_min(EPS)), norm[..., 0]


def _similarity(e: Tensor, tile: Tile, temperature: float) -> Tensor:
    left, right = e[tile.batch, tile.rows], e[tile.batch, tile.cols]
    return torch.bmm(left, right.mT).mul_(1 / temperature)


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """Per-token loss and mean cosines ``[B, L]``, and what `backward` needs (see `op.loss`)."""
    order = describe(sort_tokens(labels, segments), labels, segments)
    e, norm = _embed(hidden, order)
    running = Running(norm, form)
    for tile in tiles(order, block(hidden.device)):
        running.add(_similarity(e, tile, form.temperature), tile)
    sums = running.sums()
    if form.variant == "decoupled":
        gaps = Gaps(sums.lse)
        for tile in tiles(order, block(hidden.device)):
            if tile.positive is None:
                continue
            gaps.add(_similarity(e, tile, form.temperature), tile)
        sums = sums._replace(softplus=gaps.softplus, slope=gaps.slope)
    *results, statistic = losses(sums, order, norm, form)
    return (*map(order.unsort, results), order.position, norm, sums.lse, statistic)


def backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    saved: tuple[Tensor, ...],
    form: Form,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]`` (design §2)."""
    index, norm, lse, statistic = saved
    order = describe(index, labels, segments)
    e, _ = _embed(hidden, order)
    both = ends(grad, order, lse, statistic, form)
    grad_e = torch.zeros_like(e)
    for tile in tiles(order, block(hidden.device)):
        g = gradient(_similarity(e, tile, form.temperature), tile, both, both, form)
        grad_e[tile.batch, tile.rows].baddbmm_(g, e[tile.batch, tile.cols])
        if tile.rows != tile.cols:
            grad_e[tile.batch, tile.cols].baddbmm_(g.mT, e[tile.batch, tile.rows])
    grad_h = through_norm(grad_e, e, norm[..., None])
    out = hidden.new_empty(hidden.shape)
    out.flatten(0, 1).index_copy_(0, _flat(index), grad_h.flatten(0, 1).to(hidden.dtype))
    return out
