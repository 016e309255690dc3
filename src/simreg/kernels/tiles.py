"""Triton kernels of the loss, over tiles of the similarity matrix of sorted tokens.

h: [B, L, d]; everything per token [B, L], sorted (`order`), flat in memory. index: int64, position
in the row. runs: int32 [4, B, L], first token and end of the token's segment, then of its label; 0,
0 where ignored. count: int32 [B], valid tokens of a row. The batch row of a program is `first_row`
+ its last grid index, its row tile is counted from `first_tile`: a launch covers a panel of row
tiles (`panel` tokens) of some batch rows. Products are of raw hidden states, in their dtype with
float32 sums; 1/‖h‖ and 1/τ scale them in float32. BOUNDED: e^(2/τ) is far from what float32 holds,
so exponentials are taken of s − 1/τ ≤ 0, one of each pair for its row and its column. EVEN: the
embedding fills the tiles it is loaded in.
"""

import triton
import triton.language as tl

from simreg.kernels.tokens import DECOUPLED, IN, POSITIVES, launched


@triton.jit
def _place(program, tiles, rows, GROUP: tl.constexpr = 8):
    """Row and column tile of a program: a few rows at a time, which find the columns in L2."""
    group = program // (GROUP * tiles) * GROUP
    height = tl.minimum(rows - group, GROUP)
    return group + program % (GROUP * tiles) % height, program % (GROUP * tiles) // height


