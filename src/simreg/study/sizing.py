"""How long things take: step times, the size of a study that fits the machine, the time left."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import simreg
from simreg.kernels.order import BOUNDED
from simreg.recipe import config as recipe
from simreg.recipe import provenance, timing
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.config import RunConfig, SimRegConfig, TrainConfig
from simreg.recipe.data import Corpus
from simreg.recipe.errors import UserError
from simreg.study.plan import Cell, Study

STEP_TIME_FILE = "step_time.json"
MIN_STEPS = 20
EVAL_TOKENS = 50_000
"""Tokens of a validation pass in a sized study, if the base does not say and time allows."""
FEWEST_EVALS, FEW_EVAL_TOKENS = 4, 16_384
"""Where evaluation must be short, passes are dropped down to this before they get this small."""
_EVAL_SHARE = 0.15
# A forward pass costs a third of a training step, and a little more for what surrounds it.
_EVAL_COST = 0.4
# Start-up of a run, checkpoints, the report: seconds a run on top of its steps.
_RUN_SECONDS = 3.0
# To time an arm's steps, where the machine is too uneven to know sooner; a study sized to fit some
# minutes has less to spare.
_TIMING_SECONDS, _SIZED_TIMING_SECONDS = 120.0, 40.0
# Settings that leave the cost of a step as it is (of SimReg's schedules, all but "stop").
_FREE = {
    "simreg": {"schedule", "schedule_fraction"},
    "optim": {"lr", "warmup", "schedule", "min_lr_ratio", "weight_decay", "beta1", "beta2"},
    "train": {"tokens", "seed", "log_every", "evals", "eval_tokens", "save_every"}
    | {"keep_checkpoints", "report_to", "analyze_every"},  # the clock stands still for a look
    "data": {"cache_dir"},
}
_SAME_COST = {"ratio": 1.0, "ratio_quartiles": [1.0, 1.0], "base_s": None, "arm_s": None, "n": 0}

StepTimes = dict[str, dict[str, Any]]


def step_times(study: Study, corpus: Corpus) -> StepTimes:
    """Each arm's step time against the reference's, measured once and kept.

    An entry is what `timing.step_time_ratio` returns; an arm whose steps do the same work as the
    reference's has the ratio 1 and `n` 0, and arms whose steps do the same work share one entry.
    """
    path = Path(study.out) / STEP_TIME_FILE
    known = cached_step_times(study)
    for arm in study.others:
        if arm not in known and study.times(arm):
            measured = _measured(study, arm, corpus)
            known = {
                # A key of its own: the arm that it was measured for may be dropped.
                a: {**found, "key": _key(study, a), "configs": _configs(study, a)}
                if found["n"]
                else found
                for a, found in _shared(study, {**known, arm: measured}).items()
            }
            write_atomically(path, json.dumps(_stored(study) | known, indent=1) + "\n")
    return known


def _shared(study: Study, known: StepTimes) -> StepTimes:
    """`known`, and for the arms that are not in it the times of arms whose steps do the same."""
    found: StepTimes = {}
    for arm in study.others:
        alike = (a for a in known if _work(study, a) == _work(study, arm))
        source = arm if arm in known else next(alike, None)
        if source is not None:
            found[arm] = known[source]
    return found


def _measured(study: Study, name: str, corpus: Corpus) -> dict[str, Any]:
    """The arm's step time over the reference's, on average over a run."""
    reference, arm = (study.arm_config(which) for which in (study.reference, name))
    seconds = _TIMING_SECONDS if study.minutes is None else _SIZED_TIMING_SECONDS
    found = timing.step_time_ratio(reference, arm, corpus, seconds=seconds)
    if not _stops(arm.simreg):
        return found
    plain = replace(arm, simreg=replace(arm.simreg, weight=0.0))
    rest = timing.step_time_ratio(reference, plain, corpus, seconds=seconds)
    share = arm.simreg.over_run.share

    def mean(first: float, then: float) -> float:
        return share * first + (1 - share) * then

    quartiles = map(mean, found["ratio_quartiles"], rest["ratio_quartiles"])
    means = {key: mean(found[key], rest[key]) for key in ("ratio", "arm_s")}
    return {**found, **means, "ratio_quartiles": list(quartiles)}


def _stops(simreg: SimRegConfig) -> bool:
    """Whether SimReg ends during the run, and its cost with it."""
    return simreg.schedule == "stop" and simreg.weight > 0


def cached_step_times(study: Study, *, any_machine: bool = False) -> StepTimes:
    """The step times that need no measurement: same cost, or measured earlier.

    Unless `any_machine`, those of another machine or of other software do not count; those of
    another reference or of other configs never do, if the record says.
    """
    stored = _stored(study)
    known: StepTimes = {}
    for arm in study.others:
        entry = stored.get(arm)
        if _work(study, arm) == _work(study, study.reference):
            known[arm] = _SAME_COST
        elif isinstance(entry, dict):
            configs = _configs(study, arm)
            elsewhere = any_machine and entry.get("configs", configs) == configs
            if elsewhere or entry.get("key") == _key(study, arm):
                known[arm] = entry
    return _shared(study, known)


def _stored(study: Study) -> dict[str, Any]:
    """What the file holds, of this plan and of earlier ones; nothing if it is damaged."""
    try:
        stored = json.loads((Path(study.out) / STEP_TIME_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _cost(study: Study, arm: str) -> dict[str, Any]:
    """The part of an arm's config that the cost of a step depends on.

    Without what is left open (None, no depths), so that records outlive options that come later.
    """
    found = study.arm_config(arm)
    config = recipe.to_dict(found)
    config["optim"]["clip"] = config["optim"]["clip"] > 0
    config["simreg"]["push"] = config["simreg"]["push"] > 0 or None
    del config["simreg"]["push_above"], config["simreg"]["depths_offset"]
    config["train"]["timeout"] = TrainConfig().timeout  # costs nothing; kept records have it
    return {
        section: {
            k: v
            for k, v in values.items()
            if v is not None
            and v != []
            and (k not in _FREE.get(section, ()) or (section == "simreg" and _stops(found.simreg)))
        }
        for section, values in config.items()
        if section != "out"
    }


def _work(study: Study, arm: str) -> dict[str, Any]:
    """What a step of the arm computes: `_cost` without numbers that change no work.

    These are where embeddings start, how large a weight is above 0, and the temperature, down to
    where exponentials must be kept in bounds.
    """
    found = _cost(study, arm)
    found["model"].pop("embedding_std", None)
    simreg = found["simreg"] | {"weight": True}
    simreg["temperature"] = simreg["temperature"] >= BOUNDED
    scope = {"scope": simreg["scope"]} if found["auxiliary"].get("name") is not None else {}
    found["simreg"] = simreg if found["simreg"]["weight"] else scope
    if "weight" in (options := found["auxiliary"]["options"]):
        found["auxiliary"]["options"] = options | {"weight": options["weight"] != 0}
    return found


def only_adds(study: Study, arm: str) -> bool:
    """Whether the arm does what the reference does, and an objective besides: it must cost more.

    Or more of SimReg: the push, further depths.
    """
    plain, own = (_work(study, name) for name in (study.reference, arm))
    before, after = (work.pop("simreg") for work in (plain, own))
    few, many = (set(simreg.pop("depths", ())) for simreg in (before, after))
    if "weight" in before:  # else there is nothing that the options of the other could replace
        pushes = before.pop("push", False) <= after.pop("push", False)
        contained = before == after and pushes and few <= many
    else:
        contained = before.items() <= after.items()
    first, second = (work.pop("auxiliary") for work in (plain, own))
    contained &= first == second or first.keys() <= {"options"}
    return contained and plain == own and _work(study, study.reference) != _work(study, arm)


def _configs(study: Study, arm: str) -> str:
    """Identifies the configs whose step times are compared."""
    return _digest([_cost(study, name) for name in (study.reference, arm)])


def _key(study: Study, arm: str) -> str:
    """Identifies what a step time depends on: both configs, the software and the machine."""
    machine = provenance.machine()
    parts = [
        *(_cost(study, name) for name in (study.reference, arm)),
        *(torch.__version__, simreg.__version__),
        *(machine[name] for name in ("cpu", "device", "threads")),
    ]
    return _digest(parts)


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def fit(study: Study, step_s: float, step_time: StepTimes, seconds: float, rows: int) -> Study:
    """The study with a full budget N such that all runs together take about `seconds`.

    Args:
        study: the plan; evaluations that its base leaves open are chosen too.
        step_s: seconds of a step of the reference.
        step_time: of the other arms.
        seconds: for all runs with their evaluations.
        rows: training rows of the corpus; no run goes through them more than once.

    Raises:
        UserError: the corpus is too small for the budgets to differ.
    """
    base, cells = study.base, study.cells()
    a_step = base.tokens_per_step
    train = _evaluations(base, len(cells), seconds * _EVAL_SHARE * a_step / step_s)
    a_pass = (train.eval_tokens or 0) * _EVAL_COST * step_s / a_step
    fixed = len(cells) * (_RUN_SECONDS + train.evals * a_pass)
    ratios = {arm: times["ratio"] for arm, times in step_time.items()}
    fewer = {arm: train.batch_rows / study.arm_config(arm).train.batch_rows for arm in study.arms}
    work = sum(cell.budget * ratios.get(cell.arm, 1.0) * fewer[cell.arm] for cell in cells)
    least = _least_steps(study)
    steps = max(MIN_STEPS, least, int((seconds - fixed) / (work * step_s)))
    steps = min(steps, int(rows / train.batch_rows / max(cell.budget for cell in cells)))

    def of(steps: int) -> Study:
        sized = replace(train, tokens=max(1, steps) * a_step)
        return replace(study, base=replace(base, train=sized))

    while steps > least and _rows(of(steps)) > rows:  # arms may have other batches, and round up
        steps -= 1
    if steps < least:
        raise UserError(
            f"the training text fills {rows} rows, too few for budgets that differ: give more "
            "text, or leave out budgets"
        )
    return of(steps)


def _evaluations(base: RunConfig, runs: int, tokens: float) -> TrainConfig:
    """Evaluations whose cost is that of `tokens` training tokens in all, where the base is open."""
    train = base.train
    if train.eval_tokens is not None:
        return train
    passes = tokens / (runs * _EVAL_COST)
    evals = train.evals
    if evals == TrainConfig().evals:
        evals = max(FEWEST_EVALS, min(evals, int(passes / FEW_EVAL_TOKENS)))
    eval_tokens = max(base.data.seq_len, min(EVAL_TOKENS, int(passes / evals)))
    return replace(train, evals=evals, eval_tokens=eval_tokens)


def _least_steps(study: Study) -> int:
    """Steps of the full budget from which on every arm's budgets are whole steps apart."""
    largest = max(study.arm_config(arm).train.batch_rows for arm in study.arms)
    gaps = []
    for arm in study.arms:
        budgets = study.budgets_of(arm)
        gaps += [high - low for low, high in zip([0.0, *budgets], budgets, strict=False)]
    return math.ceil(largest / study.base.train.batch_rows / min(gaps) - 1e-9)


