"""Triton kernels of the loss over the tokens of a row, where no pair of them is looked at.

What they are given is described in `tiles`.
"""

import triton
import triton.language as tl

# Arguments that change from launch to launch: not worth a compilation for 1 or a multiple of 16.
VARYING = (
    "batches", "length", "first_row", "first_tile", "tiles", "panel", "parts", "steps",
    "row_stride", "token_stride", "row", "rows", "col", "at", "cols", "tokens", "segmented",
    "touching", "own",
)  # fmt: skip
OUT, IN, DECOUPLED, POSITIVES = (tl.constexpr(k) for k in range(4))  # what a tile sums


def launched(function):
    """A kernel that is compiled once for all values of VARYING, and wherever tokens' values lie."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in VARYING if name in names],
        do_not_specialize_on_alignment=[n for n in names if n.startswith(("row_", "col_"))],
    )


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
def inverses(
    h, index, count, inverse, parts, length, dim,
    SMALLEST: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """1/‖h‖ of every token, 0 where it is not finite; a batch row in `parts` programs.

    In float64: an error would shift all similarities of a token at once, by up to 1/τ times it.
    """
    row = tl.program_id(0) // parts
    t = tl.program_id(0) % parts * TOKENS + tl.arange(0, TOKENS)
    base = row.to(tl.int64) * length
    inside = t < tl.load(count + row)
    tokens = h + (base + tl.load(index + base + t, mask=inside, other=0)) * dim
    total = tl.zeros([TOKENS], tl.float64)
    for k in range(0, dim, DEPTH):
        d = k + tl.arange(0, DEPTH)
        x = tl.load(tokens[:, None] + d, mask=inside[:, None] & (d < dim), other=0).to(tl.float64)
        total += tl.sum(x * x, 1)
    norm = tl.sqrt(total)
    finite = norm.to(tl.float32) < float("inf")  # neither is NaN
    found = tl.where(finite, 1 / tl.maximum(norm, SMALLEST), 0.0)
    tl.store(inverse + base + t, found.to(tl.float32), mask=t < length)


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
    AGAIN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the slots of a launch (`tiles.sums`) up in `into`, those of each token in order.

    into: [SUMS, 2, B, L]: the sum, or with bit k of LOGS the largest exponent seen and the sum of
    exponentials below it. Only the tiles of a token's segment (bit k of LABELS: its label) wrote;
    SYMMETRIC: those from its own tile on by row, those before it by column; else all by row.
    AGAIN: earlier launches left sums of the same tokens there; else it is not read.
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
        total, top = tl.zeros([TILE], tl.float32), tl.full([TILE], float("-inf"), tl.float32)
        if AGAIN:
            total = tl.load(known + per_run, mask=inside, other=0)
            if (LOGS >> k) & 1:
                top = tl.load(known, mask=inside, other=float("-inf"))
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


@triton.jit
def _sizes(runs, per_run, inside):
    """|P(i)| and |A(i)| of tokens, 0 where ignored."""
    start = tl.load(runs, mask=inside, other=0)
    end = tl.load(runs + per_run, mask=inside, other=0)
    first = tl.load(runs + 2 * per_run, mask=inside, other=0)
    last = tl.load(runs + 3 * per_run, mask=inside, other=0)
    return tl.maximum(last - first - 1, 0), tl.maximum(end - start - 1, 0)


@launched
def results(
    merged, gaps, index, runs, inverse, lse, statistic, loss, pos_cos, neg_cos,
    batches, length, parts, temperature, inverse_temperature, push,
    MODE: tl.constexpr, PUSH: tl.constexpr, BOUNDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `order.losses`, from merged sums: loss and cosines unsorted, lse and statistic sorted.

    merged: [sums, 2, B, L] of `tiles.sums`. DECOUPLED: lse is given, gaps are those of POSITIVES.
    A batch row in `parts` programs.
    """
    row = tl.program_id(0) // parts
    t = tl.program_id(0) % parts * TOKENS + tl.arange(0, TOKENS)
    inside = t < length
    base, per_run = row.to(tl.int64) * length, batches.to(tl.int64) * length
    to = base + tl.load(index + base + t, mask=inside, other=0)
    t += base
    positives, candidates = _sizes(runs + t, per_run, inside)
    merged += t
    negative = tl.load(merged + 3 * per_run, mask=inside, other=0)
    positive = tl.load(merged + 5 * per_run, mask=inside, other=0)
    some = tl.maximum(positives, 1).to(tl.float32)
    if MODE == DECOUPLED:
        gaps += t
        found = tl.load(gaps + per_run, mask=inside, other=0) / some
        tl.store(statistic + t, tl.load(gaps + 3 * per_run, mask=inside, other=0) / some, inside)
    else:
        denominator = _logarithm(merged, per_run, inverse_temperature, inside, BOUNDED)
        tl.store(lse + t, denominator, mask=inside)
        if MODE == IN:
            summed = merged + 6 * per_run
            numerator = _logarithm(summed, per_run, inverse_temperature, inside, BOUNDED)
            found = denominator - numerator + tl.log(some)
        else:
            numerator = tl.zeros([TOKENS], tl.float32)
            found = denominator - positive / some
        tl.store(statistic + t, numerator, mask=inside)
    found = tl.where(positives == 0, 0.0, found)
    if PUSH:
        SUM: tl.constexpr = 4 if MODE == IN else 3
        excess = tl.load(merged + (2 * SUM + 1) * per_run, mask=inside, other=0)
        found += push * temperature * excess / tl.maximum(candidates, 1)
    finite = tl.load(inverse + t, mask=inside, other=0) > 0
    tl.store(loss + to, tl.where(finite, found, float("nan")), mask=inside)
    negatives = candidates - positives
    cosine = positive * temperature / some
    tl.store(pos_cos + to, tl.where(positives == 0, float("nan"), cosine), mask=inside)
    cosine = negative * temperature / tl.maximum(negatives, 1)
    tl.store(neg_cos + to, tl.where(negatives == 0, float("nan"), cosine), mask=inside)


