"""The parts of a run, built from its config."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from simreg.baselines import registry
from simreg.depths import AtDepths
from simreg.loss import SimRegLoss
from simreg.objectives import Objective, Sum
from simreg.recipe import models
from simreg.recipe.config import WSD_DECAY, OptimConfig, RunConfig
from simreg.recipe.data import Corpus
from simreg.recipe.errors import UserError
from simreg.recipe.head import start_at_unigram
from simreg.recipe.processes import check_met, check_place, check_replicated, rank, world_size

_ACCELERATE = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_")
"""How the variables begin by which accelerate is told of precision and compilation."""


def model(config: RunConfig, corpus: Corpus) -> PreTrainedModel:
    """The model of a run at its start, float32 on the CPU."""
    built = models.build(
        config, tokenizer_size=corpus.vocab_size, eos_token_id=corpus.tokenizer.eos_token_id
    )
    if config.model.head_bias is not None:
        start_at_unigram(built, corpus.train.tokens)
    return built


def objective(config: RunConfig, model: PretrainedConfig) -> Objective | None:
    """The auxiliary losses of a run as one, or None where there is none.

    What they initialise follows from the seed, and takes nothing from the model's random numbers.
    """
    own, other = config.simreg, config.auxiliary
    simreg: Objective | None = None
    if own.weight > 0:
        simreg = SimRegLoss(
            weight=own.weight,
            temperature=own.temperature,
            variant=own.variant,
            chunk_size=own.chunk_size,
            push=own.push,
            push_above=own.push_above,
        )
        if offsets := own.within(model.num_hidden_layers):
            simreg = AtDepths(simreg, list(offsets), offset=list(offsets.values()))
    if other.name is None:
        return simreg
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        auxiliary = registry.build(
            other.name,
            other.options,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
        )
    return Sum(simreg, auxiliary)


def collator(config: RunConfig) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Rows to a batch; it carries document ids only if the loss is to stay within documents."""
    keys = ["input_ids", "labels"]
    active = config.simreg.weight > 0 or config.auxiliary.name is not None
    if active and config.simreg.scope == "document":
        keys.append("segments")

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in keys}

    return collate


def micro_batch(config: RunConfig) -> int:
    """Rows a forward pass of one process; UserError if the batch does not divide evenly."""
    processes = world_size()
    rows, parts = config.train.batch_rows, config.train.accumulate * processes
    if rows % parts:
        raise UserError(
            f"train.batch_rows={rows} must be a multiple of "
            f"train.accumulate={config.train.accumulate} times the {processes} processes"
        )
    return rows // parts


def device() -> torch.device:
    """The accelerator, if there is one, else the CPU: what transformers trains on."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def precision(config: RunConfig) -> str:
    """Of a run on this machine: bf16 or fp32."""
    return "bf16" if use_bf16(config.train.precision) else "fp32"


def described(config: RunConfig, total: int, active: int, processes: int = 1) -> str:
    """A run's model of so many parameters, and where it is trained, in words."""
    of_active = "" if active == total else f" ({models.millions(active)} active)"
    where = device().type + (f" × {processes}" if processes > 1 else "")
    return (
        f"{config.model.preset}: {models.millions(total)} parameters{of_active}, "
        f"{where} {precision(config)}"
    )


def hook_guards(*configs: RunConfig) -> AbstractContextManager[object]:
    """Within, compiled graphs ask whether the model has the hooks they were made with.

    By default they serve every model of its class, so that an arm that follows the baseline in a
    process would get the baseline's, without the hook.
    """
    if not any(config.train.compile for config in configs):
        return nullcontext()
    guards: AbstractContextManager[object] = torch._dynamo.config.patch(
        skip_nnmodule_hook_guards=False
    )
    return guards


