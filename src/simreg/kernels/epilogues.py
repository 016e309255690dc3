"""Triton kernels over a tile of products that cuBLAS made: what `pairs` does in ten passes, in one.

A tile has `rows` × `cols` products h_r · h_c in float32. What is known of each token: its place,
segment and label (`rectangular.Tokens`), int32, and its 1/‖h‖. `row` and `col` are where the tile's
first tokens are in these, flat in memory, `at` where its first column is in what a piece brings:
its scales and ends. `segmented`: tokens are of several segments; `touching`: some pairs may be
positives; `own`: tokens may meet themselves. Where not, nobody looks.
"""

import triton
import triton.language as tl

from simreg.kernels.tiles import _cast, _extend, _finite, _sigmoid, _softmax, _softplus
from simreg.kernels.tokens import DECOUPLED, IN, POSITIVES, launched


@triton.jit
def _pairs(
    row_place, row_segment, row_label, col_place, col_segment, col_label, r, c, in_row, in_col,
    segmented, touching, own,
):  # fmt: skip
    """Candidates and positives among some rows and columns."""
    candidate = in_row[:, None] & in_col[None, :]
    positive = tl.full(candidate.shape, 0, tl.int1)
    if segmented > 0:
        mine = tl.load(row_segment + r, mask=in_row, other=0)[:, None]
        candidate &= mine == tl.load(col_segment + c, mask=in_col, other=0)[None, :]
    if own > 0:
        mine = tl.load(row_place + r, mask=in_row, other=0)[:, None]
        candidate &= mine != tl.load(col_place + c, mask=in_col, other=0)[None, :]
    if touching > 0:
        mine = tl.load(row_label + r, mask=in_row, other=0)[:, None]
        equal = mine == tl.load(col_label + c, mask=in_col, other=0)[None, :]
        positive = candidate & equal
    return candidate, positive


