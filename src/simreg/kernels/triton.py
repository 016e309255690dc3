"""The loss on CUDA by Triton kernels (`tiles`): exact, without atomics, two runs are equal.

- Forward: tiles on and above the diagonal of S, each for its rows and its columns. What a tile adds
  to a token goes into a slot of its own; slots are merged in order.
- Backward: tiles of G = D + Dᵀ (design §2), rounded to the dtype of hidden as M; then dH = M·H.
  Where the M of a whole row fits, a tile serves both sides here too; else it comes in panels.

Tiles that hold no pair of one segment are neither computed nor multiplied. Extra memory besides the
gradient: per-token statistics, slots (at most SLOTS), and M, for which with all that comes with it
there are the size of `hidden` and SCRATCH (design §5).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels import tiles
from simreg.kernels.order import Form, Order, Sums, describe, ends, losses, sort_tokens
from simreg.kernels.reference import EPS

SLOTS = 32 * 2**20  # bytes
SCRATCH = 64 * 2**20  # bytes
TOKEN = 200  # bytes of statistics a token, in backward, at most
INTERPRETED = not isinstance(tiles.norms, triton.JITFunction)
_MODES = {"out": tiles.OUT.value, "in": tiles.IN.value, "decoupled": tiles.DECOUPLED.value}


def obstacle(device: torch.device) -> str | None:
    """Why the kernels can't run on `device`; None if they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, not {'ROCm' if torch.version.hip else device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, not {major}.{minor}"


class Blocks(NamedTuple):
    """Sizes of tiles: powers of two, at least 16."""

    tile: int  # tokens, on both sides of a tile of S
    depth: int  # of the embedding, a step of S; tokens, a step of dH
    wide: int  # of the embedding, a tile of dH
    warps: int
    stages: int


def blocks(dtype: torch.dtype, device: torch.device) -> Blocks:
    """Tile sizes for hidden states; those that spill no registers, see tests/kernels/compile.py."""
    if dtype == torch.float32:
        return Blocks(tile=64, depth=32, wide=64, warps=4, stages=3)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return Blocks(tile=128, depth=64, wide=256 if hopper else 128, warps=8, stages=3)


class Launch(NamedTuple):
    """Some batch rows and a panel of their row tiles."""

    first_row: int
    rows: int
    first_tile: int
    tiles: int


