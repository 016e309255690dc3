"""From finished runs to `results.json` (its schema: docs/results-schema.md)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from simreg.intervals import paired_difference
from simreg.recipe import config as recipe
from simreg.recipe.errors import UserError
from simreg.study import sizing, stats
from simreg.study.plan import Cell, Study, to_dict
from simreg.study.records import Run

SCHEMA = 1

Grid = dict[str, dict[float, dict[int, Run]]]
"""arm -> budget -> seed -> run"""


def grid(runs: list[Run]) -> Grid:
    """The runs by arm, budget and seed; budgets ascend."""
    table: Grid = defaultdict(lambda: defaultdict(dict))
    for run in sorted(runs, key=lambda r: (r.cell.budget, r.cell.seed)):
        table[run.cell.arm][run.cell.budget][run.cell.seed] = run
    return table


def build(
    study: Study,
    runs: list[Run],
    step_time: dict[str, dict[str, Any]],
    commands: list[str],
    failures: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The content of `results.json`.

    `step_time` maps an arm to `{ratio, ratio_quartiles, base_s, arm_s, n}`, `failures` the path of
    a run that diverged to what went wrong. UserError if the runs did not all see the same corpus.
    """
    _require_one_corpus(runs)
    table, failures = grid(runs), failures or {}
    ratios = {
        arm: step_time[arm]["ratio"] * study.steps_over_reference(arm)
        for arm in study.others
        if arm in step_time and resolved(study, arm, step_time[arm]["ratio"])
    }
    return {
        "schema": SCHEMA,
        "study": {key: value for key, value in to_dict(study).items() if key != "out"},
        "seeds": list(study.seeds),
        "complete": len(runs) + len(failures) == len(study.cells()),
        "commands": commands,
        "versions": _distinct(runs, "versions"),
        "machine": _distinct(runs, "machine"),
        "corpus": _distinct(runs, "corpus", leave_out="epochs"),
        "isoloss": {
            arm: _isoloss(study, table, arm, ratios.get(arm), failures)
            for arm in study.others
            if any(budget != 1.0 for budget in study.budgets_of(arm))
        },
        "equal_time": {
            arm: _equal_time(study, table, arm, ratios.get(arm), failures) for arm in study.others
        },
        "arms": {arm: _arm(study, table, arm, failures) for arm in study.arms},
        "step_time": {arm: step_time[arm] for arm in study.arms if arm in step_time},
        "runs": [_run(run) for run in runs],
        "failures": failures,
    }


def resolved(study: Study, arm: str, ratio: float) -> bool:
    """False for a step time that is below the reference's though the arm does more: noise."""
    return ratio >= 1 or not sizing.only_adds(study, arm)


def _require_one_corpus(runs: list[Run]) -> None:
    """Losses on different text cannot be compared."""
    seen: dict[str | None, str] = {}
    for run in runs:
        seen.setdefault(run.result.get("corpus", {}).get("fingerprint"), run.cell.folder)
    if len(seen) > 1:
        (one, first), (other, second), *_ = seen.items()
        raise UserError(
            f"the runs of the study saw different data ({first}: {one}, {second}: {other}): "
            "restore the data, delete the runs on the wrong one, and repeat the command"
        )


def _distinct(runs: list[Run], key: str, leave_out: str = "") -> list[dict[str, Any]]:
    """The different values of a part of the results (runs may come from several machines)."""
    values: list[dict[str, Any]] = []
    for run in runs:
        value = {k: v for k, v in run.result.get(key, {}).items() if k != leave_out}
        if value and value not in values:
            values.append(value)
    return values


def _curve(table: Grid, arm: str, seed: int) -> tuple[list[float], list[float]]:
    """Tokens and final losses of an arm's budgets for one seed, ascending."""
    runs = [by_seed[seed] for by_seed in table[arm].values() if seed in by_seed]
    return [run.tokens for run in runs], [run.final_ce for run in runs]


