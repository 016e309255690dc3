"""Tiles of `rectangular` on CUDA: products by cuBLAS, the rest by the kernels of `epilogues`."""

from functools import cached_property

import torch
import triton
from torch import Tensor

from simreg.kernels import rectangular
from simreg.kernels.epilogues import entries, row_sums
from simreg.kernels.order import Ends, Form, Sums
from simreg.kernels.pairs import Gaps, logarithm
from simreg.kernels.rectangular import Pair, Piece, Rows
from simreg.kernels.tokens import POSITIVES
from simreg.kernels.triton import FUSION, INTERPRETED, MODES

ROWS, COLS = 8, 128  # of a tile, at a time


class Fused:
    """As `rectangular.Plain`, of bfloat16 hidden states on CUDA."""

    def __init__(self, rows: Rows, form: Form) -> None:
        self.rows, self.form = rows, form
        self.inverse = rectangular.inverse(rows.norm).contiguous()

    @cached_property
    def known(self) -> Tensor:
        """As `row_sums` has it."""
        known = self.inverse.new_zeros(7, *self.inverse.shape)
        known[0] = known[4] = -torch.inf
        return known

    def add(self, cols: Piece, pair: Pair) -> None:
        """A tile to the sums of its rows."""
        form = self.form
        self._sum(
            cols, pair, self.inverse, self.known, MODE=MODES[form.variant], PUSH=form.push != 0
        )

    def add_gaps(self, cols: Piece, pair: Pair, gaps: Gaps) -> None:
        """A tile with positives to what "decoupled" sums when the rest is known."""
        self._sum(cols, pair, gaps.lse, gaps.both, MODE=POSITIVES.value, PUSH=False)

    def sums(self) -> Sums:
        """What was added."""
        top, total, negative, positive, highest, rest, excess = self.known
        lse, numerator = logarithm(top, total), logarithm(highest, rest)
        return Sums(lse, positive, negative, numerator, excess=excess)

    def pulled(self, cols: Piece, pair: Pair, ends: Ends) -> Tensor:
        """G·E of a tile, ``[1, r, d]``; `ends` of the rows, the piece has its own."""
        assert cols.ends is not None
        theirs = cols.take(pair)
        products, places, numbers = self._tile(cols, pair)
        m = torch.empty_like(products, dtype=theirs.dtype)
        grid = triton.cdiv(m.shape[1], ROWS), triton.cdiv(m.shape[2], COLS)
        mine, given = _given(ends.map(Tensor.contiguous)), _given(cols.ends)
        entries[grid](
            products, *places, *mine, *given, m, *numbers,
            MODE=MODES[self.form.variant], PUSH=self.form.push != 0, ROWS=ROWS, COLS=COLS,
            INTERPRETED=INTERPRETED, **FUSION,
        )  # fmt: skip
        return rectangular.product(m, theirs)

    def _sum(self, cols: Piece, pair: Pair, lse: Tensor, sums: Tensor, **flags: object) -> None:
        products, places, numbers = self._tile(cols, pair)
        row_sums[(triton.cdiv(products.shape[1], ROWS),)](
            products, *places, lse, sums, self.inverse.numel(), *numbers,
            ROWS=ROWS, COLS=COLS, **FUSION, **flags,
        )  # fmt: skip

    def _tile(
        self, cols: Piece, pair: Pair
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[float, ...]]:
        """Products, and what both kernels ask of the tokens and the tile."""
        b, row, col = pair.batch, pair.row, pair.col
        products = rectangular.product(self.rows.take(b, row), cols.take(pair).mT)
        mine, theirs = self.rows.tokens, cols.tokens
        places = (*mine[:3], self.inverse, *theirs[:3], cols.inverse)
        numbers = (
            b * self.inverse.shape[1] + row.start,
            products.shape[1],
            b * theirs.place.shape[1] + col.start,
            b * cols.inverse.stride(0) + pair.cols.start,  # as in the ends of the piece
            products.shape[2],
            self.form.largest,
            self.form.edge,
            *map(int, (pair.segmented, pair.touching, pair.own)),
        )
        return products, places, numbers


def _given(ends: Ends) -> tuple[Tensor, ...]:
    """Five of them: without a push the last is not read."""
    return (*ends[:4], ends.lse if ends.hinge is None else ends.hinge)
