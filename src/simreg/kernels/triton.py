"""The loss on CUDA by Triton kernels (`tiles`, `tokens`): exact, no atomics, two runs are equal.

- Forward: tiles on and above the diagonal of S, each for its rows and its columns. What a tile adds
  to a token goes into a slot of its own; slots are merged in order.
- Backward: tiles of G = D + Dᵀ (`reference`), rounded to the dtype of hidden as M; then dH = M·H.
  Where the M of a whole row fits, a tile serves both sides here too; else it comes in panels.

Tiles that hold no pair of one segment are neither computed nor multiplied. Extra memory besides the
gradient: per-token statistics, slots (at most SLOTS), and M, for which with all that comes with it
there are the size of `hidden` and SCRATCH.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from simreg.kernels import tiles, tokens
from simreg.kernels.order import Form, sort_tokens
from simreg.kernels.pairs import logarithm
from simreg.kernels.reference import EPS

SLOTS = 32 * 2**20  # bytes
SCRATCH = 64 * 2**20  # bytes
WHOLE_ROWS = 256 * 2**20  # bytes of M at a time, if it need not come in panels
MERGING = {False: 4, True: 2}  # warps; with logarithms 4 spill on compute capability 8.0
TOKEN = 200  # bytes of statistics a token, in backward, at most
INTERPRETED = not isinstance(tokens.inverses, triton.JITFunction)
MODES = {"out": tokens.OUT.value, "in": tokens.IN.value, "decoupled": tokens.DECOUPLED.value}
_TOKENS = 128  # to a program that looks at each token alone
FUSION = {"enable_fp_fusion": True}  # unless told, Triton 3.9 warns, and later ones fuse none
capability = cache(torch.cuda.get_device_capability)


def obstacle(device: torch.device) -> str | None:
    """Why the kernels can't run on `device`; None if they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, not {'ROCm' if torch.version.hip else device.type}"
    major, minor = capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, not {major}.{minor}"


class Blocks(NamedTuple):
    """Sizes of tiles: powers of two, at least 16; and the warps and stages of the two products."""

    tile: int  # tokens, on both sides of a tile of S
    depth: int  # of the embedding, a step of S
    parts: int  # 4 or 8, of a tile of S, in which it is summed
    warps: int
    stages: int
    wide: int  # of the embedding, a tile of dH
    step: int  # tokens, a step of dH
    wide_warps: int
    wide_stages: int  # half of them for the indices of the rows to load


def blocks(dtype: torch.dtype, device: torch.device) -> Blocks:
    """Tile sizes for hidden states: benchmarks/tune.py on an H200; elsewhere what does not spill.

    With 4 warps to a tile a multiprocessor has two at a time.
    """
    if dtype == torch.float32:
        return Blocks(64, 32, 8, 4, 3, wide=64, step=32, wide_warps=4, wide_stages=6)
    major = _major(device)
    if major == 9:
        return Blocks(128, 64, 8, 4, 3, wide=256, step=64, wide_warps=8, wide_stages=8)
    parts = 8 if major == 10 else 4
    return Blocks(128, 64, parts, 8, 3, wide=128, step=64, wide_warps=8, wide_stages=6)


def registers(dtype: torch.dtype, device: torch.device, *, bounded: bool) -> dict[str, int]:
    """Launch options of `tiles.gradients` where the compiler would rather spill than need more."""
    spills = _major(device) == 10 and dtype == torch.float16 and not bounded
    return {"maxnreg": 255} if spills else {}


def _major(device: torch.device) -> int:
    return capability(device)[0] if device.type == "cuda" else 0


class Launch(NamedTuple):
    """Some batch rows and a panel of their row tiles."""

    first_row: int
    rows: int
    first_tile: int
    tiles: int


