"""The real torchtitan trainer, on gloo with 1, 2 and 4 processes, against one process."""

import itertools
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from simreg import simreg_loss
from tests.integrations import titan_cpu
from tests.processes import spawn

pytestmark = pytest.mark.skipif(find_spec("torchtitan") is None, reason="needs torchtitan")

DEEPSEEK = {"config": "deepseek_v3_debugmodel_simreg"}
TP, PP, CP, EP, REPLICATE, BATCH = (
    "parallelism.tensor_parallel_degree",
    "parallelism.pipeline_parallel_degree",
    "parallelism.context_parallel_degree",
    "parallelism.expert_parallel_degree",
    "parallelism.data_parallel_replicate_degree",
    "training.local_batch_size",
)
BACKEND, SP, SCHEDULE = (
    "parallelism.spmd_backend",
    "parallelism.enable_sequence_parallel",
    "parallelism.pipeline_parallel_schedule",
)
DOCUMENTS, CHUNKS = {"loss.scope": "document"}, {"loss.chunk_size": 12, "loss.variant": "decoupled"}
COMPILE = {"compile.enable": True, "compile.backend": "aot_eager"}
DEPTHS = {"loss.depths": [0.25, 0.5], "loss.depths_offset": [-2, 1]}  # two of three layers

# name: (what one process does, or None; how else to do it). The global batch is 4 rows.
ONE = {
    "row": (None, {}),
    "document": (None, DOCUMENTS),
    "chunks": (None, CHUNKS),
    "deepseek": (None, {**DEEPSEEK, **DEPTHS}),
    "depths": (None, DEPTHS),
    "document, depths": (None, {**DOCUMENTS, **DEPTHS}),
    "accumulation": ("depths", {BATCH: 1, "training.global_batch_size": 4, **DEPTHS}),
    "cross-entropy in one chunk": ("row", {"loss.num_chunks": 1}),
    "full activation checkpointing": ("depths", {"checkpointing": "full", **DEPTHS}),
    "constant": (None, {"loss.schedule": "constant"}),
    "compile": ("depths", {**COMPILE, **DEPTHS}),
    "compile, selective checkpointing, validation": (
        "depths",
        {**COMPILE, "checkpointing": "selective", "validator.enable": True, **DEPTHS},
    ),
    "spmd_types": ("row", {BACKEND: "spmd_types"}),
}
TWO = {
    "FSDP": ("depths", {BATCH: 2, **DEPTHS}),
    "FSDP, documents": ("document", {BATCH: 2, **DOCUMENTS}),
    "FSDP, full_dtensor": ("depths", {BATCH: 2, BACKEND: "full_dtensor", **DEPTHS}),
    "TP, SP": ("depths", {TP: 2, **DEPTHS}),
    "TP": ("chunks", {TP: 2, SP: False, **CHUNKS}),
    "TP, depths": ("depths", {TP: 2, SP: False, **DEPTHS}),
    "TP, SP, full_dtensor": (
        "document, depths",
        {TP: 2, BACKEND: "full_dtensor", **DOCUMENTS, **DEPTHS},
    ),
    "PP": ("row", {PP: 2, SCHEDULE: "1F1B"}),
    "PP, interleaved, documents": ("document", {PP: 2, **DOCUMENTS}),
    "EP": ("deepseek", {EP: 2, BATCH: 2, **DEEPSEEK, **DEPTHS}),
    "CP": ("depths", {CP: 2, **DEPTHS}),
    "CP, documents": ("document", {CP: 2, **DOCUMENTS}),
    "CP, chunks": ("chunks", {CP: 2, **CHUNKS}),
}
FOUR = {
    "FSDP, TP": ("depths", {TP: 2, BATCH: 2, **DEPTHS}),
    "HSDP": ("row", {REPLICATE: 2, BATCH: 1}),
    "PP, FSDP": ("document", {PP: 2, BATCH: 2, SCHEDULE: "1F1B", **DOCUMENTS}),
    "PP, TP": ("row", {PP: 2, TP: 2, SCHEDULE: "1F1B"}),
    "EP, FSDP": ("deepseek", {EP: 2, BATCH: 1, **DEEPSEEK, **DEPTHS}),
    "CP, TP": ("document, depths", {CP: 2, TP: 2, **DOCUMENTS, **DEPTHS}),
}