@launched
def row_sums(
    products, row_place, row_segment, row_label, row_scale, col_place, col_segment, col_label,
    col_scale, lse, sums, tokens, row, rows, col, at, cols, inverse_temperature, edge, segmented,
    touching, own,
    MODE: tl.constexpr, PUSH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the sums of its rows, [7, tokens] or with POSITIVES [2, tokens].

    Sums: a logsumexp of candidates (DECOUPLED: of negatives) as largest exponent and sum below it,
    Σ of negatives, Σ of positives, the positives' logsumexp likewise (IN), Σ max(0, s − edge) of
    candidates (PUSH). POSITIVES: Σ softplus(lse − s), Σ sigmoid(lse − s).
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = r < rows
    row_inverse = tl.load(row_scale + row + r, mask=in_row, other=1)[:, None]
    products += r[:, None].to(tl.int64) * cols
    r += row
    sums += r
    nothing, zero = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    top, total, negatives, positives = nothing, zero, zero, zero
    positive_top, positive_total, softplus, slope, excess = nothing, zero, zero, zero, zero
    row_lse = tl.load(lse + r, mask=in_row, other=0)[:, None] if MODE == POSITIVES else 0.0
    for start in range(0, cols, COLS):
        c = start + tl.arange(0, COLS)
        in_col = c < cols
        x = tl.load(products + c[None, :], mask=in_row[:, None] & in_col[None, :], other=0)
        col_inverse = tl.load(col_scale + at + c, mask=in_col, other=1)[None, :]
        candidate, positive = _pairs(
            row_place, row_segment, row_label, col_place, col_segment, col_label, r, col + c,
            in_row, in_col, segmented, touching, own,
        )  # fmt: skip
        s = x * (row_inverse * col_inverse) * inverse_temperature
        if MODE == POSITIVES:
            gap = row_lse - s
            softplus += tl.sum(tl.where(positive, _softplus(gap), 0.0), 1)
            slope += tl.sum(tl.where(positive, _sigmoid(gap), 0.0), 1)
        else:
            s = tl.where(candidate, s, float("-inf"))
            negative = tl.where(positive, float("-inf"), s)
            top, total = _extend(top, total, negative if MODE == DECOUPLED else s, False)
            negatives += tl.sum(_finite(negative), 1)
            positives += tl.sum(tl.where(positive, s, 0.0), 1)
            if MODE == IN:
                chosen = tl.where(positive, s, float("-inf"))
                positive_top, positive_total = _extend(positive_top, positive_total, chosen, False)
            if PUSH:
                above = tl.maximum(s - edge, 0.0, propagate_nan=tl.PropagateNan.ALL)
                excess += tl.sum(above, 1)
    if MODE == POSITIVES:
        _add(sums, softplus, in_row)
        _add(sums + tokens, slope, in_row)
    else:
        _add_exponentials(sums, tokens, top, total, in_row)
        _add(sums + 2 * tokens, negatives, in_row)
        _add(sums + 3 * tokens, positives, in_row)
        if MODE == IN:
            _add_exponentials(sums + 4 * tokens, tokens, positive_top, positive_total, in_row)
        if PUSH:
            _add(sums + 6 * tokens, excess, in_row)


@triton.jit
def _add(sums, value, inside):
    tl.store(sums, tl.load(sums, mask=inside, other=0) + value, mask=inside)


@triton.jit
def _add_exponentials(sums, tokens, top, total, inside):
    known = tl.load(sums, mask=inside, other=float("-inf"))
    new = tl.maximum(known, top)
    shift = tl.where(new == float("-inf"), 0.0, new)
    below = tl.load(sums + tokens, mask=inside, other=0) * tl.exp(known - shift)
    tl.store(sums, new, mask=inside)
    tl.store(sums + tokens, below + total * tl.exp(top - shift), mask=inside)


@launched
def entries(
    products, row_place, row_segment, row_label, row_scale, col_place, col_segment, col_label,
    col_scale, row_lse, row_softmax, row_numerator, row_pull, row_hinge, col_lse, col_softmax,
    col_numerator, col_pull, col_hinge, m, row, rows, col, at, cols, inverse_temperature, edge,
    segmented, touching, own,
    MODE: tl.constexpr, PUSH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """M = G / ‖h_col‖ of a tile, [rows, cols], in the dtype of m; the ends are those of `Ends`."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    in_row, in_col = r < rows, c < cols
    inside = in_row[:, None] & in_col[None, :]
    place = r[:, None].to(tl.int64) * cols + c[None, :]
    row_inverse = tl.load(row_scale + row + r, mask=in_row, other=1)[:, None]
    col_inverse = tl.load(col_scale + at + c, mask=in_col, other=1)[None, :]
    x = tl.load(products + place, mask=inside, other=0)
    s = x * (row_inverse * col_inverse) * inverse_temperature
    candidate, positive = _pairs(
        row_place, row_segment, row_label, col_place, col_segment, col_label, row + r, col + c,
        in_row, in_col, segmented, touching, own,
    )  # fmt: skip
    r += row
    c += at
    lse_r = tl.load(row_lse + r, mask=in_row, other=0)[:, None]
    lse_c = tl.load(col_lse + c, mask=in_col, other=0)[None, :]
    weight_r = tl.load(row_softmax + r, mask=in_row, other=0)[:, None]
    weight_c = tl.load(col_softmax + c, mask=in_col, other=0)[None, :]
    g = _softmax(s, s, lse_r, weight_r, lse_c, weight_c, 0.0, False)
    if touching > 0:
        pull_r = tl.load(row_pull + r, mask=in_row, other=0)[:, None]
        pull_c = tl.load(col_pull + c, mask=in_col, other=0)[None, :]
        if MODE == IN:
            numerator_r = tl.load(row_numerator + r, mask=in_row, other=0)[:, None]
            numerator_c = tl.load(col_numerator + c, mask=in_col, other=0)[None, :]
            pull = _softmax(s, s, numerator_r, pull_r, numerator_c, pull_c, 0.0, False)
        elif MODE == DECOUPLED:
            pull = _sigmoid(lse_r - s) * pull_r + _sigmoid(lse_c - s) * pull_c
        else:
            pull = pull_r + pull_c
        kept = 0.0 if MODE == DECOUPLED else g  # whose positives do not push
        g = tl.where(positive, kept - pull, g)
    if PUSH:
        hinge_r = tl.load(row_hinge + r, mask=in_row, other=0)[:, None]
        hinge_c = tl.load(col_hinge + c, mask=in_col, other=0)[None, :]
        g += tl.where(s > edge, hinge_r + hinge_c, 0.0)
    g = tl.where(candidate, g * col_inverse, 0.0)
    tl.store(m + place, _cast(g, m.dtype.element_ty, INTERPRETED), mask=inside)
