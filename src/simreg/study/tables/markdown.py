"""Cells and tables of Markdown."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from simreg.study import summary

NONE = "–"
UNPAIRED = "†"
_HYPHEN_MINUS = re.compile(r"(?<![\w.)-])-(?=\d)")


def minus(text: str) -> str:
    """With the sign for numbers below zero; hyphens of names and exponents stay."""
    return _HYPHEN_MINUS.sub("\N{MINUS SIGN}", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words and whose others are numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(_line(cells) for cells in (head, rule, *rows))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def unpaired_note(reference: str, fields: Iterable[str]) -> str:
    """What UNPAIRED says of arms that differ from the reference in these fields."""
    return (
        f"{UNPAIRED} Differs from {reference} in {', '.join(dict.fromkeys(fields))}, so the same "
        "seed starts from other weights or sees other batches."
    )


def with_notes(drawn: str, notes: Sequence[str]) -> str:
    """The table with sentences below it."""
    return "\n\n".join([drawn, " ".join(notes)]) if notes else drawn


def number(value: float | None, form: str) -> str:
    """By a format such as `.4f`; a dash for what is not known."""
    return NONE if value is None else minus(format(value, form))


def difference(found: dict[str, Any] | None, planned: int | None = None) -> str:
    """A paired difference of losses, `−0.0123 [−0.0200, −0.0046]`, as `summary.difference_cell`."""
    return minus(summary.difference_cell(found, planned))


def step_time(times: dict[str, Any] | None) -> str:
    """A ratio with its quartiles, `1.029 [1.023, 1.061]`."""
    if times is None:
        return NONE
    if not times["n"]:
        return "1 (same cost)"
    low, high = times["ratio_quartiles"]
    return f"{times['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def machine(found: dict[str, Any]) -> str:
    """`AMD EPYC, 2 threads`, or what the GPU is called."""
    if found["device"] != "cpu":
        return str(found["device"])
    return f"{found.get('cpu') or 'cpu'}, {found['threads']} threads"
