"""Some tokens of each row against all of its tokens, which arrive in pieces.

As in `blockwise`, tokens are sorted and the matrix of similarities comes in tiles, but a tile
serves its rows alone: the tokens of its columns belong to somebody else, who computes theirs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from simreg.kernels.op import no_triton
from simreg.kernels.order import Ends, Form, Order, Sums, losses
from simreg.kernels.pairs import Gaps, Running, Tile, fold, gradient, through_norm, wide
from simreg.kernels.reference import EPS

if TYPE_CHECKING:
    from simreg.kernels.fused import Fused


class Span(NamedTuple):
    """Consecutive sorted tokens of a row, and the first and last of what they are."""

    start: int
    stop: int
    segments: tuple[int, int]
    labels: tuple[int, int]
    places: tuple[int, int]


class Tokens(NamedTuple):
    """Tokens of each row in sorted order; ``[B, n]`` each, int32, contiguous."""

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
    inverse: Tensor  # 1/‖h‖, [B, c]: of all rows, like the next
    ends: Ends | None = None  # for the gradient

    def take(self, pair: "Pair") -> Tensor:
        """Hidden states ``[1, c, d]`` of a tile's columns."""
        row = pair.batch - self.first
        return self.hidden[row : row + 1, pair.cols]


class Rows(NamedTuple):
    """The tokens whose loss is computed."""

    tokens: Tokens
    order: Order  # position: in `hidden`; counts: over everybody's tokens
    hidden: Tensor  # [B, l, d], not sorted
    norm: Tensor  # [B, n]

    def take(self, batch: int, span: Span) -> Tensor:
        """Hidden states ``[1, r, d]`` of a span."""
        index = self.order.position[batch, span.start : span.stop]
        return self.hidden[batch].index_select(0, index)[None]


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
    keys = (values.int().contiguous() for values in (place, segment, label))
    return [Tokens(*parts) for parts in zip(*keys, spans, strict=True)]


class Pair(NamedTuple):
    """Spans of a row and a piece that may hold candidates of each other: a tile."""

    batch: int
    row: Span
    col: Span
    start: int  # of the piece

    @property
    def cols(self) -> slice:
        """Of the piece."""
        return slice(self.col.start - self.start, self.col.stop - self.start)

    @property
    def segmented(self) -> bool:
        """Whether there are several segments."""
        return len({*self.row.segments, *self.col.segments}) > 1

    @property
    def touching(self) -> bool:
        """Whether there may be positives."""
        return overlap(self.row.labels, self.col.labels)

    @property
    def own(self) -> bool:
        """Whether a token may meet itself, which is not its own candidate."""
        return overlap(self.row.places, self.col.places)


def tiles(rows: Tokens, cols: Piece) -> Iterator[Pair]:
    """Wherever there may be a pair of candidates."""
    for b in range(cols.first, cols.first + len(cols.hidden)):
        for col in cols.tokens.spans[b]:
            if not 0 <= col.start - cols.start < cols.hidden.shape[1]:
                continue
            for row in rows.spans[b]:
                if overlap(row.segments, col.segments):
                    yield Pair(b, row, col, cols.start)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges, with both ends, have a number in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def _masked(rows: Tokens, cols: Piece, pair: Pair) -> Tile:
    b, row, col = pair.batch, pair.row, pair.col

    def equal(mine: Tensor, theirs: Tensor) -> Tensor:
        left, right = mine[b, row.start : row.stop], theirs[b, col.start : col.stop]
        return (left[:, None] == right)[None]

    theirs = cols.tokens
    inside = equal(rows.segment, theirs.segment) if pair.segmented else None
    positive = equal(rows.label, theirs.label) if pair.touching else None
    if pair.own:
        others = ~equal(rows.place, theirs.place)
        inside = others if inside is None else inside & others
        positive = None if positive is None else positive & others
    return Tile(slice(b, b + 1), slice(row.start, row.stop), pair.cols, inside, positive)


def inverse(norm: Tensor) -> Tensor:
    """1/‖h‖ of tokens."""
    return 1 / norm.clamp_min(EPS)


