"""Who holds which tokens, and how embeddings travel to the ranks that need them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels import rectangular
from simreg.kernels.op import plainly
from simreg.kernels.order import Ends, Form, Order, describe, ends, sort_tokens
from simreg.kernels.pairs import block
from simreg.kernels.rectangular import Piece, Rows, Span
from simreg.parallel.peers import Peers

CHUNK = 16 * 2**20
"""Bytes of embeddings that travel at a time, or one tile of one row; up to four are there at once:
one's own, the one before it or the one that is computed with, and the one that is on its way."""


class Chunk(NamedTuple):
    """Sorted tokens from `start` to `stop` of the rows from `first` to `last`."""

    first: int
    last: int
    start: int
    stop: int


class Shards:
    """The tokens of all ranks, sorted as one row, and the part of this one.

    Each rank knows of each token only its place in the order, its segment and its label (12
    bytes); of embeddings it has its own, and others only while it computes with them.
    """

    def __init__(
        self, labels: Tensor, scopes: list[Tensor], lengths: list[int], peers: Peers, copies: Peers
    ) -> None:
        """Gathers labels and scopes: every rank of `peers` must call.

        Args:
            labels: ``[B, l]``, negative where ignored.
            scopes: ``[B, l]`` int64 each: tokens interact where all of these are equal.
            lengths: l of every rank of `peers`.
            peers: who holds other tokens of the same rows.
            copies: who holds the same tokens; the rows of the matrix are dealt out to them.
        """
        self.peers, self.copies = peers, copies
        self.block = block(labels.device)
        self.width = max(lengths)  # ignored tokens fill up what is missing
        missing = (0, self.width - labels.shape[1])
        keys = [F.pad(labels, missing, value=-1), *(F.pad(scope, missing) for scope in scopes)]
        rows = peers.gather(torch.stack(keys)).permute(1, 2, 0, 3).flatten(2)
        scope = combine(rows[1:])
        everyone = describe(sort_tokens(rows[0], scope), rows[0], scope)
        self.count = everyone.valid.sum()

        places = torch.arange(rows[0].shape[1], device=labels.device).expand_as(rows[0])
        split = (len(labels), peers.size, self.width)
        place, position = everyone.unsort(places).view(split).transpose(0, 1).sort(-1)
        self.tokens = rectangular.describe(place, everyone, self.block)
        mine = place[peers.rank]
        columns = (values.gather(1, mine) for values in everyone[1:])
        self.own = Order(position[peers.rank].clone(), *columns)
        self.mine = self.tokens[peers.rank]
        # Copies take turns of so many sorted tokens: whole tiles, if there are enough.
        most = max((row[-1].stop for row in self.mine.spans if row), default=1)
        self.turn = min(self.block, -(-most // copies.size))
        self.dealt = Order(*map(self.deal, self.own))
        place, segment, label, valid = (
            self.deal(values)[None] for values in (*self.mine[:3], self.own.valid)
        )
        self.rows = rectangular.split(place, segment, label, valid, self.turn)[0]

    def forward(self, hidden: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor | None]]:
        """Loss and mean cosines ``[B, l]`` of ``[B, l, d]``, and what `backward` must know."""
        with plainly(hidden):
            norm = rectangular.norms(hidden, self.own, self.mine)
            norms = self.peers.gather(norm)
            results = rectangular.forward(
                self.own_rows(hidden, norm), lambda: self.pieces(hidden, norms), form
            )
        *values, lse, statistic = self.collect(torch.stack(results))
        length = hidden.shape[1]
        return [self.own.unsort(value)[:, :length] for value in values], [norms, lse, statistic]

    def backward(self, grad: Tensor, hidden: Tensor, saved: list[Tensor], form: Form) -> Tensor:
        """dL/dhidden ``[B, l, d]`` from dL/dloss ``[B, l]``."""
        norms, lse, statistic = saved
        grad = F.pad(grad, (0, self.width - grad.shape[1]))
        with plainly(hidden):
            mine = ends(grad, self.own, lse, statistic, form)
            everyone = Ends(*self.peers.gather(mine.stack()).unbind(1))
            found = rectangular.backward(
                self.own_rows(hidden, norms[self.peers.rank]),
                mine.map(self.deal),
                self.pieces(hidden, norms, everyone),
                form,
            )
            return self.scatter(found, hidden)

    def own_rows(self, hidden: Tensor, norm: Tensor) -> Rows:
        """What this copy computes, from ``[B, l, d]`` and the sorted norms of its tokens."""
        return Rows(self.rows, self.dealt, hidden, self.deal(norm))

    def deal(self, values: Tensor) -> Tensor:
        """This copy's share ``[B, n]`` of sorted per-token values ``[B, width]``, 0 where none."""
        values = F.pad(values, (0, -self.width % (self.turn * self.copies.size)))
        turns = values.view(len(values), -1, self.copies.size, self.turn)
        return turns[:, :, self.copies.rank].flatten(1)

    def collect(self, values: Tensor) -> Tensor:
        """All shares ``[..., B, width]`` of the copies, from one's own ``[..., B, n]``."""
        turns = self.copies.gather(values)
        turns = turns.view(*turns.shape[:-1], -1, self.turn)
        return turns.movedim(0, -2).flatten(-3)[..., : self.width]

    def scatter(self, found: Iterable[tuple[int, Span, Tensor]], hidden: Tensor) -> Tensor:
        """Gradients ``[r, d]`` of spans of this copy's share to ``[B, l, d]``, like `hidden`."""
        if self.copies.size == 1:
            out = torch.zeros_like(hidden)
            for b, span, gradient in found:
                index = self.own.position[b, span.start : span.stop]
                out[b].index_copy_(0, index, gradient.to(out.dtype))
            return out
        share = hidden.new_zeros(*self.dealt.position.shape, hidden.shape[2])
        for b, span, gradient in found:
            share[b, span.start : span.stop] = gradient
            del gradient  # a view of all of them, in float32
        out = torch.zeros_like(hidden)
        for k in range(share.shape[1] // self.turn):
            gradients = self.copies.gather(share[:, k * self.turn : (k + 1) * self.turn])
            for copy, turn in enumerate(gradients):
                start = (k * self.copies.size + copy) * self.turn
                for b, spans in enumerate(self.mine.spans):
                    stop = min(start + self.turn, spans[-1].stop if spans else 0)
                    if start < stop:
                        index = self.own.position[b, start:stop]
                        out[b].index_copy_(0, index, turn[b, : stop - start])
        return out

    def pieces(self, hidden: Tensor, norm: Tensor, ends: Ends | None = None) -> Iterator[Piece]:
        """The embeddings of everybody, own ones first, as far as this rank needs them.

        Every rank of `peers` must iterate to the end. While one piece is computed with, the next
        is on its way. Rank r sends to r + 1, r + 2, ... and only what they need.

        Args:
            hidden: ``[B, l, d]`` of this rank.
            norm: ``[size, B, width]``, sorted, of every rank.
            ends: ``[size, B, width]`` each, for the gradient.
        """
        me, size = self.peers.rank, self.peers.size
        inverse = rectangular.inverse(norm)
        for chunk in self._chunks(hidden):
            own = self._gather(hidden, chunk)
            transfers = [self._begin(own, chunk, step) for step in range(1, min(2, size))]
            if self._needs(me, chunk, me):
                yield self._piece(own, inverse, ends, me, chunk)
            for step in range(1, size):
                requests, arrived = transfers.pop()
                for request in requests:
                    request.wait()
                if step + 1 < size:
                    transfers.append(self._begin(own, chunk, step + 1))
                if arrived is not None:
                    yield self._piece(arrived, inverse, ends, (me - step) % size, chunk)

    def _chunks(self, hidden: Tensor) -> Iterator[Chunk]:
        """The same on every rank: as many rows as fit into CHUNK, of whole tiles."""
        batch, _, dim = hidden.shape
        tile = max(1, self.block * dim * hidden.element_size())
        length = max(1, CHUNK // tile) * self.block
        rows = max(1, CHUNK // (tile * -(-min(length, self.width) // self.block)))
        for first in range(0, batch, rows):
            for start in range(0, self.width, length):
                yield Chunk(first, min(first + rows, batch), start, start + length)

    def _begin(self, own: Tensor, chunk: Chunk, step: int) -> tuple[list[dist.Work], Tensor | None]:
        me, size = self.peers.rank, self.peers.size
        to, source = (me + step) % size, (me - step) % size
        operations, arriving = [], None
        if self._needs(me, chunk, to):
            operations.append(self._operation(dist.isend, own, to))
        if self._needs(source, chunk, me):
            arriving = own.new_empty(len(own), self._length(source, chunk), own.shape[2])
            operations.append(self._operation(dist.irecv, arriving, source))
        return dist.batch_isend_irecv(operations) if operations else [], arriving

    def _operation(self, what, tensor: Tensor, peer: int) -> dist.P2POp:  # type: ignore[no-untyped-def]
        return dist.P2POp(what, tensor, group=self.peers.group, group_peer=peer)

    def _spans(self, source: int, chunk: Chunk) -> list[list[Span]]:
        """Of each row of a chunk."""
        return [
            [span for span in row if chunk.start <= span.start < chunk.stop]
            for row in self.tokens[source].spans[chunk.first : chunk.last]
        ]

    def _length(self, source: int, chunk: Chunk) -> int:
        """Tokens of a row of a chunk that travel: none, after the last that isn't ignored."""
        spans = self._spans(source, chunk)
        return max((row[-1].stop - chunk.start for row in spans if row), default=0)

    def _needs(self, source: int, chunk: Chunk, to: int) -> bool:
        """Whether a chunk of `source` has candidates for tokens of rank `to`."""
        kept = self.tokens[to].spans[chunk.first : chunk.last]
        return any(
            rectangular.overlap(one.segments, other.segments)
            for row, others in zip(self._spans(source, chunk), kept, strict=True)
            for one in row
            for other in others
        )

    def _gather(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        """A chunk of one's own tokens, sorted, ``[b, c, d]``."""
        spans = self._spans(self.peers.rank, chunk)
        length = self._length(self.peers.rank, chunk)
        out = hidden.new_zeros(len(spans), length, hidden.shape[2])
        for i, row in enumerate(spans):
            if row:
                index = self.own.position[chunk.first + i, chunk.start : row[-1].stop]
                torch.index_select(hidden[chunk.first + i], 0, index, out=out[i, : len(index)])
        return out

    def _piece(
        self, hidden: Tensor, inverse: Tensor, ends: Ends | None, source: int, chunk: Chunk
    ) -> Piece:
        part = (source, slice(None), slice(chunk.start, chunk.start + hidden.shape[1]))
        of_piece = None if ends is None else ends.map(lambda value: value[part])
        return Piece(self.tokens[source], chunk.first, chunk.start, hidden, inverse[part], of_piece)


def combine(scopes: Tensor) -> Tensor | None:
    """Ids ``[B, L]`` that are equal where all of ``[S, B, L]`` are; None if S is 0."""
    scope = None
    for other in scopes:
        if scope is None:
            scope = other
            continue
        dense, others = (torch.unique(ids, return_inverse=True)[1] for ids in (scope, other))
        scope = dense * (others.max() + 1) + others
    return scope
