"""The figures of a study; they know nothing of files. None where there is nothing to draw."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from simreg.evaluation.outcome import ACCURACIES
from simreg.study.picture import Picture
from simreg.study.records import Run
from simreg.study.summary import bound, count, fewer, saving_cell


def curves(picture: Picture) -> Figure | None:
    """Validation loss over tokens and, where step times are known, over training seconds."""
    table, seconds = picture.grid, picture.seconds_per_token()
    full = table[picture.arms[0]].get(1.0)
    if not full:
        return None
    longest = max(seconds.values(), default=0.0) * max(run.tokens for run in picture.runs)
    unit, size = _time_unit(longest)
    panels = 2 if seconds else 1
    with rc_context(picture.theme.rc):
        figure = Figure(figsize=(4.6 * panels, 3.7), layout="constrained")
        figure.set_layout_engine("constrained", wspace=0.06)  # the last tick label sticks out
        axes = np.atleast_1d(figure.subplots(1, panels, sharey=True))
        for arm in picture.shown:
            for budget, by_seed in table[arm].items():
                _curve(axes[0], picture, arm, budget, by_seed, 1.0)
                if arm in seconds:
                    _curve(axes[1], picture, arm, budget, by_seed, seconds[arm] / size)
        target = float(np.mean([run.final_ce for run in full.values()]))
        for ax in axes:
            ax.axhline(target, color=picture.theme.text, linewidth=0.8, linestyle=":")
        axes[0].set(xlabel="training tokens", ylabel="validation cross-entropy (nats per token)")
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x else "0"))
        if seconds:
            axes[1].set(xlabel=f"training time ({unit}): tokens × measured step time")
        axes[0].set_ylim(*_loss_limits(picture.runs))
        for ax in axes:
            ax.set_xlim(left=0)
        _legend(figure, picture, shorter=any(len(table[arm]) > 1 for arm in picture.shown))
    return figure


def _curve(
    ax: Axes, picture: Picture, arm: str, budget: float, by_seed: dict[int, Run], scale: float
) -> None:
    """One schedule of an arm: each seed faintly, their mean, and a dot for each final loss."""
    colour = picture.colours[arm]
    style: dict[str, Any] = (
        {"linewidth": 1.8, "linestyle": picture.line(arm)}
        if budget == 1.0
        else {"linewidth": 1.1, "dashes": (4, 2)}
    )
    series = []
    for run in by_seed.values():
        x = np.array([e["tokens"] for e in run.evals]) * scale
        y = np.array([e["ce"] for e in run.evals])
        series.append((x, y))
        if picture.several_seeds:
            ax.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
        ax.plot([run.tokens * scale], [run.final_ce], "o", color=colour, markersize=3.5)
    if len({len(x) for x, _ in series}) == 1:
        x, y = (np.mean(part, axis=0) for part in zip(*series, strict=True))
        ax.plot(x, y, color=colour, **style)


def _loss_limits(runs: list[Run]) -> tuple[float, float]:
    """Leaves out the steep start, which would flatten what matters."""
    shown = [e["ce"] for run in runs for e in run.evals if e["tokens"] >= 0.2 * run.tokens]
    shown = shown or [run.final_ce for run in runs]  # curves may be lost
    low, high = min(shown), max(shown)
    pad = 0.06 * (high - low or 1.0)
    return low - pad, high + pad


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds > 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds > 180 else ("seconds", 1.0)


def _legend(figure: Figure, picture: Picture, *, shorter: bool) -> None:
    handles = [
        Line2D([], [], color=picture.colours[a], linewidth=1.8, linestyle=picture.line(a), label=a)
        for a in picture.shown
    ]
    text = picture.theme.text
    if left_out := len(picture.arms) - len(picture.shown):
        label = f"the best arms, {left_out} left out"
        handles.append(Line2D([], [], linestyle="none", label=label))
    if shorter:
        dashed = Line2D([], [], color=text, linewidth=1.1, dashes=(4, 2), label="shorter schedule")
        handles.append(dashed)
    handles.append(
        Line2D(
            [],
            [],
            color=text,
            linewidth=0.8,
            linestyle=":",
            label=f"final loss of {picture.arms[0]}",
        )
    )
    # Inches of a handle and of a letter, generously: what is too wide is cut off.
    widest = max(0.6 + 0.085 * len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(4, int(figure.get_figwidth() / widest)))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.25 * max(0, lines - 3))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(columns, len(handles)))


def isoloss(picture: Picture) -> Figure | None:
    """Final loss against budget, a panel for each arm, with its crossing of the reference's."""
    arms = [arm for arm in picture.results["isoloss"] if picture.grid[arm]]
    full = picture.grid[picture.arms[0]].get(1.0)
    if not arms or not full:
        return None
    columns = min(2, len(arms))
    lines = -(-len(arms) // columns)
    with rc_context(picture.theme.rc):
        figure = Figure(figsize=(4.6 * max(columns, 1.3), 3.9 * lines), layout="constrained")
        figure.set_layout_engine("constrained", hspace=0.08)
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for ax, arm in zip(axes, arms, strict=False):
            _isoloss_panel(ax, picture, arm, full)
        for ax in axes[len(arms) :]:
            ax.set_visible(False)
        for ax in axes[::columns]:
            ax.set_ylabel("final validation cross-entropy (nats)")
    return figure


def _isoloss_panel(ax: Axes, picture: Picture, arm: str, full: dict[int, Run]) -> None:
    reference, colours = picture.arms[0], picture.colours
    n_tokens = float(np.mean([run.tokens for run in full.values()]))
    target = float(np.mean([run.final_ce for run in full.values()]))
    by_budget = picture.grid[arm]
    x = [run.tokens for by_seed in by_budget.values() for run in by_seed.values()]
    y = [run.final_ce for by_seed in by_budget.values() for run in by_seed.values()]
    means = [
        (np.mean([r.tokens for r in s.values()]), np.mean([r.final_ce for r in s.values()]))
        for s in by_budget.values()
    ]
    ax.plot(*zip(*means, strict=True), color=colours[arm], linewidth=1.6)
    ax.plot(x, y, "o", color=colours[arm], markersize=5, alpha=0.75, label=arm)
    ax.plot(
        [run.tokens for run in full.values()],
        [run.final_ce for run in full.values()],
        "s",
        color=colours[reference],
        markersize=5,
        alpha=0.75,
        label=reference,
    )
    ax.axhline(target, color=colours[reference], linewidth=0.9, linestyle=":")
    saved = picture.results["isoloss"][arm]["tokens_saved"]
    _mark_crossings(ax, picture, saved, full, n_tokens, target)
    ax.set_xscale("log")
    budgets = sorted({*by_budget, 1.0})
    ax.xaxis.set_major_locator(FixedLocator([b * n_tokens for b in budgets]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{round(v / n_tokens, 3):g} N\n{count(v)}")
    )
    ax.margins(x=0.1, y=0.14)
    ax.set_xlabel("training tokens of the whole schedule")
    ax.set_title(f"{arm}: {_saving_title(saved)}")
    ax.legend(loc="best")


def _saving_title(saved: dict[str, Any]) -> str:
    if saved["status"] == "not_reached":
        return saving_cell(saved)
    return f"tokens saved {saving_cell(saved)}"


def _mark_crossings(
    ax: Axes,
    picture: Picture,
    saved: dict[str, Any],
    full: dict[int, Run],
    n_tokens: float,
    target: float,
) -> None:
    """A cross where each seed meets the reference's loss; an arrow for the mean saving."""
    text = picture.theme.text
    for seed in saved["per_seed"]:
        if seed["status"] == "ok":
            at = (seed["crossing_tokens"], full[seed["seed"]].final_ce)
            ax.plot(*at, "x", color=text, markersize=7, markeredgewidth=1.6, zorder=5)
    if saved["mean"] is None:
        return
    end = (1 - saved["mean"]) * n_tokens
    ax.annotate(
        "",
        xy=(end, target),
        xytext=(n_tokens, target),
        arrowprops={
            "arrowstyle": "->",
            "color": text,
            "linewidth": 1.2,
            "shrinkA": 4,
            "shrinkB": 4,
        },
    )
    at_least = saved["status"] == "at_least"
    ax.annotate(
        bound(saved["mean"]) if at_least else fewer(saved["mean"], "tokens"),
        xy=((end * n_tokens) ** 0.5, target),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        va="bottom",
    )


_METRICS = (
    ("simreg", "SimReg loss, unweighted, with its push"),
    ("pos_fraction", "fraction of tokens with a positive"),
    ("pos_cos", "mean cosine, same label"),
    ("neg_cos", "mean cosine, different label"),
)
_GRADIENT = (
    ("grad_norm", "gradient norm before clipping"),
    ("clipped", "fraction of clipped steps"),
)


def metrics(picture: Picture) -> Figure | None:
    """What SimReg measures over training, at each arm's largest budget."""
    return _panels(picture, _METRICS)


def gradient(picture: Picture) -> Figure | None:
    """Gradient norm and clipping over training: clipping can confound a comparison."""
    return _panels(picture, _GRADIENT)


def _panels(picture: Picture, keys: tuple[tuple[str, str], ...]) -> Figure | None:
    """A panel for each logged quantity; None if no run logged any."""
    largest = {
        arm: by_budget[max(by_budget)] for arm, by_budget in picture.grid.items() if by_budget
    }
    drawn = {
        arm: by_seed
        for arm in picture.shown
        if (by_seed := largest.get(arm))
        and any(run.mean(key) is not None for run in by_seed.values() for key, _ in keys)
    }
    if not drawn:
        return None
    lines = len(keys) // 2
    with rc_context(picture.theme.rc):
        figure = Figure(figsize=(9.2, 2.7 * lines + 0.4), layout="constrained")
        axes = figure.subplots(lines, 2, sharex=True, squeeze=False)
        for ax, (key, label) in zip(axes.ravel(), keys, strict=True):
            for arm, by_seed in drawn.items():
                for run in by_seed.values():
                    logged = [e for e in run.train if e.get(key) is not None]
                    x, y = [e["tokens"] for e in logged], [e[key] for e in logged]
                    alpha = 0.6 if picture.several_seeds else 1.0
                    look = {"color": picture.colours[arm], "linestyle": picture.line(arm)}
                    ax.plot(x, y, **look, linewidth=1.1, alpha=alpha)
            ax.set_title(label)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: count(v) if v else "0"))
        for ax in axes[-1]:
            ax.set_xlabel("training tokens")
        handles = [
            Line2D([], [], color=picture.colours[a], linestyle=picture.line(a), label=a)
            for a in drawn
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)))
    return figure


