"""The report: one HTML file that needs nothing else, and pictures to show elsewhere."""

import contextlib
import json
import re
from collections.abc import Callable
from html import escape
from io import StringIO
from pathlib import Path
from string import Template
from typing import Any

import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from simreg import theme
from simreg.analysis import figures
from simreg.analysis import summary as geometry_summary
from simreg.evaluation import summary as scores
from simreg.recipe import outputs
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.folder import storage_errors
from simreg.study import geometry, plots, records, summary
from simreg.study.picture import Picture
from simreg.study.plan import Study
from simreg.study.records import Run
from simreg.study.results import build
from simreg.study.sizing import StepTimes
from simreg.theme import PRINT, Theme

# Stand-ins that matplotlib can draw with; the page's style decides what they look like.
_TEXT, _GRID = "#010203", "#010204"
_SERIES = tuple(f"#01030{i}" for i in range(len(PRINT.series)))
PAGE = Theme(text=_TEXT, grid=_GRID, series=_SERIES)
_VARIABLES = {_TEXT: "var(--text)", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)
}
_TEMPLATE = Path(__file__).with_name("report.html.template")


_FILES = (("curves", plots.curves), ("isoloss", plots.isoloss), ("zero-shot", plots.zero_shot))


def publish(
    study: Study,
    step_time: StepTimes,
    zero_shot: dict[str, Any],
    failures: dict[str, str],
    command: str | None = None,
) -> dict[str, Any]:
    """Write results.json and the report of the runs that are finished; returns the results."""
    out, runs = Path(study.out), records.collect(study)
    found = build(study, runs, step_time, _all_commands(out, command), failures)
    found["zero_shot"] = zero_shot
    outputs.write(out / "results.json", found)
    with storage_errors(out):
        write(out, runs, found)
    return found


def _all_commands(out: Path, command: str | None) -> list[str]:
    """The commands that led to these results, earlier ones first."""
    earlier: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads((out / "results.json").read_text(encoding="utf-8"))
        earlier = [str(each) for each in stored["commands"]]
    return list(dict.fromkeys([*earlier, *([command] if command else [])]))


def write(out: Path, runs: list[Run], results: dict[str, Any]) -> None:
    """Write report.html and, for other documents, its main figures as .png and .svg."""
    write_atomically(out / "report.html", html(runs, results, geometry.load(out)))
    picture = Picture(runs, results)
    for name, draw in _FILES:
        theme.save(draw(picture), out, name)


def html(runs: list[Run], results: dict[str, Any], analysis: dict[str, Any] | None = None) -> str:
    """The report as one page; `analysis` is what `simreg analyze` found, if it was run."""
    study = results["study"]
    picture = Picture(runs, results, PAGE)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"SimReg study: {study['name']}"),
        headlines="".join(f"<p>{escape(line)}</p>" for line in summary.headlines(results)),
        caveats=_caveats(results),
        table=_table(summary.COLUMNS, summary.rows(results)),
        figures="".join(_figure(picture, *entry) for entry in _FIGURES),
        zero_shot=_zero_shot(picture),
        geometry="" if analysis is None else _geometry(analysis, results["failures"]),
        apart=_apart(results),
        confidence="95 %",
        reference=escape(study["reference"]),
        commands=_pre(_commands(results, analysis)),
        plan=_pre(yaml.safe_dump(study, sort_keys=False, allow_unicode=True)),
        environment=_environment(results),
        runs=_table(
            ("run", "tokens", "steps", "seconds", "final CE (nats)"),
            [
                [
                    r["path"],
                    f"{r['tokens']:,}",
                    f"{r['steps']:,}",
                    f"{r['seconds']:.1f}",
                    f"{r['final_ce']:.4f}",
                ]
                for r in results["runs"]
            ],
        ),
        **{f"light_{i}": colour for i, colour in enumerate(PRINT.series)},
    )


