"""The pictures in words: what a reader who can't see them needs to know, from the same numbers."""

from typing import Any

from simreg.analysis import plots
from simreg.recipe.progress import tokens as short

Results = dict[str, Any]


def margins(results: Results) -> str:
    """Medians of both margins, by arm."""
    parts = []
    for arm in plots.trained(results):
        own = results["means"][arm]
        medians = "; ".join(
            f"{group} {_mean(own, group, 'margin_p50')}, "
            f"by cosine {_mean(own, group, 'margin_cos_p50')}, "
            f"accuracy {_mean(own, group, 'accuracy', '{:.1%}')}"
            for group in ("all", "head", "tail")
        )
        parts.append(f"Median margin of {arm}: {medians}.")
    return " ".join(parts)


def deciles(results: Results) -> str:
    """Each metric at the first, fifth and last decile."""
    compared = results["minus_reference"]
    parts = []
    for arm, own in (compared or results["means"]).items():
        for metric, label in plots.LABELS.items():
            values = ", ".join(
                f"{_entry(own.get(f'decile-{i}', {}).get(metric))} in decile {i}"
                for i in (1, 5, 10)
            )
            minus = f" minus {results['reference']}" if compared else ""
            parts.append(f"{arm}{minus}, {label}: {values}.")
    return " ".join(parts)


def cosines(results: Results) -> str:
    """First and last point of each arm."""
    parts = []
    for arm, seeds in plots.cosine_curves(results).items():
        ends = []
        for k in (0, -1):
            points = [p[k] for p in seeds.values()]
            intra, inter = (sum(p[i] for p in points) / len(points) for i in (1, 2))
            tokens = short(sum(p[0] for p in points) / len(points))
            ends.append(f"{intra:.3f} and {inter:.3f} at {tokens} tokens")
        parts.append(f"{arm}, cosine to the same and to other labels: {', then '.join(ends)}.")
    return " ".join(parts)


def explanation(results: Results) -> str:
    """The correlations, pooled and within arms."""
    parts = []
    for group in ("head", "torso", "tail"):
        found = results["correlations"]["models"][group]["margin"]
        values = ", ".join(
            f"{name} {entry['pearson']:+.2f} (n = {entry['n']})"
            for name, entry in found.items()
            if entry["pearson"] is not None
        )
        parts.append(f"Correlation of margin and loss, {group}: {values or 'too few models'}.")
    return " ".join(parts)


def embedding_map(results: Results) -> str:
    """Which labels, and how far their tokens lie from their centre against the centres' spread."""
    names = ", ".join(map(repr, results["map"]["labels"].values()))
    parts = [f"Labels {names}."]
    for arm, entry in results["map"]["arms"].items():
        clouds = [p for p in entry["points"].values() if p]
        centres = [[sum(c) / len(p) for c in zip(*p, strict=True)] for p in clouds]
        n = sum(map(len, clouds))
        middle = [sum(c) / n for c in zip(*(x for p in clouds for x in p), strict=True)]
        inside = sum(_apart(x, c) for p, c in zip(clouds, centres, strict=True) for x in p)
        whole = sum(_apart(x, middle) for p in clouds for x in p)
        parts.append(
            f"In the map of {arm}, {inside / whole:.0%} of the spread lies within labels, the rest "
            "between them."
        )
    return " ".join(parts)


def positives(results: Results) -> str:
    """The rate at each length."""
    rows = [r for r in results["positive_rate"] if r["chunk"] is None]
    return " ".join(
        f"L = {r['length']}: {r['all']:.0%} of all, "
        + ", ".join(f"{r[p]:.0%} of {p}" for p in ("head", "tail") if r[p] is not None)
        + "."
        for r in rows
    )


def _apart(x: list[float], y: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def _mean(own: dict[str, Any], group: str, metric: str, form: str = "{:.3f}") -> str:
    value = own[group].get(metric, {}).get("mean")
    return "–" if value is None else form.format(value)


def _entry(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return "unknown"
    if entry["low"] is None:
        return f"{entry['mean']:.3g}"
    return f"{entry['mean']:.3g} ({entry['low']:.3g} to {entry['high']:.3g})"
