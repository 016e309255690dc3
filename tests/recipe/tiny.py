"""Whole runs in a second: two layers, d = 32, 20 steps of 4 rows of 32 tokens.

As a program, `simreg train CONFIG.yaml`, hit by a signal at a place, perhaps in one process only:
`python -m tests.recipe.tiny CONFIG.yaml kill@step:9 | kill@save:14 | int@step:9/1 | none`.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from simreg.cli import run
from simreg.recipe import loop, presets
from simreg.recipe.config import RunConfig, from_dict, merge, to_yaml

Make = Callable[..., RunConfig]
"""Of the fixture `make`."""
ROOT = Path(__file__).parents[2]
STEPS = 20
LAST = f"checkpoints/step-{STEPS:07d}"
PRESETS = {
    "llama-test": presets.Shape(32, 64, 2, 2),
    "mixtral-test": presets.Shape(32, 64, 2, 2, experts=4),
}
TIMING = ("seconds", "tokens_per_s")


def write_text(folder: Path) -> Path:
    """A small corpus of made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijkl", k=rng.randint(2, 6))) for _ in range(120)]
    path = folder / "text.jsonl"
    documents = (" ".join(rng.choices(words, k=60)) for _ in range(150))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def config(folder: Path, text: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """A run in `folder`/run on the text; `changes` as in a YAML file."""
    values = {
        "out": str(folder / "run"),
        "model": {"preset": "llama-test"},
        "data": {
            "source": str(text),
            "tokenizer": "bpe:300",
            "seq_len": 32,
            "cache_dir": str(text.parent / "cache"),
        },
        "train": {
            "tokens": STEPS * 4 * 32,
            "batch_rows": 4,
            "log_every": 3,
            "evals": 3,
            "report_to": "none",
        },
    }
    return from_dict(merge(values, changes or {}))


def metrics(out: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMING} for x in lines]


def run_and_die(config: RunConfig, folder: Path, where: str) -> None:
    """Train in a process of its own that is killed at `step:N` or `save:N`."""
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "tests.recipe.tiny", str(file), f"kill@{where}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    """Of two finished runs: metrics, weights and the optimizer's state, bit for bit."""
    assert metrics(one.out) == metrics(other.out)
    for file in ("model/model.safetensors", f"{LAST}/model.safetensors"):
        a, b = (load_file(Path(config.out) / file) for config in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), file
    a, b = (torch.load(Path(config.out) / LAST / "optimizer.pt") for config in (one, other))
    for index, state in a["state"].items():
        assert all(torch.equal(state[key], b["state"][index][key]) for key in state)


def strike(plan: str) -> None:
    """Arrange for a signal at the start of a step, or before a checkpoint is whole."""
    name, _, where = plan.partition("@")
    where, _, rank = where.partition("/")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not where or again or os.environ.get("RANK", "") != rank:
        return
    number = {"kill": signal.SIGKILL, "int": signal.SIGINT, "stop": signal.SIGSTOP}[name]
    what, step = where.split(":")
    if what == "step":
        victim, name = loop.RunTrainer, "training_step"
    else:
        victim, name = loop.checkpoints, "seal"
    original = getattr(victim, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        now = args[0].state.global_step + 1 if what == "step" else args[1]["step"]
        if now == int(step):
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(victim, name, deadly)


presets.PRESETS.update(PRESETS)

if __name__ == "__main__":
    torch.set_num_threads(1)
    file, plan = sys.argv[1:]
    strike(plan)
    sys.argv[1:] = ["train", file]
    run()  # not main(), whose process may abort as it ends, where there are several
