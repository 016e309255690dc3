"""What the tests of whole runs share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, tokenised once for all tests of the session."""
    from tests.recipe import tiny

    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums do not depend on how they are split, so bits can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