INSPECTED = {
    "loss.weight": 0.7,
    "loss.temperature": 0.2,
    "loss.variant": "in",
    "loss.chunk_size": 12,
    "loss.push": 2.0,
    "loss.push_above": 0.1,
    "loss.depths": [0.75, 0.5],  # the third and the second of four layers
    "loss.depths_offset": [2, -2],
}
SCOPES = ("row", "document")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A folder with initial weights, and what one process does from them."""
    folder = tmp_path_factory.mktemp("titan")
    jobs = {
        "seed": ("seed", {"config": "llama3_debugmodel_simreg"}),
        "seed of experts": ("seed", DEEPSEEK),
        **{name: ("train", job) for name, (_, job) in ONE.items()},
        **{f"inspect {s}": ("inspect", {**INSPECTED, "loss.scope": s}) for s in SCOPES},
        "head": ("vocabulary_parallel", {}),
        "stopped": ("train", {**DEPTHS, "loss.schedule": "stop", "loss.schedule_fraction": 0.4}),
    }
    return folder, work(folder, 1, jobs)


def work(folder, processes, jobs):
    """What the last of the processes got for each (task, job)."""
    spawn(titan_cpu.run, (processes, folder, jobs), processes)
    return json.loads((folder / f"{processes}.json").read_text())


def compare(found, wanted, name):
    """Equal within the rounding of float32, step by step."""
    assert len(found) == len(wanted) == 3
    for step, (mine, truth) in enumerate(zip(found, wanted, strict=True)):
        message = f"{name}, step {step}"
        tolerance = 2e-6
        if "EP" in name:  # experts compute in bfloat16; rounding can move a token to another
            tolerance = 1e-3 if step else 1e-4
        mine, truth = dict(mine), dict(truth)
        weight = 0.3 * (1 - step / 3)  # decays over the run
        regularizer = truth["loss"] + 2 * truth.get("earlier", 0)  # the mean of two
        assert truth["total"] == pytest.approx(truth["ce"] + weight * regularizer, rel=1e-6)
        gradients, true_gradients = mine.pop("gradients"), truth.pop("gradients")
        if "full_dtensor" in name:  # torchtitan logs the loss times the data-parallel ranks
            mine.pop("total"), truth.pop("total")
        assert mine == pytest.approx(truth, rel=tolerance, abs=1e-7), message
        least = 2e-5 if "EP" in name and step else None  # a router's norm is 2e-3 there
        assert gradients == pytest.approx(true_gradients, rel=tolerance, abs=least), message


def test_one_process(single):
    _, results = single
    for name, (reference, _) in ONE.items():
        if reference:
            compare(results[name], results[reference], name)
    assert results["row"][0]["total"] != pytest.approx(results["document"][0]["total"], rel=1e-3)
    # λ of 0.3 for two of three steps, then none: nothing is computed within the model.
    *_, last = results["stopped"]
    assert "earlier" in results["stopped"][1]
    assert "earlier" not in last
    assert last["total"] == pytest.approx(last["ce"], rel=1e-6)
    for step in results["constant"]:
        assert step["total"] == pytest.approx(step["ce"] + 0.3 * step["loss"], rel=1e-6)


def test_two_processes_equal_one(single):
    folder, results = single
    jobs = {name: ("train", job) for name, (_, job) in TWO.items()}
    heads = {"head": {}, "head, sequence parallel": {"sequence": True}}
    for name, job in heads.items():
        jobs[name] = "vocabulary_parallel", job
    found = work(folder, 2, jobs)
    for name, (reference, _) in TWO.items():
        compare(found[name], results[reference], name)
    for name in heads:
        mine, truth = found[name], results["head"]
        assert mine["total"] == pytest.approx(truth["total"], rel=1e-6)
        torch.testing.assert_close(torch.tensor(mine["gradient"]), torch.tensor(truth["gradient"]))


def test_four_processes_equal_one(single):
    folder, results = single
    found = work(folder, 4, {name: ("train", job) for name, (_, job) in FOUR.items()})
    for name, (reference, _) in FOUR.items():
        compare(found[name], results[reference], name)


@pytest.mark.parametrize("scope", SCOPES)
def test_loss_gradient_metrics_and_validation(single, scope):
    """Against cross-entropy of the hidden states that enter the head, and simreg_loss of these and
    of those that leave two layers, by the label two positions later."""
    folder, results = single
    found, seen = results[f"inspect {scope}"], torch.load(folder / f"{scope}.pt")
    hidden, labels = seen["hidden"].double().requires_grad_(), seen["labels"]
    documents = (seen["positions"] == 0).cumsum(1) if scope == "document" else None

    def cross_entropy(hidden, head):
        return F.cross_entropy((hidden @ head.double().T).flatten(0, 1), labels.flatten())

    later, before = torch.full_like(labels, -100), torch.full_like(labels, -100)
    for row, i in itertools.product(range(len(labels)), range(labels.shape[1] - 2)):
        joined = documents is None or documents[row, i] == documents[row, i + 2]
        if joined and (labels[row, [i, i + 2]] >= 0).all():
            later[row, i], before[row, i + 2] = labels[row, i + 2], labels[row, i]

    def regularizer(hidden, ids):
        return simreg_loss(
            hidden, ids, segments=documents, temperature=0.2, variant="in", push=2,
            push_above=0.1, chunk_size=12, backend="reference", reduction="sum",
        ) / (labels >= 0).sum()  # fmt: skip

    within = {n: seen[f"layer {n}"].double().requires_grad_() for n in (2, 3)}
    simreg = regularizer(hidden, labels)
    earlier = regularizer(within[3], later) + regularizer(within[2], before)
    ce = cross_entropy(hidden, seen["hidden head"])
    total = ce + 0.7 * (simreg + earlier)
    total.backward()
    assert found["total"] == pytest.approx(total.item(), rel=1e-6)
    assert found["loss"] == pytest.approx(simreg.item(), rel=1e-6)
    assert found["earlier"] == pytest.approx(earlier.item() / 2, rel=1e-6)
    for number, states in within.items():
        own = seen[f"gradient of layer {number}"] - seen[f"above {number}"]
        torch.testing.assert_close(own.double(), states.grad, rtol=1e-3, atol=1e-8)
    assert found["ce"] == pytest.approx(ce.item(), rel=1e-6)
    torch.testing.assert_close(seen["gradient"].double(), hidden.grad, rtol=1e-4, atol=1e-8)
    validated = cross_entropy(seen["validated"].double(), seen["validated head"]).item()
    assert found["validated"] == pytest.approx(validated, rel=1e-6)


def command(*arguments, folder, **environment):
    """Output of the shimmed entry point; raises if it fails or takes too long."""
    done = subprocess.run(
        [sys.executable, *arguments, "--dump_folder", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_command_line(tmp_path):
    """The command of the documentation, with the options that torchtitan makes of the config."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --local-ranks-filter 0"
    options = "--training.steps 1 --training.seq_len 64 --training.local_batch_size 2 "
    options += "--loss.weight 0.5 --loss.scope document --loss.chunk_size 32 --loss.depths 0.25 0.5"
    out = command(
        *torchrun.split(),
        *["-m", "tests.integrations.titan_cpu", "--module", "simreg.integrations.torchtitan"],
        *["--config", "llama3_debugmodel_simreg"],
        *options.split(),
        folder=tmp_path,
    )
    logged = {k: float(v) for k, v in re.findall(r"simreg/(\w+): (-?[\d.]+)", out)}
    total = float(re.search(r"loss: +([\d.]+) .*grad_norm", out)[1])
    metrics = {"ce", "loss", "weight", "pos_fraction", "pos_cos", "neg_fraction", "neg_cos"}
    assert set(logged) == metrics | {"earlier"}
    assert logged["weight"] == 0.5
    regularizer = logged["loss"] + 2 * logged["earlier"]  # the mean of two depths
    assert total == pytest.approx(logged["ce"] + 0.5 * regularizer, abs=1e-4)
    assert 0 < logged["pos_fraction"] < 1


