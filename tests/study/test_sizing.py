import dataclasses
import json
from pathlib import Path

import pytest

from simreg.recipe.errors import UserError
from simreg.study import plan, sizing
from simreg.study.options import CompareOptions, from_options
from tests.study.fakes import compare

TIMES = {"ratio": 1.1, "ratio_quartiles": [1.05, 1.15], "base_s": 0.4, "arm_s": 0.44, "n": 20}
A_STEP = 16 * 256


def fitted(study, tokens_per_s=9000.0, seconds=300.0, rows=10**8, ratio=1.2):
    step_time = {"simreg": {**TIMES, "ratio": ratio}}
    return sizing.fit(study, A_STEP / tokens_per_s, step_time, seconds, rows)


def simulated(study, tokens_per_s, ratio):
    """Seconds of a whole study on a machine of this speed, step by step and pass by pass."""
    clock = 0.0
    for cell in study.cells():
        config = study.config(cell)
        clock += 3.0  # start-up, checkpoints, export
        step = A_STEP / tokens_per_s * (ratio if config.simreg.weight else 1.0)
        for _ in range(config.steps):
            clock += step
        for _ in range(config.train.evals):
            clock += config.train.eval_tokens / tokens_per_s * 0.4
    return clock


@pytest.mark.parametrize("minutes", [5, 20])
@pytest.mark.parametrize("tokens_per_s", [1e3, 3e3, 1e4, 1e5, 1e6])
def test_a_simulated_study_takes_the_minutes_asked_for(minutes, tokens_per_s):
    study = from_options(CompareOptions(minutes=minutes))
    sized = fitted(study, tokens_per_s, 60 * minutes)
    took = simulated(sized, tokens_per_s, 1.2)
    config = sized.config(sized.cells()[0])
    if (minutes, tokens_per_s) == (5, 1e3):  # the fewest steps: said before the start
        assert config.steps == sizing.MIN_STEPS
        assert took > 1.1 * 300
    else:
        assert 0.9 * 60 * minutes < took < 1.1 * 60 * minutes
    times = {"simreg": {**TIMES, "ratio": 1.2}}
    assert sizing.total(sized, A_STEP / tokens_per_s, times) == pytest.approx(took)
    evaluation = 4 * config.train.evals * config.train.eval_tokens * 0.4 / tokens_per_s
    assert evaluation <= 0.151 * 60 * minutes
    assert sizing.FEWEST_EVALS <= config.train.evals <= 10
    assert 256 <= config.train.eval_tokens <= sizing.EVAL_TOKENS


def test_evaluations_that_the_base_sets_are_left_alone():
    base = {"train": {"evals": 7, "eval_tokens": 123_000}}
    train = fitted(plan.from_dict({"base": base, "minutes": 5}), 3000.0).base.train
    assert (train.evals, train.eval_tokens) == (7, 123_000)
    study = plan.from_dict({"base": {"train": {"evals": 7}}, "minutes": 5})
    assert fitted(study, 3000.0).base.train.evals == 7


@pytest.mark.parametrize(
    "budgets", [[0.6, 0.8, 1.0], [0.7, 1.1], {"simreg": [0.33, 1.3], "x": [0.9]}]
)
@pytest.mark.parametrize("rows", [999, 1000, 1017, 3000])
def test_no_run_sees_a_row_twice(budgets, rows):
    arms = {"simreg": {}, "x": {"train": {"batch_rows": 24}}}
    study = fitted(
        plan.from_dict({"arms": arms, "budgets": budgets, "minutes": 60}), seconds=3600, rows=rows
    )
    used = [c.steps * c.train.batch_rows for c in map(study.config, study.cells())]
    assert max(used) <= rows
    assert max(used) > 0.9 * rows - 24


def test_close_budgets_come_to_different_steps_or_are_refused():
    study = plan.from_dict({"budgets": [0.97, 0.99, 1.0], "minutes": 0.1})
    sized = fitted(study, seconds=6.0)
    steps = [sized.config(cell).steps for cell in sized.cells() if cell.arm == "simreg"]
    assert len(set(steps)) == 3
    with pytest.raises(UserError, match="fills 1000 rows, too few for budgets"):
        fitted(study, rows=1000)


