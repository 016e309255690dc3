"""Runs with another objective than SimReg, or with a weight that changes."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simreg import SimRegLoss
from simreg.baselines import registry
from simreg.objectives import Reads, Sum
from simreg.recipe import assemble, loop, models
from simreg.recipe import train as train_module
from simreg.recipe.config import SimRegConfig, from_dict, to_dict, to_yaml, with_overrides
from simreg.recipe.errors import UserError
from simreg.recipe.folder import RunFolder
from simreg.recipe.timing import Stepper
from simreg.recipe.train import train
from simreg.study import run as study_run
from tests.processes import launch
from tests.recipe import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
OWNED = {"name": "simreg-variant", "options": {"learn_temperature": True}}
LAST = f"{tiny.LAST}/model.safetensors"
PARAMETER = "training_objective.auxiliary.log_temperature"


def run(folder: Path, text: Path, changes: dict[str, Any]) -> Any:
    config = tiny.config(folder, text, changes)
    return config, train(config)


def test_its_parameters_are_trained_saved_and_left_behind(tmp_path: Path, text: Path) -> None:
    changes = {"simreg": {"weight": 0, "depths_offset": [1, 2, 3]}, "auxiliary": OWNED}
    config, result = run(tmp_path / "whole", text, changes)
    saved = load_file(Path(config.out) / LAST)
    assert abs(float(saved[PARAMETER]) - torch.log(torch.tensor(0.1))) > 1e-3
    exported = load_file(Path(config.out) / "model/model.safetensors")
    assert exported.keys() == saved.keys() - {PARAMETER}
    assert all(torch.equal(exported[name], saved[name]) for name in exported)
    assert result["auxiliary"] == OWNED | {"schedule": None, "schedule_fraction": None}
    lines = tiny.metrics(config.out)
    assert all(line["auxiliary"] > 0 for line in lines if line["kind"] == "train")
    assert all(line["simreg"] is None for line in lines if line["kind"] == "train")

    # Killed and continued, it ends as if nothing had been.
    broken = tiny.config(tmp_path / "broken", text, changes)
    tiny.run_and_die(broken, tmp_path, "step:13")
    train(broken)
    tiny.assert_same_run(config, broken)


def test_options_of_the_config_reach_the_loss(text: Path, tmp_path: Path) -> None:
    """Each by another value than its default; a new one must be told here."""
    options = {
        "weight": 0.7,
        "temperature": 0.2,
        "variant": "in",
        "chunk_size": 8,
        "push": 2.0,
        "push_above": 0.4,
    }
    within = {"depths": [0.25, 0.75], "depths_offset": [2, -2]}
    changes = {"simreg": options | within, "model": {"layers": 4}}
    config = tiny.config(tmp_path, text, changes)
    loss: Any = assemble.objective(config, models.of_run(config, vocab_size=300))
    assert (loss.reads, loss.offsets) == (Reads(depths=(0.25, 0.75)), (2, -2))
    assert {name: getattr(loss.simreg, name) for name in options} == options
    others = {"scope", "schedule", "schedule_fraction"}
    assert {f.name for f in fields(SimRegConfig)} == options.keys() | within.keys() | others


def test_a_model_of_one_layer_has_none_within(text: Path, tmp_path: Path) -> None:
    before = tiny.config(tmp_path, text, {"model": {"layers": 1}, "simreg": {"depths": [0.5]}})
    assert before.simreg.within(1) == {}  # as that was by default, there are such runs
    changes = {"model": {"layers": 2}, "data": {"seq_len": 4}}  # for -2 it takes five
    assert tiny.config(tmp_path, text, changes).simreg.within(2) == {0.5: 1}
    config = tiny.config(tmp_path, text, {"model": {"layers": 1}})
    assert config.simreg.depths == [0.25, 0.5]
    loss = assemble.objective(config, models.of_run(config, vocab_size=300))
    assert isinstance(loss, SimRegLoss)
    assert train(config)["objective"]["depths"] == []
    with pytest.raises(UserError, match=r"simreg.depths: a model of one layer has none within it"):
        tiny.config(tmp_path, text, {"model": {"layers": 1}, "simreg": {"depths": [0.6]}})


@pytest.mark.parametrize(
    ("layers", "simreg", "depths", "offsets"),
    [
        (2, {}, (0.5,), (1,)),
        (2, {"depths_offset": [3, 2]}, (0.5,), (2,)),
        (3, {}, (0.25, 0.5), (-2, 1)),
        (4, {"depths_offset": [3, 2]}, (0.25, 0.5), (3, 2)),
        (4, {"depths": [0.2, 0.3, 0.75]}, (0.2, 0.3, 0.75), (-2, 1, 1)),
        (4, {"depths": [0.5, 0.25], "depths_offset": 0}, (0.5, 0.25), (0, 0)),
    ],
)
def test_layers_within_and_their_labels(
    text: Path, tmp_path: Path, layers: int, simreg: dict[str, Any], depths: Any, offsets: Any
) -> None:
    """By default two, of which a shallow model has fewer."""
    config = tiny.config(tmp_path, text, {"model": {"layers": layers}, "simreg": simreg})
    loss: Any = assemble.objective(config, models.of_run(config, vocab_size=300))
    assert (loss.reads.depths, loss.offsets) == (depths, offsets)
    loss.check_layers(layers)


def test_it_takes_nothing_from_the_models_random_numbers(text: Path, tmp_path: Path) -> None:
    """A run with a projector goes on with the random numbers of a run without."""
    config = tiny.config(tmp_path, text, {"auxiliary": {"name": "nitp"}})
    model = models.of_run(config, vocab_size=300)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    projector: Any = assemble.objective(config, model)
    assert all(p.std() > 0 for p in projector.parameters())  # drawn, from something else
    assert torch.equal(torch.rand(3), expected)


def test_what_it_starts_with_follows_from_the_seed_alone(text: Path, tmp_path: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        changes = {"auxiliary": {"name": "nitp"}, "train": {"seed": seed}}
        config = tiny.config(tmp_path, text, changes)
        model = models.of_run(config, vocab_size=300)
        weights: Any = assemble.objective(config, model)
        return torch.cat([p.flatten() for p in weights.parameters()])

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    assert torch.equal(start(0), first)
    assert not torch.equal(start(1), first)


def test_beside_simreg(tmp_path: Path, text: Path) -> None:
    """Both act: the gradient is the sum, so the run is neither's alone."""
    both = {"simreg": {"weight": 0.3}, "auxiliary": {"name": "z-loss", "options": {"weight": 0.1}}}
    ends = [
        run(tmp_path / str(i), text, changes)[1]["final_ce"]
        for i, changes in enumerate(
            (both, {"simreg": both["simreg"]}, {**both, "simreg": {"weight": 0}})
        )
    ]
    assert len(set(ends)) == 3
    lines = tiny.metrics(str(tmp_path / "0" / "run"))
    assert all({"simreg", "auxiliary"} <= line.keys() for line in lines if line["kind"] == "train")


