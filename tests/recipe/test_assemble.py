"""The values of a config reach what trains, what is timed and what looks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simreg import SimRegLoss
from simreg.geometry.glance import glance
from simreg.geometry.pull import gradient_ratio
from simreg.recipe import assemble, models, timing
from simreg.recipe import probe as module
from simreg.recipe.config import from_dict
from simreg.recipe.data import prepare
from simreg.recipe.probe import Probe
from tests.recipe.tiny import Make


def test_arguments_of_the_trainer_are_the_configs(make: Make, tmp_path: Path) -> None:
    """Each by another value than its default."""
    optim = {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.3, "clip": 0.5}
    train = {"accumulate": 2, "gradient_checkpointing": True, "seed": 5}
    config = make(optim=optim, train={**train, "timeout": 7})
    with assemble.governed(config):
        made: Any = assemble.training_arguments(config, tmp_path)
    assert {
        "lr": made.learning_rate,
        "beta1": made.adam_beta1,
        "beta2": made.adam_beta2,
        "weight_decay": made.weight_decay,
        "clip": made.max_grad_norm,
    } == optim
    names = ("activation_checkpointing", "gradient_checkpointing")
    assert {
        "accumulate": made.gradient_accumulation_steps,
        "gradient_checkpointing": any(getattr(made, name, False) for name in names),
        "seed": made.seed,
    } == train
    assert (made.max_steps, made.per_device_train_batch_size, made.ddp_timeout) == (20, 2, 7)


def test_a_timed_step_is_a_whole_one_of_its_config(make: Make) -> None:
    simreg = {"scope": "document"}
    train = {"accumulate": 2, "gradient_checkpointing": True}
    config = make(simreg=simreg, train=train)
    stepper: Any = timing.Stepper(config, prepare(config.data), 1)
    forward, reg, seen = stepper.forward, stepper.reg, []

    def spy(labels: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        seen.append((labels.shape, segments.shape))
        return reg(labels, segments)

    stepper.forward = lambda **batch: seen.append(sorted(batch)) or forward(**batch)
    stepper.reg = spy
    stepper.step()
    assert seen == [["input_ids", "labels"], ((2, 32), (2, 32))] * 2
    assert stepper.model.is_gradient_checkpointing


def test_throughput_is_of_the_median_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0] * timing.WARM_UP + [1.0, 4.0, 5.0, 9.0, 2.0])
    monkeypatch.setattr(timing.Stepper, "step", lambda self: next(times))
    config = make()
    assert timing.throughput(config, prepare(config.data), steps=5) == 4 * 32 / 4


def test_a_look_takes_the_bias_of_the_head_into_account(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict({"model": {"preset": "llama-test", "head_bias": "unigram"}})
    model: Any = models.build(config, tokenizer_size=300, eos_token_id=0)
    torch.nn.init.normal_(model.lm_head.bias)
    objective = SimRegLoss(0.3)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m, keep_torch_compile: m),
        args=SimpleNamespace(device=torch.device("cpu")),
        compute_loss_context_manager=torch.no_grad,
        model=model,
        regularizer=objective,
    )
    rows = prepare(make().data).validation
    probe = Probe(rows)
    with torch.no_grad():
        hidden = model.get_decoder()(probe.ids).last_hidden_state[:, :-1]
        given = hidden, probe.ids[:, 1:], model.lm_head.weight, model.lm_head.bias
        assert probe(trainer) == glance(*given) | {"grad_ratio": gradient_ratio(*given, objective)}
    assert torch.equal(probe.ids[-1], rows[len(rows) - 1]["input_ids"])  # spread over all of them
    monkeypatch.setattr(module, "TOKENS", 31)  # less than a row
    assert Probe(rows).ids.shape == (1, 32)
