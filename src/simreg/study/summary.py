"""What a study found, in words and in a table: shared by the terminal and the report."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

CLAIM_SEEDS = 5
"""Fewer seeds than this show a difference and make no claim."""

COLUMNS = (
    "arm",
    "budget",
    "tokens",
    "final CE (nats)",
    "minus reference",
    "step time",
    "clipped steps",
    "tokens saved",
    "time saved",
)


def percent(value: float) -> str:
    """A fraction as `23.4 %`."""
    return f"{100 * value:.1f} %"


def count(tokens: float) -> str:
    """A number of tokens as `1.23 M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"


def headlines(results: dict[str, Any]) -> list[str]:
    """A sentence for each arm but the reference."""
    reference = results["study"]["reference"]
    return [headline(results, arm) for arm in results["arms"] if arm != reference]


def headline(results: dict[str, Any], arm: str) -> str:
    """One honest sentence on an arm: how much it saved, how sure that is."""
    reference = results["study"]["reference"]
    saved = results["isoloss"].get(arm)
    if saved is None:
        return _by_loss(results, arm)
    tokens, n = saved["tokens_saved"], saved["tokens_saved"]["n"]
    if n == 0:
        return f"{arm}: no seed has all of its runs yet."
    largest = f"{max(saved['budgets']):g} N"
    if tokens["status"] == "not_reached":
        return (
            f"{arm} did not reach the final loss of {reference} within {largest} "
            f"in {tokens['not_reached']} of {_seeds(n)}: no saving is claimed."
        )
    if tokens["status"] == "at_least":
        sentence = (
            f"{arm} reached the final loss of {reference} with at least "
            f"{fewer(tokens['mean'], 'tokens')}: {_where(tokens, n)} it was already better at the "
            f"smallest budget tried, {min(saved['budgets']):g} N"
        )
        return f"{sentence} ({_certainty(tokens, n)})."
    sentence = (
        f"{arm} reached the final loss of {reference} with {fewer(tokens['mean'], 'tokens')} "
        f"({_certainty(tokens, n)})"
    )
    if (seconds := saved["seconds_saved"]["mean"]) is not None:
        sentence += f"; with its own step time counted, {fewer(seconds, 'training time')}"
    return f"{sentence}."


def _by_loss(results: dict[str, Any], arm: str) -> str:
    """For an arm at one budget only: the difference of final losses at equal tokens."""
    difference = results["arms"][arm]["budgets"].get("1", {}).get("ce_minus_reference")
    if difference is None:
        return f"{arm}: no run beside the reference at equal tokens yet."
    direction = "below" if difference["mean"] < 0 else "above"
    return (
        f"{arm} ended {abs(difference['mean']):.4f} nats per token {direction} "
        f"{results['study']['reference']} at equal tokens "
        f"({_certainty(difference, difference['n'], '{:+.4f}')})."
    )


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def fewer(saved: float, what: str) -> str:
    """`23.4 % fewer tokens`, `1.2 % more training time`."""
    amount, more = percent(abs(saved)), saved < 0
    if what == "tokens":
        return f"{amount} {'more' if more else 'fewer'} tokens"
    return f"{amount} {'more' if more else 'less'} {what}"


def _where(tokens: dict[str, Any], n: int) -> str:
    if n == 1:
        return ""
    return f"in {tokens['at_least']} of {n} seeds"


def _certainty(interval: dict[str, Any], n: int, form: str | None = None) -> str:
    if n == 1:
        return "one seed: this shows the difference and claims no interval"
    text = _seeds(n)
    if interval["low"] is not None:
        low, high = (
            form.format(v) if form else percent(v) for v in (interval["low"], interval["high"])
        )
        text += f", 95 % interval {low} to {high}"
        if interval["low"] <= 0 <= interval["high"]:
            text += ", which includes no difference"
    elif interval.get("status") == "at_least":
        text += ", a lower bound without an interval"
    if n < CLAIM_SEEDS:
        text += f"; a claim takes at least {CLAIM_SEEDS} seeds"
    return text


def saving_cell(saved: dict[str, Any] | None) -> str:
    """A saving for a table: `23.4 % [20.1, 26.5]`, `≥ 40.0 %`, `not reached (2 of 5)`, `–`."""
    if not saved or not saved["n"]:
        return "–"
    if saved["status"] == "not_reached":
        return f"not reached ({saved['not_reached']} of {saved['n']})"
    if saved["mean"] is None:
        return "–"
    sign = "≥ " if saved["status"] == "at_least" else ""
    limits = ""
    if saved["low"] is not None:
        limits = f" [{100 * saved['low']:.1f}, {100 * saved['high']:.1f}]"
    return f"{sign}{percent(saved['mean'])}{limits}"


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of arms, by `COLUMNS`; without budgets below 1 it ranks arms by final loss."""
    arms = results["arms"]
    names = list(arms)
    if not results["isoloss"]:
        names.sort(key=lambda a: arms[a]["final_ce"]["mean"] or float("inf"))
    return [
        _row(results, arm, budget, first=i == 0)
        for arm in names
        for i, budget in enumerate(sorted(arms[arm]["budgets"], key=float, reverse=True))
    ]


def _row(results: dict[str, Any], arm: str, budget: str, *, first: bool) -> list[str]:
    """One budget of an arm; what belongs to the arm as a whole stands in its first row."""
    cell = results["arms"][arm]["budgets"][budget]
    ce, difference = cell["final_ce"], cell["ce_minus_reference"]
    saved = results["isoloss"].get(arm, {}) if first else {}
    ratio = results["step_time"].get(arm, {}).get("ratio")
    reference = arm == results["study"]["reference"]
    step_time = "× 1" if reference else f"× {ratio:.3f}" if ratio else "–"
    return [
        arm,
        f"{budget} N",
        count(cell["tokens"]) if cell["tokens"] else "–",
        _plus_minus(ce["mean"], ce["sd"]),
        difference_cell(difference),
        step_time if first else "",
        percent(cell["clipped"]) if cell["clipped"] is not None else "–",
        saving_cell(saved.get("tokens_saved")) if first else "",
        saving_cell(saved.get("seconds_saved")) if first else "",
    ]


def _plus_minus(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def difference_cell(difference: dict[str, Any] | None) -> str:
    """A paired difference for a table: `-0.0123 [-0.0200, -0.0046]`."""
    if difference is None:
        return "–"
    limits = ""
    if difference["low"] is not None:
        limits = f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"{difference['mean']:+.4f}{limits}"


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table (its most telling columns, to fit a terminal) and a sentence for each arm."""
    kept = [i for i, name in enumerate(COLUMNS) if name not in ("tokens", "clipped steps")]
    table = Table(title=f"Study {results['study']['name']}", title_justify="left", box=box.SIMPLE)
    for i in kept:
        table.add_column(
            COLUMNS[i], justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold"
        )
    for row in rows(results):
        table.add_row(*(row[i] for i in kept))
    console.print()
    console.print(table)
    for line in headlines(results):
        console.print(line, markup=False)