def zero_shot(picture: Picture) -> Figure | None:
    """Accuracy minus the reference's with its interval, a line for each task (and average).

    Without suites whose differences are to another arm, as where the reference has no model.
    """
    lines = [
        (_label(name, task, kind), kind, task, suite["differences"])
        for name, suite in picture.results.get("zero_shot", {}).items()
        if suite["reference"] == picture.arms[0]
        for task in [*suite["tasks"], "average"]
        for kind in ("score", "normalised")
        if any(_accuracy_gap(gaps, task, kind) for gaps in suite["differences"].values())
        and any(task == "average" or _is_accuracy(arm, task) for arm in suite["arms"].values())
        and (task != "average" or len(suite["tasks"]) > 2)
    ]
    if not lines:
        return None
    others = picture.arms[1:]
    with rc_context(picture.theme.rc):
        figure = Figure(figsize=(9.2, 1.3 + 0.36 * len(lines) * max(1, 0.6 * len(others))))
        figure.set_layout_engine("constrained")
        ax = figure.subplots()
        for y, (_, kind, task, differences) in enumerate(lines):
            for i, arm in enumerate(others):
                if (gap := _accuracy_gap(differences.get(arm, {}), task, kind)) is None:
                    continue
                at = y + 0.7 * ((i + 0.5) / len(others) - 0.5)
                if gap["low"] is not None:
                    ends = [100 * gap["low"], 100 * gap["high"]]
                    ax.plot(ends, [at, at], color=picture.colours[arm], linewidth=1.6)
                ax.plot([100 * gap["mean"]], [at], "o", color=picture.colours[arm], markersize=5)
        ax.axvline(0, color=picture.theme.text, linewidth=0.8, linestyle=":")
        ax.set_yticks(range(len(lines)), [label for label, *_ in lines])
        ax.set_ylim(len(lines) - 0.4, -0.6)
        ax.set_xlabel(f"accuracy minus that of {picture.arms[0]}, percentage points")
        dots = [
            Line2D([], [], color=picture.colours[a], marker="o", linewidth=1.6, label=a)
            for a in others
        ]
        figure.legend(handles=dots, loc="outside upper left", ncols=min(6, len(others)))
    return figure


def _label(suite: str, task: str, kind: str) -> str:
    text = f"average of {suite}" if task == "average" else task
    return f"{text} (normalised)" if kind == "normalised" else text


def _accuracy_gap(gaps: dict[str, Any], task: str, kind: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = (gaps.get(task) or {}).get(kind)
    return found


def _is_accuracy(arm: dict[str, Any], task: str) -> bool:
    return bool(arm["tasks"][task]["metric"] in ACCURACIES)
