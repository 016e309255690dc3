import pytest

from simreg.evaluation import scoring
from simreg.recipe.train import train
from tests.evaluation import tiny
from tests.recipe import tiny as recipe


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder in Hugging Face format."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded(model):
    """(scorer, tokenizer)"""
    return scoring.load(model, None, bf16=False)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Four trained runs, `arm/seed-N`: two arms of two seeds on one corpus."""
    folder = tmp_path_factory.mktemp("runs")
    text = recipe.write_text(folder)
    for arm, weight in (("plain", 0.0), ("simreg", 0.3)):
        for seed in (1, 2):
            changes = {
                "out": str(folder / arm / f"seed-{seed}"),
                "simreg": {"weight": weight},
                "train": {"seed": seed, "tokens": 8 * 4 * 32, "evals": 1},
            }
            train(recipe.config(folder, text, changes), on_step=lambda record: None)
    return folder
