"""Muon and AdamW as one optimizer: each parameter by its own, schedules and checkpoints whole."""

import copy
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW, Muon

from simreg.recipe import models
from simreg.recipe.config import OptimConfig, from_dict
from simreg.recipe.data import prepare
from simreg.recipe.muon import MuonAdamW
from simreg.recipe.timing import Stepper
from simreg.recipe.train import train
from tests.recipe import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIM = OptimConfig(name="muon", lr=0.02, weight_decay=0.3, beta1=0.8, beta2=0.9)


def build(preset: str = "llama-test") -> torch.nn.Module:
    config = from_dict({"model": {"preset": preset}})
    return models.build(config, tokenizer_size=50, eos_token_id=0)


def gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("preset", ["llama-test", "mixtral-test"])
def test_each_weight_moves_as_by_its_own_optimizer(preset: str) -> None:
    model = build(preset)
    twin, extra = copy.deepcopy(model), torch.nn.Parameter(torch.ones(3, 4))
    both = MuonAdamW(model, OPTIM, [extra])
    named = dict(twin.named_parameters())
    matrices = [p for n, p in named.items() if ".layers." in n and p.ndim == 2]
    assert len(matrices) == (14 if preset == "llama-test" else 10)
    ids = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in ids]
    alone = [
        Muon(matrices, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        AdamW([p for p in rest if p.ndim > 1], lr=0.02, betas=(0.8, 0.9), weight_decay=0.3),
        AdamW([p for p in rest if p.ndim == 1], lr=0.02, betas=(0.8, 0.9), weight_decay=0.0),
    ]
    for seed in range(3):
        for each in (model, twin):
            gradients(each, seed)
        extra.grad = torch.ones(3, 4)
        both.step()
        for optimizer in alone:
            optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, named[name], msg=name)
    assert extra[0, 0] < 0.95
    with pytest.raises(ValueError, match="closure"):
        both.step(lambda: 0.0)


def test_a_copy_goes_on_by_itself() -> None:
    model = build()
    first = MuonAdamW(model, OPTIM)
    gradients(model, 0)
    first.step()
    twin, second = copy.deepcopy((model, first))
    before = [p.clone() for p in model.parameters()]
    gradients(twin, 1)
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    gradients(model, 1)
    first.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_a_scheduler_reaches_every_group(loaded: bool) -> None:
    model = build()
    both = MuonAdamW(model, OPTIM)
    if loaded:  # which replaces the groups; accelerate does so before the first step too
        both.load_state_dict(both.state_dict())
    torch.optim.lr_scheduler.LambdaLR(both, lambda step: 0.0)
    before = [p.clone() for p in model.parameters()]
    gradients(model, 0)
    both.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_state_that_is_loaded_goes_on_as_if_nothing_had_been() -> None:
    model = build()
    first = MuonAdamW(model, OPTIM)
    gradients(model, 0)
    first.step()
    twin = copy.deepcopy(model)
    second = MuonAdamW(twin, OPTIM)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each, optimizer in ((model, first), (twin, second)):
        gradients(each, 1)
        optimizer.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert first.state_dict()["state"].keys() == second.state_dict()["state"].keys()


def test_a_run_that_was_killed_ends_as_one_that_never_was(tmp_path: Path, text: Path) -> None:
    optim = {"optim": {"name": "muon"}}
    whole, broken = (tiny.config(tmp_path / name, text, optim) for name in ("whole", "broken"))
    train(whole)
    tiny.run_and_die(broken, tmp_path, "step:13")
    train(broken)
    tiny.assert_same_run(whole, broken)
    plain = tiny.config(tmp_path / "plain", text)
    assert train(plain)["final_ce"] != train(whole)["final_ce"]


def test_its_steps_are_timed(tmp_path: Path, text: Path) -> None:
    config = tiny.config(tmp_path, text, {"optim": {"name": "muon"}})
    stepper = Stepper(config, prepare(config.data), 1)
    assert isinstance(stepper.optimizer, MuonAdamW)
    assert stepper.step() > 0
