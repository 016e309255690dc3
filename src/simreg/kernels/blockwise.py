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


def tiles(order: Order, size: int, masks: torch.dtype = torch.bool) -> Iterator[Tile]:
    """Tiles that hold at least one pair of candidates, each unordered pair of tokens once.

    A tile has size² pairs at most: several short rows share one. `masks`: bool, or floating.
    """
    length = order.valid.shape[1]
    counts = order.valid.sum(1).tolist()
    if masks != torch.bool:
        order = order._replace(segment=order.segment.to(masks), label=order.label.to(masks))
    if length <= size:
        yield from _short(order, size, counts, masks)
        return
    begins = order.segment == torch.arange(length, device=order.segment.device)
    for b, end in enumerate(counts):
        starts = begins[b, :end].nonzero()[:, 0].tolist()
        spans = _spans([*starts[1:], end], size)
        first, last = ([p.start for p in spans], [p.stop - 1 for p in spans])
        segment_lo, segment_hi = order.segment[b, first].tolist(), order.segment[b, last].tolist()
        label_lo, label_hi = order.label[b, first].tolist(), order.label[b, last].tolist()
        for i, rows in enumerate(spans):
            for j in range(i, len(spans)):
                if segment_hi[i] < segment_lo[j]:
                    break
                masked = segment_lo[i] != segment_hi[j]
                positives = label_hi[i] >= label_lo[j]
                yield _tile(order, slice(b, b + 1), rows, spans[j], masked, positives, masks)


def _short(order: Order, size: int, counts: list[int], masks: torch.dtype) -> Iterator[Tile]:
    last = max(counts, default=0)
    # Of a quarter of the size, lest half of the pairs in a tile on the diagonal come twice.
    side = max(1, min(last, size // 4))
    masked = bool((order.segment[:, :last] > 0).any())  # several segments, or ignored tokens
    group, spans = size**2 // side**2, _spans([last], side)
    for start in range(0, len(counts), group):
        batch = slice(start, start + group)
        for i, rows in enumerate(spans):
            for cols in spans[i:]:
                yield _tile(order, batch, rows, cols, masked, True, masks)


def _spans(stops: list[int], size: int) -> list[slice]:
    """Of at most `size` tokens, and ending where segments do, unless these are short."""
    spans, start = [], 0
    for stop in stops:
        for cut in range(start + size, stop, size):
            spans.append(slice(start, cut))
            start = cut
        if stop - start >= size // 4 or stop == stops[-1]:
            spans.append(slice(start, stop))
            start = stop
    return [span for span in spans if span.stop > span.start]


def _tile(
    order: Order,
    batch: slice,
    rows: slice,
    cols: slice,
    masked: bool,
    positives: bool,
    masks: torch.dtype,
) -> Tile:
    def equal(run: Tensor) -> Tensor:
        left, right = run[batch, rows, None], run[batch, None, cols]
        return left == right if masks == torch.bool else (left - right).eq_(0)

    inside = equal(order.segment) if masked else None
    positive = equal(order.label) if positives else None
    diagonal = rows == cols
    if diagonal and positive is not None:
        positive.diagonal(dim1=-2, dim2=-1).fill_(0)
    return Tile(
        batch, rows, cols, inside, positive, not diagonal, diagonal, floating=masks != torch.bool
    )


def _masks(form: Form, *values: Tensor) -> torch.dtype:
    """Of the tiles of tokens with such norms, and dL/dloss, ``[B, L]``: see `Tile.floating`."""
    exact = values[0].shape[1] < 2**24  # as places of a row in float32
    fast = values[0].device.type == "cpu" and form.bounded and exact
    return values[0].dtype if fast and all(bool(v.isfinite().all()) for v in values) else torch.bool


def _flat(index: Tensor) -> Tensor:
    """Positions among the flattened ``[B·L]`` tokens, so that moving embeddings copies rows."""
    batch, length = index.shape
    return (index + length * torch.arange(batch, device=index.device)[:, None]).flatten()


def _embed(hidden: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Sorted unit embeddings ``[B, L, d]`` (0 where ignored) and norms ``[B, L]``."""
    h = hidden.flatten(0, 1).index_select(0, _flat(order.position)).view_as(hidden)
    h = h.to(wide(h.dtype))
    ignored = (~order.valid).flatten().nonzero()[:, 0]  # few: to mask all would take far longer
    h.flatten(0, 1).index_fill_(0, ignored, 0)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return h.div_(norm.clamp_min(EPS)), norm[..., 0]


def _similarity(e: Tensor, tile: Tile, temperature: float) -> Tensor:
    left, right = e[tile.batch, tile.rows], e[tile.batch, tile.cols]
    return torch.bmm(left, right.mT).mul_(1 / temperature)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    # A strided result torch would take matrix by matrix.
    if into.is_contiguous():
        into.baddbmm_(left, right)
    else:
        into.add_(torch.bmm(left, right))


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """Per-token loss and mean cosines ``[B, L]``, and what `backward` needs (see `op.loss`)."""
    order = describe(sort_tokens(labels, segments), labels, segments)
    e, norm = _embed(hidden, order)
    running, masks = Running(norm, form), _masks(form, norm)
    for tile in tiles(order, block(hidden.device), masks):
        running.add(_similarity(e, tile, form.temperature), tile)
    sums = running.sums()
    if form.variant == "decoupled":
        gaps = Gaps(sums.lse)
        for tile in tiles(order, block(hidden.device), masks):
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
    for tile in tiles(order, block(hidden.device), _masks(form, norm, grad)):
        g = gradient(_similarity(e, tile, form.temperature), tile, both, both, form)
        _add_product(grad_e[tile.batch, tile.rows], g, e[tile.batch, tile.cols])
        if tile.rows != tile.cols:
            _add_product(grad_e[tile.batch, tile.cols], g.mT, e[tile.batch, tile.rows])
    grad_h = through_norm(grad_e, e, norm[..., None])
    back = order.unsort(torch.arange(index.shape[1], device=index.device).expand_as(index))
    sorted_grad = grad_h.to(hidden.dtype).flatten(0, 1)
    return sorted_grad.index_select(0, _flat(back)).view_as(hidden)
