"""Without lm-evaluation-harness; these run where it is not installed, too."""

import pytest

from simreg.evaluation import harness
from simreg.recipe.errors import UserError


def test_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]' in the checkout \(--suite"):
        harness.load(["piqa"], None, None)
