"""`SimRegTrainer` in two processes under DeepSpeed, at each stage of ZeRO, equals one process."""

import pytest
import torch
from torch import nn

from simreg import AtDepths, SimRegLoss
from simreg.baselines import registry
from tests.processes import free_port, leave, meet, spawn

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from simreg.integrations.transformers import SimRegTrainer
from tests.integrations.test_transformers import (
    SIMREG,
    SMALL,
    _tensor_names,
    arguments,
    build,
    relative,
    rows,
    weights,
)

LIMIT = 2.7  # of the gradient norm, which not every step exceeds


def two_layers():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"num_hidden_layers": 2}))


def at_depths():
    return AtDepths(SimRegLoss(**SIMREG), [0.5], offset=1)


def nitp():
    torch.manual_seed(1)
    return registry.build("nitp", {}, hidden_size=16, vocab_size=24)


def deep_supervision():
    return registry.build("deep-supervision", {}, hidden_size=16, vocab_size=24)


CASES = {
    "llama": (build, lambda: SimRegLoss(**SIMREG)),
    "mixtral": (lambda: build("mixtral"), lambda: SimRegLoss(**SIMREG)),
    "depths": (two_layers, at_depths),
    "owns weights": (two_layers, nitp),
    "reads the head": (two_layers, deep_supervision),
}
RUNS = [(1, "depths"), (2, "llama"), (2, "mixtral"), *((3, case) for case in CASES)]
RESUMED = {(2, "mixtral"), (3, "depths"), (3, "owns weights")}


def made(case):
    return [make() for make in CASES[case]]


def run(folder, case, steps, *, resume=None, **changes):
    """Two SGD steps of 8 rows, in micro-batches of two: the router loss depends on their size."""
    model, objective = made(case)
    settings = {"max_steps": 2, "learning_rate": 0.1, "max_grad_norm": LIMIT} | changes
    args = arguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=steps, **settings
    )
    trainer = SimRegTrainer(model, args, train_dataset=rows(), objective=objective)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def config(stage):
    """Everything is sharded at stage 3, however small."""
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    own_optimizer = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"zero_optimization": zero, **dict.fromkeys(auto, "auto"), **own_optimizer}


def two_processes(folder, stage, case):
    import deepspeed

    out, model = f"{folder}/{stage}-{case}", f"{folder}/{stage}-{case}/model"
    once = run(out, case, 2, deepspeed=config(stage), save_strategy="steps", save_steps=1)
    once.save_model(model)
    unset_hf_deepspeed_config()  # else the next model is sharded, and otherwise begun, when made
    trainers, found = {"once": once}, {}
    if (stage, case) in RESUMED:
        checkpoint = f"{out}/checkpoint-1"
        trainers["resumed"] = run(out, case, 2, deepspeed=config(stage), resume=checkpoint)
        unset_hf_deepspeed_config()
    for name, trainer in trainers.items():
        parameters = list(trainer.model.parameters())
        shards = [hasattr(p, "ds_tensor") and p.ds_tensor.numel() < p.ds_numel for p in parameters]
        with deepspeed.zero.GatheredParameters(parameters):
            found[name] = weights(trainer.model)
    return found | {
        "engine": type(once.model_wrapped).__name__,
        "sharded": all(shards),
        "log": [record for record in once.state.log_history if "ce" in record],
    }


def worker(rank, folder, port):
    import deepspeed

    # Its sums through shared memory need a C++ compiler, for a minute; gloo's are as good here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    meet(rank, port)
    found = {each: two_processes(folder, *each) for each in RUNS}
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    spawn(worker, (str(folder), free_port()))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(tmp_path, ranks, case):
    one = run(tmp_path, case, 4)
    start = weights(nn.ModuleList(made(case)))
    expected = weights(one.model) - start
    log = [record for record in one.state.log_history if "ce" in record]
    if case == "llama":
        assert [record["clipped"] for record in log] == [1, 0]
    for stage in (stage for stage, ran in RUNS if ran == case):
        for found in (rank[stage, case] for rank in ranks):
            assert found["engine"] == "DeepSpeedEngine"
            assert found["sharded"] == (stage == 3)
            assert ("resumed" in found) == ((stage, case) in RESUMED)
            for way in ("once", "resumed") if "resumed" in found else ("once",):
                assert relative(found[way] - start, expected) < 1e-5, (stage, way)
            for ours, its in zip(log, found["log"], strict=True):
                assert ours.keys() == its.keys()
                for key, value in ours.items():
                    assert its[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize(("stage", "case"), [(2, "mixtral"), (3, "mixtral"), (3, "owns weights")])
def test_the_model_is_saved_whole_and_alone(folder, ranks, stage, case):
    path = folder / f"{stage}-{case}" / "model"
    saved = weights(AutoModelForCausalLM.from_pretrained(path))
    assert not any("objective" in name for name in _tensor_names(path))
    assert torch.equal(saved, ranks[0][stage, case]["once"][: len(saved)])