class Problem:
    """The sorted tokens of a batch and what every kernel wants to know of them."""

    def __init__(self, hidden: Tensor, order: Order, norm: Tensor | None = None) -> None:
        """`norm`: ``[B, L]`` sorted, computed if not given."""
        # Rows that begin at multiples of 16 numbers can be copied 16 bytes at a time.
        spare = -hidden.shape[-1] % 16
        self.hidden = (F.pad(hidden, (0, spare)) if spare else hidden).contiguous()
        self.order = order
        self.batch, self.length, self.dim = self.hidden.shape
        self.blocks = blocks(hidden.dtype, hidden.device)
        self.tiles: int = triton.cdiv(self.length, self.blocks.tile)
        segment_end = order.segment + order.positives + order.negatives + 1
        label_end = order.label + order.positives + 1
        runs = torch.stack([order.segment, segment_end, order.label, label_end])
        self.runs = runs.masked_fill_(~order.valid, 0).int()
        self.count = order.valid.sum(1, dtype=torch.int32)
        self.norm: Tensor = self._norms() if norm is None else norm

    def _norms(self) -> Tensor:
        norm = self.per_token()
        parts = triton.cdiv(self.length, 16)
        tiles.norms[(parts * self.batch,)](
            self.hidden, self.order.position, self.count, norm, parts, self.length, self.dim,
            TOKENS=16, DEPTH=128,
        )  # fmt: skip
        return norm

    def per_token(self, *leading: int) -> Tensor:
        """Uninitialised float32 ``[*leading, B, L]``."""
        shape = (*leading, self.batch, self.length)
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def slots(self, sums: int, launch: Launch) -> tuple[Tensor, Tensor]:
        """For the row and the column side of a launch; see `tiles.sums`."""
        tile = self.blocks.tile
        shape = (sums, launch.rows, self.tiles, launch.tiles * tile)
        by_row = torch.empty(shape, dtype=torch.float32, device=self.hidden.device)
        return by_row, torch.empty_like(by_row)

    def slot_bytes(self, sums: int) -> int:
        """Of `slots` for one tile of one row."""
        return 8 * sums * self.tiles * self.blocks.tile

    def launches(self, tile_bytes: int, limit: int) -> Iterator[Launch]:
        """As few as keep within `limit` bytes, where a tile of a batch row takes `tile_bytes`."""
        rows = limit // (tile_bytes * self.tiles)
        if rows:
            for row in range(0, self.batch, rows):
                yield Launch(row, min(rows, self.batch - row), 0, self.tiles)
            return
        panels = triton.cdiv(self.tiles, max(1, limit // tile_bytes))
        panel = triton.cdiv(self.tiles, panels)
        for row in range(self.batch):
            for tile in range(0, self.tiles, panel):
                yield Launch(row, 1, tile, min(panel, self.tiles - tile))

    def over_pairs(self, kernel, launch: Launch, *tensors: Tensor, form: Form, **flags):  # type: ignore[no-untyped-def]
        """Run `tiles.sums` or `tiles.gradients` on every pair of tiles of a launch."""
        b = self.blocks
        kernel[(launch.tiles * self.tiles, launch.rows)](
            self.hidden, self.order.position, self.count, self.norm, self.runs, *tensors,
            self.batch, self.length, self.dim, 1 / form.temperature, form.edge,
            launch.first_row, launch.first_tile, self.tiles, launch.tiles * b.tile,
            PUSH=form.push != 0, TILE=b.tile, DEPTH=b.depth, SMALLEST=EPS, INTERPRETED=INTERPRETED,
            num_warps=b.warps, num_stages=b.stages, **flags,
        )  # fmt: skip

    def merge(
        self,
        slots: tuple[Tensor, Tensor],
        into: Tensor,
        launch: Launch,
        *,
        logs: int = 0,
        labels: int = 0,
        symmetric: bool = True,
    ) -> None:
        """Add what a launch left in its slots to ``[sums, 2, B, L]``; see `tiles.merge`."""
        tile = self.blocks.tile
        # For each side: its tiles, then first slot, slots, tokens of the launch.
        rows = (launch.first_tile, launch.tiles, 0, self.tiles, launch.tiles * tile)
        cols = (0, self.tiles, launch.first_tile, launch.tiles, self.tiles * tile)
        for by_col, side in enumerate((rows, cols) if symmetric else (rows,)):
            first_tile, programs, first_slot, slot_count, width = side
            tiles.merge[(programs, launch.rows)](
                slots[by_col], into, self.runs,
                self.batch, self.length, launch.first_row, first_tile, first_slot, slot_count,
                width, slots[0][0].numel(),
                SUMS=len(into), LOGS=logs, LABELS=labels, BELOW=bool(by_col),
                ABOVE=not by_col and symmetric, TILE=tile,
            )  # fmt: skip


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """Per-token loss and mean cosines ``[B, L]``, and what `backward` needs (see `op.loss`)."""
    order = describe(sort_tokens(labels, segments), labels, segments)
    problem = Problem(hidden, order)
    own = 4 if form.variant == "in" else 3  # in the order of `tiles.sums`
    logs, labels_only = (0b1001, 0b1100) if own == 4 else (0b001, 0b100)
    sums, mode = own + bool(form.push), _MODES[form.variant]
    merged = _over_launches(problem, problem.norm, form, sums, mode, logs, labels_only)
    found = Sums(_logarithm(merged[0]), merged[2, 1], merged[1, 1])
    if form.push:
        found = found._replace(excess=merged[own, 1])
    if form.variant == "in":
        found = found._replace(numerator=_logarithm(merged[3]))
    elif form.variant == "decoupled":
        mode, form_of_gaps = tiles.POSITIVES.value, form._replace(push=0.0)
        merged = _over_launches(problem, found.lse, form_of_gaps, 2, mode, 0, 0b11)
        found = found._replace(softplus=merged[0, 1], slope=merged[1, 1])
    *results, statistic = losses(found, order, problem.norm, form)
    return (*map(order.unsort, results), order.position, problem.norm, found.lse, statistic)


def _over_launches(
    problem: Problem, lse: Tensor, form: Form, sums: int, mode: int, logs: int, labels: int
) -> Tensor:
    merged = problem.per_token(sums, 2)
    merged[:, 0], merged[:, 1] = -torch.inf, 0
    slots = None
    for launch in problem.launches(problem.slot_bytes(sums), SLOTS):
        del slots  # before the next are allocated
        slots = problem.slots(sums, launch)
        problem.over_pairs(tiles.sums, launch, lse, *slots, form=form, MODE=mode)
        problem.merge(slots, merged, launch, logs=logs, labels=labels)
    return merged


def _logarithm(merged: Tensor) -> Tensor:
    top, total = merged.unbind()
    return total.log() + top.masked_fill(top == -torch.inf, 0)


def backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    saved: tuple[Tensor, ...],
    form: Form,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]`` (design §2)."""
    index, norm, lse, statistic = saved
    order = describe(index, labels, segments)
    problem = Problem(hidden, order, norm)
    both = ends(grad, order, lse, statistic, form)
    weights = {"softmax": both.softmax, "pull": both.pull}
    if both.hinge is not None:
        weights["hinge"] = both.hinge
    powers, unit = _scales(problem, torch.stack([*weights.values()]))
    scaled = both._replace(**{name: weight * unit[:, None] for name, weight in weights.items()})
    stacked, rescaled = scaled.stack(), hidden.dtype == torch.float16
    out = torch.empty_like(problem.hidden)

    b = problem.blocks
    tile_bytes = b.tile * problem.tiles * b.tile * hidden.element_size()  # of M
    room = SCRATCH // 2 + hidden.numel() * hidden.element_size()
    room = max(0, room - TOKEN * labels.numel() - room // 16)  # statistics, and slots beside M
    symmetric = tile_bytes * problem.tiles <= room
    limit = min(room, max(SCRATCH, tile_bytes * problem.tiles)) if symmetric else room
    slots = m = None
    for launch in problem.launches(tile_bytes, limit):
        del slots, m  # before the next are allocated
        slots = problem.slots(1, launch)
        m = hidden.new_empty(launch.rows, launch.tiles * b.tile, problem.tiles * b.tile)
        problem.over_pairs(
            tiles.gradients, launch, stacked, powers, m, *slots, form=form,
            MODE=_MODES[form.variant], SYMMETRIC=symmetric, RESCALED=rescaled,
        )  # fmt: skip
        radial = problem.per_token(1, 2).zero_()
        problem.merge(slots, radial, launch, symmetric=symmetric)
        tiles.apply[(triton.cdiv(problem.dim, b.wide), launch.tiles, launch.rows)](
            problem.hidden, index, problem.count, norm, problem.runs, radial[0, 1], powers, unit, m,
            out, problem.batch, problem.length, problem.dim,
            launch.first_row, launch.first_tile, problem.tiles, launch.tiles * b.tile,
            RESCALED=rescaled, TILE=b.tile, DEPTH=b.depth, WIDE=b.wide, SMALLEST=EPS,
            INTERPRETED=INTERPRETED, num_warps=b.warps,
            num_stages=2 * b.stages,  # half of them for the indices of the rows to load
        )  # fmt: skip
    return out[..., : hidden.shape[-1]].contiguous()


def _scales(problem: Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What brings M into the range of float16; to the other dtypes only exponents change.

    Args:
        weights: ``[n, B, L]``, of the terms of G.

    Returns:
        powers of two near 1/‖h‖, ``[B, L]``, to multiply H and not M with; ``unit`` ``[B]``, by
        which the largest entry of M becomes about 2¹².
    """
    inverse = 1 / problem.norm.clamp_min(EPS)
    powers = torch.ldexp(torch.ones_like(inverse), torch.frexp(inverse).exponent)
    largest = 1 if problem.hidden.dtype == torch.float16 else inverse.nan_to_num(0, 0, 0).amax(1)
    weight = weights.abs().nan_to_num(0, 0, 0).amax((0, 2))
    return powers, 2**12 / (weight * largest).clamp_min(1e-30)
