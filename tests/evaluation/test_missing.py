"""Without lm-evaluation-harness; these run where it is not installed, too."""

import pytest

from simreg.evaluation import harness
from simreg.recipe.errors import UserError


def test_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]' in the checkout \(--suite"):
        harness.load(["piqa"], None, None)


def sample(doc, kind="none", **metrics):
    return {"doc_id": doc, "filter": kind, "metrics": list(metrics), **metrics}


def test_of_the_harness_come_the_first_filters_metrics_in_the_order_of_the_items():
    two = [sample(1, acc=1.0, acc_norm=0.0), sample(0, acc=0.0, acc_norm=1.0)]
    two.append(sample(0, "other", acc=1.0, acc_norm=0.0))
    found = {"samples": {"b": two, "a": [sample(0, acc=True, acc_norm=1.0, f1=0.5)]}}
    found["results"] = {"a": {"acc,none": 1.0, "f1,none": 0.5}, "b": {"acc,none": 0.5}}
    outcome = harness._outcome("both", found)
    assert (outcome.metric, outcome.values) == ("acc", [1.0, 0.0, 1.0])
    assert outcome.normalised == [1.0, 1.0, 0.0]
    assert outcome.extra == {}  # of a whole task only
    del found["samples"]["a"], found["results"]["a"]
    found["results"]["b"] |= {"alias": "b", "acc_stderr,none": "N/A", "acc_norm,none": 0.5}
    found["results"]["b"] |= {"perplexity,none": 3, "perplexity_stderr,none": 0.1}
    assert harness._outcome("b", found).extra == {"perplexity": 3.0}


def test_other_metrics_of_the_harness():
    found = {"results": {"t": {}}, "samples": {"t": [sample(0, f1=(1, 2), acc_norm=1.0, em=0.5)]}}
    outcome = harness._outcome("t", found)
    assert (outcome.metric, outcome.normalised) == ("acc_norm", None)
    found["samples"]["t"] = [sample(0, f1=0.25, exact_match=1, acc_norm=0.0)]
    outcome = harness._outcome("t", found)
    assert (outcome.metric, outcome.values, outcome.normalised) == ("exact_match", [1.0], None)
    found["samples"]["t"] = [sample(0, f1=(1, 2))]
    with pytest.raises(UserError, match="gives no number for each item of t: leave the task out"):
        harness._outcome("t", found)
