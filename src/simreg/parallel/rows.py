"""Whole rows for ranks that share a batch: each computes some, with the kernels of `simreg_loss`.

Where a batch has a row for every rank, that takes half of the products of `shards` and, of P ranks,
a P-th of its bytes: embeddings go once to the rank that computes their row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from simreg.kernels import op
from simreg.kernels.order import Form
from simreg.parallel.peers import Peers
from simreg.parallel.shards import combine

ROUND = 128 * 2**20
"""Bytes of embeddings of the rows that a rank computes at a time; one row at least."""


class WholeRows:
    """Rows dealt out to the ranks of a grid, some to each, and computed a few at a time."""

    def __init__(
        self, labels: Tensor, scopes: list[Tensor], lengths: list[int], peers: Peers, copies: Peers
    ) -> None:
        """As `Shards`: every rank of both groups must call."""
        self.peers, self.copies = peers, copies
        self.labels, self.scopes = labels, scopes
        self.width = max(lengths)  # ignored tokens fill up what is missing
        self.share = -(-len(labels) // (peers.size * copies.size))  # rows of a rank, at most
        self.count = peers.gather((labels >= 0).sum()).sum()
        self.order = _order(peers, copies, labels.device)
        self.copy = self.order.index(copies.rank)

    @staticmethod
    def suffice(batch: int, peers: Peers, copies: Peers) -> bool:
        """Whether there is a row for every rank."""
        return batch >= peers.size * copies.size

    def forward(self, hidden: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor | None]]:
        """Loss and mean cosines ``[B, l]``, and what `backward` must know."""
        results, saved = None, []
        for turn in self._turns(hidden):
            labels = self._fetch(self.labels, turn, fill=-1)
            scopes = [self._fetch(scope, turn) for scope in self.scopes]
            scope = combine(torch.stack(scopes)) if scopes else None
            rows = self._fetch(hidden, turn)
            *found, index, norm, lse, statistic = op.loss(rows, labels, scope, *form, "auto")
            saved += [labels, scope, index, norm, lse, statistic]
            if results is None:
                results = [value.new_zeros(hidden.shape[:2]) for value in found]
            for out, value in zip(results, found, strict=True):
                self._return(value, out, turn)
        assert results is not None
        return results, saved

    def backward(
        self, grad: Tensor, hidden: Tensor, saved: list[Tensor | None], form: Form
    ) -> Tensor:
        """dL/dhidden ``[B, l, d]`` from dL/dloss ``[B, l]``."""
        out = torch.zeros_like(hidden)
        for i, turn in enumerate(self._turns(hidden)):
            known = saved[6 * i : 6 * (i + 1)]
            rows, pull = self._fetch(hidden, turn), self._fetch(grad, turn)
            gradient = op.loss_backward(pull, rows, *known, *form, "auto")
            del rows
            self._return(gradient, out, turn)
        return out

    def _turns(self, hidden: Tensor) -> Iterator[slice]:
        """Of each rank's share the rows that it computes at a time."""
        row = self.peers.size * self.width * hidden.shape[2] * hidden.element_size()
        count = max(1, ROUND // max(1, row))
        for start in range(0, self.share, count):
            yield slice(start, min(start + count, self.share))

    def _rows(self, peer: int, copy: int, turn: slice, batch: int) -> slice:
        """Which rows of the batch a rank of the grid computes in a turn: perhaps none."""
        first = (peer * self.copies.size + copy) * self.share
        return slice(min(first + turn.start, batch), min(first + turn.stop, batch))

    def _fetch(self, values: Tensor, turn: slice, fill: int = 0) -> Tensor:
        """``[n, P·width, ...]`` of this rank's turn, from what each has of all ``[B, l, ...]``."""
        size, count = self.peers.size, turn.stop - turn.start
        parts = values.new_full((size, count, self.width, *values.shape[2:]), fill)
        for peer in range(size):
            rows = values[self._rows(peer, self.copy, turn, len(values))]
            parts[peer, : len(rows), : values.shape[1]] = rows
        return self.peers.exchange(parts).transpose(0, 1).flatten(1, 2)

    def _return(self, found: Tensor, out: Tensor, turn: slice) -> None:
        """Writes ``[n, P·width, ...]`` of every rank's turn into ``[B, l, ...]`` of each."""
        size = len(found), self.peers.size, self.width
        parts = found.reshape(*size, *found.shape[2:]).transpose(0, 1).contiguous()
        found_by = self.copies.gather(self.peers.exchange(parts))
        for copy, place in enumerate(self.order):
            for peer, values in enumerate(found_by[place]):
                rows = out[self._rows(peer, copy, turn, len(out))]
                rows.copy_(values[: len(rows), : out.shape[1]])


def _order(peers: Peers, copies: Peers, device: torch.device) -> list[int]:
    """Places in `copies` in an order that is the same for all ranks of `peers`.

    A rank's own place need not be the same as theirs, since torch sorts the ranks of each group of
    a mesh. So copies are counted by the first rank of the group of peers that each is in.
    """
    if peers.group is None or copies.group is None:
        return list(range(copies.size))
    first = torch.tensor(min(peers.members), device=device)
    return copies.gather(first).argsort().tolist()
