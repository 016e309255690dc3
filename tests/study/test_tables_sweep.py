"""The table of several studies with the same arms."""

import json

import pytest

from simreg.recipe.errors import UserError
from tests.study.tabled import cells, record

FEW = {"weak": {"simreg": {"weight": 0.1}}, "strong": {"simreg": {"weight": 1.0}}}


def studies(folder):
    """A small and a large study: `strong` ran in the small one alone, which has no looks."""
    record(
        folder / "small",
        {"baseline": {1: 5.0}, "weak": {1: 4.9}, "strong": {1: 5.25}},
        FEW,
        seeds=[1],
    )
    record(folder / "large", {"baseline": {1: 4.0}, "weak": {1: 3.75}}, FEW, seeds=[1])
    run = folder / "large/weak/1/seed-1"
    run.mkdir(parents=True)
    looks = [{"kind": "geometry", "step": 1, "grad_ratio": ratio} for ratio in (0.9, 0.25)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))


def drawn(folder, options=""):
    return cells(f"sweep small/results.json large/results.json {options}", folder)


def test_a_row_a_study_and_a_column_an_arm(tmp_path):
    studies(tmp_path)
    (head, _, *rows), below = drawn(tmp_path)
    assert head == ["study", "CE of its reference", "weak", "strong"]
    assert rows == [
        ["small", "5.0000", "−0.1000", "+0.2500"],
        ["large", "4.0000", "−0.2500", "–"],
    ]
    expected = "Nats, minus the reference of the same study. One seed: no intervals, no claim."
    assert below == expected


def test_a_metric_stands_in_brackets_where_it_was_looked_at(tmp_path):
    studies(tmp_path)
    (_, _, *rows), below = drawn(tmp_path, "metric=grad_ratio")
    assert rows == [
        ["small", "5.0000", "−0.1000 (–)", "+0.2500 (–)"],
        ["large", "4.0000", "−0.2500 (0.250)", "–"],
    ]
    assert "In brackets: grad_ratio at the last look." in below
    (_, _, _, large), below = drawn(tmp_path, "metric=grad_ratio look=first")
    assert large[2] == "−0.2500 (0.900)"
    assert "In brackets: grad_ratio at the first look." in below


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("arms=none", "arms: unknown 'none' .there are baseline, weak, strong"),
        ("look=third", "look: expected first or last, got 'third'"),
        ("metric=grad_ratios", "metric: no look at the geometry has 'grad_ratios'"),
        ("arms=strong metric=grad_ratio", "metric: no look at the geometry has 'grad_ratio'"),
    ],
)
def test_what_no_study_has_is_refused(tmp_path, options, message):
    studies(tmp_path)
    with pytest.raises(UserError, match=message):
        drawn(tmp_path, options)


def test_more_seeds_are_no_caveat(tmp_path):
    for name in ("small", "large"):
        record(tmp_path / name, {"baseline": {1: 5.0, 2: 5.2}, "weak": {1: 4.0, 2: 4.4}}, FEW)
    (_, _, *rows), below = drawn(tmp_path)
    assert rows[0] == ["small", "5.1000", "−0.9000", "–"]
    assert below == "Nats, minus the reference of the same study."