def test_what_leaves_the_cost_of_a_step_alone_is_not_timed(tmp_path):
    arms = {
        "lr": {"optim": {"lr": 1e-4, "warmup": 0.5, "clip": 0.5}, "train": {"log_every": 3}},
        "fading": {"simreg": {"weight": 0, "schedule": "decay"}},
        "noclip": {"optim": {"clip": 0}},
        "batch": {"train": {"batch_rows": 32}},
    }
    plain = {arm: {"simreg": {"weight": 0}, **changes} for arm, changes in arms.items()}
    study = plan.from_dict({"arms": {**plain, "simreg": {}}, "out": str(tmp_path)})
    known = sizing.cached_step_times(study)
    assert list(known) == ["lr", "fading"]
    assert (known["lr"]["ratio"], known["lr"]["n"]) == (1.0, 0)


@pytest.mark.parametrize(
    "changed", ["version", "torch", "cpu", "device", "threads", "weight", "nothing"]
)
def test_a_step_time_belongs_to_its_configs_software_and_machine(tmp_path, monkeypatch, changed):
    measured = []

    def measure(*args, seconds):
        measured.append(seconds)
        return TIMES

    machine = {"cpu": "a", "device": "cpu", "threads": 2, "platform": "x"}
    monkeypatch.setattr(sizing.timing, "step_time_ratio", measure)
    monkeypatch.setattr(sizing.provenance, "machine", lambda: machine)
    study = plan.from_dict({"out": str(tmp_path)})
    sizing.step_times(study, None)
    assert json.loads((Path(study.out) / sizing.STEP_TIME_FILE).read_text())["simreg"]["n"] == 20
    if changed == "version":
        monkeypatch.setattr(sizing.simreg, "__version__", "9")
    elif changed == "torch":
        monkeypatch.setattr(sizing.torch, "__version__", "9")
    elif changed == "weight":
        study = plan.from_dict(
            {"out": str(tmp_path), "arms": {"simreg": {"simreg": {"weight": 2}}}}
        )
    elif changed != "nothing":
        machine[changed] = "b"
    else:
        base = {"train": {"tokens": 900_000, "eval_tokens": 9, "timeout": 60}}
        study = plan.from_dict({"out": str(tmp_path), "base": base})
    sizing.step_times(study, None)
    assert measured == [120.0] * (1 if changed == "nothing" else 2)


def test_a_study_sized_to_fit_some_minutes_is_timed_for_less_long(tmp_path, monkeypatch):
    given = []

    def measure(*args, seconds):
        given.append(seconds)
        return TIMES

    monkeypatch.setattr(sizing.timing, "step_time_ratio", measure)
    sizing.step_times(plan.from_dict({"out": str(tmp_path), "minutes": 8}), None)
    assert given == [40.0]


def test_time_left_learns_from_what_was_slower():
    study = plan.from_dict({"base": {"train": {"eval_tokens": 5000}}})
    left = sizing.TimeLeft(study, {"simreg": TIMES})
    first, *rest = study.cells()
    before = left.of(rest)
    assert before > 0.44 * study.config(rest[0]).steps
    assert left.slowdown is None
    left.ended(first, 2 * left.predict(first))
    assert left.of(rest) == pytest.approx(2 * before)
    assert left.slowdown == pytest.approx(2)


def test_time_left_without_timings_comes_from_the_runs():
    study = plan.from_dict({"base": {"train": {"eval_tokens": 5000}}, "budgets": [1.0]})
    left = sizing.TimeLeft(study, {})
    first, *rest = study.cells()
    assert left.of(rest) is None
    left.ended(first, 77.0)
    assert left.of(rest) == pytest.approx(77.0)
    assert left.slowdown is None


def test_step_times_stay_known_when_a_study_begins_to_look_at_geometry(study):
    looking = dataclasses.replace(
        study,
        base=dataclasses.replace(
            study.base, train=dataclasses.replace(study.base.train, analyze_every=10)
        ),
    )
    assert sizing._key(looking, "simreg") == sizing._key(study, "simreg")


def test_options_left_open_do_not_count_so_that_later_ones_change_no_record(study):
    wide = {**study.arms, "simreg": {"model": {"hidden_size": 256}}}
    changed = dataclasses.replace(study, arms=wide)
    assert "hidden_size" not in sizing._cost(study, "simreg")["model"]
    assert sizing._cost(changed, "simreg")["model"]["hidden_size"] == 256
    assert sizing._configs(changed, "simreg") != sizing._configs(study, "simreg")