@triton.jit
def _products(
    h, index, rows, cols, valid, dim, EVEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """h_r · h_c of sorted tokens, [TILE, TILE]; `index` and `h` are those of the batch row.

    Beyond the last valid token it stands for those that follow: loads without masks are faster.
    """
    left = h + tl.load(index + tl.minimum(rows, valid - 1)) * dim
    right = h + tl.load(index + tl.minimum(cols, valid - 1)) * dim
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, dim, DEPTH):
        d = k + tl.arange(0, DEPTH)
        if EVEN:
            a, b = tl.load(left[:, None] + d[None, :]), tl.load(right[None, :] + d[:, None])
        else:
            a = tl.load(left[:, None] + d[None, :], mask=(d < dim)[None, :], other=0)
            b = tl.load(right[None, :] + d[:, None], mask=(d < dim)[:, None], other=0)
        if INTERPRETED:  # the interpreter's products of bfloat16 are wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # which would truncate, not round to nearest even
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _similarities(products, row_inverse, col_inverse, inverse_temperature):
    """cos / τ, the same to the last bit for (r, c) and (c, r)."""
    return products * (row_inverse[:, None] * col_inverse[None, :]) * inverse_temperature


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@triton.jit
def _quarters(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    left, right = _halves(x, ROWS, COLS)
    return _halves(left, ROWS, COLS // 2) + _halves(right, ROWS, COLS // 2)


@triton.jit
def _eighths(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    left, right = _halves(x, ROWS, COLS)
    return _quarters(left, ROWS, COLS // 2) + _quarters(right, ROWS, COLS // 2)


@triton.jit
def _within(runs, first, end, rows, cols, valid):
    """Pairs whose column lies in the run of their row: runs are contiguous."""
    start = tl.load(runs + first + rows, mask=rows < valid, other=0)
    stop = tl.load(runs + end + rows, mask=rows < valid, other=0)
    return (
        (cols[None, :] >= start[:, None])
        & (cols[None, :] < stop[:, None])
        & (cols[None, :] != rows[:, None])
    )


@triton.jit
def _all_within(runs, end, i, j, last, TILE: tl.constexpr):
    """Whether all columns of tile (i, j) are in the segment of each row; `last`: its last valid.

    Rows beyond that are not asked: what a tile says of them is not read.
    """
    starts_before = tl.load(runs + last) <= j * TILE
    ends_after = tl.load(runs + end + i * TILE) >= (j + 1) * TILE
    return starts_before & ends_after & (i != j)


@triton.jit
def _exponential(s, largest, BOUNDED: tl.constexpr):
    """What `_extend` and `_of_columns` sum."""
    return tl.exp(s - largest) if BOUNDED else s


@triton.jit
def _except(e, pairs, BOUNDED: tl.constexpr):
    """What `_exponential` gave, without some pairs."""
    return tl.where(pairs, 0.0 if BOUNDED else float("-inf"), e)


@triton.jit
def _extend(top, total, e, BOUNDED: tl.constexpr):
    """A logsumexp of each row as largest exponent and sum below it, extended by those of a tile."""
    if BOUNDED:
        return top, total + tl.sum(e, 1)
    new = tl.maximum(top, tl.max(e, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(e - shift[:, None]), 1)


@triton.jit
def _of_rows(top, total, BOUNDED: tl.constexpr):
    """What is stored of `_extend`'s: a sum, or its logarithm."""
    if BOUNDED:
        return total
    return tl.log(total) + tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _of_columns(e, BOUNDED: tl.constexpr):
    """As `_of_rows`, for the columns of a tile."""
    if BOUNDED:
        return tl.sum(e, 0)
    top = tl.max(e, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return _of_rows(top, tl.sum(tl.exp(e - shift[None, :]), 0), False)


@triton.jit
def _finite(s):
    return tl.where(s == float("-inf"), 0.0, s)


@triton.jit
def _softplus(x):
    small = tl.exp(-tl.abs(x))
    one = 1 + small  # log1p(small), exact where 1 + small rounds
    log1p = tl.where(one == 1, small, tl.log(one) * small / (one - 1))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _store_columns(
    slot, stride, s, e, positive, lse, MODE: tl.constexpr, BOUNDED: tl.constexpr,
    TOUCHING: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of a tile: `slot` for the first, `stride` to the next."""
    if MODE == POSITIVES:
        gap = lse[None, :] - s
        tl.store(slot, tl.sum(tl.where(positive, _softplus(gap), 0.0), 0))
        tl.store(slot + stride, tl.sum(tl.where(positive, _sigmoid(gap), 0.0), 0))
    else:
        negative = tl.where(positive, float("-inf"), s) if TOUCHING else s
        summed = _except(e, positive, BOUNDED) if TOUCHING and MODE == DECOUPLED else e
        tl.store(slot, _of_columns(summed, BOUNDED))
        tl.store(slot + stride, tl.sum(_finite(negative), 0))
        if TOUCHING:
            tl.store(slot + 2 * stride, tl.sum(tl.where(positive, s, 0.0), 0))
            if MODE == IN:
                chosen = _except(e, ~positive, BOUNDED)
                tl.store(slot + 3 * stride, _of_columns(chosen, BOUNDED))


@launched
def sums(
    h, index, count, inverse, runs, lse, by_row, by_col,
    batches, length, dim, inverse_temperature, edge, first_row, first_tile, tiles, panel,
    MODE: tl.constexpr, PUSH: tl.constexpr, BOUNDED: tl.constexpr, EVEN: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiles of S on and above the diagonal, for row tiles of a panel, into slots.

    by_row: [sums, rows of the launch, tiles, panel]: a slot a column tile. by_col: [sums, rows of
    the launch, panel / TILE, tiles · TILE]: a slot a row tile. A tile on the diagonal is whole and
    serves its rows alone. Sums: logsumexp of candidates (DECOUPLED: of negatives), Σ of negatives,
    Σ of positives, with IN their logsumexp, with PUSH Σ max(0, s − edge) of candidates; POSITIVES:
    Σ softplus(lse − s), Σ sigmoid(lse − s). BOUNDED: Σ exp(s − 1/τ) in place of each logsumexp.
    """
    batch_rows, local = tl.num_programs(1), tl.program_id(1)
    i, j = _place(tl.program_id(0), tiles, panel // TILE)
    i += first_tile
    if j < i:
        return
    batch = first_row + local
    valid = tl.load(count + batch)
    if i * TILE >= valid:
        return
    base, per_run = batch.to(tl.int64) * length, batches.to(tl.int64) * length
    runs += base
    last = tl.minimum((i + 1) * TILE, valid) - 1
    label_end = tl.load(runs + 3 * per_run + last)
    if j * TILE >= (label_end if MODE == POSITIVES else tl.load(runs + per_run + last)):
        return
    whole = _all_within(runs, per_run, i, j, last, TILE)
    rows, cols = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    products = _products(
        h + base * dim, index + base, rows, cols, valid, dim, EVEN, TILE, DEPTH, INTERPRETED
    )
    # One after the other they need fewer registers.
    parts = _eighths(products, TILE, TILE) if PARTS == 8 else _quarters(products, TILE, TILE)
    row_inverse = tl.load(inverse + base + rows, mask=rows < valid, other=1)
    row_lse = tl.load(lse + base + rows, mask=rows < valid, other=0) if MODE == POSITIVES else 0
    stride = batch_rows.to(tl.int64) * tiles * panel
    by_row += (local * tiles + j).to(tl.int64) * panel + rows - first_tile * TILE
    by_col += (local * (panel // TILE) + i - first_tile).to(tl.int64) * tiles * TILE
    LAST: tl.constexpr = 4 if MODE == IN else 3
    nothing, zero = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
    top, total, negatives, positives = nothing, zero, zero, zero
    positive_top, positive_total, softplus, slope, excess = nothing, zero, zero, zero, zero
    WIDTH: tl.constexpr = TILE // PARTS
    for part in tl.static_range(PARTS):
        cols = j * TILE + part * WIDTH + tl.arange(0, WIDTH)
        col_inverse = tl.load(inverse + base + cols, mask=cols < valid, other=1)
        s = _similarities(parts[part], row_inverse, col_inverse, inverse_temperature)
        if not whole:
            s = tl.where(_within(runs, 0, per_run, rows, cols, valid), s, float("-inf"))
        e = _exponential(s, inverse_temperature, BOUNDED)
        col_lse = tl.load(lse + base + cols, mask=cols < valid, other=0) if MODE == POSITIVES else 0
        if PUSH:
            above = tl.maximum(s - edge, 0.0, propagate_nan=tl.PropagateNan.ALL)
            excess += tl.sum(above, 1)
            if i != j:
                tl.store(by_col + cols + LAST * stride, tl.sum(above, 0))
        if j * TILE < label_end:
            positive = _within(runs, 2 * per_run, 3 * per_run, rows, cols, valid)
            if MODE == POSITIVES:
                gap = row_lse[:, None] - s
                softplus += tl.sum(tl.where(positive, _softplus(gap), 0.0), 1)
                slope += tl.sum(tl.where(positive, _sigmoid(gap), 0.0), 1)
            else:
                negative = tl.where(positive, float("-inf"), s)
                summed = _except(e, positive, BOUNDED) if MODE == DECOUPLED else e
                top, total = _extend(top, total, summed, BOUNDED)
                negatives += tl.sum(_finite(negative), 1)
                positives += tl.sum(tl.where(positive, s, 0.0), 1)
                if MODE == IN:
                    chosen = _except(e, ~positive, BOUNDED)
                    positive_top, positive_total = _extend(
                        positive_top, positive_total, chosen, BOUNDED
                    )
            if i != j:
                _store_columns(by_col + cols, stride, s, e, positive, col_lse, MODE, BOUNDED, True)
        elif MODE != POSITIVES:
            top, total = _extend(top, total, e, BOUNDED)
            negatives += tl.sum(_finite(s), 1)
            _store_columns(by_col + cols, stride, s, e, s, col_lse, MODE, BOUNDED, False)
    if MODE == POSITIVES:
        tl.store(by_row, softplus)
        tl.store(by_row + stride, slope)
    else:
        tl.store(by_row, _of_rows(top, total, BOUNDED))
        tl.store(by_row + stride, negatives)
        tl.store(by_row + 2 * stride, positives)
        if MODE == IN:
            tl.store(by_row + 3 * stride, _of_rows(positive_top, positive_total, BOUNDED))
    if PUSH:
        tl.store(by_row + LAST * stride, excess)


@triton.jit
def _softmax(s, e, row_lse, row_weight, col_lse, col_weight, largest, BOUNDED: tl.constexpr):
    """exp(s − lse) times its weight, for the row and the column of each pair, added up."""
    if BOUNDED:
        # NaN for a token without such pairs (0 · ∞), of which none is read.
        return e * (row_weight * tl.exp(largest - row_lse) + col_weight * tl.exp(largest - col_lse))
    # s is computed again, with other roundings than when lse was made: at a tiny τ they count.
    row_share = tl.minimum(s - row_lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    col_share = tl.minimum(s - col_lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp(row_share) * row_weight + tl.exp(col_share) * col_weight


@triton.jit
def _pair_gradients(
    s, runs, ends, per_run, rows, cols, valid, largest, edge, whole, touching,
    MODE: tl.constexpr, PUSH: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """G of the pairs of a tile.

    `whole`: each of them is of one segment; `touching`: some of them may be positives.
    """
    row_in, col_in = rows < valid, cols < valid
    row_lse = tl.load(ends + rows, mask=row_in, other=0)[:, None]
    col_lse = tl.load(ends + cols, mask=col_in, other=0)[None, :]
    row_weight = tl.load(ends + per_run + rows, mask=row_in, other=0)[:, None]
    col_weight = tl.load(ends + per_run + cols, mask=col_in, other=0)[None, :]
    e = _exponential(s, largest, BOUNDED)
    g = _softmax(s, e, row_lse, row_weight, col_lse, col_weight, largest, BOUNDED)
    if touching:
        positive = _within(runs, 2 * per_run, 3 * per_run, rows, cols, valid)
        row_pull = tl.load(ends + 3 * per_run + rows, mask=row_in, other=0)[:, None]
        col_pull = tl.load(ends + 3 * per_run + cols, mask=col_in, other=0)[None, :]
        if MODE == IN:
            row_lse = tl.load(ends + 2 * per_run + rows, mask=row_in, other=0)[:, None]
            col_lse = tl.load(ends + 2 * per_run + cols, mask=col_in, other=0)[None, :]
            pull = _softmax(s, e, row_lse, row_pull, col_lse, col_pull, largest, BOUNDED)
        elif MODE == DECOUPLED:
            pull = _sigmoid(row_lse - s) * row_pull + _sigmoid(col_lse - s) * col_pull
        else:
            pull = row_pull + col_pull
        kept = 0.0 if MODE == DECOUPLED else g  # whose positives do not push
        g = tl.where(positive, kept - pull, g)
    if PUSH:
        row_hinge = tl.load(ends + 4 * per_run + rows, mask=row_in, other=0)[:, None]
        col_hinge = tl.load(ends + 4 * per_run + cols, mask=col_in, other=0)[None, :]
        g += tl.where(s > edge, row_hinge + col_hinge, 0.0)
    if not whole:
        g = tl.where(_within(runs, 0, per_run, rows, cols, valid), g, 0.0)
    return g


@launched
def gradients(
    h, index, count, inverse, runs, ends, powers, m, by_row, by_col,
    batches, length, dim, inverse_temperature, edge, first_row, first_tile, tiles, panel,
    MODE: tl.constexpr, PUSH: tl.constexpr, BOUNDED: tl.constexpr, SYMMETRIC: tl.constexpr,
    RESCALED: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiles of M = G / ‖h_col‖ for row tiles of a panel, and Σ_col M h_row · h_col in slots.

    m: [rows of the launch, panel, tiles · TILE]. ends: [4 or with PUSH 5, B, L], as `Ends` has it.
    RESCALED: M is also divided by `powers`, since float16 has too few exponents for all 1/‖h‖.
    SYMMETRIC: the panel is the whole row, and tiles above the diagonal also fill those below.
    """
    local = tl.program_id(1)
    i, j = _place(tl.program_id(0), tiles, panel // TILE)
    i += first_tile
    if (j < i) & SYMMETRIC:
        return
    batch = first_row + local
    valid = tl.load(count + batch)
    if i * TILE >= valid:
        return
    base, per_run = batch.to(tl.int64) * length, batches.to(tl.int64) * length
    runs += base
    ends += base
    last = tl.minimum((i + 1) * TILE, valid) - 1
    if (j * TILE >= tl.load(runs + per_run + last)) | ((j + 1) * TILE <= tl.load(runs + i * TILE)):
        return
    whole = _all_within(runs, per_run, i, j, last, TILE)
    rows, cols = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    products = _products(
        h + base * dim, index + base, rows, cols, valid, dim, EVEN, TILE, DEPTH, INTERPRETED
    )
    # One after the other they need fewer registers.
    parts = _eighths(products, TILE, TILE) if PARTS == 8 else _quarters(products, TILE, TILE)
    row_inverse = tl.load(inverse + base + rows, mask=rows < valid, other=1)
    row_factor = row_inverse
    label_start = tl.load(runs + 2 * per_run + i * TILE)
    touching = j * TILE < tl.load(runs + 3 * per_run + last)
    touching = touching & ((j + 1) * TILE > label_start)
    width = tiles * TILE
    m += local.to(tl.int64) * panel * width
    local_rows = rows - first_tile * TILE
    by_row += (local * tiles + j).to(tl.int64) * panel + local_rows
    by_col += (local * tiles + i).to(tl.int64) * width
    if RESCALED:
        powers += base
        row_power = tl.load(powers + rows, mask=rows < valid, other=1)
        row_factor = row_inverse / row_power
    dtype: tl.constexpr = m.dtype.element_ty
    along = tl.zeros([TILE], tl.float32)
    WIDTH: tl.constexpr = TILE // PARTS
    for part in tl.static_range(PARTS):
        cols = j * TILE + part * WIDTH + tl.arange(0, WIDTH)
        products = parts[part]
        col_inverse = tl.load(inverse + base + cols, mask=cols < valid, other=1)
        s = _similarities(products, row_inverse, col_inverse, inverse_temperature)
        g = _pair_gradients(
            s, runs, ends, per_run, rows, cols, valid, inverse_temperature, edge, whole,
            touching, MODE, PUSH, BOUNDED,
        )  # fmt: skip
        if RESCALED:
            col_power = tl.load(powers + cols, mask=cols < valid, other=1)
            col_inverse /= col_power
        mine = _cast(g * col_inverse[None, :], dtype, INTERPRETED)
        tl.store(m + local_rows.to(tl.int64)[:, None] * width + cols[None, :], mine)
        mine = mine.to(tl.float32) * products
        along += tl.sum(mine * col_power[None, :] if RESCALED else mine, 1)
        if SYMMETRIC:  # noqa: SIM102 (known when compiled, unlike the next)
            if i != j:
                theirs = _cast(g * row_factor[:, None], dtype, INTERPRETED)
                tl.store(m + cols.to(tl.int64)[None, :] * width + rows[:, None], theirs)
                theirs = theirs.to(tl.float32) * products
                theirs = theirs * row_power[:, None] if RESCALED else theirs
                tl.store(by_col + cols, tl.sum(theirs, 0))
    tl.store(by_row, along)


@launched
def apply(
    h, index, count, inverse, runs, radial, powers, unit, m, out,
    batches, length, dim, first_row, first_tile, tiles, panel,
    RESCALED: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr, SMALLEST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dL/dh of a panel: M·H, less its part along h, over ‖h‖; 0 at ignored tokens.

    RESCALED: M holds `unit` times what it should, and is without `powers`.
    """
    local, i = tl.program_id(2), first_tile + tl.program_id(1)
    batch = first_row + local
    valid = tl.load(count + batch)
    base, per_run = batch.to(tl.int64) * length, batches.to(tl.int64) * length
    h += base * dim
    out += base * dim
    index += base
    d = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    rows = i * TILE + tl.arange(0, TILE)
    width = tiles * TILE
    m += (local * panel + rows - first_tile * TILE).to(tl.int64)[:, None] * width
    total = tl.zeros([TILE, WIDE], tl.float32)
    if i * TILE < valid:
        # Whole tiles: those of the segments of these rows, and only those, were written.
        first = tl.load(runs + base + i * TILE) // TILE * TILE
        end = tl.load(runs + base + per_run + tl.minimum((i + 1) * TILE, valid) - 1)
        for k in range(first, tl.cdiv(end, TILE) * TILE, DEPTH):
            c = k + tl.arange(0, DEPTH)
            a = tl.load(m + c[None, :])
            c = tl.minimum(c, valid - 1)  # beyond it M is 0
            tokens = h + tl.load(index + c) * dim
            if EVEN:
                x = tl.load(tokens[:, None] + d)
            else:
                x = tl.load(tokens[:, None] + d, mask=(d < dim)[None, :], other=0)
            if RESCALED:
                scale = tl.load(powers + base + c)[:, None]
                x = (x.to(tl.float32) * scale).to(x.dtype)
            if INTERPRETED:
                a, x = a.to(tl.float32), x.to(tl.float32)
            total = tl.dot(a, x, total, input_precision="ieee")
    position = tl.load(index + rows, mask=rows < length, other=0)[:, None] * dim + d
    known = (rows < valid)[:, None] & (d < dim)[None, :]
    x = tl.load(h + position, mask=known, other=0).to(tl.float32)
    scale = tl.load(inverse + base + rows, mask=rows < valid, other=1)
    along = tl.load(radial + base + rows, mask=rows < valid, other=0) * scale * scale
    along = tl.where(scale < 1 / SMALLEST, along, 0.0)  # else of a vector that counts as zero
    g = (total - along[:, None] * x) * scale[:, None]
    if RESCALED:
        g /= tl.load(unit + batch)
    g = _cast(tl.where(known, g, 0.0), out.dtype.element_ty, INTERPRETED)
    tl.store(out + position, g, mask=(rows < length)[:, None] & (d < dim)[None, :])
