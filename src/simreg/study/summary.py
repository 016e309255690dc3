"""What a study found, in words and in a table: shared by the terminal and the report."""

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from simreg.intervals import limits

CLAIM_SEEDS = 5
"""Fewer seeds than this show a difference and make no claim."""
OTHER_WORK = 0.5
"""So much load beyond a timing's own threads is of something else."""

COLUMNS = (
    "arm",
    "budget",
    "tokens",
    "final CE (nats)",
    "minus reference",
    "step time, quartiles",
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
        if tokens >= 0.9995 * size:  # what would round to 1e+03 of the unit below
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"


def headlines(results: dict[str, Any]) -> list[str]:
    """A sentence for each arm but the reference."""
    reference = results["study"]["reference"]
    return [headline(results, arm) for arm in results["arms"] if arm != reference]


def headline(results: dict[str, Any], arm: str) -> str:
    """What is known of an arm, in words: how much it saved, how sure that is, what is left out."""
    saved = results["isoloss"].get(arm)
    if saved is None:
        difference = results["arms"][arm]["budgets"].get("1", {}).get("ce_minus_reference")
        counted = {entry["seed"] for entry in difference["per_seed"]} if difference else set()
        sentence = _by_loss(results, arm, difference)
        missing = [seed for seed in results["seeds"] if seed not in counted]
        full = [f"{name}/1/seed-" for name in (arm, results["study"]["reference"])]
        lost = [s for s in missing if any(f"{path}{s}" in results["failures"] for path in full)]
    else:
        sentence = _by_tokens(results, arm, saved)
        missing, lost = saved["tokens_saved"]["missing"], saved["tokens_saved"]["diverged"]
    unfinished = [seed for seed in missing if seed not in lost]
    parts = sentence, _left_out(unfinished, len(results["seeds"])), _diverged(results, arm)
    return " ".join(filter(None, parts))


def _by_tokens(results: dict[str, Any], arm: str, saved: dict[str, Any]) -> str:
    """For an arm at several budgets: the tokens it took to the reference's final loss."""
    reference = results["study"]["reference"]
    tokens, n = saved["tokens_saved"], saved["tokens_saved"]["n"]
    budgets = sorted(results["arms"][arm]["budgets"], key=float)
    if n == 0:
        return f"{arm}: no seed has all of its runs yet."
    if tokens["status"] == "not_reached":
        return (
            f"{arm} did not reach the final loss of {reference} within {budgets[-1]} N in "
            f"{_of_seeds(tokens['not_reached'], n)}: no saving is claimed."
        )
    sentence = f"{arm} reached the final loss of {reference} with "
    if tokens["status"] == "at_least":
        return (
            f"{sentence}{bound(tokens['mean'])}: in {_of_seeds(tokens['at_least'], n)} it was "
            "already better at the smallest budget tried, "
            f"{budgets[0]} N ({_certainty(tokens, n)})."
        )
    sentence += f"{fewer(tokens['mean'], 'tokens')} ({_certainty(tokens, n)})"
    return f"{sentence}{_in_time(saved['seconds_saved'], results['step_time'].get(arm))}."


def _in_time(seconds: dict[str, Any], times: dict[str, Any] | None) -> str:
    """What is left of the saving when the arm's own step time is counted."""
    if times is None:
        return ""
    if seconds["mean"] is None:
        return (
            f"; its steps, which do more than the reference's, were timed as faster "
            f"({_ratio(times)}): that is noise, and the time saved is not known"
        )
    if not times["n"]:
        return f"; its steps cost the same, so {fewer(seconds['mean'], 'training time')}"
    text = (
        f"; with its own step time counted ({_ratio(times)}), "
        f"{fewer(seconds['mean'], 'training time')}"
    )
    if seconds["low"] is None:
        return text
    return f"{text} (95 % interval {_limits(seconds)}, without the spread of the timing itself)"


def _ratio(times: dict[str, Any]) -> str:
    low, high = times["ratio_quartiles"]
    return f"× {times['ratio']:.3f}, quartiles {low:.3f} to {high:.3f}"


def _left_out(missing: list[int], planned: int) -> str:
    """The planned seeds that the sentence does not cover, unless it covers none."""
    k = len(missing)
    if k in (0, planned):
        return ""
    verb, whose, seeds = ("is", "its", "seed") if k == 1 else ("are", "their", "seeds")
    return (
        f"{k} of {planned} seeds {verb} left out: {whose} runs are not finished "
        f"({seeds} {', '.join(map(str, missing))})."
    )


def _diverged(results: dict[str, Any], arm: str) -> str:
    """How many runs of the arm, or of the reference, became NaN."""
    notes = []
    for name in (arm, results["study"]["reference"]):
        if k := sum(path.startswith(f"{name}/") for path in results["failures"]):
            planned = len(results["arms"][name]["budgets"]) * len(results["seeds"])
            notes.append(f"{k} of {planned} runs of {name} diverged.")
    return " ".join(notes)


def _by_loss(results: dict[str, Any], arm: str, difference: dict[str, Any] | None) -> str:
    """For an arm at one budget only: the difference of final losses at equal tokens."""
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


def _of_seeds(k: int, n: int) -> str:
    return "the only seed" if n == 1 else f"{k} of {n} seeds"


def fewer(saved: float, what: str) -> str:
    """`23.4 % fewer tokens`, `1.2 % more training time`."""
    if saved < 0:
        return f"{percent(-saved)} more {what}"
    return f"{percent(saved)} {'fewer' if what == 'tokens' else 'less'} {what}"


def bound(saved: float) -> str:
    """A lower bound of a saving: `at least 23.4 % fewer tokens`, `at most 1.2 % more tokens`."""
    return f"at {'most' if saved < 0 else 'least'} {fewer(saved, 'tokens')}"


def _limits(interval: dict[str, Any], form: str | None = None) -> str:
    """`20.1 % to 26.5 %`, and whether no difference lies between.

    A saving's limits follow its words: those of `more` are the negative ones of `fewer`.
    """
    low, high = interval["low"], interval["high"]
    if form is None and interval["mean"] < 0:
        low, high = -high, -low
    none = ", which includes no difference" if low <= 0 <= high else ""
    low, high = (form.format(v) if form else percent(v) for v in (low, high))
    return f"{low} to {high}{none}"


def _certainty(interval: dict[str, Any], n: int, form: str | None = None) -> str:
    if n == 1:
        return "one seed: this shows the difference and claims no interval"
    text = _seeds(n)
    if interval["low"] is not None:
        text += f", 95 % interval {_limits(interval, form)}"
    elif interval.get("diverged"):
        text += " that did not diverge, which are no sample of all: no interval"
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
    return f"{sign}{percent(saved['mean'])}{limits(saved, '.1f', 100)}"


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
    times = results["step_time"].get(arm)
    reference = arm == results["study"]["reference"]
    step_time = "× 1" if reference else _step_time_cell(times) if times else "–"
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


def _step_time_cell(times: dict[str, Any]) -> str:
    if not times["n"]:
        return "× 1 (same cost)"
    low, high = times["ratio_quartiles"]
    return f"× {times['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def busy(results: dict[str, Any]) -> str | None:
    """Says which step times were measured while other work ran, if any was."""
    found = {
        arm: times
        for arm, times in results["step_time"].items()
        if times["n"] and times.get("load", 0) > times.get("threads", math.inf) + OTHER_WORK
    }
    if not found:
        return None
    most = max(times["load"] for times in found.values())
    return (
        f"other work ran while the steps of {', '.join(found)} were timed (load {most:.1f}), which "
        "may distort their step times and the time saved: to time them again on an idle machine, "
        "delete step_time.json and repeat the command"
    )


def _plus_minus(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def difference_cell(difference: dict[str, Any] | None, planned: int | None = None) -> str:
    """A paired difference for a table: `-0.0123 [-0.0200, -0.0046]`.

    With how many seeds it is over, if that is fewer than `planned`.
    """
    if difference is None or difference["mean"] is None:
        return "–"
    few = ""
    if planned is not None and difference["n"] < planned:
        few = f" ({difference['n']} of {planned} seeds)"
    return f"{difference['mean']:+.4f}{limits(difference, '+.4f')}{few}"


def _legend(table_rows: list[list[str]]) -> str | None:
    """What ± and brackets are, where the column does not say it."""
    steps = COLUMNS.index("step time, quartiles")
    cells = "".join(cell for row in table_rows for i, cell in enumerate(row) if i != steps)
    said = ["±: standard deviation over seeds"] if "±" in cells else []
    said += ["brackets: 95 % intervals"] if "[" in cells else []
    return "; ".join(said) or None


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table (its most telling columns, to fit a terminal) and a sentence for each arm."""
    table_rows = rows(results)
    kept = [
        i
        for i, name in enumerate(COLUMNS)
        if name not in ("tokens", "clipped steps")
        and any(row[i] not in ("", "–") for row in table_rows)
    ]
    table = Table(title=f"Study {results['study']['name']}", title_justify="left", box=box.SIMPLE)
    for i in kept:
        table.add_column(
            COLUMNS[i], justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold"
        )
    for row in table_rows:
        table.add_row(*(row[i] for i in kept))
    table.caption, table.caption_justify = _legend(table_rows), "left"
    console.print()
    console.print(table, soft_wrap=False)
    for line in [*headlines(results), *filter(None, [busy(results)])]:
        console.print(line)
