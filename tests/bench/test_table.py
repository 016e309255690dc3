"""What the terminal's table says of records."""

import io

from rich.console import Console

from simreg.bench.contenders import BARE
from simreg.bench.table import table


def record(name, **values):
    unknown = {"median_s": None, "quartiles_s": None, "over_bare": None, "peak_extra_bytes": None}
    return {"name": name, "variant": None if name == BARE else "in", "skipped": None} | (
        unknown | values
    )


def test_times_are_in_milliseconds_and_memory_in_mebibytes():
    shown = table(
        "shape",
        [
            record(BARE, median_s=0.0012345, quartiles_s=[0.001, 0.0123]),
            record(
                "naive",
                **{"median_s": 1.2345, "quartiles_s": [0.0456, 2.0], "over_bare": 3.456},
                peak_extra_bytes=1500 * 2**20,
            ),
            record("triton", skipped="runs on CUDA only"),
        ],
    )
    Console(width=120, file=(printed := io.StringIO())).print(shown)
    lines = [line.split() for line in printed.getvalue().splitlines() if line.strip()]
    bare, naive = (next(line for line in lines if line[0] == first) for first in ("bare", "naive"))
    assert bare == ["bare", "matmuls", "1.23", "1.00", "to", "12.3", "–", "–"]
    assert naive == ["naive", "(in)", "1,234", "45.6", "to", "2,000", "3.46", "1,500"]
    assert shown.row_count == 2
    assert shown.caption == "not run: triton (in): runs on CUDA only"
