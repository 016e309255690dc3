"""Compile the Triton kernels for GPUs that need not be there, and report what they take.

    python -m tests.kernels.compile 90 bfloat16          # a JSON line a kernel
    python -m tests.kernels.compile 90 bfloat16 single   # for one token of one dimension
    python -m tests.kernels.compile 90 bfloat16 push     # as with a push
    python -m tests.kernels.compile 90 bfloat16 unbounded    # as at a temperature below 0.05
    python -m tests.kernels.compile 90 bfloat16 brief    # of the variants "out" alone, a third

Triton makes arguments that are 1 constants, hence the second.
Registers and spilled bytes a thread, shared memory a block in bytes, and the unit that multiplies.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelParam

from simreg.kernels import epilogues, fused, tiles, tokens
from simreg.kernels import triton as host
from simreg.kernels.order import Ends
from simreg.kernels.reference import EPS

DTYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
INPUTS = ("h", "m", "out")
INTEGERS = {"index": "*i64", "labels": "*i64", "segments": "*i64", "runs": "*i32", "count": "*i32"}
for known in ("place", "segment", "label"):
    INTEGERS |= {f"row_{known}": "*i32", f"col_{known}": "*i32"}
FLOATS = (
    "products", "sums", "inverse", "scale", "lse", "by_row", "by_col", "into", "ends", "unit",
    "radial", "powers", "merged", "gaps", "statistic", "loss", "pos_cos", "neg_cos", "grad",
    *Ends._fields,
)  # fmt: skip
SCALARS = ("temperature", "inverse_temperature", "edge", "push")
DIVISIBLE = ("dim",)  # by 16: wider hidden states are padded


def variants(
    dtype: str, blocks: host.Blocks, *, push: bool, bounded: bool, even: bool, brief: bool
) -> Iterator[tuple[triton.JITFunction, dict, int, int]]:
    """Kernels with their constants, warps and stages, as `simreg.kernels.triton` has them."""
    size = {"EVEN": even, "TILE": blocks.tile, "INTERPRETED": False}
    pairs = {"DEPTH": blocks.depth, "PARTS": blocks.parts, "BOUNDED": bounded, **size}
    shape = blocks.warps, blocks.stages
    rescaled = {"RESCALED": dtype == "float16"}
    yield tokens.inverses, {"SMALLEST": EPS, "TOKENS": 16, "DEPTH": 128}, 4, 3
    for segmented in (False, True):
        yield tokens.find_runs, {"SEGMENTED": segmented, "TOKENS": 128}, 4, 3
    if dtype == "bfloat16" and not brief:  # they hardly know of which dtype hidden states are
        yield from _of_tokens_and_products(push=push, bounded=bounded)
    modes = range(1 if brief else 4)
    for mode in modes:
        pushing = push and mode != tokens.POSITIVES.value
        yield tiles.sums, {"MODE": mode, "PUSH": pushing, **pairs}, *shape
    for mode in modes[:3]:
        for symmetric in (True, False):
            flags = {"MODE": mode, "PUSH": push, "SYMMETRIC": symmetric, **rescaled}
            yield tiles.gradients, {**flags, **pairs}, *shape
    merging = {"LABELS": 0b1100, "LOGS": 0 if bounded else 0b1001, "SYMMETRIC": True}
    for again in (True, False):
        flags = {"SUMS": 5 if push else 4, **merging, "AGAIN": again, "TILE": blocks.tile}
        yield tokens.merge, flags, host.MERGING[not bounded], 3
    wide = {"DEPTH": blocks.step, "WIDE": blocks.wide, "SMALLEST": EPS}
    yield tiles.apply, {**rescaled, **wide, **size}, blocks.wide_warps, blocks.wide_stages


def _of_tokens_and_products(
    *, push: bool, bounded: bool
) -> Iterator[tuple[triton.JITFunction, dict, int, int]]:
    piece = {"ROWS": fused.ROWS, "COLS": fused.COLS}
    for mode in range(3):
        flags = {"MODE": mode, "PUSH": push}
        yield tokens.results, {**flags, "BOUNDED": bounded, "TOKENS": 128}, 4, 3
        yield tokens.ends, {**flags, "TOKENS": 128}, 4, 3
        yield epilogues.row_sums, {**flags, **piece}, 4, 3
        yield epilogues.entries, {**flags, **piece, "INTERPRETED": False}, 4, 3
    flags = {"MODE": tokens.POSITIVES.value, "PUSH": False}
    yield epilogues.row_sums, {**flags, **piece}, 4, 3


def signature(kernel: triton.JITFunction, dtype: str) -> dict[str, str]:
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
        elif name in INPUTS:
            types[name] = DTYPES[dtype]
        elif name in INTEGERS:
            types[name] = INTEGERS[name]
        elif name.removeprefix("row_").removeprefix("col_") in FLOATS:
            types[name] = "*fp32"
        else:
            types[name] = "fp32" if name in SCALARS else "i32"
    return types


def _becomes_constant(parameter: KernelParam, kind: str) -> bool:
    return kind == "i32" and not parameter.do_not_specialize


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory a thread: the stack holds what was spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main(
    capability: int, dtype: str, *, single: bool, push: bool, bounded: bool, brief: bool
) -> None:
    known = divmod(capability, 10)
    with mock.patch.object(host, "capability", return_value=known):
        hidden = getattr(torch, dtype), torch.device("cuda")
        blocks, more = host.blocks(*hidden), host.registers(*hidden, bounded=bounded)
    for kernel, constants, warps, stages in variants(
        dtype, blocks, push=push, bounded=bounded, even=not single, brief=brief
    ):
        types = signature(kernel, dtype)
        if single:
            ones = {p.name: 1 for p in kernel.params if _becomes_constant(p, types[p.name])}
            constants, types = constants | ones, types | dict.fromkeys(ones, "constexpr")
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(types.items())
            if not single
            and (kind.startswith("*") or name in DIVISIBLE)
            and not name.startswith(("row_", "col_"))
        }
        compiled = triton.compile(
            ASTSource(kernel, types, constexprs=constants, attrs=divisible),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": warps,
                "num_stages": stages,
                **host.FUSION,
                **(more if kernel is tiles.gradients else {}),
            },
        )
        registers, spilled = resources(compiled.asm["cubin"])
        units = ("wgmma", "tcgen05", "mma.sync")
        record = {
            "kernel": kernel.__name__,
            **{k: constants[k] for k in ("MODE", "PUSH", "SYMMETRIC") if k in constants},
            "registers": registers,
            "spilled": spilled,
            "shared": compiled.metadata.shared,
            "unit": next((unit for unit in units if unit in compiled.asm["ptx"]), "scalar"),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    flags = {name: name in sys.argv for name in ("single", "push", "brief")}
    main(int(sys.argv[1]), sys.argv[2], **flags, bounded="unbounded" not in sys.argv)
