"""`simreg analyze`: measures every model that is named, compares arms, writes JSON and pictures."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from rich.text import Text

from simreg import theme
from simreg.analysis import compare, figures, project, states, text
from simreg.analysis.measure import HISTOGRAMS, Settings, Tokens, group_masks, measure
from simreg.analysis.options import AnalyzeOptions
from simreg.geometry import groups
from simreg.geometry.sample import Sample
from simreg.intervals import pairing
from simreg.recipe import progress, provenance
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.errors import UserError
from simreg.recipe.processes import warn
from simreg.recipe.trained import Trained


def check(options: AnalyzeOptions) -> None:
    """UserError for what can't be, before models are looked for."""
    if min(options.tokens, options.least, options.pairs) < 1:
        raise UserError("--tokens, --least and --pairs must be 1 or more")
    project.check(options.projection)


def analyze(
    found: list[Trained], options: AnalyzeOptions, console: Console, *, command: str
) -> dict[str, Any]:
    """Everything of results.json (docs/analysis.md) for these models; `options.models` and `out`
    are not read."""
    check(options)
    reference = _reference(options.reference, found)
    changes = {
        key: value
        for key in ("source", "validation", "seq_len")
        if (value := getattr(options, key)) is not None
    }
    read = text.read(text.data_of(found, changes), options.tokens, options.split)
    text.check_held_out(found, read, changes)
    text.check_tokenizers(found, read.corpus)
    wanted = None if options.labels is None else _ids(options.labels, read.corpus.tokenizer)
    settings = Settings(options.least, options.pairs)
    compared = _compared(found)
    models, tokens, maps = [], {}, {}
    shown: list[int] = []
    sample: Sample | None = None
    for target in found:
        began = time.perf_counter()
        with console.status(Text(target.title)) as status:
            tell = partial(_tell, status)
            state = states.collect(target, read.ids, options.cache_dir, tell)
            forward = time.perf_counter() - began
            tell(f"{target.title}: measuring")
            record, values = measure(
                state, read.frequency, read.ids.shape[1], settings, brief=not target.final
            )
        of_arms = target.final and pairing(target.seed) in compared
        identity = _identity(target, state.weights_hash) | {"compared": of_arms}
        models.append(identity | record)
        seconds = time.perf_counter() - began
        console.print(
            f"{target.title}: {forward:.1f} s for states, {seconds - forward:.1f} s for the rest"
        )
        if not of_arms:
            continue
        if not shown:
            sample = state.sample  # all models have the same labels and rows
            decile = groups.deciles(state.sample.labels, read.frequency)
            shown = _labels(wanted, read.corpus, state.sample.labels, decile)
        tokens[target.arm, pairing(target.seed)] = values
        if target.arm not in maps and (
            place := project.project(state.sample, shown, options.projection)
        ):
            maps[target.arm] = {"seed": target.seed, **place}
    names = {str(label): read.corpus.tokenizer.decode([label]) for label in shown}
    return {
        "schema": 1,
        "command": command,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "text": {
            "fingerprint": read.corpus.fingerprint,
            "source": options.source,
            "split": options.split,
            "rows": len(read.ids),
            "length": read.ids.shape[1],
            "tokens": read.ids.shape[0] * (read.ids.shape[1] - 1),
        },
        "settings": vars(settings) | {"histograms": HISTOGRAMS},
        "reference": reference,
        **_comparisons(models, tokens, sample, read, reference),
        "positive_rate": text.positive_rates(read),
        "map": {"labels": names, "arms": maps},
        "training": _training(found),
        "models": models,
    }


