"""Who holds which tokens, and how embeddings travel to the ranks that need them."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels import rectangular
from simreg.kernels.order import Ends, Order, describe, sort_tokens
from simreg.kernels.pairs import block
from simreg.kernels.rectangular import Piece, Rows, Span
from simreg.parallel.peers import Peers

CHUNK = 16 * 2**20  # bytes of embeddings that travel at a time; three such chunks exist at once


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
        # Ignored tokens fill up what is missing; each copy gets the same number of tokens.
        longest = max(lengths)
        self.width = longest + -longest % copies.size
        missing = (0, self.width - labels.shape[1])
        keys = [F.pad(labels, missing, value=-1), *(F.pad(scope, missing) for scope in scopes)]
        rows = peers.gather(torch.stack(keys)).permute(1, 2, 0, 3).flatten(2)
        scope = _combine(rows[1:])
        everyone = describe(sort_tokens(rows[0], scope), rows[0], scope)
        self.count = everyone.valid.sum()

        places = torch.arange(rows[0].shape[1], device=labels.device).expand_as(rows[0])
        split = (len(labels), peers.size, self.width)
        place, position = everyone.unsort(places).view(split).transpose(0, 1).sort(-1)
        self.tokens = rectangular.describe(place, everyone, self.block)
        mine = place[peers.rank]
        self.own = Order(position[peers.rank], *(v.gather(1, mine) for v in everyone[1:]))
        self.mine = self.tokens[peers.rank]
        dealt = mine[None, :, copies.rank :: copies.size]
        self.rows = rectangular.describe(dealt, everyone, self.block)[0]
        self.dealt = Order(*map(self.deal, self.own))

    def own_rows(self, hidden: Tensor, norm: Tensor) -> Rows:
        """What this copy computes, from ``[B, l, d]`` and the sorted norms of its tokens."""
        return Rows(self.rows, self.dealt, hidden, self.deal(norm))

    def deal(self, values: Tensor) -> Tensor:
        """This copy's share ``[..., n]`` of sorted per-token values."""
        return values[..., self.copies.rank :: self.copies.size].contiguous()

    def collect(self, values: Tensor) -> Tensor:
        """All shares ``[..., B, width]`` of the copies, from one's own."""
        return self.copies.gather(values).movedim(0, -1).flatten(-2)

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
        shares, out = self.copies.gather(share), torch.zeros_like(hidden)
        for b, spans in enumerate(self.mine.spans):
            for span in spans:
                k = torch.arange(span.start, span.stop, device=out.device)
                gradient = shares[k % self.copies.size, b, k // self.copies.size]
                out[b].index_copy_(0, self.own.position[b, k], gradient)
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
        for start in range(0, self.width, self._chunk(hidden)):
            own = self._gather(hidden, start)
            transfers = [self._begin(own, start, step) for step in range(1, min(2, size))]
            if self._needs(me, start, me, hidden):
                yield self._piece(own, norm, ends, me, start)
            for step in range(1, size):
                requests, arrived = transfers.pop()
                for request in requests:
                    request.wait()
                if step + 1 < size:
                    transfers.append(self._begin(own, start, step + 1))
                if arrived is not None:
                    yield self._piece(arrived, norm, ends, (me - step) % size, start)

    def _begin(self, own: Tensor, start: int, step: int) -> tuple[list[dist.Work], Tensor | None]:
        me, size = self.peers.rank, self.peers.size
        to, source = (me + step) % size, (me - step) % size
        operations, arriving = [], None
        if self._needs(me, start, to, own):
            operations.append(self._operation(dist.isend, own, to))
        if self._needs(source, start, me, own):
            shape = (len(own), self._width(source, start, own), own.shape[2])
            arriving = own.new_empty(shape)
            operations.append(self._operation(dist.irecv, arriving, source))
        return dist.batch_isend_irecv(operations) if operations else [], arriving

    def _operation(self, what, tensor: Tensor, peer: int) -> dist.P2POp:  # type: ignore[no-untyped-def]
        return dist.P2POp(what, tensor, group=self.peers.group, group_peer=peer)

    def _chunk(self, hidden: Tensor) -> int:
        """Tokens of a row in a chunk: whole tiles."""
        token = len(hidden) * hidden.shape[2] * hidden.element_size()
        return max(1, CHUNK // token // self.block) * self.block

    def _spans(self, source: int, start: int, hidden: Tensor) -> list[list[Span]]:
        end = start + self._chunk(hidden)
        return [
            [span for span in row if start <= span.start < end] for row in self.tokens[source].spans
        ]

    def _width(self, source: int, start: int, hidden: Tensor) -> int:
        """Tokens of a row of a chunk that travel: none are, after the last that isn't ignored."""
        spans = self._spans(source, start, hidden)
        return max((row[-1].stop - start for row in spans if row), default=0)

    def _needs(self, source: int, start: int, to: int, hidden: Tensor) -> bool:
        """Whether a chunk of `source` has candidates for tokens of rank `to`."""
        chunk = self._spans(source, start, hidden)
        return any(
            rectangular.overlap(one.segments, other.segments)
            for sent, kept in zip(chunk, self.tokens[to].spans, strict=True)
            for one in sent
            for other in kept
        )

    def _gather(self, hidden: Tensor, start: int) -> Tensor:
        """A chunk of one's own tokens, sorted, ``[B, c, d]``."""
        width = self._width(self.peers.rank, start, hidden)
        out = hidden.new_zeros(len(hidden), width, hidden.shape[2])
        for b, spans in enumerate(self._spans(self.peers.rank, start, hidden)):
            stop = spans[-1].stop if spans else start
            index = self.own.position[b, start:stop]
            torch.index_select(hidden[b], 0, index, out=out[b, : stop - start])
        return out

    def _piece(
        self, hidden: Tensor, norm: Tensor, ends: Ends | None, source: int, start: int
    ) -> Piece:
        part = (source, slice(None), slice(start, start + hidden.shape[1]))
        of_piece = None if ends is None else Ends(*(value[part] for value in ends))
        return Piece(self.tokens[source], start, hidden, norm[part], of_piece)


def _combine(scopes: Tensor) -> Tensor | None:
    """Ids ``[B, L]`` that are equal where all of ``[S, B, L]`` are; None if S is 0."""
    scope = None
    for other in scopes:
        if scope is None:
            scope = other
            continue
        dense, others = (torch.unique(ids, return_inverse=True)[1] for ids in (scope, other))
        scope = dense * (others.max() + 1) + others
    return scope