def _rows(study: Study) -> int:
    """Training rows of the longest run."""
    configs = [study.config(cell) for cell in study.cells()]
    return max(config.steps * config.train.batch_rows for config in configs)


def _seconds(config: RunConfig, step_s: float, ratio: float) -> float:
    """Of a run's steps and evaluations."""
    eval_steps = (config.train.eval_tokens or 0) / config.tokens_per_step
    return step_s * (ratio * config.steps + _EVAL_COST * config.train.evals * eval_steps)


def total(study: Study, step_s: float, step_time: StepTimes) -> float:
    """Predicted seconds of all runs, from the seconds of a step of the reference."""
    ratios = {arm: times["ratio"] for arm, times in step_time.items()}
    return sum(
        _RUN_SECONDS + _seconds(study.config(cell), step_s, ratios.get(cell.arm, 1.0))
        for cell in study.cells()
    )


def reference_step(step_time: StepTimes) -> float | None:
    """Seconds of a step of the reference, if it was timed beside any arm."""
    return next((float(times["base_s"]) for times in step_time.values() if times["n"]), None)


class TimeLeft:
    """Estimates what remains from measured step times, corrected by the runs that have ended."""

    def __init__(self, study: Study, step_time: StepTimes) -> None:
        self._study, self._step_s = study, reference_step(step_time)
        self._ratios = {arm: times["ratio"] for arm, times in step_time.items()}
        self._predicted = self._actual = 0.0

    def predict(self, cell: Cell) -> float:
        """Seconds of a run by its step time alone; in reference steps if none was timed."""
        config, ratio = self._study.config(cell), self._ratios.get(cell.arm, 1.0)
        if self._step_s is None:
            return _seconds(config, 1.0, ratio)
        return _RUN_SECONDS + _seconds(config, self._step_s, ratio)

    def ended(self, cell: Cell, seconds: float) -> None:
        """Tell how long a whole run took."""
        self._predicted += self.predict(cell)
        self._actual += seconds

    @property
    def slowdown(self) -> float | None:
        """How much longer than predicted the runs took; None before the first, or untimed."""
        return self._actual / self._predicted if self._step_s and self._predicted else None

    def of(self, cells: list[Cell]) -> float | None:
        """Seconds that these runs will take together; None while nothing is known."""
        if self._step_s is None and not self._predicted:
            return None
        correction = self._actual / self._predicted if self._predicted else 1.0
        return correction * sum(self.predict(cell) for cell in cells)