def test_8b_on_64_ranks(tmp_path):
    """Two of its layers: one dry step of one of 8 x 8 ranks, on torchtitan's fake backend."""
    options = "--comm.mode fake_backend --parallelism.tensor_parallel_degree 8 "
    options += "--training.steps 1 --training.seq_len 64"
    out = command(
        *["-m", "tests.integrations.titan_cpu", "--module", "tests.integrations.titan_jobs"],
        *["--config", "short_8b"],
        *options.split(),
        folder=tmp_path,
        NGPU="64",
        LOCAL_RANK="0",
    )
    assert "simreg/loss" in out


CONFIGS = """
import json, sys
from dataclasses import dataclass, fields, replace
import torch
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer
from simreg.integrations.torchtitan import with_simreg
from simreg.integrations.torchtitan.rows import Rows, shard
from simreg.integrations.torchtitan.trainer import SimRegTrainer
from simreg.integrations.torchtitan.data import BOS, EOS, ByteTokenizer, StandardLibrary
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel_mtp
from torchtitan.models.llama3.config_registry import llama3_debugmodel, llama3_debugmodel_ce_loss

found = {}
for name in sys.argv[1:]:
    arguments = ["--module", "simreg.integrations.torchtitan", "--config", name]
    config = ConfigManager().parse_args([*arguments, "--loss.scope", "document"])
    config.model_spec.model.update_from_config(config=config)
    found[name] = type(config).__qualname__, config.loss.scope, config.loss.weight
plain = llama3_debugmodel()
assert with_simreg(plain).training.disable_cuda_graphs
assert not plain.training.disable_cuda_graphs
graphs = with_simreg(plain)
graphs.training = replace(graphs.training, disable_cuda_graphs=False)
try:
    SimRegTrainer(graphs)
except ValueError as error:
    found["graphs"] = str(error)
for wrong in (llama3_debugmodel_ce_loss, deepseek_v3_debugmodel_mtp):
    try:
        with_simreg(wrong())
    except ValueError as error:
        found[wrong.__name__] = str(error)

def refusal(depths, offset=1, **parallelism):
    config = with_simreg(plain, depths=depths, depths_offset=offset)
    config.parallelism = replace(config.parallelism, **parallelism)
    try:
        SimRegTrainer(config)
    except ValueError as error:
        return str(error)
found["pipeline"] = refusal([0.5], pipeline_parallel_degree=2)
found["twice"], found["last"] = refusal([0.5, 0.4]), refusal([0.5, 0.9])
found["offset"] = refusal([0.5], offset=[1 - plain.training.seq_len])
graphs = with_simreg(plain, schedule="constant", depths=[0.5])
graphs.training = replace(graphs.training, disable_cuda_graphs=False)
for what in ("depths", "tensor_parallel_degree", "context_parallel_degree"):
    if what != "depths":
        graphs.loss.depths, graphs.parallelism = [], replace(plain.parallelism, **{what: 2})
    try:
        SimRegTrainer(graphs)
    except ValueError as error:
        found[f"graphs with {what}"] = str(error)

for wrong in (
    {"scope": "doc"}, {"weight": -1}, {"schedule": "x"}, {"variant": "y"}, {"push": -1},
    {"depths": 0.5}, {"depths": [1.0]},
):
    try:
        with_simreg(llama3_debugmodel(), **wrong)
    except ValueError as error:
        assert str(error).split(":")[0].removeprefix("loss.") == next(iter(wrong)), error
    else:
        raise AssertionError(wrong)
try:
    with_simreg(object())
except ValueError as error:
    assert "expected a Trainer.Config" in str(error)

options = {
    "weight": 0.1, "temperature": 0.2, "variant": "in", "chunk_size": 12, "push": 2.0,
    "push_above": 0.3,
}
loss = with_simreg(plain, **options, scope="document").loss.build()
assert {name: getattr(loss.simreg, name) for name in options} == options
assert loss.scope == "document"
other = with_simreg(plain)
other.loss = plain.loss
try:
    SimRegTrainer(other)
except ValueError as error:
    found["loss"] = str(error)

class Mine(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

try:
    with_simreg(Mine.Config(**{each.name: getattr(plain, each.name) for each in fields(plain)}))
except ValueError as error:
    found["subclass"] = str(error)
assert shard(Rows(), None, "ptrr") == Rows()
try:
    shard(Rows(places=torch.arange(4)[None]), None, "ptrr")
except ValueError as error:
    found["ptrr"] = str(error)

tokenizer = ByteTokenizer.Config().build()
assert tokenizer.decode(tokenizer.encode("é!", add_bos=True, add_eos=True)) == "é!"
rows = iter(StandardLibrary(tokenizer, 4096, 0, 1, True))
first = [next(rows) for _ in range(8)]
for rank in (0, 1):
    shard = StandardLibrary(tokenizer, 4096, rank, 2, True)
    taken = iter(shard)
    for n in (0, 1):
        mine = next(taken)
        assert mine[1].equal(first[rank + 2 * n][1])
    resumed = StandardLibrary(tokenizer, 4096, rank, 2, True)
    resumed.load_state_dict(shard.state_dict())
    mine = next(iter(resumed))
    assert mine[0]["positions"].equal(first[rank + 4][0]["positions"])
finite = StandardLibrary(tokenizer, 500_000, 0, 1, False)
assert len(list(finite)) == len(list(finite)) > 1
for inputs, labels in first:
    ids, positions = inputs["input"], inputs["positions"]
    assert (ids == EOS).sum() == 0 and (labels == BOS).sum() == 0
    starts = (positions == 0).nonzero().flatten()
    assert starts[0] == 0 and (ids[starts[1:]] == BOS).all()
    assert (ids[1:] == BOS).sum() == len(starts) - 1
    assert (ids[1:] == labels[:-1])[positions[1:] > 0].all()
print(json.dumps(found))
"""