def use_bf16(precision: str) -> bool:
    """Whether to run under bfloat16 autocast."""
    cuda = torch.cuda.is_available()
    supported = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and cuda and not supported:
        raise UserError(
            f"train.precision=bf16, but {torch.cuda.get_device_name()} has no bfloat16: use fp32"
        )
    return supported if precision == "auto" else precision == "bf16"


@contextmanager
def governed(config: RunConfig) -> Iterator[None]:
    """Within, precision and compilation are what `config` says, whatever a launcher has said."""

    def replace(told: dict[str, str]) -> dict[str, str]:
        names = [name for name in os.environ if name.startswith(_ACCELERATE)]
        before = {name: os.environ.pop(name) for name in names}
        os.environ |= told
        return before

    told = {
        "ACCELERATE_MIXED_PRECISION": "bf16" if use_bf16(config.train.precision) else "no",
        "ACCELERATE_DYNAMO_BACKEND": "inductor" if config.train.compile else "no",
    }
    before = replace(told)
    try:
        with hook_guards(config):
            yield
    finally:
        replace(before)


def training_arguments(config: RunConfig, output: Path) -> TrainingArguments:
    """transformers' arguments; when to log, evaluate and save is the run's own callback's.

    Where there are several processes, this is where they meet.
    """
    train, optim = config.train, config.optim
    check_replicated()
    on_cpu = device().type == "cpu"
    told = rank(), world_size()  # of the environment, to which accelerate adds
    if on_cpu and world_size() > 1:
        check_place()
        # Joined here, since with use_cpu transformers 5.23 leaves ddp_timeout out.
        PartialState(cpu=True, timeout=timedelta(seconds=train.timeout))
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=micro_batch(config),
        per_device_eval_batch_size=micro_batch(config),
        gradient_accumulation_steps=train.accumulate,
        learning_rate=optim.lr,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        warmup_steps=round(optim.warmup * config.steps),
        **_schedule(optim, config.steps),
        seed=train.seed,
        use_cpu=on_cpu,
        bf16=use_bf16(train.precision),
        torch_compile=config.train.compile,
        **_activation_checkpointing(train.gradient_checkpointing),
        train_sampling_strategy="sequential",  # the data set comes in its order
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_timeout=train.timeout,
        # Every parameter of every preset takes part in each step, experts too.
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    check_met(told, (arguments.process_index, arguments.world_size))
    # Several GPUs need a process each (torchrun): nn.DataParallel would split the rows unasked.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _schedule(optim: OptimConfig, steps: int) -> dict[str, Any]:
    if optim.schedule == "cosine":
        kwargs: dict[str, Any] = {"min_lr_rate": optim.min_lr_ratio}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    warmup = round(optim.warmup * steps)
    decay = min(round(WSD_DECAY * steps), steps - warmup)
    kwargs = {
        "num_decay_steps": decay,
        "decay_type": "linear",
        "min_lr_ratio": optim.min_lr_ratio,
    }
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}


def _activation_checkpointing(on: bool) -> dict[str, Any]:
    """transformers 5.23 renamed the argument and deprecates the old name."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    return {name if name in fields else "gradient_checkpointing": on}


def _require_login() -> None:
    """UserError where Weights & Biases would ask who one is, or fail."""
    import wandb

    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and wandb.api.api_key is None:
        raise UserError(
            "train.report_to=wandb, but nobody is logged in: `wandb login`, or set "
            "WANDB_MODE=offline"
        )


def reporter(name: str, folder: Path, step: int) -> list[TrainerCallback]:
    """The callback that sends the logs to a tracker; a run resumed at `step` goes on from there."""
    if name == "none":
        return []
    if importlib.util.find_spec(name) is None:
        raise UserError(f"train.report_to={name}, but {name} is not installed: pip install {name}")
    if name == "wandb":
        _require_login()
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=step + 1)
        return [TensorBoardCallback(writer)]  # type: ignore[no-untyped-call]
    callback: Any = WandbCallback if name == "wandb" else TrackioCallback
    return [callback()]
