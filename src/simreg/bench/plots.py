"""The figure of a benchmark: time and memory against the length, a line for each contender."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from simreg.bench.contenders import BARE
from simreg.bench.table import name
from simreg.theme import PRINT

THEME = dataclasses.replace(PRINT, series=(*PRINT.series, "#be185d"))
LINES: dict[str | None, Literal["-", "-.", ":"]] = {"out": "-", "in": "-.", "decoupled": ":"}
_MEASURES = (
    ("median_s", 1e3, "forward + backward (ms per batch)"),
    ("peak_extra_bytes", 2**-20, "peak memory beyond the inputs (MiB)"),
)

Records = Sequence[dict[str, Any]]


def figure(records: Records) -> Figure | None:
    """A line of panels for each width, dtype and chunk size; None if nothing was measured.

    Those with a single length are left out if there are others. Lines end where a contender was
    not run, for one because it would not fit.
    """
    measures = [m for m in _MEASURES if any(record[m[0]] for record in records)]
    groups = _groups(records)
    if not measures or not groups:
        return None
    colours = THEME.of(dict.fromkeys([BARE, *(record["name"] for record in records)]))
    drawn = {name(r): r for group in groups.values() for r in group if r["median_s"]}
    handles = [Line2D([], [], label=n, **_style(r, colours)) for n, r in drawn.items()]
    columns = 2 * len(measures)
    size = (4.6 * len(measures), 3.3 * len(groups) + 0.2 + 0.2 * -(-len(handles) // columns))
    with rc_context(THEME.rc):
        made = Figure(figsize=size, layout="constrained")
        made.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
        axes = made.subplots(len(groups), len(measures), squeeze=False)
        for line, (title, group) in zip(axes, groups.items(), strict=True):
            for ax, (key, scale, label) in zip(line, measures, strict=True):
                _panel(ax, group, key, scale, colours)
                ax.set_ylabel(label)
            line[0].set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel("sequence length L (tokens)")
        made.legend(handles=handles, loc="outside upper left", ncols=min(columns, len(handles)))
    return made


def _groups(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Records that differ in length alone, by their title."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["dim"], record["dtype"], record["chunk"] or 0)
        groups.setdefault(key, []).append(record)
    several = [key for key, group in groups.items() if len({r["length"] for r in group}) > 1]
    return {_title(groups[key]): groups[key] for key in several or groups}


def _title(group: Records) -> str:
    first = group[0]
    tokens = sorted({r["batch"] * r["length"] for r in group})
    batch = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    chunk = f", chunks of {first['chunk']:,}" if first["chunk"] else ""
    return f"d = {first['dim']:,}, {first['dtype']}{chunk}, {batch} tokens a batch"


def _panel(ax: Axes, group: Records, key: str, scale: float, colours: dict[str, str]) -> None:
    for line in dict.fromkeys(map(name, group)):
        found = sorted((r for r in group if name(r) == line and r[key]), key=_length)
        if found:
            y = [r[key] * scale for r in found]
            ax.plot([r["length"] for r in found], y, **_style(found[0], colours))
    ax.set(xscale="log", yscale="log")
    lengths = sorted({r["length"] for r in group})
    ax.xaxis.set_major_locator(FixedLocator(lengths))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(labelsize=8.5)
    _decades(ax.yaxis, ax.get_ylim())


def _length(record: dict[str, Any]) -> int:
    length: int = record["length"]
    return length


def _decades(axis: Axis, limits: tuple[float, float]) -> None:
    """Plain numbers on the axis: 1, 2, 5 of each decade if there are few."""
    few = math.log10(limits[1] / limits[0]) < 2.5
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.12g}"))
    axis.set_minor_locator(NullLocator())


def _style(record: dict[str, Any], colours: dict[str, str]) -> dict[str, Any]:
    bare = record["name"] == BARE
    return {
        "color": colours[record["name"]],
        "linestyle": "--" if bare else LINES[record["variant"]],
        "marker": "" if bare else "o",
        "markersize": 3.5,
        "linewidth": 1.6,
    }