RECORDS = Path(__file__).parents[2] / "docs/results"


@pytest.mark.parametrize(
    "record", sorted(RECORDS.glob(f"*/{sizing.STEP_TIME_FILE}")), ids=lambda path: path.parent.name
)
def test_the_step_times_on_record_still_count(record):
    """A new field of the config must not make them those of other configs."""
    study = dataclasses.replace(plan.load(record.parent / "study.yaml"), out=str(record.parent))
    recorded = json.loads(record.read_text(encoding="utf-8")).keys()
    assert recorded
    assert recorded <= sizing.cached_step_times(study, any_machine=True).keys()


def test_a_step_time_of_another_machine_is_still_of_its_configs(tmp_path, monkeypatch):
    """A finished study may name another reference: the ratio on record is not to that."""
    monkeypatch.setattr(sizing.timing, "step_time_ratio", lambda *args, seconds: TIMES)
    arms = {"half": {"simreg": {"chunk_size": 8}}, "simreg": {}}
    study = plan.from_dict({"arms": arms, "out": str(tmp_path)})
    sizing.step_times(study, None)
    monkeypatch.setattr(sizing.torch, "__version__", "9")
    assert not sizing.cached_step_times(study)
    assert set(sizing.cached_step_times(study, any_machine=True)) == {"half", "simreg"}
    other = dataclasses.replace(study, reference="half")
    assert "simreg" not in sizing.cached_step_times(other, any_machine=True)

    path = tmp_path / sizing.STEP_TIME_FILE  # as recorded by versions that did not say
    found = {arm: {**entry, "configs": None} for arm, entry in json.loads(path.read_text()).items()}
    for entry in found.values():
        del entry["configs"]
    path.write_text(json.dumps(found))
    assert set(sizing.cached_step_times(study, any_machine=True)) == {"half", "simreg"}


def test_an_arm_of_larger_batches_takes_fewer_steps():
    arms = {"simreg": {"train": {"batch_rows": 32}}}
    values = {"arms": arms, "base": {"train": {"evals": 1, "eval_tokens": 256}}, "minutes": 60}
    sized = fitted(plan.from_dict(values), 9000.0, 3600.0, ratio=2.0)
    times = {"simreg": {**TIMES, "ratio": 2.0}}
    assert sizing.total(sized, A_STEP / 9000.0, times) == pytest.approx(3600, rel=0.02)


def test_a_reference_of_larger_batches_takes_fewer_steps():
    arms = {"baseline": {"train": {"batch_rows": 32}}, "simreg": {"train": {"batch_rows": 32}}}
    values = {"arms": arms, "base": {"train": {"evals": 1, "eval_tokens": 256}}, "minutes": 60}
    step_s = 2 * A_STEP / 9000.0
    times = {"simreg": {**TIMES, "ratio": 1.2}}
    sized = sizing.fit(plan.from_dict(values), step_s, times, 3600.0, 10**8)
    assert sizing.total(sized, step_s, times) == pytest.approx(3600, rel=0.02)


def test_a_regularizer_that_stops_costs_until_then(study, monkeypatch):
    stop = {"schedule": "stop", "schedule_fraction": 0.25}
    arms = {"stop": {"simreg": stop}, "decay": {"simreg": {"schedule": "decay"}}}
    asked = []

    def ratio(reference, arm, corpus, seconds):
        asked.append(arm.simreg.weight)
        ratio = 1.4 if arm.simreg.weight else 1.0
        return {**TIMES, "ratio": ratio, "ratio_quartiles": [ratio - 0.1, ratio + 0.1]}

    monkeypatch.setattr(sizing.timing, "step_time_ratio", ratio)
    out = Path(study.out)
    out.mkdir()
    found = sizing.step_times(plan.from_dict({"out": str(out), "arms": arms}), None)
    assert asked == [0.3, 0.0, 0.3]
    assert found["decay"]["ratio"] == 1.4
    assert found["stop"]["ratio"] == pytest.approx(1.1)
    assert found["stop"]["ratio_quartiles"] == pytest.approx([1.0, 1.2])
    beside = plan.from_dict({"out": str(out), "reference": "decay", "arms": arms})
    assert "stop" not in sizing.cached_step_times(beside)


