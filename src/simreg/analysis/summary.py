"""What an analysis found, as a table: for the terminal and the report."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from simreg.intervals import limits

ROWS = (
    ("loss", "loss (nats)"),
    ("accuracy", "accuracy"),
    ("margin", "margin"),
    ("margin_cos", "cosine margin"),
    ("row_pos_cos", "cosine, same label, in row"),
    ("row_neg_cos", "cosine, other labels, in row"),
    ("intra_cos", "cosine, same label"),
    ("inter_cos", "cosine, other labels"),
    ("intra_cos_centred", "cosine, same label, centred"),
    ("inter_cos_centred", "cosine, other labels, centred"),
    ("inter_max_cos", "cosine to nearest class mean"),
    ("inter_max_cos_centred", "cosine to nearest class mean, centred"),
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
CONTRASTS = ("loss", "margin_cos", "intra_cos_centred")
"""Of which metrics a sentence says whether the change differs between rare and frequent labels."""


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
                _difference(
                    results["minus_reference"][arm].get(group, {}).get(metric),
                    _of_tokens(results, arm).get(group, {}).get(metric),
                )
                for arm in _others(results)
            ]
            table.append([label, group, *means, *differences])
    return table


def sentences(results: dict[str, Any]) -> list[str]:
    """For each arm but the reference: whether its change differs between tail and head."""
    found, labels, reference = [], dict(ROWS), results["reference"]
    contrasts = results.get("tail_minus_head", {})  # not in results of older versions
    for arm in (arm for arm in results["means"] if arm != reference):
        if arm not in results["minus_reference"]:
            found.append(f"{arm} shares no seed with {reference}: not compared.")
        entries = {m: e for m in CONTRASTS if (e := contrasts.get(arm, {}).get(m))}
        if entries:
            seeds = max(entry["n"] for entry in entries.values())
            each = "; ".join(f"{labels[m]} {_difference(e)}" for m, e in entries.items())
            over = f"{seeds} seeds" if seeds > 1 else "one pair, of which no interval is known"
            found.append(
                f"{arm} minus {reference}, at rare labels (tail) minus at frequent ones (head): "
                f"{each} ({over})."
            )
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table and the sentences."""
    table = Table(title=_title(results), title_justify="left", box=box.SIMPLE)
    for i, name in enumerate(columns(results)):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    console.print()
    console.print(table, soft_wrap=False)
    for text in sentences(results):
        console.print(text)


def _title(results: dict[str, Any]) -> str:
    text = results["text"]
    title = f"{text['tokens']:,} tokens of {text['split']} text"
    return f"{title}; brackets: {intervals(results)}" if _others(results) else title


def intervals(results: dict[str, Any]) -> str:
    """What the intervals of the table are over."""
    text = "95 % Student-t intervals of paired differences over seeds"
    if single := results.get("over_tokens"):
        text += (
            f"; of {', '.join(single)}, with one seed, over tokens by row, which says nothing of "
            "other seeds"
        )
    return text


def _of_tokens(results: dict[str, Any], arm: str) -> dict[str, Any]:
    found: dict[str, Any] = results.get("over_tokens", {}).get(arm, {})
    return found


def _others(results: dict[str, Any]) -> list[str]:
    return list(results["minus_reference"])


def _value(entry: dict[str, Any] | None) -> str:
    return "–" if entry is None or entry["mean"] is None else f"{entry['mean']:.4g}"


def _difference(entry: dict[str, Any] | None, tokens: dict[str, Any] | None = None) -> str:
    """With the limits over `tokens` where there are none over seeds."""
    if entry is None or entry["mean"] is None:
        return "–"
    known = entry if entry["low"] is not None else tokens
    return f"{entry['mean']:+.4g}{limits(known, '+.3g')}"
