"""What the tests of the recipe share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simreg.recipe.config import DataConfig, RunConfig
from tests.recipe import corpora, tiny
from tests.recipe.tiny import Make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, tokenised once for all tests of the session."""
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(tmp_path: Path, text: Path) -> Make:
    """A config whose sections are given as keywords."""

    def build(name: str = "run", **changes: Any) -> RunConfig:
        return tiny.config(tmp_path / name, text, changes)

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums do not depend on how they are split, so bits can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """The small corpus of `corpora`, not yet prepared."""
    return corpora.make(tmp_path)