def test_arms_whose_steps_do_the_same_work_share_a_step_time(tmp_path, monkeypatch):
    measured = []

    def measure(*args, seconds):
        measured.append(seconds)
        return {**TIMES, "arm_s": len(measured) - 1.0}

    monkeypatch.setattr(sizing.timing, "step_time_ratio", measure)
    none = {"simreg": {"weight": 0}}
    arms = {
        "baseline": none,
        "baseline-large": {**none, "model": {"embedding_std": 1.0}},
        "simreg": {},
        "simreg-strong": {"simreg": {"weight": 2.0, "temperature": 0.2}, "optim": {"lr": 1e-4}},
        "simreg-large": {"model": {"embedding_std": 1.0}},
        "simreg-cold": {"simreg": {"temperature": 0.01}},
        "simreg-colder": {"simreg": {"temperature": 0.001}},
        "in": {"simreg": {"variant": "in"}},
        "push": {"simreg": {"push": 3.0}},
        "push-weak": {"simreg": {"push": 1.0, "push_above": 0.2}},
        "above": {"simreg": {"push_above": 0.2}},
        "z": {**none, "auxiliary": {"name": "z-loss", "options": {"weight": 1e-3}}},
        "z-weak": {**none, "auxiliary": {"name": "z-loss", "options": {"weight": 1e-4}}},
        "z-none": {**none, "auxiliary": {"name": "z-loss", "options": {"weight": 0}}},
        "z-document": {
            "simreg": {"weight": 0, "scope": "document"},
            "auxiliary": {"name": "z-loss", "options": {"weight": 1e-3}},
        },
    }
    values = {
        "base": {"simreg": {"push": 0.0}},
        "arms": arms,
        "out": str(tmp_path),
        "timed": ["simreg-strong", "simreg-cold", "in", "z-weak", "push"],
    }
    study = plan.from_dict(values)
    found = sizing.step_times(study, None)
    assert len(measured) == 5
    assert found["baseline-large"]["n"] == 0
    measured_as = {arm: times["arm_s"] for arm, times in found.items() if times["n"]}
    assert measured_as == {
        **dict.fromkeys(("simreg", "simreg-strong", "simreg-large", "above"), 0.0),
        **dict.fromkeys(("simreg-cold", "simreg-colder"), 1.0),
        "in": 2.0,
        **dict.fromkeys(("push", "push-weak"), 3.0),
        **dict.fromkeys(("z", "z-weak"), 4.0),
    }
    assert not {"z-none", "z-document"} & found.keys()
    again = sizing.cached_step_times(study)
    assert again == found
    assert [arm for arm in study.others if sizing.only_adds(study, arm)] == [
        *("simreg", "simreg-strong", "simreg-large", "simreg-cold", "simreg-colder"),
        *("in", "push", "push-weak", "above", "z", "z-weak", "z-none", "z-document"),
    ]


def test_what_is_added_to_simreg_must_cost_more(tmp_path):
    formula = {"simreg": {"push": 0.0, "depths": [0.25]}}
    arms = {
        "formula": formula,
        "push": {"simreg": {"depths": [0.25]}},
        "layers": {"simreg": {"push": 0.0, "depths": [0.25, 0.5]}},
        "other-layer": {"simreg": {"depths": [0.5]}},
        "chunk": {"simreg": {"depths": [0.25], "chunk_size": 8}},
        "nothing": {"simreg": {"weight": 0}},
        "z": {**formula, "auxiliary": {"name": "z-loss", "options": {"weight": 1e-3}}},
    }
    study = plan.from_dict({"out": str(tmp_path), "reference": "formula", "arms": arms})
    more = [arm for arm in study.others if sizing.only_adds(study, arm)]
    assert more == ["push", "layers", "z"]
    beside = plan.from_dict({"out": str(tmp_path), "reference": "z", "arms": arms})
    assert not sizing.only_adds(beside, "formula")


def test_step_times_of_arms_that_were_dropped_are_kept(lab, study):
    def times(**arms):
        before = len(lab.timed)
        compare(dataclasses.replace(study, arms={"baseline": study.arms["baseline"], **arms}))
        return len(lab.timed) - before

    twin, other = {"simreg": {"weight": 0.5}}, {"simreg": {"variant": "in"}}
    assert times(simreg={}, twin=twin) == 1
    assert times(other=other) == 1
    assert times(simreg={}) == 0
    assert times(twin=twin) == 0  # timed as another arm, which does the same work
