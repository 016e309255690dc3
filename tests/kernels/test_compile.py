"""The Triton kernels compile for GPUs that are not here, spill nothing and fit their memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.problems import needs_triton

pytestmark = needs_triton
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB that a block can have
UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


def compiled(*arguments):
    # A process of its own: here the kernels are those of the interpreter.
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    expected = 9 if "brief" in arguments else 29 if "bfloat16" in arguments else 16
    assert len(records) == expected
    return records


def test_kernels_compile_for_a_single_token():
    compiled("90", "float16", "single", "brief")  # what is constant then is so in all variants


CONFIGURATIONS = [
    (80, "bfloat16", ()),
    (80, "float16", ("push", "unbounded")),
    (90, "bfloat16", ("push", "unbounded")),
    (100, "bfloat16", ()),
    (100, "float16", ("push", "unbounded")),
    (90, "float16", ()),
    (90, "float32", ()),
]
BRIEF = [CONFIGURATIONS[i] for i in (0, 2, 4, 6)]  # each generation; the rest take minutes
CONSUMER = (120, "bfloat16", ("push",))


@pytest.mark.parametrize(
    ("capability", "dtype", "flags"),
    [
        (90, "bfloat16", ()),
        *((*known, (*flags, "brief")) for *known, flags in BRIEF),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (*CONFIGURATIONS, CONSUMER)),
    ],
)
def test_kernels_compile_without_spills(capability, dtype, flags):
    for record in compiled(str(capability), dtype, *flags):
        print(capability, dtype, record)
        assert record["spilled"] == 0, record
        assert record["shared"] <= 1024 * SHARED[capability], record
        multiplies = record["kernel"] in ("sums", "gradients", "apply")
        tensor_cores = multiplies and dtype != "float32"
        assert record["unit"] == (UNIT[capability] if tensor_cores else "scalar"), record
