"""Triton kernels of the loss over the tokens of a row, where no pair of them is looked at.

What they are given is described in `tiles`.
"""

import triton
import triton.language as tl

# Arguments that change from launch to launch: not worth a compilation for 1 or a multiple of 16.
VARYING = (
    "batches", "length", "first_row", "first_tile", "tiles", "panel", "parts", "steps",
)  # fmt: skip


def launched(function):
    """A kernel that is compiled once for all values of VARYING."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in VARYING if name in names])


@triton.jit
def _search(
    index, labels, segments, segment, label, count, steps, SEGMENTED: tl.constexpr,
    LABEL: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """First of the sorted tokens that is not before (END: that is after) those of a run."""
    low = tl.zeros_like(label).to(tl.int32)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        inside = low < high
        token = tl.load(index + middle, mask=inside, other=0)
        before = tl.full(low.shape, END and not LABEL, tl.int1)
        if LABEL:
            other = tl.load(labels + token, mask=inside, other=0)
            before = (other >= label) if END else (other > label)
        if SEGMENTED:
            of = tl.load(segments + token, mask=inside, other=0)
            before = (of < segment) | ((of == segment) & before)
        low = tl.where(inside & before, middle + 1, low)
        high = tl.where(inside & ~before, middle, high)
    return low


@launched
def find_runs(
    index, labels, segments, runs, count, batches, length, parts, steps,
    SEGMENTED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`runs` and `count` of tokens sorted by (ignored, segment, falling label); see `tiles`.

    labels, segments: int64 [B, L], not sorted. A batch row in `parts` programs; 2 ** `steps` >
    length.
    """
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    base, per_run = row.to(tl.int64) * length, batches.to(tl.int64) * length
    index += base
    labels += base
    segments += base
    # The first that is ignored, by bisection: what is none is before it.
    low, high = 0, length
    for _ in range(steps):
        middle = tl.minimum((low + high) // 2, length - 1)
        before = tl.load(labels + tl.load(index + middle)) >= 0
        open_ = low < high
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    valid = low
    tl.store(count + row, valid)
    t = part * TOKENS + tl.arange(0, TOKENS)
    inside = t < valid
    token = tl.load(index + t, mask=inside, other=0)
    label = tl.load(labels + token, mask=inside, other=0)
    segment = tl.load(segments + token, mask=inside, other=0) if SEGMENTED else label
    for k in tl.static_range(4):
        found = tl.zeros([TOKENS], tl.int32) + (valid if k == 1 else 0)
        if SEGMENTED or k >= 2:
            found = _search(
                index, labels, segments, segment, label, valid, steps, SEGMENTED, k >= 2, k % 2 == 1
            )
        found = tl.where(inside, found, 0)
        tl.store(runs + k * per_run + base + t, found, mask=t < length)


@launched
def norms(h, index, count, norm, parts, length, dim, TOKENS: tl.constexpr, DEPTH: tl.constexpr):
    """‖h‖ of every token, 0 where ignored; a batch row in `parts` programs."""
    row = tl.program_id(0) // parts
    t = tl.program_id(0) % parts * TOKENS + tl.arange(0, TOKENS)
    base = row.to(tl.int64) * length
    inside = t < tl.load(count + row)
    tokens = h + (base + tl.load(index + base + t, mask=inside, other=0)) * dim
    total = tl.zeros([TOKENS], tl.float32)
    for k in range(0, dim, DEPTH):
        d = k + tl.arange(0, DEPTH)
        x = tl.load(tokens[:, None] + d, mask=inside[:, None] & (d < dim), other=0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(norm + base + t, tl.sqrt(total), mask=t < length)


@triton.jit
def _add(slots, width, top, total, low, high, inside, LOG: tl.constexpr):
    """A sum or (LOG) largest exponent and sum below it, extended by slots `low` to `high`."""
    first, last = tl.min(low, 0), tl.max(high, 0)
    if LOG:
        old = top
        for slot in range(first, last):
            here = inside & (slot >= low) & (slot < high)
            top = tl.maximum(top, tl.load(slots + slot * width, mask=here, other=float("-inf")))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total *= tl.exp(old - shift)
        for slot in range(first, last):
            here = inside & (slot >= low) & (slot < high)
            x = tl.load(slots + slot * width, mask=here, other=float("-inf"))
            total += tl.exp(x - shift)
    else:
        for slot in range(first, last):
            here = inside & (slot >= low) & (slot < high)
            total += tl.load(slots + slot * width, mask=here, other=0)
    return top, total


@launched
def merge(
    by_row, by_col, into, runs, batches, length, first_row, first_tile, tiles, panel,
    SUMS: tl.constexpr, LOGS: tl.constexpr, LABELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds the slots of a launch (`tiles.sums`) to `into`, those of each token in order.

    into: [SUMS, 2, B, L]: the sum, or with bit k of LOGS the largest exponent seen and the sum of
    exponentials below it. Only the tiles of a token's segment (bit k of LABELS: its label) wrote;
    SYMMETRIC: those from its own tile on by row, those before it by column; else all by row.
    """
    local, tile = tl.program_id(1), tl.program_id(0)
    if not SYMMETRIC:
        tile += first_tile
    height = panel // TILE
    base = (first_row + local).to(tl.int64) * length
    per_run = batches.to(tl.int64) * length
    stride = tl.num_programs(1).to(tl.int64) * tiles * panel
    t = tile * TILE + tl.arange(0, TILE)
    inside = t < length
    in_panel = inside & (tile >= first_tile) & (tile < first_tile + height)
    by_row += local.to(tl.int64) * tiles * panel + t - first_tile * TILE
    by_col += local.to(tl.int64) * height * tiles * TILE + t
    for k in tl.static_range(SUMS):
        run = runs + base + t + (2 * per_run if (LABELS >> k) & 1 else 0)
        low = tl.load(run, mask=inside, other=0) // TILE
        high = tl.cdiv(tl.load(run + per_run, mask=inside, other=0), TILE)
        known = into + 2 * k * per_run + base + t
        total = tl.load(known + per_run, mask=inside, other=0)
        top = tl.load(known, mask=inside, other=float("-inf")) if (LOGS >> k) & 1 else total
        first, last = tl.maximum(low, tile if SYMMETRIC else 0), tl.where(in_panel, high, 0)
        top, total = _add(by_row, panel, top, total, first, last, inside, (LOGS >> k) & 1)
        if SYMMETRIC:
            first = tl.maximum(low - first_tile, 0)
            last = tl.minimum(tl.minimum(high, tile) - first_tile, height)
            top, total = _add(
                by_col, tiles * TILE, top, total, first, last, inside, (LOGS >> k) & 1
            )
        if (LOGS >> k) & 1:
            tl.store(known, top, mask=inside)
        tl.store(known + per_run, total, mask=inside)
        by_row += stride
        by_col += stride
