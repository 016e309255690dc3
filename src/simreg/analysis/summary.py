"""What an analysis found, as a table: for the terminal and the report."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROWS = (
    ("loss", "loss (nats)"),
    ("accuracy", "right"),
    ("margin", "margin"),
    ("margin_cos", "cosine margin"),
    ("row_pos_cos", "cosine, same label, in row"),
    ("row_neg_cos", "cosine, other labels, in row"),
    ("intra_cos", "cosine, same label"),
    ("inter_cos", "cosine, other labels"),
    ("intra_cos_centred", "cosine, same label, centred"),
    ("inter_cos_centred", "cosine, other labels, centred"),
    ("inter_max_cos", "cosine to nearest class mean"),
    ("variance_share", "variance within classes, share"),
    ("nc1", "NC1"),
    ("cdnv", "CDNV"),
    ("nc2_equinorm", "NC2 equinorm"),
    ("nc2_etf_error", "NC2 ETF error"),
    ("nc3_alignment", "NC3 alignment"),
    ("nc4_agreement", "NC4 agreement"),
    ("effective_rank", "effective rank"),
    ("isoscore", "IsoScore"),
    ("pair_cos", "cosine of random pairs"),
)
GROUPS = ("all", "head", "tail")


def columns(results: dict[str, Any]) -> list[str]:
    """The head of the table."""
    arms = list(results["means"])
    return [
        "metric",
        "tokens",
        *arms,
        *(f"{arm} minus {results['reference']}" for arm in _others(results)),
    ]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Metric and group, the mean of each arm, and paired differences with their intervals."""
    table = []
    for metric, label in ROWS:
        for group in GROUPS:
            means = [_value(own.get(group, {}).get(metric)) for own in results["means"].values()]
            differences = [
                _difference(results["minus_reference"][arm].get(group, {}).get(metric))
                for arm in _others(results)
            ]
            table.append([label, group, *means, *differences])
    return table


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=_title(results), title_justify="left", box=box.SIMPLE)
    for i, name in enumerate(columns(results)):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    console.print()
    console.print(table)


def _title(results: dict[str, Any]) -> str:
    text = results["text"]
    return f"{text['tokens']:,} tokens of {text['split']} text; brackets: 95 % intervals over seeds"


def _others(results: dict[str, Any]) -> list[str]:
    return list(results["minus_reference"])


def _value(entry: dict[str, Any] | None) -> str:
    return "–" if entry is None or entry["mean"] is None else f"{entry['mean']:.4g}"


def _difference(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    limits = "" if entry["low"] is None else f" [{entry['low']:+.3g}, {entry['high']:+.3g}]"
    return f"{entry['mean']:+.4g}{limits}"
