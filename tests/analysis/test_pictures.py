"""What pictures show and tell, of numbers made up for it."""

from simreg.analysis import describe, plots
from simreg.theme import PRINT

RATES = [
    {"length": 64, "chunk": None, "all": 0.5, "head": 0.75, "torso": 0.5, "tail": 0.25},
    {"length": 64, "chunk": 16, "all": 0.2, "head": 0.35, "torso": 0.1, "tail": 0.0},
    {"length": 128, "chunk": None, "all": 0.6, "head": 0.8, "torso": 0.4, "tail": None},
    {"length": 128, "chunk": 16, "all": 0.1, "head": 0.3, "torso": 0.2, "tail": 0.0},
]


def entry(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high}


def drawn(ax):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]


def test_rates_of_positives_by_length_and_chunk():
    results = {"positive_rate": RATES}
    assert describe.positives(results) == (
        "L = 64: 50% of all, 75% of head, 25% of tail. L = 128: 60% of all, 80% of head."
    )
    whole, chunks = drawn(plots.positives(results, PRINT).axes[0])[2:4]
    assert whole == ([64, 128], [0.75, 0.8])
    assert chunks == ([16], [0.3])


def test_margins_stand_below_losses():
    groups = {name: {"margin": 2.0 + i, "loss": 5.0 - i} for i, name in enumerate(plots._PANELS)}
    models = [{"arm": "a", "final": final, "groups": groups} for final in (True, False, True)]
    results = {"models": models, "means": {"a": {}}, "reference": "a"}
    figure = plots.explanation(results, PRINT)
    for i, ax in enumerate(figure.axes):
        assert drawn(ax) == [([2.0 + i], [5.0 - i])] * 3
        hollow = [line.get_markerfacecolor() == "none" for line in ax.lines]
        assert hollow == [False, True, False]
    found = {"a": {"pearson": -0.5, "n": 4}, "b": {"pearson": None, "n": 2}}
    correlations = {name: {"margin": found} for name in ("head", "torso")}
    correlations["tail"] = {"margin": {"b": found["b"]}}
    told = describe.explanation({"correlations": {"models": correlations}})
    assert "margin and loss, head: a -0.50 (n = 4). " in told
    assert told.endswith("margin and loss, tail: too few models.")


def test_the_map_is_told_by_its_spread():
    points = {"1": [[0.0, 0.0], [2.0, 0.0]], "2": [[0.0, 4.0], [2.0, 4.0]], "3": []}
    arm = {"seed": 7, "points": points, "explained": [0.5, 0.25]}
    results = {"map": {"labels": {"1": "a", "2": " b", "3": "c"}, "arms": {"ours": arm}}}
    told = describe.embedding_map(results)
    assert told.startswith("Labels 'a', ' b', 'c'. In the map of ours, 20% of the spread lies w")
    [ax] = plots.embedding_map(results, PRINT).axes
    assert ax.get_title("left") == "ours, seed 7: 75% of variance"
    assert drawn(ax) == [([0.0, 2.0], [0.0, 0.0]), ([0.0, 2.0], [4.0, 4.0])]


def test_deciles_are_told_with_their_intervals():
    own = {"decile-1": {"loss": entry(1.0, 0.5, 1.5)}, "decile-10": {"loss": entry(2.0)}}
    results = {"minus_reference": {"ours": own}, "means": {}, "reference": "base"}
    told = describe.deciles(results)
    assert told.startswith(
        "ours minus base, loss (nats): 1 (0.5 to 1.5) in decile 1, unknown in decile 5, 2 in dec"
    )
    results = {"minus_reference": {}, "means": {"ours": own}, "reference": "ours"}
    assert describe.deciles(results).startswith("ours, loss (nats): 1 (0.5")
