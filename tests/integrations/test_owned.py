"""Objectives with parameters or buffers of their own, under `SimRegTrainer`."""

import pytest
import torch

from simreg import SimRegLoss
from simreg.baselines import registry
from tests.processes import free_port, leave, meet, spawn

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM  # noqa: E402

from simreg.integrations.transformers import OBJECTIVE, SimRegTrainer  # noqa: E402
from tests.integrations.test_transformers import (  # noqa: E402
    _tensor_names,
    arguments,
    build,
    rows,
    train,
    weights,
)


def nitp():
    torch.manual_seed(1)
    return registry.build("nitp", {"depth": 1.0}, hidden_size=16, vocab_size=24)


def run(folder, model, objective, **changes):
    settings = {"max_steps": 2, "learning_rate": 0.1} | changes
    return train(folder, model, objective=objective, **settings)


def worker(rank, folder, port):
    meet(rank, port)
    model, objective = build(), nitp()
    run(folder, model, objective, per_device_train_batch_size=2)
    center = registry.build("center", {}, hidden_size=16, vocab_size=24)
    seen = []
    center.register_forward_pre_hook(lambda module, _: seen.append(module.centers.clone()))
    run(folder, build(), center, per_device_train_batch_size=2)
    found = {"weights": weights(model), "objective": weights(objective), "centers": seen[1]}
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_two_processes_of_default_arguments_equal_one(tmp_path):
    model, objective = build(), nitp()
    before = weights(objective)
    run(tmp_path, model, objective)
    spawn(worker, (str(tmp_path), free_port()))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        torch.testing.assert_close(found["weights"], weights(model), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["objective"], weights(objective), rtol=1e-5, atol=1e-6)
    assert not torch.equal(before, weights(objective))
    assert torch.equal(ranks[0]["centers"], ranks[1]["centers"])  # whatever the rows of the second
    assert ranks[0]["centers"].any()


def test_a_weight_that_ends_keeps_the_parameters_in_the_graph(tmp_path):
    """DDP waits for the gradient of each."""

    class End(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            objective.weight = 0.0

    objective, calls = nitp(), []
    objective.register_forward_pre_hook(lambda *_: calls.append(objective.weight))
    train(tmp_path, build(), objective=objective, max_steps=3, extra={"callbacks": [End()]})
    assert calls[0] > 0
    assert calls[1:] == [0.0, 0.0]


def test_what_is_not_supported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=True"):
        run(tmp_path, build(), nitp(), ddp_find_unused_parameters=True)
    model = build()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="PEFT is not supported with"):
        run(tmp_path, model, nitp())
    assert not any(module._forward_hooks for module in model.modules())

    class Sharded(SimRegTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match="which FSDP is not supported with; use DDP"):
        Sharded(build(), arguments(tmp_path), train_dataset=rows(), objective=nitp())
    settings = arguments(tmp_path)
    SimRegTrainer(build(), settings, train_dataset=rows(), objective=nitp())
    assert settings.ddp_find_unused_parameters is None  # as the user left it


def test_without_a_weight_from_the_start_it_is_no_part_of_the_model(tmp_path):
    objective, model = nitp(), build()
    objective.weight = 0.0
    settings = arguments(tmp_path, ddp_find_unused_parameters=True)
    SimRegTrainer(model, settings, train_dataset=rows(), objective=objective)
    assert not hasattr(model, OBJECTIVE)
    assert not model.model._forward_hooks


def test_the_next_trainer_of_the_model_removes_what_the_last_ones_objective_owned(tmp_path):
    model = build()
    run(tmp_path, model, nitp())
    assert hasattr(model, OBJECTIVE)
    SimRegTrainer(model, arguments(tmp_path), train_dataset=rows())
    assert [*model.state_dict()] == [*build().state_dict()]


def test_a_buffer_that_is_not_saved_is_moved_and_no_more(tmp_path, monkeypatch):
    objective, moved = SimRegLoss(), []
    objective.register_buffer("scratch", torch.zeros(2), persistent=False)
    monkeypatch.setattr(objective, "to", lambda device: moved.append(device) or objective)
    run = SimRegTrainer(build(), arguments(tmp_path), objective=objective)
    assert moved == [run.args.device]
    assert not hasattr(run.model, "training_objective")


def test_matrices_alone_decay(tmp_path):
    options = {"learn_temperature": True}
    objective = registry.build("simreg-variant", options, hidden_size=16, vocab_size=24)
    scaled = torch.nn.Module()
    scaled.forward = lambda hidden, labels, segments=None, *, num_items=None: None
    scaled.gains = torch.nn.Parameter(torch.ones(16))
    for each, decays in ((objective, False), (scaled, False), (nitp(), True)):
        trainer = SimRegTrainer(
            build(), arguments(tmp_path, weight_decay=0.1), train_dataset=rows(), objective=each
        )
        trainer.create_optimizer()
        owned = {id(p) for p in each.parameters()}
        groups = [g for g in trainer.optimizer.param_groups if {id(p) for p in g["params"]} & owned]
        assert [g["weight_decay"] > 0 for g in groups] == [decays]


def test_model_init_begins_with_the_objective_as_it_came(tmp_path):
    objective = nitp()
    trainer = SimRegTrainer(
        None,
        arguments(tmp_path),
        train_dataset=rows(),
        model_init=lambda: build(),
        objective=objective,
    )
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append((weights(trainer.model), weights(objective)))
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], weights(nitp()))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_goes_to_the_hub_is_published(tmp_path, monkeypatch, name):
    """`push_to_hub` saves by the internal call, as checkpoints do, but not for resuming."""
    model = build(name)
    trainer = run(tmp_path, model, nitp(), max_steps=1)
    uploaded = []

    class Hub:
        def upload_folder(self, folder_path, **unused):
            uploaded.extend(_tensor_names(tmp_path))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(trainer, "create_model_card", lambda **unused: None)
    trainer.hub_model_id = "owner/name"
    trainer.push_to_hub()
    build(name).save_pretrained(tmp_path / "plain")
    assert sorted(uploaded) == sorted(_tensor_names(tmp_path / "plain"))
    assert OBJECTIVE in dict(model.named_children())  # training could go on
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = {n: p for n, p in model.named_parameters() if OBJECTIVE not in n}
    assert all(torch.equal(p, own[n]) for n, p in loaded.named_parameters())
