"""Some tokens of each row against all of its tokens, which arrive in pieces.

As in `blockwise`, tokens are sorted and the matrix of similarities comes in tiles, but a tile
serves its rows alone: the tokens of its columns belong to somebody else, who computes theirs.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from simreg.kernels.order import Ends, Form, Order, losses
from simreg.kernels.pairs import Gaps, Running, Tile, gradient, through_norm, wide
from simreg.kernels.reference import EPS


class Span(NamedTuple):
    """Consecutive sorted tokens of a row, and the first and last of what they are."""

    start: int
    stop: int
    segments: tuple[int, int]
    labels: tuple[int, int]
    places: tuple[int, int]


class Tokens(NamedTuple):
    """Tokens of each row in sorted order; ``[B, n]`` each."""

    place: Tensor  # in the sorted row that holds everybody's tokens
    segment: Tensor  # as in `Order`, places of that row
    label: Tensor
    spans: list[list[Span]]  # of valid tokens, a tile's length each, by row


class Piece(NamedTuple):
    """Embeddings that arrived: sorted tokens from `start` on, of some rows from `first` on."""

    tokens: Tokens
    first: int
    start: int
    hidden: Tensor  # [b, c, d]
    norm: Tensor  # [B, c]: of all rows, like the next
    ends: Ends | None = None  # for the gradient

    def embed(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Hidden states ``[1, c, d]`` of a tile's columns and 1/‖h‖ ``[1, c, 1]``."""
        row = tile.batch.start - self.first
        hidden = self.hidden[row : row + 1, tile.cols]
        return hidden, _inverse(self.norm[tile.batch, tile.cols])


class Rows(NamedTuple):
    """The tokens whose loss is computed."""

    tokens: Tokens
    order: Order  # position: in `hidden`; counts: over everybody's tokens
    hidden: Tensor  # [B, l, d], not sorted
    norm: Tensor  # [B, n]

    def embed(self, batch: int, span: Span) -> tuple[Tensor, Tensor]:
        """Hidden states ``[1, r, d]`` of a span and 1/‖h‖ ``[1, r, 1]``."""
        index = self.order.position[batch, span.start : span.stop]
        hidden = self.hidden[batch].index_select(0, index)[None]
        return hidden, _inverse(self.norm[batch : batch + 1, span.start : span.stop])


def describe(place: Tensor, order: Order, size: int) -> list[Tokens]:
    """The tokens at each of the places ``[S, B, n]`` (sorted) of a sorted row, `S` times."""
    sources, batch, length = place.shape
    flat = place.transpose(0, 1).flatten(1)

    def at_place(values: Tensor) -> Tensor:
        return values.gather(1, flat).view(batch, sources, length).transpose(0, 1)

    segment, label, valid = map(at_place, (order.segment, order.label, order.valid))
    return split(place, segment, label, valid, size)


def split(place: Tensor, segment: Tensor, label: Tensor, valid: Tensor, size: int) -> list[Tokens]:
    """Tokens from what is known of each ``[S, B, n]``, valid ones first; spans of `size`."""
    count = valid.sum(-1, keepdim=True)
    starts = torch.arange(0, place.shape[2], size, device=place.device).expand(*count.shape[:2], -1)
    ends = torch.minimum(starts + size, count)
    edges = [starts, ends]
    for values in (segment, label, place):
        edges += [values.gather(2, at).long() for at in (starts, (ends - 1).clamp_min(0))]
    spans = [
        [
            [Span(a, z, (s, t), (k, m), (p, q)) for a, z, s, t, k, m, p, q in row if a < z]
            for row in source
        ]
        for source in torch.stack(edges, -1).tolist()
    ]
    whole = zip(place.int(), segment.int(), label.int(), spans, strict=True)
    return [Tokens(*parts) for parts in whole]


def tiles(rows: Tokens, cols: Piece) -> Iterator[tuple[int, Span, Tile]]:
    """Batch row, span of its tokens, and tile, wherever there may be a pair of candidates."""
    for b in range(cols.first, cols.first + len(cols.hidden)):
        for col in cols.tokens.spans[b]:
            if not 0 <= col.start - cols.start < cols.hidden.shape[1]:
                continue
            for row in rows.spans[b]:
                if overlap(row.segments, col.segments):
                    yield b, row, _tile(rows, cols, b, row, col)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges, with both ends, have a number in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def _tile(rows: Tokens, cols: Piece, b: int, row: Span, col: Span) -> Tile:
    def equal(mine: Tensor, theirs: Tensor) -> Tensor:
        left, right = mine[b, row.start : row.stop], theirs[b, col.start : col.stop]
        return (left[:, None] == right)[None]

    theirs, one_segment = cols.tokens, len({*row.segments, *col.segments}) == 1
    candidate = None if one_segment else equal(rows.segment, theirs.segment)
    positive = equal(rows.label, theirs.label) if overlap(row.labels, col.labels) else None
    if overlap(row.places, col.places):  # a token is not its own candidate
        other = ~equal(rows.place, theirs.place)
        candidate = other if candidate is None else candidate & other
        positive = None if positive is None else positive & other
    columns = slice(col.start - cols.start, col.stop - cols.start)
    return Tile(slice(b, b + 1), slice(row.start, row.stop), columns, candidate, positive)


