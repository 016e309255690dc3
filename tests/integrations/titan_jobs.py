"""Small runs of torchtitan's trainer with SimReg, on synthetic rows; imported after the shims."""

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend

from simreg.integrations.torchtitan import ChunkedSimRegLoss, config_registry
from simreg.integrations.torchtitan.data import on_standard_library
from simreg.integrations.torchtitan.layers import Layers

STEPS, ROWS, LENGTH, VOCABULARY = 3, 4, 32, 40


class Rows(IterableDataset):
    """Packed rows of few tokens, with documents of all lengths and very unequal valid labels."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks

    def __iter__(self):
        generator = torch.Generator().manual_seed(7)
        number = 0
        while True:
            row = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
            starts = torch.rand(LENGTH, generator=generator) < 0.2
            starts[0] = True
            last = torch.where(starts, torch.arange(LENGTH), 0).cummax(0).values
            labels = row[1:].clone()
            labels[torch.rand(LENGTH, generator=generator) < (0.0, 0.7, 0.3)[number % 3]] = -100
            if number % self.ranks == self.rank:
                yield {"input": row[:-1], "positions": torch.arange(LENGTH) - last}, labels
            number += 1


class Loader(ParallelAwareDataloader):
    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        infinite: bool = True

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **unused):
        rows = Rows(dp_rank, dp_world_size)
        super().__init__(rows, dp_rank, dp_world_size, batch_size=local_batch_size)


def build(job, folder):
    """The trainer of a registered config: ROWS rows, float32, three layers, weights of a
    checkpoint; or so many layers, weights of the seed.

    `job` names the config and what else differs: {"parallelism.tensor_parallel_degree": 2, ...}.
    """
    options = {"config": "llama3_debugmodel_simreg", **job}
    name = options.pop("config")
    config = getattr(config_registry, name)()
    layers = options.pop("layers", None)
    del config.model_spec.model.layers[layers or 3 :]
    config.dataloader = Loader.Config()
    config.validator.dataloader = Loader.Config()
    config.validator.steps = 1
    config.validator.freq = STEPS
    config.training.local_batch_size = ROWS
    config.training.seq_len = LENGTH
    config.training.steps = STEPS
    config.training.mixed_precision_param = "float32"
    config.training.max_norm = 1e9  # no clipping, whose norm is rounded
    config.lr_scheduler.warmup_steps = 1
    config.activation_checkpoint = None
    config.metrics.log_freq = 1
    config.debug.seed = 0
    config.debug.enable_structured_logging = False
    config.dump_folder = str(folder)
    config.checkpoint.enable = config.checkpoint.load_only = layers is None
    config.checkpoint.initial_load_path = str(folder / name)
    if checkpointing := options.pop("checkpointing", None):
        config.activation_checkpoint = {"full": FullAC, "selective": SelectiveAC}[
            checkpointing
        ].Config()
    for key, value in options.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    return config.build()


def short_8b():
    """Two layers of the 8B config, on text that is here: a config for the command line."""
    config = on_standard_library(config_registry.llama3_8b_simreg())
    del config.model_spec.model.layers[2:]
    config.profiler.enable_profiling = config.metrics.enable_tensorboard = False
    return config


def seed(job, folder):
    """Initial weights, by torchtitan's own seed checkpoint."""
    name = job["config"]
    trainer = build(
        {
            **job,
            "checkpoint.create_seed_checkpoint": True,
            "checkpoint.load_only": False,
            "checkpoint.folder": f"{name}.seed",
            "checkpoint.initial_load_path": None,
        },
        folder,
    )
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()
    (folder / f"{name}.seed" / "step-0").rename(folder / name)


def train(job, folder, before=lambda trainer: None):
    """Train: per step the logged loss, SimReg's metrics, and the gradient norm of each tensor."""
    trainer = build(job, folder)
    before(trainer)
    steps = []
    log, step = trainer.metrics_processor.log, trainer.train_step

    def record(number, mean, highest, norm, extra_metrics=None):
        steps.append({"total": mean, "gradients": gradients(trainer.model_parts)})
        log(number, mean, highest, norm, extra_metrics)

    def advance(iterator):
        step(iterator)
        steps[-1] |= trainer.simreg_metrics
        assert_nothing_kept(trainer)

    trainer.metrics_processor.log, trainer.train_step = record, advance
    trainer.train()
    assert_nothing_kept(trainer)  # nor by the validation after the last step
    trainer.close()
    return steps


