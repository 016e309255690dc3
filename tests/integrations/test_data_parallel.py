"""`SimRegTrainer` in two processes, replicated (DDP) and sharded (FSDP2), equals one process."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from simreg.loss import SimRegLoss
from tests.processes import free_port, leave, meet, spawn

transformers = pytest.importorskip("transformers")
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from tests.integrations.test_transformers import (  # noqa: E402
    SIMREG,
    build,
    relative,
    rows,
    train,
    weights,
)

MODES = ("ddp", "fsdp2-at-load", "fsdp2-by-accelerate")
LAYER = {"llama": "LlamaDecoderLayer", "mixtral": "MixtralDecoderLayer"}


def run(folder, model, *, size, steps, **changes):
    """Two SGD steps of 8 rows; one of the two exceeds the gradient norm's limit."""
    return train(
        folder,
        model,
        objective=SimRegLoss(**SIMREG),
        max_steps=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        logging_steps=2,
        max_grad_norm=5.5,
        extra={"eval_dataset": rows(7)},
        per_device_eval_batch_size=2,
        **changes,
    )


def whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def allow_fsdp_on_cpu():
    """Accelerate takes its FSDP plugin on accelerators only: elsewhere it would be DDP, unsaid."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def two_processes(mode, name, folder):
    changes, model = {}, build(name)
    if mode == "fsdp2-at-load":
        config = DistributedConfig(fsdp_size=2)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=config)
    elif mode == "fsdp2-by-accelerate":
        plugin = {"version": 2, "transformer_layer_cls_to_wrap": [LAYER[name]]}
        changes = {"fsdp": True, "fsdp_config": plugin}
    done = run(folder, model, size=2, steps=2, **changes)
    parameters = list(done.model.parameters())
    result = {
        "replicated": isinstance(done.model_wrapped, DistributedDataParallel),
        "sharded": all(
            isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters
        ),
        "weights": torch.cat([whole(p).flatten() for p in parameters]),
        "log": done.state.log_history[0],
        "eval": done.evaluate(),
    }
    if mode == "fsdp2-at-load":
        done.save_model(f"{folder}/{name}-trained")
    return result


def worker(rank, folder, port):
    meet(rank, port)
    allow_fsdp_on_cpu()
    results = {(m, name): two_processes(m, name, folder) for m in MODES for name in LAYER}
    torch.save(results, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in LAYER:
        build(name).save_pretrained(folder / name)
    spawn(worker, (str(folder), free_port()))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_hold_unequal_numbers_of_labels():
    counts = [row["labels"][1:].ne(-100).sum() for row in rows()]
    for step in (counts[:8], counts[8:]):  # micro-batches of two rows go to the ranks in turn
        assert sum(step[0:2] + step[4:6]) != sum(step[2:4] + step[6:8])


# The router loss is not additive over rows: the one process must form the same micro-batches.
@pytest.mark.parametrize(
    ("name", "size", "steps"), [("llama", 8, 1), ("llama", 2, 4), ("mixtral", 2, 4)]
)
@pytest.mark.parametrize("mode", MODES)
def test_equals_one_process(tmp_path, ranks, mode, name, size, steps):
    model = build(name)
    before = weights(model)
    one = run(tmp_path, model, size=size, steps=steps)
    assert one.state.log_history[0]["clipped"] == 0.5
    expected = one.evaluate()
    for rank in ranks:
        actual = rank[mode, name]
        assert actual["replicated"] == (mode == "ddp")
        assert actual["sharded"] == (mode != "ddp")
        assert relative(actual["weights"] - before, weights(model) - before) < 1e-5
        assert actual["eval"]["eval_ce"] == pytest.approx(expected["eval_ce"], rel=1e-6)
        # A mean over batches, which two processes group and fill up otherwise.
        assert actual["eval"]["eval_loss"] == pytest.approx(expected["eval_loss"], rel=0.02)
        assert actual["log"].keys() == one.state.log_history[0].keys()
        for key, value in one.state.log_history[0].items():
            assert actual["log"][key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("name", LAYER)
def test_a_model_sharded_at_load_is_saved_whole(folder, ranks, name):
    model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-trained")
    assert torch.equal(weights(model), ranks[0]["fsdp2-at-load", name]["weights"])