def mixed(hidden: Tensor) -> bool:
    """Whether products are of bfloat16 with sums in float32, as GPUs do them: exact, and fast.

    Elsewhere embeddings are widened first; float16 too, whose range does not hold the gradient.
    """
    return hidden.is_cuda and hidden.dtype == torch.bfloat16


def product(left: Tensor, right: Tensor) -> Tensor:
    """Of bfloat16, in float32."""
    return torch.bmm(left, right, out_dtype=torch.float32)


class Plain:
    """Sums over tiles, and their gradient, in plain PyTorch."""

    def __init__(self, rows: Rows, form: Form) -> None:
        self.rows, self.form = rows, form

    @cached_property
    def running(self) -> Running:
        """What was added."""
        return Running(self.rows.norm, self.form)

    def add(self, cols: Piece, pair: Pair) -> None:
        """A tile to the sums of its rows."""
        s, tile = self._similarities(cols, pair)
        self.running.add(s, tile)

    def add_gaps(self, cols: Piece, pair: Pair, gaps: Gaps) -> None:
        """A tile with positives to what "decoupled" sums when the rest is known."""
        s, tile = self._similarities(cols, pair)
        gaps.add(s, tile)

    def sums(self) -> Sums:
        """What was added."""
        return self.running.sums()

    def pulled(self, cols: Piece, pair: Pair, ends: Ends) -> Tensor:
        """G·E of a tile, ``[1, r, d]``; `ends` of the rows, the piece has its own."""
        assert cols.ends is not None
        s, tile = self._similarities(cols, pair)
        left = ends.map(lambda value: value[tile.batch, tile.rows, None])
        right = cols.ends.map(lambda value: value[tile.batch, None, tile.cols])
        g = gradient(s, tile, fold(left, self.form), fold(right, self.form), self.form)
        theirs, scale = cols.take(pair), cols.inverse[tile.batch, tile.cols, None]
        if mixed(theirs):
            return product(g.mul_(scale.mT).to(theirs.dtype), theirs)
        return torch.bmm(g, theirs.to(g.dtype) * scale)

    def _similarities(self, cols: Piece, pair: Pair) -> tuple[Tensor, Tile]:
        tile, tau = _masked(self.rows.tokens, cols, pair), self.form.temperature
        mine, theirs = self.rows.take(pair.batch, pair.row), cols.take(pair)
        rows = inverse(self.rows.norm[tile.batch, tile.rows])[..., None]
        columns = cols.inverse[tile.batch, tile.cols, None]
        if mixed(mine):
            return product(mine, theirs.mT).mul_(rows / tau).mul_(columns.mT), tile
        dtype = wide(mine.dtype)
        s = torch.bmm(mine.to(dtype) * rows, (theirs.to(dtype) * columns).mT)
        return s.div_(tau), tile


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
    work = _work(rows, form)
    for cols in pieces():
        for pair in tiles(rows.tokens, cols):
            work.add(cols, pair)
    sums = work.sums()
    if form.variant == "decoupled":
        gaps = Gaps(sums.lse)
        for cols in pieces():
            for pair in tiles(rows.tokens, cols):
                if pair.touching:
                    work.add_gaps(cols, pair, gaps)
        sums = sums._replace(softplus=gaps.softplus, slope=gaps.slope)
    *results, statistic = losses(sums, rows.order, rows.norm, form)
    return (*results, sums.lse, statistic)  # type: ignore[return-value]


def _work(rows: Rows, form: Form) -> "Plain | Fused":
    if mixed(rows.hidden) and no_triton(rows.hidden) is None:
        from simreg.kernels.fused import Fused

        return Fused(rows, form)
    return Plain(rows, form)


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
    work = _work(rows, form)
    for cols in pieces:
        for pair in tiles(rows.tokens, cols):
            row = slice(pair.row.start, pair.row.stop)
            grad_e[pair.batch, row] += work.pulled(cols, pair, ends)[0]
    for b, spans in enumerate(rows.tokens.spans):
        for span in spans:
            norm = rows.norm[b, span.start : span.stop]
            e = rows.take(b, span)[0].to(norm.dtype) * inverse(norm)[:, None]
            yield b, span, through_norm(grad_e[b, span.start : span.stop], e, norm[:, None])
