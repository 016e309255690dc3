"""What a study found: a row, sentences, or its seeds one by one."""

from typing import Any

from simreg.recipe.errors import UserError
from simreg.study import summary
from simreg.study.results import loss_difference, seeds_diverged
from simreg.study.tables import markdown
from simreg.study.tables.request import Request

_HEAD = (
    "study",
    "model",
    "tokens N",
    "steps",
    "seeds",
    "tokens saved",
    "time saved",
    "step time [quartiles]",
    "final CE at N, minus reference (nats)",
    "minus reference given the same time (nats)",
)


def table(request: Request) -> str:
    """A row for each study, or for each of its arms but the reference.

    The column of equal time is left out where no study has it.
    """
    rows: list[list[str]] = []
    unpaired: dict[str, list[str]] = {}  # reference -> what arms change of it
    for source in request.sources:
        results = source.content
        arms = _arms(request, results)
        for arm in arms:
            name = results["study"]["name"]
            label = f"{name}: {arm}" if len(arms) > 1 else name
            if results["arms"][arm]["unpaired"]:
                label = f"{label} {markdown.UNPAIRED}"
                own = unpaired.setdefault(results["study"]["reference"], [])
                own += results["arms"][arm]["unpaired"]
            rows.append([label, *_row(results, arm)])
    drawn = markdown.table(_HEAD, rows, left=2)
    if all(row[-1] == markdown.NONE for row in rows):
        drawn = markdown.table(_HEAD[:-1], [row[:-1] for row in rows], left=2)
    notes = [markdown.unpaired_note(name, fields) for name, fields in unpaired.items()]
    return markdown.with_notes(drawn, notes)


def sentences(request: Request) -> str:
    """What the report of the study says of each arm."""
    results = request.source.content
    lines = [summary.headline(results, arm) for arm in _arms(request, results)]
    return "\n\n".join(markdown.minus(line) for line in lines)


def seeds(request: Request) -> str:
    """A row for each seed of an arm: final losses at N, their difference, tokens saved."""
    results = request.source.content
    reference, rows = results["study"]["reference"], []
    arms = _arms(request, results)
    for arm in arms:
        saved = results["isoloss"].get(arm, {}).get("tokens_saved", {}).get("per_seed", [])
        by_seed = {entry["seed"]: entry for entry in saved}
        own, base = final_losses(results, arm), final_losses(results, reference)
        for seed in results["seeds"]:
            gap = own[seed] - base[seed] if seed in own and seed in base else None
            cells = [
                str(seed),
                markdown.number(base.get(seed), ".4f"),
                markdown.number(own.get(seed), ".4f"),
                markdown.number(gap, "+.4f"),
                _saved_by_seed(by_seed.get(seed)),
            ]
            rows.append([arm, *cells] if len(arms) > 1 else cells)
    head = ["seed", f"CE of {reference}", f"CE of {arms[0]}", "difference (nats)", "tokens saved"]
    if len(arms) > 1:
        head[1:3] = [head[1], "CE of the arm"]
        head.insert(0, "arm")
    return markdown.table(head, rows, left=len(arms) > 1)


def final_losses(results: dict[str, Any], arm: str) -> dict[int, float]:
    """Seed -> final validation cross-entropy of the arm at the full budget."""
    runs = (run for run in results["runs"] if run["arm"] == arm and run["budget"] == 1.0)
    return {run["seed"]: run["final_ce"] for run in runs}


def final_difference(results: dict[str, Any], arm: str, other: str) -> dict[str, Any]:
    """Paired difference of two arms' `final_losses`; no limits where a run of theirs diverged."""
    full = [(arm, 1.0), (other, 1.0)]
    own, base = (final_losses(results, each) for each, _ in full)
    return loss_difference(own, base, seeds_diverged(results["seeds"], full, results["failures"]))


def and_diverged(cell: str, found: dict[str, Any]) -> str:
    """With how many seeds a difference lacks because a run diverged."""
    return f"{cell}, {len(found['diverged'])} diverged" if found["diverged"] else cell


def _arms(request: Request, results: dict[str, Any]) -> list[str]:
    """Those asked for, else all but the reference."""
    reference = results["study"]["reference"]
    others = [arm for arm in results["arms"] if arm != reference]
    arms = request.names("arms", others) or others
    if not arms:
        raise UserError(f"study {results['study']['name']!r} has no arm but {reference!r}")
    return arms


def _row(results: dict[str, Any], arm: str) -> list[str]:
    saved = results["isoloss"].get(arm, {})
    full = results["arms"][arm]["budgets"].get("1", {})
    difference, steps = full.get("ce_minus_reference"), full.get("steps")
    base, planned = results["study"]["base"], len(results["seeds"])
    return [
        _model(base["model"].get("preset"), results["arms"][arm]["params"]),
        summary.count(base["train"]["tokens"]),
        markdown.number(steps, ",d"),
        _seeds(saved.get("tokens_saved"), difference, planned),
        _saving(saved.get("tokens_saved")),
        _saving(saved.get("seconds_saved")),
        markdown.step_time(results["step_time"].get(arm)),
        markdown.difference(difference, planned),
        markdown.difference(results["equal_time"][arm]["ce_difference"], planned),
    ]


def _model(preset: str | None, params: dict[str, int] | None) -> str:
    words = [preset or "own"]
    if params is not None:
        words.append(summary.count(params["total"]))
        if params["active"] != params["total"]:
            words.append(f"{summary.count(params['active'])} active")
    return ", ".join(words)


def _seeds(saved: dict[str, Any] | None, difference: dict[str, Any] | None, planned: int) -> str:
    """How many count, and what that allows to claim."""
    found = saved or difference or {"n": 0, "diverged": []}
    n = found["n"]
    words = [str(n) if n == planned else f"{n} of {planned}"]
    if n == 1:
        words = [
            "one seed, claims nothing" if planned == 1 else f"one of {planned}, claims nothing"
        ]
    elif 0 < n < summary.CLAIM_SEEDS:
        words.append(f"a claim takes {summary.CLAIM_SEEDS}")
    return and_diverged(", ".join(words), found)


def _saving(saved: dict[str, Any] | None) -> str:
    cell = markdown.minus(summary.saving_cell(saved))
    bound = saved and saved["status"] == "at_least" and saved["mean"] is not None
    return f"{cell} (a bound, no interval)" if bound else cell


def _saved_by_seed(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return markdown.NONE
    if entry["saved"] is None:
        return "not reached"
    bound = "≥ " if entry["status"] == "at_least" else ""
    return markdown.minus(f"{bound}{summary.percent(entry['saved'])}")
