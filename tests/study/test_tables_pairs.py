"""The table of arms that differ by one change, over several studies."""

import pytest

from simreg.intervals import t_interval
from simreg.recipe.errors import UserError
from simreg.study.tables import document
from tests.study.tabled import LOSSES, cells, record, rows

PUSH = {"simreg": {"push": 1.0}}
BOTH = {"plain": {}, "push": PUSH}


def studies(folder):
    """Two seeds of which one gains; one seed that gains, with arms of other names beside."""
    losses = {
        "baseline": {1: 5.0, 2: 5.0},
        "plain": {1: 4.5, 2: 4.5},
        "push": {1: 4.25, 2: 4.625},
        "tied": {1: 4.0, 2: 4.0},
    }
    record(folder / "two", losses, {**BOTH, "tied": {"model": {"tie_embeddings": True}}})
    arms = {"a-plain": {}, "a-push": PUSH, **BOTH}
    losses = {"plain": {1: 4.0}, "push": {1: 3.5}, "a-plain": {1: 4.5}, "a-push": {1: 4.75}}
    record(folder / "one", losses, arms, seeds=[1], base={"train": {"tokens": 500_000}})


def drawn(folder, options="pairs=push:plain,a-push:a-plain"):
    return cells(f"pairs two/results.json one/results.json {options}", folder)


def test_a_row_for_each_study_that_has_both_arms(tmp_path):
    studies(tmp_path)
    (head, _, *rows), below = drawn(tmp_path)
    assert head == ["study", "arms", "tokens N", "difference (nats)", "seeds", "lower in"]
    limits = t_interval([-0.25, 0.125])
    interval = f"−0.0625 [{limits.low:+.4f}, {limits.high:+.4f}]".replace("-", "−")
    assert rows == [
        ["two", "push minus plain", "1 M", interval, "2", "1 of 2"],
        ["one", "push minus plain", "500 k", "−0.5000", "1", "1 of 1"],
        ["one", "a-push minus a-plain", "500 k", "+0.2500", "1", "0 of 1"],
    ]
    assert below.endswith(
        "The mean is lower in 2 of 3 comparisons, with the interval below 0 in 0; 2 of 4 pairs of "
        "one seed are lower."
    )


def test_pairs_of_an_unfinished_study_that_have_not_run_are_left_out(tmp_path):
    arms = {**BOTH, "later": PUSH}
    losses = {"plain": {1: 4.0, 2: 4.0}, "push": {1: 3.5}}
    record(tmp_path / "one", losses, arms, seeds=[1, 2])
    (_, _, *rows), _ = cells("pairs one/results.json pairs=push:plain,later:plain", tmp_path)
    assert rows == [["one", "push minus plain", "1 M", "−0.5000", "1", "1 of 1"]]


def test_an_interval_below_zero_is_counted(tmp_path):
    losses = {"plain": {1: 4.5, 2: 4.5}, "push": {1: 4.25, 2: 4.25}}
    record(tmp_path, losses, BOTH)
    request = "pairs results.json pairs=push:plain"
    assert "with the interval below 0 in 1;" in document.draw(request, tmp_path)
    request = "pairs results.json pairs=plain:push"
    assert "with the interval below 0 in 0;" in document.draw(request, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "pairs: give arms as first:second"),
        ("pairs=push", "pairs: give arms as first:second,... .got 'push'"),
        ("pairs=push:push", "pairs: give arms as first:second"),
        ("pairs=push:none", "pairs: no file has both arms of push:none"),
        ("pairs=a-push:a-plain", "pairs: two/results.json has both arms of none"),
        ("pairs=push:plain,a-push:tied", "pairs: no file has both arms of a-push:tied"),
        ("pairs=tied:plain", "two/results.json tied:plain differ in model.tie_embeddings"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    studies(tmp_path)
    with pytest.raises(UserError, match=message):
        drawn(tmp_path, options)


def test_pairs_of_which_every_run_diverged_stay_in_the_table(tmp_path):
    losses = {arm: own for arm, own in LOSSES.items() if arm != "good"}
    record(tmp_path, losses, failures={f"good/1/seed-{s}": "NaN" for s in (1, 2)})
    [row], _ = rows(tmp_path, "pairs", "pairs=good:baseline")
    assert row[1:] == ["good minus baseline", "1 M", "–", "0, 2 diverged", "0 of 0"]