def test_configs_and_data():
    names = ["llama3_debugmodel", "llama3_8b", "deepseek_v3_debugmodel", "qwen3_moe_debug"]
    names = [f"{name}_simreg" for name in names]
    out = subprocess.run(
        [sys.executable, "-c", CONFIGS, *names], stdout=subprocess.PIPE, check=True, timeout=100
    )
    found = json.loads(out.stdout.splitlines()[-1])
    for name in names:
        assert found[name] == ["SimRegTrainer.Config", "document", 0.3]
    assert "unless loss.schedule is 'constant'" in found["graphs"]
    assert "ChunkedLossWrapper" in found["llama3_debugmodel_ce_loss"]
    assert "MTPLoss" in found["deepseek_v3_debugmodel_mtp"]
    assert "expected a ChunkedSimRegLoss.Config, got ChunkedLossWrapper" in found["loss"]
    assert "derive the trainer from SimRegTrainer" in found["subclass"]
    assert "'ptrr' permutes tokens by the attention mask" in found["ptrr"]
    assert "pipeline" in found["pipeline"]
    assert "loss.depths: [0.5, 0.4] are layers [3, 3] of 6" in found["twice"]
    assert "loss.depths: [0.5, 0.9] are layers [3, 6] of 6" in found["last"]
    assert "loss.depths_offset: [-2047] leaves no two tokens to compare" in found["offset"]
    for what in ("depths", "tensor_parallel_degree", "context_parallel_degree"):
        assert "expected True with loss.depths, which" in found[f"graphs with {what}"]