_FIGURES: tuple[tuple[Callable[[Picture], Figure | None], str, str], ...] = (
    (
        plots.curves,
        "Loss over training",
        "Validation cross-entropy alone, without SimReg's own term. Left: over tokens. Right: over "
        "training time, which is tokens × the step time measured for the arm (interleaved with the "
        "reference's in one process), not the clock of runs that may have shared the machine. Dots "
        "are final losses, one a seed. The steep start is cut off.",
    ),
    (
        plots.isoloss,
        "Tokens to equal loss",
        "Each dot is the final loss of a whole schedule of its own, one a seed; lines join their "
        "means. A cross marks where a seed's losses, interpolated between budgets, equal the "
        "reference's final loss of the same seed.",
    ),
    (
        plots.metrics,
        "What SimReg measures",
        "At each arm's largest budget, on training batches. Arms without SimReg do not measure it.",
    ),
    (
        plots.gradient,
        "Gradients",
        "At each arm's largest budget. If one arm is clipped more often than another, part of "
        "their difference may come from clipping.",
    ),
)


def _figure(
    picture: Picture, draw: Callable[[Picture], Figure | None], title: str, caption: str
) -> str:
    figure = draw(picture)
    if figure is None:
        return ""
    label = f"{title}. {caption} {' '.join(summary.headlines(picture.results))}"
    drawing = _inline(figure, label, draw.__name__)
    return (
        f"<section><h2>{escape(title)}</h2><figure><div>{drawing}</div>"
        f"<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def _geometry(analysis: dict[str, Any], failures: dict[str, str]) -> str:
    """The section on embeddings: a table, and each picture with a text that tells it."""
    drawn = []
    for picture in figures.PICTURES:
        if (figure := picture.draw(analysis, PAGE)) is None:
            continue
        told = picture.describe(analysis)
        svg = _inline(figure, f"{picture.title}. {told}", f"geometry-{picture.name}")
        drawn.append(
            f"<h3>{escape(picture.title)}</h3><figure><div>{svg}</div><figcaption>"
            f"{escape(picture.caption)}<details><summary>In words</summary>{escape(told)}</details>"
            "</figcaption></figure>"
        )
    head, rows = tuple(geometry_summary.columns(analysis)), geometry_summary.rows(analysis)
    said = "".join(f"<p>{escape(text)}</p>" for text in geometry_summary.sentences(analysis))
    return (
        f"<section><h2>Geometry</h2>{_table(head, [row for row in rows if row[1] == 'all'])}"
        f"<p class='note'>{escape(geometry.note(analysis, failures))}</p>{said}"
        f"<details><summary>Head and tail</summary>{_table(head, rows)}</details>"
        f"{''.join(drawn)}</section>"
    )


def _commands(results: dict[str, Any], analysis: dict[str, Any] | None) -> str:
    commands = results["commands"] or ["simreg compare study.yaml"]
    return "\n".join([*commands, *([analysis["command"]] if analysis else [])])


def _inline(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an SVG element in the page's own colours and with ids of its own."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    # The same scale for every figure: 9.2 inches fill the page.
    width = f"max-width: {100 * figure.get_figwidth() / 9.2:.0f}%"
    opening = f'<svg {box.group()} style="{width}" role="img" aria-label="{escape(label)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg


def _caveats(results: dict[str, Any]) -> str:
    """What a reader must know before believing the headline."""
    notes = []
    if not results["complete"]:
        notes.append(
            "Not all runs are finished: figures cover those that are. A study that ends when its "
            "intervals look good claims too much."
        )
    notes += [f"{path}: {message}" for path, message in results["failures"].items()]
    for arm, saved in results["isoloss"].items():
        wiggly = [s["seed"] for s in saved["tokens_saved"]["per_seed"] if s["monotone"] is False]
        if wiggly:
            notes.append(
                f"{arm}: a longer schedule did not always end lower (seeds "
                f"{', '.join(map(str, wiggly))}), so the crossing is the point from which it stays "
                "at or below the reference."
            )
    for arm, entry in results["arms"].items():
        if entry["unpaired"]:
            notes.append(
                f"{arm} changes {', '.join(entry['unpaired'])}: its runs do not share initial "
                f"weights or batches with {results['study']['reference']}."
            )
    if any((run["epochs"] or 0) > 1 for run in results["runs"]):
        notes.append("Some runs saw the corpus more than once.")
    if said := summary.busy(results):
        notes.append(f"{said[0].upper()}{said[1:]}.")
    for key in ("versions", "machine"):
        if len(results[key]) > 1:
            notes.append(
                f"The runs come from {len(results[key])} different {key} entries (see below)."
            )
    if not notes:
        return ""
    return f"<ul class='caveats'>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


_SUITES = {
    "offline": "Held-out documents of the corpus itself: which of four continuations follows "
    "(chance is 25 %; the other three are pieces of other documents, as long as the true one), and "
    "bits per byte.",
    "offline-text": "Other text, given with --text: which of four continuations follows (chance is "
    "25 %), and bits per byte.",
    "small": "Benchmarks on which models under 200 M parameters differ from chance, by "
    "lm-evaluation-harness.",
    "paper": "The benchmarks of the paper's tables, by lm-evaluation-harness.",
}


def _zero_shot(picture: Picture) -> str:
    """What the models at the full budget can do without training on the task."""
    suites = picture.results.get("zero_shot")
    if not suites:
        return ""
    parts, said = [], []
    for name, found in suites.items():
        sentences = scores.sentences(found)
        notes = [
            f"{task}: {each['note']}." for task, each in found["tasks"].items() if each["note"]
        ]
        lines = [_SUITES.get(name, "Tasks chosen by hand."), *sentences, *notes]
        parts.append("".join(f"<p>{escape(line)}</p>" for line in lines))
        parts.append(_table(scores.COLUMNS, scores.rows(found)))
        said += sentences
    if (figure := plots.zero_shot(picture)) is not None:
        drawing = _inline(figure, " ".join(["Zero-shot differences.", *said]), "zero-shot")
        parts.append(f"<figure><div>{drawing}</div></figure>")
    return f"<section><h2>Zero-shot</h2>{''.join(parts)}<p class='note'>{_ZERO_SHOT}</p></section>"


_ZERO_SHOT = (
    "Models at the full budget, accuracies in per cent. ± is the standard deviation over seeds, or "
    "with one seed the standard error over items. Normalised: log-likelihoods are divided by the "
    "length of the answer (benchmarks), or the answer's own, without context, is subtracted "
    "(heldout-cloze). Differences are paired over seeds and items; brackets hold 95 % Student-t "
    "intervals with the spread of both (with one seed of the items alone, which says nothing of "
    "other seeds)."
)


def _apart(results: dict[str, Any]) -> str:
    """Figures that stand beside the headline: mid-run gap, bootstrap, equal time."""
    rows = []
    for arm, equal_time in results["equal_time"].items():
        saved = results["isoloss"].get(arm)
        boot = saved and saved["tokens_saved"]["bootstrap"]
        rows.append(
            [
                arm,
                summary.saving_cell(saved["midrun_tokens_saved"]) if saved else "–",
                f"{summary.percent(boot['low'])} to {summary.percent(boot['high'])}"
                if boot
                else "–",
                _equal_time(equal_time, len(results["seeds"])),
            ]
        )
    head = (
        "arm",
        "mid-run gap (not a saving)",
        "tokens saved, 95 % bootstrap",
        "CE minus reference at equal time (nats)",
    )
    return _table(head, rows)


def _equal_time(entry: dict[str, Any], planned: int) -> str:
    if entry["status"] == "ok":
        return summary.difference_cell(entry["ce_difference"], planned)
    if entry["reference_tokens"] is None:
        return "not run"
    at = summary.count(entry["reference_tokens"])
    return f"not run: takes finished runs of the reference around {at} tokens"


def _environment(results: dict[str, Any]) -> str:
    parts = [
        f"<h3>{title}</h3>{_pre(yaml.safe_dump_all(results[key], sort_keys=False))}"
        for key, title in (("versions", "Versions"), ("machine", "Machine"), ("corpus", "Corpus"))
        if results[key]
    ]
    return "".join(parts)


def _pre(text: str) -> str:
    return f"<pre>{escape(text.strip())}</pre>"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    headers = "".join(f"<th scope='col'>{escape(h)}</th>" for h in head)
    # An interval goes below its value, so that the table stays narrow.
    cells = [[escape(cell).replace(" [", "<br>[") for cell in row] for row in rows]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return (
        f"<div class='scroll'><table><thead><tr>{headers}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
