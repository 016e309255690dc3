"""Run folders as the trainer writes them, with losses from a known law instead of training."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from simreg.recipe import config as recipe
from simreg.recipe import progress
from simreg.recipe.config import RunConfig
from simreg.recipe.folder import RunFolder
from simreg.study import plan, records, results, run
from simreg.study.plan import Study

ALPHA = 0.15
LOSS_AT_1M = 4.8
SPEED = 1.35
TIMES = {"ratio": 1.05, "ratio_quartiles": [1.02, 1.08], "base_s": 0.4, "arm_s": 0.42, "n": 20}
TIMES |= {"threads": 2, "load": 0.1}


def final_loss(tokens: float, speed: float = 1.0, seed: int = 0) -> float:
    """A power law in tokens; an arm of speed 1.25 needs 1/1.25 of the tokens for the same loss."""
    noise = np.random.default_rng(seed).normal(0, 0.02)
    return float(1.5 + (LOSS_AT_1M - 1.5) * (speed * tokens / 1e6) ** -ALPHA + noise)


def write_run(config: RunConfig, speed: float = 1.0, *, jitter: float = 0.0) -> dict[str, Any]:
    """Write the folder of a finished run of `config`; returns its result."""
    folder = RunFolder(config.out)
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(recipe.to_yaml(config))
    a_step = config.train.batch_rows * config.data.seq_len
    weight, seed, tokens = config.simreg.weight, config.train.seed, config.steps * a_step
    rng = np.random.default_rng((seed, tokens, round(1000 * weight)))
    final = final_loss(tokens, speed, seed) + float(rng.normal(0, jitter))
    lines = []
    for i in range(1, 51):
        at = {"step": config.steps * i // 50, "tokens": tokens * i // 50, "seconds": i * 1.0}
        mid = final + 0.9 * (50 / i) ** 0.5 - 0.9
        on = {
            "simreg": 3 + 2 / i,
            "pos_cos": 0.2 + 0.008 * i,
            "neg_cos": 0.1 - 0.001 * i,
            "pos_fraction": 0.8,
        }
        extra = on if weight else dict.fromkeys(on)
        noise = float(rng.normal(0, 0.05))
        record = {"kind": "train", **at, "ce": mid + noise, **extra, "lr": 1e-3}
        record |= {"grad_norm": 0.6 + 1 / i + abs(noise), "clipped": 1.0 if i < 8 else 0.1}
        lines.append({**record, "tokens_per_s": 9000.0})
        if i % 5 == 0:
            lines.append({"kind": "eval", **at, "ce": mid})
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "schema": 1,
        "final_ce": final,
        "tokens": tokens,
        "steps": config.steps,
        "seconds": 50.0,
        "params": {"total": 1_838_208, "active": 1_838_208},
        "objective": {"weight": weight},
        "corpus": {"fingerprint": "f00d", "train_tokens": 9_000_000, "epochs": tokens / 9_000_000},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "simreg": "0.1"},
        "machine": {"device": "cpu", "cores": 2},
    }
    folder.result.write_text(json.dumps(result))
    return result


def compare(study: Study, **kwargs: Any) -> tuple[dict[str, Any], str]:
    """Run `run.compare`; returns its results and what it printed."""
    screen = io.StringIO()
    results = run.compare(study, console=progress.console(file=screen, width=120), **kwargs)
    return results, screen.getvalue()


def made(
    folder: Path, speeds: dict[str, float], **values: Any
) -> tuple[list[records.Run], dict[str, Any]]:
    """Results and runs of a study whose arms have known speeds."""
    base = {"train": {"tokens": 1_000_000}}
    arms = {arm: {} for arm in speeds if arm != "baseline"}
    study = plan.from_dict({"out": str(folder), "base": base, "arms": arms, **values})
    for cell in study.cells():
        write_run(study.config(cell), speeds.get(cell.arm, 1.0), jitter=0.003)
    times = dict.fromkeys(study.others, TIMES)
    runs = records.collect(study)
    return runs, results.build(study, runs, times, ["simreg compare --out 'a <b>'"])
