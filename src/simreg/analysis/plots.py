"""Drawing: results of an analysis in, figures out; None where there is nothing to draw."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from simreg.analysis.compare import final
from simreg.recipe.progress import tokens as short
from simreg.theme import Theme

Results = dict[str, Any]
Point = tuple[int, float, float]

LABELS = {
    "loss": "loss (nats)",
    "margin": "margin",
    "margin_cos": "cosine margin",
    "intra_cos": "cosine within class",
    "inter_max_cos": "cosine to nearest class mean",
    "variance_share": "variance within classes, share",
}
_PANELS = ("head", "torso", "tail")


def arms(results: Results) -> list[str]:
    """The reference first."""
    names = list(results["means"])
    names.sort(key=lambda arm: arm != results["reference"])
    return names


def trained(results: Results) -> list[str]:
    """The same without arms of which there are but checkpoints."""
    return [arm for arm in arms(results) if results["means"][arm]]


def margins(results: Results, theme: Theme) -> Figure | None:
    """Histograms of the raw and the cosine margin, arms overlaid, for head and tail."""
    names = trained(results)
    if not names:
        return None
    colours = theme.of(names)
    with rc_context(theme.rc):
        figure, axes = _panels(2, 3, (9.2, 5.2))
        for line, key in zip(axes, ("margin", "margin_cos"), strict=True):
            low, high, bins = results["settings"]["histograms"][key]
            edges = np.linspace(low, high, bins + 1)
            for ax, group in zip(line, ("all", "head", "tail"), strict=True):
                seen = np.zeros(bins, dtype=bool)
                for arm in names:
                    models = final(results["models"], arm).values()
                    share = np.mean([m["histograms"][key][group] for m in models], axis=0)
                    seen |= share > 1e-3
                    ax.stairs(share, edges, fill=True, color=colours[arm], alpha=0.22)
                    ax.stairs(share, edges, color=colours[arm], linewidth=1.3)
                    median = results["means"][arm][group].get(f"{key}_p50")
                    if median is not None and median["mean"] is not None:  # the group has tokens
                        ax.axvline(median["mean"], color=colours[arm], linewidth=1, linestyle=":")
                ax.axvline(0, color=theme.text, linewidth=0.8)
                shown = np.flatnonzero(seen)
                if len(shown):
                    ax.set_xlim(edges[shown[0]], edges[shown[-1] + 1])
                ax.set_title(f"{group} tokens")
                ax.set_xlabel(LABELS[key])
        for line in axes:
            line[0].set_ylabel("share of tokens")
        _legend(figure, colours)
    return figure


def deciles(results: Results, theme: Theme) -> Figure | None:
    """Bars for each frequency decile: differences from the reference, or values without one."""
    compared = results["minus_reference"]
    shown = compared or results["means"]
    colours = theme.of(arms(results))
    if not shown:
        return None
    with rc_context(theme.rc):
        figure, axes = _panels(2, 3, (9.2, 5.2))
        width = 0.8 / len(shown)
        for ax, metric in zip(axes.ravel(), LABELS, strict=True):
            for k, (arm, by_group) in enumerate(shown.items()):
                at, heights, errors = [], [], []
                for i in range(1, 11):
                    entry = by_group.get(f"decile-{i}", {}).get(metric)
                    if entry is None or entry["mean"] is None:
                        continue
                    at.append(i + (k - (len(shown) - 1) / 2) * width)
                    heights.append(entry["mean"])
                    errors.append(_half(results, arm, f"decile-{i}", metric, entry))
                ax.bar(at, heights, width, color=colours[arm], alpha=0.75)
                ax.errorbar(at, heights, errors, fmt="none", ecolor=theme.text, elinewidth=1)
            ax.axhline(0, color=theme.text, linewidth=0.8)
            ax.set_title(LABELS[metric])
            ax.xaxis.set_major_locator(FixedLocator(range(1, 11)))
            ax.grid(axis="x", visible=False)
        for ax in axes[-1]:
            ax.set_xlabel("decile of label frequency")
        for ax in axes[:, 0]:
            ax.set_ylabel(f"minus {results['reference']}" if compared else "")
        _legend(figure, {arm: colours[arm] for arm in shown})
    return figure


def _half(results: Results, arm: str, group: str, metric: str, entry: dict[str, Any]) -> float:
    """Half the interval; of a single model 1.96 standard errors over rows, if it has one."""
    if entry["low"] is not None:
        return float(entry["high"] - entry["mean"])
    if results["minus_reference"]:
        return 0.0
    model = next(iter(final(results["models"], arm).values()))
    return 1.96 * (model["groups"][group]["se"].get(metric) or 0.0)


def cosine_curves(results: Results) -> dict[str, dict[int, list[Point]]]:
    """arm -> seed -> (tokens, intra, inter): of checkpoints, or as logged while training.

    Of each arm the seeds with the most points, so that all points are means of the same seeds.
    Where a seed lacks a cosine (no two tokens of a label) the arm has no point.
    """
    curves: dict[str, dict[int, list[Point]]] = {}
    for m in results["models"]:
        if m["tokens"] is not None:
            own = m["groups"]["all"]
            point = (m["tokens"], own["intra_cos"], own["inter_cos"])
            curves.setdefault(m["arm"], {}).setdefault(m["seed"], []).append(point)
    curves = {arm: _complete(seeds) for arm, seeds in curves.items()}
    if any(len(points) > 1 for seeds in curves.values() for points in seeds.values()):
        return _longest(curves)
    logged: dict[str, dict[int, list[Point]]] = {}
    for curve in results["training"]:
        points = [(r["tokens"], r["intra_cos"], r["inter_cos"]) for r in curve["records"]]
        logged.setdefault(curve["arm"], {})[curve["seed"]] = points
    return _longest({arm: _complete(seeds) for arm, seeds in logged.items()})


def _complete(seeds: dict[int, list[Point]]) -> dict[int, list[Point]]:
    gaps = {point[0] for points in seeds.values() for point in points if None in point}
    return {seed: [p for p in points if p[0] not in gaps] for seed, points in seeds.items()}


def _longest(curves: dict[str, dict[int, list[Point]]]) -> dict[str, dict[int, list[Point]]]:
    longest = {}
    for arm, seeds in curves.items():
        if most := max(map(len, seeds.values())):
            longest[arm] = {s: sorted(points) for s, points in seeds.items() if len(points) == most}
    return longest


def cosines(results: Results, theme: Theme) -> Figure | None:
    """Intra- and inter-class cosine over tokens seen."""
    curves = cosine_curves(results)
    if not curves:
        return None
    colours = theme.of([a for a in arms(results) if a in curves] or list(curves))
    with rc_context(theme.rc):
        figure, axes = _panels(1, 1, (6.4, 3.9))
        ax = axes[0, 0]
        for arm, seeds in curves.items():
            for k, style in ((1, "-"), (2, "--")):
                by_x: dict[int, list[float]] = {}
                for points in seeds.values():
                    x, y = [p[0] for p in points], [p[k] for p in points]
                    for at, value in zip(x, y, strict=True):
                        by_x.setdefault(at, []).append(value)
                    ax.plot(x, y, style, color=colours[arm], linewidth=0.6, alpha=0.35, marker=".")
                most = max(map(len, by_x.values()))
                mean = [(x, np.mean(y)) for x, y in sorted(by_x.items()) if len(y) == most]
                ax.plot(*zip(*mean, strict=True), style, color=colours[arm], linewidth=1.8)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        ax.set(xlabel="training tokens", ylabel="mean cosine")
        styles: Any = {"same label": "-", "other labels": "--"}
        handles = [
            Line2D([], [], color=theme.text, linestyle=s, label=label)
            for label, s in styles.items()
        ]
        _legend(figure, colours, handles)
    return figure


def explanation(results: Results, theme: Theme) -> Figure | None:
    """Loss against margin, a dot a model, a panel for head, torso and tail."""
    if len(results["models"]) < 3:
        return None
    colours = theme.of(arms(results) or [m["arm"] for m in results["models"]])
    with rc_context(theme.rc):
        figure, axes = _panels(1, 3, (9.2, 3.3))
        for ax, group in zip(axes[0], _PANELS, strict=True):
            for m in results["models"]:
                own = m["groups"][group]
                if own.get("margin") is None or own.get("loss") is None:
                    continue
                face = colours[m["arm"]] if m["final"] else "none"
                ax.plot(own["margin"], own["loss"], "o", mec=colours[m["arm"]], mfc=face, ms=4.5)
            ax.set(title=f"{group} tokens", xlabel="mean margin")
        axes[0, 0].set_ylabel("mean loss (nats)")
        mark: Any = {"color": theme.text, "linestyle": "", "marker": "o", "markersize": 4.5}
        handles = [Line2D([], [], label="checkpoint", mfc="none", **mark)]
        hollow = any(not m["final"] for m in results["models"])
        _legend(figure, colours, handles if hollow else [])
    return figure


def embedding_map(results: Results, theme: Theme) -> Figure | None:
    """The projection of chosen labels, a panel for each arm."""
    maps, names = results["map"]["arms"], results["map"]["labels"]
    if not maps:
        return None
    colours = theme.of(list(names))
    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    with rc_context(theme.rc):
        figure, axes = _panels(lines, columns, (4.6 * max(columns, 1.4), 4.0 * lines))
        for ax in axes.ravel()[len(maps) :]:
            ax.set_visible(False)
        for ax, (arm, entry) in zip(axes.ravel(), maps.items(), strict=False):
            for i, (label, points) in enumerate(entry["points"].items()):
                if not points:
                    continue
                marker = "osD^vPX*"[i % 8]
                x, y = np.array(points).T
                ax.plot(x, y, marker, color=colours[label], ms=4, alpha=0.7, mew=0)
            share = entry["explained"]
            ax.set_title(
                (arm if entry["seed"] is None else f"{arm}, seed {entry['seed']}")
                + (f": {sum(share):.0%} of variance" if share else "")
            )
            ax.set_aspect("equal", "datalim")
            ax.tick_params(labelbottom=False, labelleft=False, length=0)
        handles = [
            Line2D(
                [], [], color=colours[k], marker="osD^vPX*"[i % 8], linestyle="", label=repr(name)
            )
            for i, (k, name) in enumerate(names.items())
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(8, len(handles)))
    return figure


def positives(results: Results, theme: Theme) -> Figure | None:
    """The share of tokens with a positive against L, and against the chunk."""
    rows = [r for r in results["positive_rate"] if r["chunk"] is None]
    if not rows:
        return None
    longest = rows[-1]["length"]
    chunks = [r for r in results["positive_rate"] if r["length"] == longest and r["chunk"]]
    colours = theme.of(("all", *_PANELS))
    with rc_context(theme.rc):
        figure, axes = _panels(1, 1, (6.4, 3.9))
        ax = axes[0, 0]
        for part, colour in colours.items():
            ax.plot([r["length"] for r in rows], [r[part] for r in rows], "o-", color=colour, ms=4)
            ax.plot(
                [r["chunk"] for r in chunks], [r[part] for r in chunks], "x", color=colour, ms=5
            )
        ax.set(xscale="log", ylim=(0, 1), xlabel="L, or chunk (tokens)", ylabel="share of tokens")
        ticks = sorted({r["length"] for r in rows} | {r["chunk"] for r in chunks})
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="x", labelsize=8)
        cross: Any = {"color": theme.text, "linestyle": "", "marker": "x"}
        _legend(figure, colours, [Line2D([], [], label=f"chunks of L = {longest}", **cross)])
    return figure


def _panels(lines: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    figure.set_layout_engine("constrained", wspace=0.05, hspace=0.07)
    return figure, figure.subplots(lines, columns, squeeze=False)


def _legend(figure: Figure, colours: dict[str, str], more: list[Line2D] | None = None) -> None:
    handles = [Line2D([], [], color=c, linewidth=2.2, label=n) for n, c in colours.items()]
    handles += more or []
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)))