class Problem:
    """The sorted tokens of a batch and what every kernel wants to know of them."""

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        index: Tensor,
        inverse: Tensor | None = None,
    ) -> None:
        """`inverse`: 1/‖h‖, ``[B, L]`` sorted, computed if not given."""
        # Rows that begin at multiples of 16 numbers can be copied 16 bytes at a time.
        spare = -hidden.shape[-1] % 16
        self.hidden = (F.pad(hidden, (0, spare)) if spare else hidden).contiguous()
        self.copied = self.hidden is not hidden
        self.batch, self.length, self.dim = self.hidden.shape
        self.blocks = blocks(hidden.dtype, hidden.device)
        self.tiles: int = triton.cdiv(self.length, self.blocks.tile)
        self.index = index
        self.parts: int = triton.cdiv(self.length, _TOKENS)
        self.runs, self.count = self._runs(labels, segments)
        self.inverse: Tensor = self._inverses() if inverse is None else inverse

    def _runs(self, labels: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        runs = self.index.new_empty((4, self.batch, self.length), dtype=torch.int32)
        count = self.index.new_empty(self.batch, dtype=torch.int32)
        ids = self.index if segments is None else segments.long().contiguous()
        tokens.find_runs[(self.parts * self.batch,)](
            self.index, labels.long().contiguous(), ids, runs, count,
            self.batch, self.length, self.parts, self.length.bit_length(),
            SEGMENTED=segments is not None, TOKENS=_TOKENS, **FUSION,
        )  # fmt: skip
        return runs, count

    def _inverses(self) -> Tensor:
        inverse = self.per_token()
        parts = triton.cdiv(self.length, 16)
        tokens.inverses[(parts * self.batch,)](
            self.hidden, self.index, self.count, inverse, parts, self.length, self.dim,
            SMALLEST=EPS, TOKENS=16, DEPTH=128, **FUSION,
        )  # fmt: skip
        return inverse

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
            self.hidden, self.index, self.count, self.inverse, self.runs, *tensors,
            self.batch, self.length, self.dim, form.largest, form.edge,
            launch.first_row, launch.first_tile, self.tiles, launch.tiles * b.tile,
            PUSH=form.push != 0, BOUNDED=form.bounded, EVEN=self.dim % b.depth == 0,
            TILE=b.tile, DEPTH=b.depth, PARTS=b.parts, INTERPRETED=INTERPRETED,
            num_warps=b.warps, num_stages=b.stages, **FUSION, **flags,
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
        """Add up what a launch left in its slots, in ``[sums, 2, B, L]``; see `tokens.merge`.

        What is there is added to after the first panel of symmetric rows, else overwritten.
        """
        tokens.merge[(self.tiles if symmetric else launch.tiles, launch.rows)](
            *slots, into, self.runs, self.batch, self.length,
            launch.first_row, launch.first_tile, self.tiles, launch.tiles * self.blocks.tile,
            SUMS=len(into), LOGS=logs, LABELS=labels, SYMMETRIC=symmetric,
            AGAIN=symmetric and launch.first_tile > 0, TILE=self.blocks.tile,
            num_warps=MERGING[bool(logs)], **FUSION,
        )  # fmt: skip


def forward(
    hidden: Tensor, labels: Tensor, segments: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """Per-token loss and mean cosines ``[B, L]``, and what `backward` needs (see `op.loss`)."""
    problem = Problem(hidden, labels, segments, sort_tokens(labels, segments))
    own = 4 if form.variant == "in" else 3  # in the order of `tiles.sums`
    logs, labels_only = (0b1001, 0b1100) if own == 4 else (0b001, 0b100)
    sums, mode = own + bool(form.push), MODES[form.variant]
    merged = gaps = _over_launches(problem, problem.inverse, form, sums, mode, logs, labels_only)
    if form.variant == "decoupled":
        lse = _logarithm(merged[0], form)
        mode_of_gaps, form_of_gaps = tokens.POSITIVES.value, form._replace(push=0.0)
        gaps = _over_launches(problem, lse, form_of_gaps, 2, mode_of_gaps, 0, 0b11)
    else:
        lse = problem.per_token()
    statistic, loss, pos_cos, neg_cos = (problem.per_token() for _ in range(4))
    tokens.results[(problem.parts * problem.batch,)](
        merged, gaps, problem.index, problem.runs, problem.inverse, lse, statistic,
        loss, pos_cos, neg_cos,
        problem.batch, problem.length, problem.parts,
        form.temperature, form.largest, form.push,
        MODE=mode, PUSH=form.push != 0, BOUNDED=form.bounded, TOKENS=_TOKENS, **FUSION,
    )  # fmt: skip
    return loss, pos_cos, neg_cos, problem.index, problem.inverse, lse, statistic


def _over_launches(
    problem: Problem, lse: Tensor, form: Form, sums: int, mode: int, logs: int, labels: int
) -> Tensor:
    merged = problem.per_token(sums, 2)
    logs = 0 if form.bounded else logs
    slots = None
    for launch in problem.launches(problem.slot_bytes(sums), SLOTS):
        del slots  # before the next are allocated
        slots = problem.slots(sums, launch)
        problem.over_pairs(tiles.sums, launch, lse, *slots, form=form, MODE=mode)
        problem.merge(slots, merged, launch, logs=logs, labels=labels)
    return merged


def _logarithm(merged: Tensor, form: Form) -> Tensor:
    """Of sums ``[2, B, L]`` as `tokens.merge` leaves them."""
    top, total = merged.unbind()
    return logarithm(form.largest if form.bounded else top, total)


def backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    saved: tuple[Tensor, ...],
    form: Form,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]``."""
    index, inverse, lse, statistic = saved
    problem = Problem(hidden, labels, segments, index, inverse)
    stacked = problem.per_token(5 if form.push else 4)
    tokens.ends[(problem.parts * problem.batch,)](
        grad, index, problem.runs, lse, statistic, stacked,
        problem.batch, problem.length, problem.parts, *grad.stride(),
        form.largest, form.push,
        MODE=MODES[form.variant], PUSH=form.push != 0, TOKENS=_TOKENS, **FUSION,
    )  # fmt: skip
    rescaled = hidden.dtype == torch.float16
    powers = unit = inverse  # which are not read
    if rescaled:
        weights = [stacked[1], *stacked[3:]]  # in the order of `Ends`
        powers, unit = _scales(inverse, weights)
        for weight in weights:
            weight *= unit[:, None]
    out = torch.empty_like(problem.hidden)

    b = problem.blocks
    tile_bytes = b.tile * problem.tiles * b.tile * hidden.element_size()  # of M
    room = SCRATCH // 2 + (0 if problem.copied else hidden.numel() * hidden.element_size())
    room = max(0, room - TOKEN * labels.numel() - room // 16)  # statistics, and slots beside M
    symmetric = tile_bytes * problem.tiles <= room
    limit = min(room, max(WHOLE_ROWS, tile_bytes * problem.tiles)) if symmetric else room
    slots = m = None
    for launch in problem.launches(tile_bytes, limit):
        del slots, m  # before the next are allocated
        slots = problem.slots(1, launch)
        m = hidden.new_empty(launch.rows, launch.tiles * b.tile, problem.tiles * b.tile)
        problem.over_pairs(
            tiles.gradients, launch, stacked, powers, m, *slots, form=form,
            MODE=MODES[form.variant], SYMMETRIC=symmetric, RESCALED=rescaled,
            **registers(hidden.dtype, hidden.device, bounded=form.bounded),
        )  # fmt: skip
        radial = problem.per_token(1, 2)
        problem.merge(slots, radial, launch, symmetric=symmetric)
        tiles.apply[(triton.cdiv(problem.dim, b.wide), launch.tiles, launch.rows)](
            problem.hidden, index, problem.count, inverse, problem.runs, radial[0, 1], powers, unit,
            m, out, problem.batch, problem.length, problem.dim,
            launch.first_row, launch.first_tile, problem.tiles, launch.tiles * b.tile,
            RESCALED=rescaled, EVEN=problem.dim % b.wide == 0,
            TILE=b.tile, DEPTH=b.step, WIDE=b.wide, SMALLEST=EPS, INTERPRETED=INTERPRETED,
            num_warps=b.wide_warps, num_stages=b.wide_stages, **FUSION,
        )  # fmt: skip
    del problem, slots, m  # before what may be another copy
    return out[..., : hidden.shape[-1]].contiguous()


def _scales(inverse: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What brings M into the range of float16.

    Args:
        inverse: 1/‖h‖, ``[B, L]``, sorted.
        weights: each ``[B, L]``, of the terms of G.

    Returns:
        powers of two near 1/‖h‖, ``[B, L]``, to multiply H and not M with; ``unit`` ``[B]``, by
        which the largest entry of M becomes about 2¹².
    """
    powers = torch.ldexp(torch.ones_like(inverse), torch.frexp(inverse).exponent)
    weight = torch.stack(weights).abs().nan_to_num(0, 0, 0).amax((0, 2))
    return powers, 2**12 / weight.clamp_min(1e-30)
