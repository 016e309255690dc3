"""One shape's records: who runs, who is skipped, what is written down."""

import dataclasses

import pytest
import torch

from simreg.bench import records
from simreg.bench.contenders import BARE, contenders
from simreg.bench.measure import Times
from simreg.bench.problem import Shape

CPU = torch.device("cpu")
SHAPE = Shape(batch=2, length=32, dim=4, dtype="float32")
BASIC = [c for c in contenders(CPU) if c.name in (BARE, "naive", "blockwise")]


def measured(chosen=BASIC, shape=SHAPE, memory=False):
    found = records.measure_shape(shape, chosen, CPU, rounds=3, seconds=9.0, memory=memory)
    return {record["name"]: record for record in found}


def test_a_record_of_each_in_order(monkeypatch):
    times = Times({BARE: [2.0, 1.0, 3.0], "naive": [6.0, 8.0, 4.0, 100.0], "blockwise": [1.0] * 3})
    monkeypatch.setattr(records.measure, "time_in_turns", lambda *args, **options: times)
    monkeypatch.setattr(records, "peak_extra_bytes", lambda contender, *rest: len(contender.name))
    found = measured(memory=True)
    assert list(found) == [BARE, "naive", "blockwise"]
    assert found["naive"] == {
        **{"batch": 2, "length": 32, "dim": 4, "dtype": "float32", "chunk": None},
        **{"name": "naive", "variant": "out", "median_s": 7.0, "quartiles_s": [5.5, 31.0]},
        **{"rounds": 4, "over_bare": 3.5, "peak_extra_bytes": 5, "skipped": None},
    }
    assert found[BARE]["variant"] is None
    assert found[BARE]["over_bare"] == 1.0


def test_times_are_kept_without_a_figure_of_memory(monkeypatch, capsys):
    def fail(*args):
        raise ValueError("odd")

    monkeypatch.setattr(records, "peak_extra_bytes", fail)
    found = measured(memory=True)
    assert found["naive"]["peak_extra_bytes"] is found["naive"]["skipped"] is None
    assert found["naive"]["median_s"] > 0
    assert f"no memory figure of naive at {SHAPE}: ValueError: odd\n" in capsys.readouterr().err


def test_what_is_replayed_has_no_peak_of_its_own(monkeypatch):
    monkeypatch.setattr(records, "peak_extra_bytes", lambda *args: 7)
    replayed = dataclasses.replace(BASIC[2], replayed=True)
    found = measured([*BASIC[:2], replayed], memory=True)
    assert found["naive"]["peak_extra_bytes"] == 7
    assert found["blockwise"]["peak_extra_bytes"] is None
    assert found["blockwise"]["median_s"] > 0


def test_what_would_not_fit_is_not_run(monkeypatch):
    naive = BASIC[1]
    monkeypatch.setattr(records.measure, "free_memory", lambda device: naive.working(SHAPE))
    assert records.unfit(naive, SHAPE, CPU) is None
    monkeypatch.setattr(records.measure, "free_memory", lambda device: naive.working(SHAPE) - 1)

    def never(*args):
        pytest.fail("prepared")

    kept = [BASIC[0], dataclasses.replace(naive, prepare=never), BASIC[2]]
    found = measured(kept)
    assert found["naive"]["skipped"] == "needs about 0.0 GiB, 0.0 GiB are free"
    assert found["naive"]["median_s"] is found["naive"]["peak_extra_bytes"] is None
    assert found["naive"]["rounds"] == 0
    assert found["blockwise"]["rounds"] == 3
    assert found["blockwise"]["over_bare"] > 0


def test_predictions_grow_as_the_matrices_do():
    long = Shape(batch=1, length=65_536, dim=512, dtype="bfloat16")
    found = {c.name: c.working(long) / 2**30 for c in contenders(CPU)}
    assert found["naive"] > 4 * 16  # at least S, its mask and their gradients, in float32
    assert found["compiled naive"] > 16
    assert found["pytorch-metric-learning"] > 4 * 16
    assert 8 <= found[BARE] < 9  # S once, in bfloat16
    assert found["blockwise"] < 1
    assert found["chunked recompute"] < 1


def test_predictions_know_who_keeps_the_matrices_of_one_row_only():
    one, many = (Shape(b, 4096, 8, "float32") for b in (1, 64))
    every = {c.name: c for c in contenders(CPU)}

    def matrices(name, shape):
        return every[name].working(shape) - every["blockwise"].working(shape)

    for name in ("naive", "compiled naive"):
        assert matrices(name, many) == 64 * matrices(name, one) > 0
    for name in ("chunked recompute", "pytorch-metric-learning"):
        assert matrices(name, many) == matrices(name, one) > 0
    # Bare products of many rows are taken row by row where all would be too much.
    assert every[BARE].working(many) == many.hidden_bytes + 4 * 4096**2
    few = Shape(3, 64, 8, "float32")
    assert every[BARE].working(few) == few.hidden_bytes + 3 * 4 * 64**2
    assert matrices("chunked recompute", few) == 9 * 4 * 3 * 64**2  # no more pairs than there are


@pytest.mark.parametrize(("dtype", "each"), [("bfloat16", 2 + 8), ("float32", 12), ("float64", 24)])
def test_what_every_contender_takes_at_least(dtype, each):
    """Embeddings and their gradient, computed in float32 or wider, and the gradient given back."""
    shape = Shape(2, 64, 8, dtype)
    blockwise = next(c for c in contenders(CPU) if c.name == "blockwise")
    assert blockwise.working(shape) == 2 * 64 * 8 * each


def test_all_work_on_the_same_inputs(monkeypatch):
    given = []

    def prepare(hidden, labels, shape):
        given.append((hidden, labels))
        return lambda: None

    measured([dataclasses.replace(contender, prepare=prepare) for contender in BASIC])
    assert len(given) == 3
    assert len({(id(hidden), id(labels)) for hidden, labels in given}) == 1


def test_nothing_is_allocated_for_a_shape_that_nobody_can_run():
    huge = Shape(batch=2**20, length=2**20, dim=2**10, dtype="float32")
    assert all("needs about" in r["skipped"] for r in measured(shape=huge).values())


def test_missing_and_failing_ones_say_why():
    def fail(*args):
        raise ImportError("no module\nof that name")

    bare, naive, blockwise = BASIC
    chosen = [
        dataclasses.replace(bare, prepare=lambda *inputs: lambda: torch.empty(2**50)),
        dataclasses.replace(naive, missing="not installed"),
        dataclasses.replace(blockwise, prepare=fail),
        dataclasses.replace(blockwise, name="other"),
    ]
    found = measured(chosen)
    assert found[BARE]["skipped"] == "out of memory"
    assert found["naive"]["skipped"] == "not installed"
    assert found["blockwise"]["skipped"] == "ImportError: no module"
    assert found["other"]["skipped"] is None
    assert found["other"]["median_s"] > 0
    assert found["other"]["over_bare"] is None


def test_times_stay_without_a_memory_figure(monkeypatch):
    def fail(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(records, "peak_extra_bytes", fail)
    found = measured(memory=True)["naive"]
    assert found["peak_extra_bytes"] is None
    assert found["median_s"] > 0