def _comparisons(
    models: list[compare.Model],
    tokens: dict[tuple[str, int], Tokens],
    sample: Sample | None,
    read: text.Text,
    reference: str,
) -> dict[str, Any]:
    """Arms against the reference; `sample` is that of any model."""
    masks, rows = {}, torch.empty(0)
    if sample is not None:
        masks = group_masks(sample, read.frequency, read.ids.shape[1], brief=True)
        rows = sample.rows
    return {
        "means": compare.means(models),
        "minus_reference": compare.paired(models, reference),
        "tail_minus_head": compare.tail_minus_head(models, reference),
        "over_tokens": compare.over_tokens(tokens, masks, rows, reference),
        "correlations": {
            "models": compare.across_models(models),
            "tokens": compare.across_tokens(tokens, masks, reference),
        },
    }


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and, for each picture that there is something for, .png, .svg and its text."""
    write_atomically(out / "results.json", _lines(results))
    described, told = [], out / "pictures.txt"
    earlier = told.read_text(encoding="utf-8", errors="replace") if told.is_file() else ""
    ours = {line.partition(":")[0] for line in earlier.splitlines()}
    for picture in figures.PICTURES:
        if (figure := picture.draw(results)) is not None:
            described.append(f"{picture.name}: {picture.title}. {picture.describe(results)}\n")
        elif picture.name not in ours:
            continue  # what is called so is no picture of an earlier analysis
        theme.save(figure, out, picture.name)
    write_atomically(told, "\n".join(described))


def _lines(results: dict[str, Any]) -> str:
    """JSON with a line for each field and each model: half the size of an indented file."""

    def short(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    models = ",\n".join(map(short, results["models"]))
    fields = [f"{short(k)}:{short(v)}" for k, v in results.items() if k != "models"]
    return "{" + ",\n".join([*fields, f'"models":[\n{models}\n]']) + "}\n"


def _reference(named: str | None, found: list[Trained]) -> str:
    arms = list(dict.fromkeys(target.arm for target in found))
    if named is not None:
        if named not in arms:
            raise UserError(f"--reference {named}: the arms are {', '.join(arms)}")
        return named
    return "baseline" if "baseline" in arms else arms[0]


def _tell(status: Status, what: str) -> None:
    status.update(Text(what))  # not markup: names may have brackets


def _compared(found: list[Trained]) -> set[int]:
    """The seeds that enter comparisons; a warning for those that do not."""
    seeds: dict[str, set[int]] = {}
    for target in found:
        if target.final:
            seeds.setdefault(target.arm, set()).add(pairing(target.seed))
    compared = compare.seeds_compared(seeds)
    for arm, own in seeds.items():
        if alone := sorted(own - compared):
            warn(f"seeds {', '.join(map(str, alone))} of {arm} have no pair: not compared")
    return compared


def _identity(target: Trained, weights_hash: str) -> dict[str, Any]:
    """What the model is; `fingerprint` is of its files, for a report to know it by (null: of a
    checkpoint), `weights` of what was loaded."""
    own = {k: getattr(target, k) for k in ("arm", "seed", "step", "tokens", "final")}
    fingerprint = target.fingerprint() if target.final else None
    path = target.name if target.run is None else str(target.model)
    return own | {"path": path, "weights": weights_hash, "fingerprint": fingerprint}


def _ids(names: list[str], tokenizer: Any) -> dict[str, int]:
    """The one token that each name is."""
    found = {}
    for name in names:
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"--labels {name!r}: it is {len(ids)} tokens of this tokenizer, not one"
            )
        found[name] = int(ids[0])
    return found


def _labels(wanted: dict[str, int] | None, corpus: Any, labels: Any, decile: Any) -> list[int]:
    if wanted is None:
        return project.choose(labels, decile, lambda label: corpus.tokenizer.decode([label]))
    for name, label in wanted.items():
        if not bool((labels == label).any()):
            raise UserError(f"--labels {name!r}: no token of the sample has this label")
    return list(wanted.values())


def _training(found: list[Trained]) -> list[dict[str, Any]]:
    """What runs logged of their geometry on the way (`train.analyze_every`)."""
    runs = {target.run: target for target in found if target.run is not None}
    curves = []
    for run, target in runs.items():
        lines = [r for r in progress.read_metrics(run / "metrics.jsonl") if r["kind"] == "geometry"]
        if lines:
            kept = [{k: v for k, v in r.items() if k not in ("kind", "seconds")} for r in lines]
            curves.append({"arm": target.arm, "seed": target.seed, "records": kept})
    return curves