@triton.jit
def _logarithm(merged, per_run, inverse_temperature, inside, BOUNDED: tl.constexpr):
    total = tl.log(tl.load(merged + per_run, mask=inside, other=1))
    if BOUNDED:
        return total + inverse_temperature
    return total + tl.load(merged, mask=inside, other=0)


@launched
def ends(
    grad, index, runs, lse, statistic, into,
    batches, length, parts, row_stride, token_stride, inverse_temperature, push,
    MODE: tl.constexpr, PUSH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `order.ends`, stacked: into [4 or with PUSH 5, B, L], sorted, from dL/dloss, unsorted.

    A batch row in `parts` programs.
    """
    row = tl.program_id(0) // parts
    t = tl.program_id(0) % parts * TOKENS + tl.arange(0, TOKENS)
    inside = t < length
    base, per_run = row.to(tl.int64) * length, batches.to(tl.int64) * length
    at = tl.load(index + base + t, mask=inside, other=0) * token_stride
    upstream = tl.load(grad + row.to(tl.int64) * row_stride + at, mask=inside, other=0)
    t += base
    positives, candidates = _sizes(runs + t, per_run, inside)
    of_positives = tl.load(statistic + t, mask=inside, other=0)
    weight = tl.where(positives == 0, 0.0, upstream * inverse_temperature)
    into += t
    tl.store(into, tl.load(lse + t, mask=inside, other=0), mask=inside)
    tl.store(into + per_run, weight * of_positives if MODE == DECOUPLED else weight, mask=inside)
    tl.store(into + 2 * per_run, of_positives, mask=inside)
    pull = weight if MODE == IN else weight / tl.maximum(positives, 1)
    tl.store(into + 3 * per_run, pull, mask=inside)
    if PUSH:
        hinge = push * upstream / tl.maximum(candidates, 1)
        # Not read where there is no candidate, but `_scales` asks for the largest.
        tl.store(into + 4 * per_run, tl.where(candidates == 0, 0.0, hinge), mask=inside)
