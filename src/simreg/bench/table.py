"""The table of one shape, for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from simreg.bench.contenders import titled

DASH = "–"


def table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    """Time with its quartiles, time over the bare products', and memory; or why there is none."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.add_column("forward + backward")
    made.add_column("ms", justify="right")
    made.add_column("quartiles", justify="right")
    made.add_column("× bare", justify="right")
    made.add_column("peak extra MiB", justify="right")
    skipped = []
    for record in records:
        if record["skipped"] is None:
            made.add_row(name(record), *_cells(record))
        else:
            skipped.append(f"{name(record)}: {record['skipped']}")
    made.caption_justify = "left"
    made.caption = "\n".join(f"not run: {line}" for line in skipped) or None
    return made


def name(record: dict[str, Any]) -> str:
    """Of the contender, and of its variant unless that is the default."""
    return titled(record["name"], record["variant"])


def _cells(record: dict[str, Any]) -> list[str]:
    low, high = (1e3 * quartile for quartile in record["quartiles_s"])
    ratio, peak = record["over_bare"], record["peak_extra_bytes"]
    return [
        _digits(1e3 * record["median_s"]),
        f"{_digits(low)} to {_digits(high)}",
        DASH if ratio is None else f"{ratio:.2f}",
        DASH if peak is None else f"{peak / 2**20:,.0f}",
    ]


def _digits(milliseconds: float) -> str:
    """Three significant digits, and all before the point."""
    decimals = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:,.{decimals}f}"