def _inverse(norm: Tensor) -> Tensor:
    return 1 / norm[..., None].clamp_min(EPS)


def _mixed(hidden: Tensor) -> bool:
    """Whether products are of bfloat16 with sums in float32, as GPUs do them: exact, and fast.

    Elsewhere embeddings are widened first; float16 too, whose range does not hold the gradient.
    """
    return hidden.is_cuda and hidden.dtype == torch.bfloat16


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left, right, out_dtype=torch.float32)


def _similarity(rows: Rows, cols: Piece, b: int, row: Span, tile: Tile, tau: float) -> Tensor:
    mine, my_inverse = rows.embed(b, row)
    theirs, inverse = cols.embed(tile)
    if _mixed(mine):
        s = _product(mine, theirs.mT)
        return s.mul_(my_inverse / tau).mul_(inverse.mT)
    dtype = wide(mine.dtype)
    return torch.bmm(mine.to(dtype) * my_inverse, (theirs.to(dtype) * inverse).mT).div_(tau)


def _pulled(g: Tensor, cols: Piece, tile: Tile) -> Tensor:
    """G·E of a tile, ``[1, r, d]``; overwrites G."""
    theirs, inverse = cols.embed(tile)
    if _mixed(theirs):
        return _product(g.mul_(inverse.mT).to(theirs.dtype), theirs)
    return torch.bmm(g, theirs.to(g.dtype) * inverse)


def norms(hidden: Tensor, order: Order, tokens: Tokens) -> Tensor:
    """‖h‖ ``[B, n]``, sorted; 0 where ignored. `hidden` is ``[B, l, d]``, not sorted."""
    out = torch.zeros_like(order.position, dtype=wide(hidden.dtype))
    for b, spans in enumerate(tokens.spans):
        for span in spans:
            index = order.position[b, span.start : span.stop]
            h = hidden[b].index_select(0, index).to(out.dtype)
            out[b, span.start : span.stop] = torch.linalg.vector_norm(h, dim=-1)
    return out


def forward(
    rows: Rows, pieces: Callable[[], Iterable[Piece]], form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, mean cosines, logsumexp and statistic as in `op.loss`, ``[B, n]``, all sorted.

    Each call of `pieces` brings everybody's tokens; "decoupled" calls it twice.
    """
    running = Running(rows.norm, form)
    for cols in pieces():
        for b, row, tile in tiles(rows.tokens, cols):
            s = _similarity(rows, cols, b, row, tile, form.temperature)
            running.add(s, tile, tile.rows, -1)
    sums = running.sums()
    if form.variant == "decoupled":
        gaps = Gaps(sums.lse)
        for cols in pieces():
            for b, row, tile in tiles(rows.tokens, cols):
                if tile.positive is not None:
                    s = _similarity(rows, cols, b, row, tile, form.temperature)
                    gaps.add(s, tile, tile.rows, -1)
        sums = sums._replace(softplus=gaps.softplus, slope=gaps.slope)
    *results, statistic = losses(sums, rows.order, rows.norm, form)
    return (*results, sums.lse, statistic)  # type: ignore[return-value]


def backward(
    rows: Rows, ends: Ends, pieces: Iterable[Piece], form: Form
) -> Iterator[tuple[int, Span, Tensor]]:
    """dL/dh of the rows: batch row, span and gradient ``[r, d]``, for each span of valid tokens.

    Args:
        rows, pieces: as in `forward`; the pieces have `ends`.
        ends: of the rows, ``[B, n]`` sorted.
        form: which loss.
    """
    shape = (*rows.norm.shape, rows.hidden.shape[-1])
    grad_e = torch.zeros(shape, dtype=rows.norm.dtype, device=rows.norm.device)
    for cols in pieces:
        assert cols.ends is not None
        for b, row, tile in tiles(rows.tokens, cols):
            s = _similarity(rows, cols, b, row, tile, form.temperature)
            g = gradient(s, tile, ends, cols.ends, form)
            grad_e[tile.batch, tile.rows] += _pulled(g, cols, tile)
    for b, spans in enumerate(rows.tokens.spans):
        for span in spans:
            hidden, inverse = rows.embed(b, span)
            norm = rows.norm[b, span.start : span.stop, None]
            e = hidden[0].to(norm.dtype) * inverse[0]
            yield b, span, through_norm(grad_e[b, span.start : span.stop], e, norm)