@pytest.mark.parametrize(
    ("auxiliary", "message"),
    [
        ({"name": "zloss"}, "no objective 'zloss'; there are"),
        ({"name": "z-loss", "options": {"wait": 1}}, "z-loss has no option wait; it has weight"),
        ({"name": "z-loss", "options": {"weight": -1}}, "weight: expected a finite number from 0"),
        ({"name": "z-loss", "options": {"weight": "x"}}, "weight: expected a finite number from 0"),
        ({"options": {"weight": 1}}, "auxiliary.name, which is not set"),
    ],
)
def test_wrong_options_are_named(auxiliary: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict({"auxiliary": auxiliary})


@pytest.mark.parametrize("name", registry.OBJECTIVES)
def test_a_config_takes_no_random_numbers(name: str) -> None:
    before = torch.get_rng_state()
    assert from_dict({"auxiliary": {"name": name}}).auxiliary.options == {}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_learned_temperature_is_timed_too(tmp_path: Path, text: Path) -> None:
    from simreg.recipe.data import prepare

    config = tiny.config(tmp_path, text, {"auxiliary": OWNED})
    stepper = Stepper(config, prepare(config.data), 2)
    assert isinstance(stepper.reg.objective, Sum)
    before = [p.detach().clone() for p in stepper.reg.objective.parameters()]
    stepper.step()
    after = list(stepper.reg.objective.parameters())
    assert len(before) == len(after) == 1
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize(("auxiliary", "depths"), [({}, []), ({"name": "z-loss"}, []), ({}, [0.5])])
def test_each_step_has_its_weight(
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    auxiliary: dict[str, Any],
    depths: list[float],
) -> None:
    seen = []
    original = loop.RunTrainer.training_step

    def spy(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        seen.append(self.regularizer.weight)
        return loss

    monkeypatch.setattr(loop.RunTrainer, "training_step", spy)
    simreg = {"weight": 0.5, "depths": depths, "schedule": "decay", "schedule_fraction": 0.5}
    run(tmp_path, text, {"simreg": simreg, "auxiliary": auxiliary})
    expected = [0.5] * 10 + [0.5 * (1 - step / 20) / 0.5 for step in range(10, 20)]
    assert seen == pytest.approx(expected)


def test_an_auxiliary_weight_follows_a_schedule_of_its_own(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = loop.RunTrainer.training_step

    def spy(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        objective: Any = self._objective
        seen.append((objective.auxiliary.weight, objective.simreg.weight))
        return loss

    monkeypatch.setattr(loop.RunTrainer, "training_step", spy)
    mtp = {"name": "mtp", "options": {"weight": 0.3}}
    decays = {"auxiliary": {**mtp, "schedule": "decay"}}
    simreg = {"simreg": {"weight": 0.5, "depths": [], "schedule": "constant"}}
    _, result = run(tmp_path / "decays", text, simreg | decays)
    expected = [(0.3 * (1 - step / 20), 0.5) for step in range(20)]
    assert seen == [pytest.approx(each) for each in expected]
    assert result["auxiliary"]["schedule"] == "decay"
    seen.clear()
    _, constant = run(tmp_path / "constant", text, simreg | {"auxiliary": mtp})
    assert seen == [(0.3, 0.5)] * 20
    assert constant["final_ce"] != result["final_ce"]
    with pytest.raises(UserError, match=r"that of auxiliary\.schedule, which is not set"):
        from_dict({"auxiliary": {**mtp, "schedule_fraction": 0.5}})
    for alone in ({"schedule": "decay"}, {"schedule_fraction": 0.5}):
        with pytest.raises(UserError, match=r"its schedule are those of auxiliary\.name"):
            tiny.config(tmp_path, text, {"auxiliary": alone})


def test_simreg_at_depths_trains_and_is_recorded(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = SimRegLoss.forward

    def spy(self: SimRegLoss, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.weight)
        return original(self, *args, **kwargs)

    simreg = {"weight": 0.5}  # and in the first of two layers, as is the default
    config, result = run(tmp_path / "both", text, {"simreg": simreg})
    objective = result["objective"]
    assert (objective["depths"], objective["depths_offset"]) == ([0.5], [1])
    lines = (Path(config.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [record for line in lines if (record := json.loads(line))["kind"] == "train"]
    assert all(record["earlier"] > 0 for record in trained)
    _, alone = run(tmp_path / "final", text, {"simreg": {"weight": 0.5, "depths": []}})
    assert result["final_ce"] != alone["final_ce"]
    monkeypatch.setattr(SimRegLoss, "forward", spy)
    stops = {"weight": 0.5, "schedule": "stop", "schedule_fraction": 0.5}
    run(tmp_path / "stops", text, {"simreg": stops, "model": {"layers": 4}})
    assert calls == [0.5] * 3 * 10  # three layers a step, and nothing at a λ of 0


@pytest.mark.parametrize("offset", [0, 1])
def test_simreg_at_depths_is_the_same_by_two_ways(tmp_path: Path, text: Path, offset: int) -> None:
    """As an auxiliary objective it has no push and does not decay."""
    simreg = {"weight": 0.5, "push": 0.0, "schedule": "constant"}
    _, ours = run(tmp_path / "ours", text, {"simreg": {**simreg, "depths_offset": offset}})
    options = {"weight": 0.5, "depths": [0.5], "offset": offset}
    auxiliary = {"name": "simreg-variant", "options": options}
    two = {"simreg": {**simreg, "depths": []}, "auxiliary": auxiliary}
    _, theirs = run(tmp_path / "theirs", text, two)
    assert ours["final_ce"] == pytest.approx(theirs["final_ce"], rel=1e-5)


def test_two_processes_train_its_parameters(tmp_path: Path, text: Path) -> None:
    """Under DDP the projector's gradient is reduced as the model's own: the run is the same."""
    changes = {"simreg": {"weight": 0}, "auxiliary": OWNED}
    config, _ = run(tmp_path / "one", text, changes)
    two = tiny.config(tmp_path / "two", text, changes)
    file = tmp_path / "two.yaml"
    file.write_text(to_yaml(two))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "tests.recipe.tiny", str(file), "none"]
    (done,) = launch([sys.executable, *torchrun, *program])
    assert done.returncode == 0, done.stderr
    one, other = (load_file(Path(c.out) / LAST) for c in (config, two))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
    start = torch.log(torch.tensor(0.1))
    torch.testing.assert_close(other[PARAMETER] - start, one[PARAMETER] - start, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("preset", "options", "meaning"),
    [
        ("llama-test", {}, "equal but for rounding"),
        ("llama-test", {"batch": True}, "the loss of simreg-variant depends on how batches are"),
        ("mixtral-test", {}, "the router's loss depends on the micro-batch, so from here on it is"),
    ],
)
def test_a_run_that_goes_on_with_other_micro_batches_says_what_that_means(
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    preset: str,
    options: dict[str, Any],
    meaning: str,
) -> None:
    auxiliary = {"name": "simreg-variant", "options": options}
    changes = {"model": {"preset": preset}, "simreg": {"weight": 0}, "auxiliary": auxiliary}
    config = tiny.config(tmp_path, text, changes)
    tiny.run_and_die(config, tmp_path, "step:13")
    capsys.readouterr()
    train(with_overrides(config, {"train": {"accumulate": 2}}))
    warned = capsys.readouterr().err
    assert f"simreg: warning: train.accumulate was 1 and is 2: {meaning}" in warned
    assert warned.count("warning") == 1


def test_of_more_processes_and_fewer_micro_batches_each_the_router_sees_the_same() -> None:
    now = from_dict({"train": {"accumulate": 2}})
    for before, same in ((4, True), (2, False)):
        manifest = {"processes": 1, "accumulate": before}
        told = train_module._split_anew(now, manifest, 2, None, mixture=True)
        assert told.endswith("2: equal but for rounding") == same, told


@pytest.mark.parametrize(
    "pair", [({}, {"weight": 0.5}), ({"weight": 0.5}, {}), ({"weight": 2},) * 2]
)
def test_a_folder_knows_the_options_of_its_run(tmp_path: Path, pair: Any) -> None:
    """Options that one of two configs leaves out are a difference too."""
    there, here = (from_dict({"auxiliary": {"name": "z-loss", "options": o}}) for o in pair)
    folder = RunFolder(tmp_path)
    folder.config.write_text(to_yaml(there))
    folder.metrics.write_text("{}\n")
    if there == here:
        folder.check(here)
    else:
        with pytest.raises(UserError, match=r"auxiliary\.options is .* there and .* now"):
            folder.check(here)
    changes = study_run._changes(to_dict(there), to_dict(here))
    assert changes.startswith("auxiliary.options: {") == (there != here)


def test_the_timed_loss_is_as_outside_of_autocast_as_the_trained_one(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simreg.recipe.data import prepare

    seen = []
    original = Sum.forward

    def spy(self: Sum, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Sum, "forward", spy)
    changes = {"auxiliary": {"name": "nitp"}, "train": {"precision": "bf16", "tokens": 128}}
    config = tiny.config(tmp_path, text, changes)
    train(config)
    Stepper(config, prepare(config.data), 2).step()
    assert len(seen) >= 2
    assert not any(seen)