def _has_all(study: Study, table: Grid, arm: str, seed: int) -> bool:
    """Whether all planned runs of an arm are finished for a seed."""
    return all(seed in table[arm].get(budget, {}) for budget in study.budgets_of(arm))


def _deciding(study: Study, table: Grid, arm: str, seed: int, target: float) -> list[Run] | None:
    """The runs of a seed, ascending, that say where it reaches `target`; None while one is missing.

    Of those that are shorter than a run that ends above it nothing depends (`stats.crossing`).
    """
    runs = [table[arm].get(budget, {}).get(seed) for budget in sorted(study.budgets_of(arm))]
    first = max((i + 1 for i, run in enumerate(runs) if run is None), default=0)
    known = [run for run in runs[first:] if run is not None]
    return known if first == 0 or any(run.final_ce > target for run in known) else None


def _isoloss(
    study: Study, table: Grid, arm: str, ratio: float | None, failures: dict[str, str]
) -> dict[str, Any]:
    """Savings of an arm at equal loss, over the seeds that have the planned runs that decide it.

    A seed with a diverged run did not reach the reference's loss, whatever its other runs did. One
    whose reference diverged has no loss to reach: without it the rest is no sample of all.
    """
    full, budgets = table[study.reference][1.0], table[arm]
    lost = seeds_diverged(study.seeds, [(study.reference, 1.0)], failures)
    crossings, midrun, diverged = {}, {}, [*lost]
    never = stats.Crossing("not_reached", None, None)
    for seed in full:
        cells = [Cell(arm, budget, seed) for budget in study.budgets_of(arm)]
        if any(cell.folder in failures for cell in cells):
            diverged.append(seed)
            crossings[seed] = midrun[seed] = never
        elif runs := _deciding(study, table, arm, seed, target := full[seed].final_ce):
            final = [run.tokens for run in runs], [run.final_ce for run in runs]
            crossings[seed] = stats.crossing(*final, target)
            run = budgets.get(1.0, {}).get(seed)
            if evals := [e for e in run.evals if e["tokens"] > 0] if run else []:
                curve = [e["tokens"] for e in evals], [e["ce"] for e in evals]
                midrun[seed] = stats.first_passing(*curve, target)

    def saving(found: dict[int, stats.Crossing], cost: float | None = 1.0) -> dict[str, Any]:
        tokens = {seed: float(run.tokens) for seed, run in full.items()}
        missing = [seed for seed in study.seeds if seed not in found]
        saved = stats.saving(found, tokens, cost)
        if lost:
            saved |= {"low": None, "high": None, "bootstrap": None}
        return {**saved, "missing": missing, "diverged": diverged}

    mid = midrun and 1.0 in study.budgets_of(arm)
    return {
        "tokens_saved": saving(crossings),
        "seconds_saved": saving(crossings, ratio),
        "midrun_tokens_saved": saving(midrun) if mid else None,
        "budgets": sorted(budgets),
    }


def _equal_time(
    study: Study, table: Grid, arm: str, ratio: float | None, failures: dict[str, str]
) -> dict[str, Any]:
    """Arm at N tokens against the reference given the same seconds, that is N * ratio tokens.

    `ratio` is that of the times of a token. Over the seeds that have the runs for it.
    """
    answer: dict[str, Any] = {"status": "not_run", "reference_tokens": None, "ce_difference": None}
    full = table[arm].get(1.0, {})
    if ratio is None or not full:
        return answer
    answer["reference_tokens"] = ratio * next(iter(full.values())).tokens
    reference_ce = {}
    for seed, run in full.items():
        if not _has_all(study, table, study.reference, seed):
            continue  # between budgets that are further apart the loss would be another
        curve = _curve(table, study.reference, seed)
        if (value := stats.interpolate(*curve, ratio * run.tokens)) is not None:
            reference_ce[seed] = value
    if not reference_ce:
        return answer
    cells = [(arm, 1.0), *((study.reference, b) for b in study.budgets_of(study.reference))]
    own = {seed: run.final_ce for seed, run in full.items()}
    lost = seeds_diverged(study.seeds, cells, failures)
    difference = loss_difference(own, reference_ce, lost)
    return {**answer, "status": "ok", "ce_difference": difference}


