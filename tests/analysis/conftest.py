"""Two arms × three seeds of a few steps each, as a study lays them out, trained once."""

import json
from pathlib import Path

import pytest
import torch

from simreg.analysis.options import AnalyzeOptions
from simreg.recipe.train import train
from tests.recipe import tiny

ARMS = {"baseline": 0.0, "simreg": 3.0}
SEEDS = (1, 2, 3)


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A folder with study.yaml and ARM/1/seed-N/, each with a model and checkpoints."""
    folder = tmp_path_factory.mktemp("analysis")
    text = tiny.write_text(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for arm, weight in ARMS.items():
        for seed in SEEDS:
            changes = {
                "out": str(folder / "study" / arm / "1" / f"seed-{seed}"),
                "optim": {"lr": 1e-2},
                "simreg": {"weight": weight},
                "train": {"seed": seed, "evals": 2, "analyze_every": 10},
            }
            train(tiny.config(folder, text, changes), on_step=lambda record: None)
    torch.set_num_threads(threads)
    plan = {"reference": "baseline", "arms": {arm: {} for arm in ARMS}, "seeds": list(SEEDS)}
    plan["base"] = {"train": {"tokens": 20 * 4 * 32, "batch_rows": 4}, "data": {"seq_len": 32}}
    (folder / "study" / "study.yaml").write_text(json.dumps(plan))
    return folder / "study"


@pytest.fixture(scope="session")
def analysed(study, tmp_path_factory):
    """Results of `simreg analyze` of that study with its checkpoints."""
    from tests.analysis.running import analyze

    options = AnalyzeOptions(
        [str(study)], tokens=600, series=True, least=2, cache_dir=str(study.parent / "cache")
    )
    return analyze(options)