def assert_nothing_kept(trainer):
    """No hidden states within the model, whose graph would live on."""
    layers = trainer.loss_fn._layers
    assert layers is None or all(kept.states is None for kept in layers._kept)


def inspect(job, folder):
    """Train, and save what entered the head in the first step and in the first validation, and
    what left the second and the third of four layers."""
    seen, validated = {}, []

    def watch(trainer):
        def keep(module, inputs, output):
            kind = "hidden" if torch.is_grad_enabled() else "validated"
            if kind not in seen:
                seen[kind] = output.detach().clone()
                seen[f"{kind} head"] = whole(trainer.model_parts[0].lm_head.weight).detach().clone()
                if kind == "hidden":
                    output.register_hook(lambda gradient: seen.setdefault("gradient", gradient))

        def watch_layer(number):
            def leaves(module, inputs, output):
                if torch.is_grad_enabled() and f"layer {number}" not in seen:
                    seen[f"layer {number}"] = output.detach().clone()
                    output.register_hook(
                        lambda g: seen.setdefault(f"gradient of layer {number}", g.clone())
                    )

            def enters(module, inputs):
                if torch.is_grad_enabled() and f"above {number}" not in seen:
                    seen[f"above {number}"] = None
                    states = inputs[0].view_as(inputs[0])  # whose gradient is of what follows alone
                    states.register_hook(lambda g: seen.__setitem__(f"above {number}", g.clone()))
                    return states, *inputs[1:]

            layers = list(model.layers.children())
            layers[number - 1].register_forward_hook(leaves)
            layers[number].register_forward_pre_hook(enters)

        def validate(loss, step, extra_metrics=None):
            validated.append(loss)

        model = trainer.model_parts[0]
        model.norm.register_forward_hook(keep)
        watch_layer(2)
        watch_layer(3)
        trainer.metrics_processor.log_validation = validate

    steps = train({**job, "layers": 4, "validator.enable": True}, folder, watch)
    inputs, seen["labels"] = next(
        iter(Loader(None, dp_world_size=1, dp_rank=0, local_batch_size=ROWS))
    )
    seen["positions"] = inputs["positions"]
    torch.save(seen, folder / f"{job['loss.scope']}.pt")
    return {**steps[0], "validated": validated[0]}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(parts):
    """Norms in float64 of the gradients of the whole model, by parameter."""
    norms, everyone = {}, [None] * dist.get_world_size()
    for part in parts:
        for name, parameter in part.named_parameters():
            name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
            norms[name] = whole(parameter.grad).double().norm().item()
    dist.all_gather_object(everyone, norms)
    return {name: norm for some in everyone for name, norm in some.items()}


def vocabulary_parallel(job, folder):
    """Gradients of a layer under the hidden states, with the head sharded over the ranks.

    What the backend spmd_types makes of tensor parallelism: plain tensors, hidden states that are
    replicated and whose gradients are partial sums over the ranks, and layers whose states are the
    same on every rank or, with job["sequence"], spread along the row. Its FSDP needs a newer torch.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=world, pp=1, ep=1, world_size=world)
    dims.build_mesh()
    set_spmd_backend("spmd_types")
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False), torch.nn.Identity()])
    weight = model.layers[0].weight
    weight.data = torch.randn(8, 8, generator=generator)
    head = torch.randn(VOCABULARY, 8, generator=generator).chunk(world)[rank]
    inputs = torch.randn(ROWS, LENGTH, 8, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ce = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    config = ChunkedSimRegLoss.Config(loss_fn=ce, depths=[0.5])
    loss = config.build()
    loss.bind(dims, Layers(model, config.depths))
    loss.set_lm_head(torch.nn.Linear(8, len(head), bias=False))
    loss.lm_head.weight.data = head
    spread = world > 1 and job.get("sequence")
    with get_spmd_context(parallel_dims=dims)():
        hidden = model.layers[0](inputs.chunk(world, dim=1)[rank] if spread else inputs)
        if world > 1:
            tp = dims.get_mesh("tp").get_group()
            source = spmd.S(1) if spread else spmd.I
            hidden = spmd.redistribute(hidden, tp, src=source, dst=spmd.R)
        total, _ = loss(hidden, labels, torch.tensor(labels.numel()))
        total.backward()
        loss._layers.take = None  # at λ = 0 nothing is: it would fail
        loss.simreg.weight = 0.0
        loss(hidden.detach().requires_grad_(), labels, torch.tensor(labels.numel()))
    if spread:  # each rank has that of its part of the row
        dist.all_reduce(weight.grad)
    return {"total": total.item(), "gradient": weight.grad.tolist()}