def loss_difference(
    own: dict[int, float], reference: dict[int, float], diverged: list[int]
) -> dict[str, Any]:
    """Paired difference of losses; without limits where a seed has none because a run diverged."""
    found = {**paired_difference(own, reference), "diverged": diverged}
    # Those that did not diverge are no sample of all.
    return found | {"low": None, "high": None} if diverged else found


def seeds_diverged(
    seeds: Sequence[int], runs: list[tuple[str, float]], failures: dict[str, str]
) -> list[int]:
    """The seeds of which one of these runs (arm, budget) diverged."""
    return [seed for seed in seeds if any(Cell(*r, seed).folder in failures for r in runs)]


def _arm(study: Study, table: Grid, arm: str, failures: dict[str, str]) -> dict[str, Any]:
    """An arm's final losses, at the full budget and at every budget."""
    budgets = {
        f"{budget:g}": _budget(study, table, arm, budget, failures)
        for budget in study.budgets_of(arm)
    }
    none = stats.mean_sd([])
    runs = [run for by_seed in table[arm].values() for run in by_seed.values()]
    return {
        "overrides": study.arms[arm],
        "unpaired": unpaired(study, study.reference, arm),
        "params": runs[0].result.get("params") if runs else None,
        "final_ce": budgets["1"]["final_ce"] if "1" in budgets else none,
        "budgets": budgets,
    }


def unpaired(study: Study, one: str, other: str) -> list[str]:
    """What two arms differ in that gives them other initial weights or other batches."""
    first, second = (recipe.to_dict(study.arm_config(arm)) for arm in (one, other))
    changed = [f"model.{key}" for key, v in second["model"].items() if first["model"][key] != v]
    same_batches = first["train"]["batch_rows"] == second["train"]["batch_rows"]
    return changed if same_batches else [*changed, "train.batch_rows"]


def _budget(
    study: Study, table: Grid, arm: str, budget: float, failures: dict[str, str]
) -> dict[str, Any]:
    runs = table[arm].get(budget, {})
    reference = table[study.reference].get(budget, {})
    difference = None
    if arm != study.reference:
        difference = loss_difference(
            {s: run.final_ce for s, run in runs.items()},
            {s: run.final_ce for s, run in reference.items()},
            seeds_diverged(study.seeds, [(a, budget) for a in (arm, study.reference)], failures),
        )
    some = next(iter(runs.values()), None)
    return {
        "final_ce": stats.mean_sd([run.final_ce for run in runs.values()]),
        "tokens": some.tokens if some else None,
        "steps": some.result["steps"] if some else None,
        "ce_minus_reference": difference if difference and difference["n"] else None,
        "clipped": _mean(runs, "clipped"),
        "grad_norm": _mean(runs, "grad_norm"),
    }


def _mean(runs: dict[int, Run], key: str) -> float | None:
    values = [value for run in runs.values() if (value := run.mean(key)) is not None]
    return sum(values) / len(values) if values else None


def _run(run: Run) -> dict[str, Any]:
    return {
        "arm": run.cell.arm,
        "budget": run.cell.budget,
        "seed": run.cell.seed,
        "path": run.cell.folder,
        "tokens": run.tokens,
        "steps": run.result["steps"],
        "epochs": run.result.get("corpus", {}).get("epochs"),
        "seconds": run.result["seconds"],
        "final_ce": run.final_ce,
        "commit": run.result.get("versions", {}).get("commit"),
        "device": run.result.get("machine", {}).get("device"),
        "threads": run.result.get("machine", {}).get("threads"),
        "precision": run.result.get("precision"),
    }
