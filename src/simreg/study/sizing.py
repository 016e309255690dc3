"""How long things take: step times, the size of a study that fits the machine, the time left."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from simreg.recipe import config as recipe
from simreg.recipe import timing
from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.config import RunConfig
from simreg.recipe.data import Corpus
from simreg.study.plan import DEMO_EVAL_TOKENS, Cell, Study

STEP_TIME_FILE = "step_time.json"
MIN_STEPS = 50
# A forward pass costs a third of a training step, and a little more for what surrounds it.
_EVAL_COST = 0.4
# Start-up of a run, checkpoints, the report: seconds a run on top of its steps.
_RUN_SECONDS = 3.0


def step_times(study: Study, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Each arm's `{ratio, base_s, arm_s, n}` against the reference, measured once and kept."""
    path = Path(study.out) / STEP_TIME_FILE
    known = cached_step_times(study)
    for arm in study.others:
        if arm not in known:
            measured = timing.step_time_ratio(
                study.arm_config(study.reference), study.arm_config(arm), corpus
            )
            known[arm] = {**measured, "key": _key(study, arm)}
            write_atomically(path, json.dumps(known, indent=1) + "\n")
    return known


def cached_step_times(study: Study) -> dict[str, dict[str, Any]]:
    """The step times measured earlier that still belong to the study's arms."""
    try:
        known = json.loads((Path(study.out) / STEP_TIME_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        arm: known[arm] for arm in study.others if known.get(arm, {}).get("key") == _key(study, arm)
    }


def _key(study: Study, arm: str) -> str:
    """Identifies what a step time depends on: both configs, apart from how long they run."""
    configs = []
    for name in (study.reference, arm):
        config = recipe.to_dict(study.arm_config(name))
        config["train"] = {
            k: v for k, v in config["train"].items() if k not in ("tokens", "seed", "eval_tokens")
        }
        configs.append({k: v for k, v in config.items() if k != "out"})
    return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:16]


def fit(study: Study, tokens_per_s: float, ratios: dict[str, float], seconds: float) -> RunConfig:
    """The base config with a full budget N such that all runs together take about `seconds`."""
    base = study.base
    eval_tokens = base.train.eval_tokens or DEMO_EVAL_TOKENS
    cells = study.cells()
    fixed = _RUN_SECONDS + base.train.evals * eval_tokens * _EVAL_COST / tokens_per_s
    training = max(seconds - len(cells) * fixed, seconds / 3)
    work = sum(cell.budget * ratios.get(cell.arm, 1.0) for cell in cells)
    a_step = base.train.batch_rows * base.data.seq_len
    steps = max(MIN_STEPS, int(training * tokens_per_s / work / a_step))
    return replace(base, train=replace(base.train, tokens=steps * a_step, eval_tokens=eval_tokens))


class TimeLeft:
    """Estimates what remains from measured step times, corrected by the runs that have ended."""

    def __init__(self, study: Study, step_time: dict[str, dict[str, Any]]) -> None:
        self._study, self._step_time = study, step_time
        self._predicted = self._actual = 0.0

    def predict(self, cell: Cell) -> float | None:
        """Seconds of a run by its step time alone, or None if no step time is known."""
        times = self._step_time.get(cell.arm) or next(iter(self._step_time.values()), None)
        if times is None:
            return None
        config = self._study.config(cell)
        step = times["arm_s"] if cell.arm in self._step_time else times["base_s"]
        eval_steps = (config.train.eval_tokens or 0) / (
            config.train.batch_rows * config.data.seq_len
        )
        return float(step * (config.steps + _EVAL_COST * config.train.evals * eval_steps))

    def ended(self, cell: Cell, seconds: float) -> None:
        """Tell how long a whole run took."""
        if (predicted := self.predict(cell)) is not None:
            self._predicted += predicted
            self._actual += seconds

    def of(self, cells: list[Cell]) -> float | None:
        """Seconds that these runs will take together."""
        predictions = [self.predict(cell) for cell in cells]
        if any(p is None for p in predictions):
            return None
        correction = self._actual / self._predicted if self._predicted else 1.0
        return correction * sum(p for p in predictions if p is not None)
