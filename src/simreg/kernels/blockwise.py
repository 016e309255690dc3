"""The loss in tiles of the similarity matrix with a closed-form gradient: O(block² + L·d) memory.

Tokens are sorted (`order`), unless rows are short. S is symmetric: only tiles on and above the
diagonal are computed, and each serves its rows and its columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from simreg.kernels.order import Ends, Form, Order, describe, ends, losses, sort_tokens
from simreg.kernels.pairs import Gaps, Running, Tile, block, fold, gradient, through_norm, wide
from simreg.kernels.reference import EPS


def tiles(order: Order, size: int, masks: torch.dtype = torch.bool) -> Iterator[Tile]:
    """Tiles that hold at least one pair of candidates, each unordered pair of tokens once.

    A tile has size² pairs at most: several short rows share one. `masks`: bool, or floating.
    """
    length = order.valid.shape[1]
    if masks != torch.bool:
        order = order._replace(segment=order.segment.to(masks), label=order.label.to(masks))
    if length <= size:
        yield from _short(order, size, masks)
        return
    counts = order.valid.sum(1).tolist()
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


def _short(order: Order, size: int, masks: torch.dtype) -> Iterator[Tile]:
    last = _end(order.valid)
    side, group = _shape(last, size)
    masked = bool((order.segment[:, :last] > 0).any())  # several segments, or ignored tokens
    spans = _spans([last], side)
    for start in range(0, len(order.valid), group):
        batch = slice(start, start + group)
        for i, rows in enumerate(spans):
            for cols in spans[i:]:
                yield _tile(order, batch, rows, cols, masked, True, masks)


def _end(valid: Tensor) -> int:
    """Of the longest row, but for ignored tokens at its end."""
    return 1 + max(valid.any(0).nonzero()[:, 0].tolist(), default=-1)


def _shape(length: int, size: int) -> tuple[int, int]:
    """Tokens on a side of a tile of short rows, and how many rows share it."""
    # Of a quarter of the size, lest half of the pairs in a tile on the diagonal come twice.
    side = max(1, min(length, size // 4))
    return side, size**2 // side**2


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


class Rows(NamedTuple):
    """Tokens in the order in which `tiles` takes them."""

    order: Order
    moved: bool  # whether that is not the order of the row
    e: Tensor  # [B, L, d], unit embeddings, 0 where ignored
    norm: Tensor  # [B, L], of the hidden states

    @staticmethod
    def of(hidden: Tensor, order: Order) -> "Rows":
        """Sorted, unless rows are short: then no tile can be left out, but of ignored tokens.

        These are left in between others where they are a sixteenth of them at most.
        """
        most = max(order.valid.sum(1).tolist(), default=0)
        last = _end(torch.zeros_like(order.valid).scatter_(1, order.position, order.valid))
        moved = order.valid.shape[1] > block(hidden.device) or 16 * most < 15 * last
        h = hidden.contiguous()
        if moved:
            h = h.flatten(0, 1).index_select(0, _flat(order.position)).view_as(hidden)
        else:
            order = order.in_rows()
        h = h.to(wide(h.dtype))
        ignored = ~order.valid
        norm = torch.linalg.vector_norm(h, dim=-1).masked_fill_(ignored, 0)
        scale = norm.clamp_min(EPS)[..., None]
        e = h / scale if h is hidden else h.div_(scale)
        # Few: to mask all embeddings would take far longer.
        e.flatten(0, 1).index_fill_(0, ignored.flatten().nonzero()[:, 0], 0)
        return Rows(order, moved, e, norm)

    def split(self, rows: int) -> list["Rows"]:
        """So many at a time."""
        spans = [slice(start, start + rows) for start in range(0, max(1, len(self.e)), rows)]
        orders = (Order(*(value[span] for value in self.order)) for span in spans)
        return [
            Rows(order, self.moved, self.e[span], self.norm[span])
            for order, span in zip(orders, spans, strict=True)
        ]

    def tiles(self, form: Form, *values: Tensor) -> Iterator[Tile]:
        """Of all of them; `values`, like norms, must be finite for masks that are multiplied by."""
        return tiles(self.order, block(self.e.device), _masks(form, self.norm, *values))

    def similarities(self, tile: Tile, form: Form) -> Tensor:
        """``[B', rows, cols]``."""
        left, right = self.e[tile.batch, tile.rows], self.e[tile.batch, tile.cols]
        # Not as the alpha of a product, which MKL multiplies into a factor: that rounds once more.
        return torch.bmm(left, right.mT).mul_(1 / form.temperature)

    def restore(self, values: Tensor) -> Tensor:
        """Of each token ``[B, L, d]``, in the order of the row."""
        if not self.moved:
            return values
        place = torch.arange(values.shape[1], device=values.device)
        back = self.order.unsort(place.expand_as(self.order.position))
        return values.flatten(0, 1).index_select(0, _flat(back)).view_as(values)


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """Per-token loss and mean cosines ``[B, L]``, and what `backward` needs (see `op.loss`)."""
    index = sort_tokens(labels, segments)
    rows = Rows.of(hidden, describe(index, labels, segments))
    *results, lse, statistic = _losses(rows, form)
    return (*map(rows.order.unsort, results), index, rows.norm, lse, statistic)


def forward_and_gradient(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """As `forward`, and last d(Σ loss)/dhidden ``[B, L, d]``, in less time than `backward` later.

    Tiles of short rows are computed once, if the form is `bounded` and not "decoupled".
    """
    size, length = block(hidden.device), hidden.shape[1]
    index = sort_tokens(labels, segments)
    rows = Rows.of(hidden, describe(index, labels, segments))
    if length <= size // 2 and form.bounded and form.variant != "decoupled":
        group = _shape(length, size)[1]
        gradient_h = torch.zeros_like(rows.e)
        into = zip(rows.split(group), torch.split(gradient_h, group), strict=True)
        found = [_losses_and_gradient(part, out, form) for part, out in into]
        *results, lse, statistic = map(torch.cat, zip(*found, strict=True))
    else:
        *results, lse, statistic = _losses(rows, form)
        gradient_h = _gradient(torch.ones_like(lse), rows, lse, statistic, form)
    results = [*map(rows.order.unsort, results), index, rows.norm, lse, statistic]
    return (*results, rows.restore(gradient_h))


def backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    saved: tuple[Tensor, ...],
    form: Form,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]``."""
    index, _, lse, statistic = saved
    rows = Rows.of(hidden, describe(index, labels, segments))
    return rows.restore(_gradient(grad, rows, lse, statistic, form).to(hidden.dtype))


def _losses(rows: Rows, form: Form) -> tuple[Tensor, ...]:
    """Loss, mean cosines, logsumexp and statistic ``[B, L]``, in the order of the rows."""
    running = Running(rows.norm, form)
    for tile in rows.tiles(form):
        running.add(rows.similarities(tile, form), tile)
    sums = running.sums()
    if form.variant == "decoupled":
        gaps = Gaps(sums.lse)
        for tile in rows.tiles(form):
            if tile.positive is None:
                continue
            gaps.add(rows.similarities(tile, form), tile)
        sums = sums._replace(softplus=gaps.softplus, slope=gaps.slope)
    *results, statistic = losses(sums, rows.order, rows.norm, form)
    return (*results, sums.lse, statistic)


def _gradient(grad: Tensor, rows: Rows, lse: Tensor, statistic: Tensor, form: Form) -> Tensor:
    """dL/dh ``[B, L, d]`` in the order of the rows, from dL/dloss in that of the input."""
    out = torch.zeros_like(rows.e)
    pulled = _Pulled(out, rows, ends(grad, rows.order, lse, statistic, form), form)
    for tile in rows.tiles(form, grad):
        pulled.add(rows.similarities(tile, form), tile)
    pulled.finish()
    return out


def _losses_and_gradient(rows: Rows, out: Tensor, form: Form) -> tuple[Tensor, ...]:
    """As `_losses`, and d(Σ loss)/dh to `out`, which is 0; what is known of pairs is kept for it.

    So rows must be few.
    """
    running, seen = Running(rows.norm, form), []
    for tile in rows.tiles(form):
        s = rows.similarities(tile, form)
        seen.append((s, tile, running.add(s, tile)))
    sums = running.sums()
    *results, statistic = losses(sums, rows.order, rows.norm, form)
    ones = torch.ones_like(sums.lse)
    pulled = _Pulled(out, rows, ends(ones, rows.order, sums.lse, statistic, form), form)
    for s, tile, exponential in seen:
        pulled.add(s, tile, exponential)
    pulled.finish()
    return (*results, sums.lse, statistic)


class _Pulled:
    """G·E, tile by tile, added to `out`."""

    def __init__(self, out: Tensor, rows: Rows, both: Ends, form: Form) -> None:
        self.out, self.rows, self.form = out, rows, form
        self.both = fold(both, form).stack()

    def add(self, s: Tensor, tile: Tile, exponential: Tensor | None = None) -> None:
        """As `gradient`."""
        left = Ends(*self.both[:, tile.batch, tile.rows, None].unbind())
        right = Ends(*self.both[:, tile.batch, None, tile.cols].unbind())
        g = gradient(s, tile, left, right, self.form, exponential)
        self._product(tile.batch, tile.rows, g, tile.cols)
        if tile.symmetric:
            self._product(tile.batch, tile.cols, g.mT, tile.rows)

    def _product(self, batch: slice, to: slice, g: Tensor, of: slice) -> None:
        into, e = self.out[batch, to], self.rows.e[batch, of]
        # A strided result torch would take matrix by matrix.
        if into.is_contiguous():
            into.baddbmm_(g, e)
        else:
            into.add_(torch.bmm(g, e))

    def finish(self) -> None:
        """Make it dL/dh."""
        through_norm(self.out, self.rows.e, self.rows.norm[..., None])
