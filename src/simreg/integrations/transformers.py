"""A `transformers.Trainer` that adds an objective on the final hidden states to cross-entropy.

trainer = SimRegTrainer(model, args, train_dataset=rows, objective=SimRegLoss(weight=0.3))
trainer.train()
"""

import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from simreg.capture import IGNORE_INDEX, Attached, logits_of, shift_left
from simreg.decoders import aligns_labels
from simreg.integrations.documents import documents
from simreg.integrations.following import Following, as_schedule, collapsed, regularizer
from simreg.integrations.place import Layers, Module, attach_at, kept
from simreg.integrations.window import Window, wide
from simreg.objectives import Objective, moved, switched_off
from simreg.schedule import SCHEDULE, Schedule, ScheduleName

SEGMENTS = "segments"
OBJECTIVE = "training_objective"
"""The submodule under which a model in training keeps an objective that has weights of its own."""
RECORDED = frozenset(
    {"ce", "clipped", "epoch", "grad_norm", "learning_rate", "router_loss", "simreg_weight"}
)
"""What training records hold besides; metrics of an objective that are called so get a prefix."""


class SimRegTrainer(Trainer):
    """`Trainer` with `objective` added to the loss, for causal language models.

    Batches hold `input_ids`, `labels` and optionally `segments` (`[B, L]` document ids, which only
    the objective sees). Without these, rows that a padding-free collator packed
    (`DataCollatorWithFlattening`) are told apart by its `seq_idx`, its `position_ids`, which rise
    within a document, or its `cu_seq_lens_q`. Both terms have the divisor that the Trainer gives
    cross-entropy, so gradient accumulation and data parallelism equal one large batch; so has the
    router loss of mixture-of-experts models, which plain `Trainer` adds up over micro-batches.
    Evaluation is without the objective. `objective=None`, or one whose `weight` is 0, is the plain
    Trainer; the weight is looked at in every step, unless the objective owns parameters or buffers.

    `module` and `layers` are those of `attach`, for a model without a `get_decoder()`; either may
    be a function of the model, as it must be with `model_init`. `shift=False` is for a model whose
    `labels` hold the token after each position already; unless it is given, they are taken as
    models of transformers take them, which of most means that they are shifted.

    While it trains, the `weight` of a `SimRegLoss` follows `schedule`: from what it is in the first
    step, by default down to 0 over the run ("decay"). With "constant" it is left alone, and so it
    is from where a callback, say, has set it to another value.

    Training records gain, averaged over the tokens since the last record and over processes: `ce`
    (cross-entropy alone; not with `compute_loss_func`, a label smoother, or the `compute_loss` of a
    class between this one and `Trainer`, whose loss is then left as it is), `router_loss` (without
    its coefficient), the objective's metrics (its `loss`, unweighted, as `simreg`), and `clipped`,
    the fraction of steps whose gradient norm exceeded `max_grad_norm`; `simreg_weight` is λ of the
    last step. Evaluation gains `eval_ce`,
    where the model's logits are those of its labels: cross-entropy alone per token of the whole
    set, each row counted once, summed in float64 (on several processes a padding-free collator's
    rows hold the samples again that fill up the last round).

    Training checkpoints keep the model's own parameter names, so that resuming is exact for models
    whose published layout differs; `save_model` writes the published layout, as in `Trainer`.

    Parameters and persistent buffers that the objective owns are a submodule of the model from here
    on, `training_objective`, so that they are optimized and saved in checkpoints with it;
    `save_model` leaves them out, and another SimRegTrainer of the model removes them.

    Raises:
        ValueError: an unknown `schedule`; `metric_for_best_model` is a cross-entropy, and the
            highest is to count as the best; under `torch.nn.DataParallel`, with sequences sharded
            over processes, or for an objective with parameters or buffers under FSDP, with PEFT or
            with `ddp_find_unused_parameters=True` (False is the default there).
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        module: Module | None = None,
        layers: Layers | None = None,
        shift: bool | None = None,
        schedule: Schedule | ScheduleName = SCHEDULE,
        **kwargs: Any,
    ) -> None:
        # What it owns, as it came: `model_init` is to begin anew with it too.
        owned = objective.state_dict() if isinstance(objective, nn.Module) else {}
        self._objective = None if owned and _idle(objective) else objective
        self.schedule = as_schedule(schedule)
        self._place, self._shift = (module, kept(layers)), shift
        self.regularizer = regularizer(objective)
        self._following: Following | None = None  # while it trains
        self._reg: Attached | None = None
        self._owned = {name: value.clone() for name, value in owned.items()}
        self._window = Window()
        self._warned = False  # of collapsed embeddings
        self._applied = False  # the objective, in this training
        self._evaluated: list[Tensor] | None = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "args: DataParallel (n_gpu > 1) is not supported; launch with torchrun"
            )
        metric = self.args.metric_for_best_model or ""
        if self.args.greater_is_better and (metric == "ce" or metric.endswith("_ce")):
            raise ValueError(  # what transformers infers for names that do not end in "loss"
                f"args: the lowest {metric} is the best: set greater_is_better=False"
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "args: context and sequence parallelism are not supported; set both to 1"
            )
        if getattr(objective, "group", None) is not None:
            raise ValueError(
                "objective: sequences spread over processes are not supported; each would lose the "
                "label of its last token"
            )
        self._attach(self.model)

    def _attach(self, model: nn.Module | None) -> None:
        if self._reg is not None:
            self._reg.detach()
            self._reg = None
        if OBJECTIVE in getattr(model, "_modules", {}):  # another trainer's
            delattr(model, OBJECTIVE)
        if model is None or self._objective is None:
            return
        self._refuse_owned(model)
        try:
            self._reg = attach_at(model, self._objective, *self._place)
            self._reg.listening = False  # but for the steps of training: else it would hold graphs
            weakref.finalize(self, self._reg.detach).atexit = False
        except ValueError:
            if _idle(self._objective):  # the plain Trainer, unless it gets a weight
                return
            raise
        if isinstance(self._objective, nn.Module):
            self._objective.to(self.args.device)
            if self._owned:
                model.add_module(OBJECTIVE, self._objective)

    def _refuse_owned(self, model: nn.Module) -> None:
        """ValueError where what the objective owns can be no part of the model."""
        if isinstance(self._objective, nn.Module) and self._owned:
            own = (
                f"objective: {type(self._objective).__name__} has parameters or buffers of its own"
            )
            if self.is_fsdp_enabled:
                raise ValueError(f"{own}, which FSDP is not supported with; use DDP")
            if getattr(model, "peft_config", None):
                raise ValueError(
                    f"{own}, which PEFT is not supported with: its checkpoints hold adapters alone"
                )

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`, but DDP does not look for unused parameters if the objective has some.

        It looks in the graph of the model's outputs, where those of the objective are not.
        """
        given = self.args.ddp_find_unused_parameters
        if self._objective is not None and self._owned:
            if given:
                raise ValueError(
                    f"args: {type(self._objective).__name__} has parameters or buffers of its own, "
                    "which ddp_find_unused_parameters=True is not supported with"
                )
            self.args.ddp_find_unused_parameters = False
        try:
            super().create_accelerator_and_postprocess()
        finally:
            self.args.ddp_find_unused_parameters = given

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As `Trainer`; of what the objective owns, matrices alone: no scale or temperature."""
        kept = {n for n, p in model.named_parameters() if p.ndim > 1 or OBJECTIVE not in n}
        return [name for name in super().get_decay_parameter_names(model) if name in kept]

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model by `model_init`, with the objective attached, as it came."""
        model = super().call_model_init(trial)
        if isinstance(self._objective, nn.Module) and self._owned:
            self._objective.load_state_dict(self._owned)
        self._attach(model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; afterwards the regularizer has the weight that it began with."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._following is not None:
                self._following.end()
            self._following = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Again with each batch size that `auto_find_batch_size` tries.
        self._window, self._applied = Window(), False
        if self._reg is not None:
            self._reg.forget()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; RuntimeError if the objective is not part of the loss."""
        loss = super().training_step(*args, **kwargs)
        if not self._applied and not _idle(self._objective):
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss leaves the objective out: call that of "
                "SimRegTrainer in it, or attach the objective yourself and leave objective out"
            )
        return loss

    def _follow_schedule(self) -> None:
        if self.regularizer is not None and self.is_in_train:
            if self._following is None:  # not before, as `model_init` may set the weight
                self._following = Following(self.regularizer, self.schedule)
            self._following.at(self.state.global_step / self.state.max_steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`Trainer`'s loss, its router loss rescaled; in training the objective is added."""
        if model.training:
            self._follow_schedule()
        inputs = dict(inputs)
        segments = inputs.pop(SEGMENTS, None)
        if segments is None and model.training and not _idle(self._objective):
            segments = documents(inputs)
        inputs.pop("skip_logits", None)  # fused heads: evaluation needs the logits of each row
        targets = self._targets(inputs)
        if self._reg is None and model.training and not _idle(self._objective):
            self._attach(self.model)  # which was refused while it had no weight, and is again
        with self._listening(model.training and not self._out_of_use()):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if targets is None and model.training and not _idle(self._objective):
            raise ValueError(
                "inputs: expected `labels` [B, L] in every training batch, for the objective"
            )
        if targets is not None:
            loss, router = self._share_router(loss, outputs, targets, num_items_in_batch)
            if model.training:
                loss = self._training_loss(loss, router, targets, segments, num_items_in_batch)
            elif self._evaluated is not None:
                self._record_rows(outputs, targets)
        return (loss, outputs) if return_outputs else loss

    def _targets(self, inputs: dict[str, Any]) -> Tensor | None:
        """The token after each position, `[B, L]`; None without labels of that shape.

        Padding-free collators give it themselves.
        """
        shifted: Tensor | None = inputs.get("shift_labels")
        labels: Tensor | None = inputs.get("labels")
        if shifted is not None:
            return shifted
        if labels is None or labels.ndim != 2 or labels.is_floating_point():
            return None
        if self._shift is None:
            assert self.model is not None
            self._shift = not aligns_labels(self.model)
        return shift_left(labels) if self._shift else labels

    @contextmanager
    def _listening(self, on: bool) -> Iterator[None]:
        if self._reg is None:
            yield
            return
        self._reg.listening = on
        try:
            yield
        except BaseException:  # what a failed pass left would keep its memory
            self._reg.forget()
            raise
        finally:
            self._reg.listening = False

    def _out_of_use(self) -> bool:
        """Whether the objective is left out: one that owns weights never is, for DDP needs them."""
        return _idle(self._objective) and not self._owned

    def _share_router(
        self, loss: Tensor, outputs: Any, targets: Tensor, num_items: Tensor | int | None
    ) -> tuple[Tensor, tuple[Tensor | float, Tensor] | None]:
        """The loss with its router loss weighed, and that weight and router loss, if there is one.

        The model adds it undivided in each micro-batch: it is to count by the share of tokens.
        """
        if not self._of_the_model():
            return loss, None
        router = _router_loss(self.accelerator.unwrap_model(self.model), outputs)
        if router is None or num_items is None or not self.model_accepts_loss_kwargs:
            return loss, router
        coefficient, balance = router
        share = targets.ne(IGNORE_INDEX).sum() / num_items
        loss = loss + self._loss_scale(num_items) * (share - 1) * coefficient * balance
        return loss, (share * coefficient, balance)

    def _training_loss(
        self,
        loss: Tensor,
        router: tuple[Tensor | float, Tensor] | None,
        targets: Tensor,
        segments: Tensor | None,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The Trainer's loss of a micro-batch, completed; its parts go into the logging window."""
        scale = self._loss_scale(num_items)
        tokens = targets.ne(IGNORE_INDEX).sum()
        if self._of_the_model():
            cross_entropy = loss.detach() / scale
            if router is not None:
                weight, balance = router
                cross_entropy = cross_entropy - weight * balance.detach()
                self._window.add("router_loss", balance, tokens)
            divisor = tokens if num_items is None else num_items
            self._window.add("ce", cross_entropy * divisor / tokens.clamp_min(1), tokens)
        if self._reg is not None and not self._out_of_use():
            self._applied = True
            device = self._reg.device
            labels, ids, items = (moved(v, device) for v in (targets, segments, num_items))
            added = self._reg(labels, ids, num_items=items, shift=False)
            loss = loss + scale * self._undivided(num_items) * added.to(loss.device)
            metrics = {name: v.to(tokens.device) for name, v in self._reg.metrics.items()}
            for name, value in metrics.items():
                # A cosine is a mean over the tokens that have one, the others over all tokens.
                share = metrics.get(name.replace("_cos", "_fraction"), 1) if "_cos" in name else 1
                name = "simreg" if name == "loss" else name
                name = f"simreg_{name}" if name in RECORDED else name
                self._window.add(name, value, tokens * share)
        return loss

    def _of_the_model(self) -> bool:
        """Whether the loss is what the model returned: cross-entropy, and a router's loss."""
        parent: Any = super().compute_loss
        plain = getattr(parent, "__func__", None) is Trainer.compute_loss
        return plain and self.label_smoother is None and self.compute_loss_func is None

    def _loss_scale(self, num_items: Tensor | int | None) -> int:
        """What `Trainer.compute_loss` multiplies by to undo the mean over data-parallel ranks."""
        divides = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if num_items is None or not divides or not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _undivided(self, num_items: Tensor | int | None) -> float:
        """What makes up for `training_step`, which divides a loss by the number of micro-batches
        unless it counts as divided already: SimReg's is, if `num_items` is given."""
        count: int = getattr(self, "current_gradient_accumulation_steps", 1)
        known = hasattr(Trainer, "loss_is_scaled_for_ga")  # older ones do not look at it
        divided = self.loss_is_scaled_for_ga if known else None
        if divided is None:
            of_model = self.model_accepts_loss_kwargs and num_items is not None
            divided = of_model or self.compute_loss_func is not None
        if num_items is None:
            return 1 / count if divided else 1
        return 1 if divided else count

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        limit = self.args.max_grad_norm or math.inf  # 0: no clipping
        clipped = torch.as_tensor(whole, device=self.args.device) > limit
        self._window.add("clipped", clipped, torch.ones_like(clipped))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training records gain the means of the logging window."""
        # The Trainer's own records: a user's may be of one process alone, and means need all.
        if {"loss", "learning_rate"} <= logs.keys():
            logs = {**logs, **self._window.means(self.accelerator)}
            if self.regularizer is not None:
                logs["simreg_weight"] = self.regularizer.weight
                done = self.state.global_step / max(1, self.state.max_steps)
                said = collapsed(logs.get("neg_cos"), done)
                if said and not self._warned:
                    self._warned = True
                    warnings.warn(said, stacklevel=2)
            self._window = Window()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with `<prefix>_ce` among the metrics."""
        self._evaluated = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._evaluated and output.metrics is not None:
                total, tokens = torch.cat(self._evaluated).sum(0).tolist()
                output.metrics[f"{metric_key_prefix}_ce"] = total / tokens if tokens else math.nan
        finally:
            self._evaluated = None
        return output

    def _record_rows(self, outputs: Any, targets: Tensor) -> None:
        logits = logits_of(outputs)
        if logits is None or logits.shape[:-1] != targets.shape:
            return  # of a sequence, say, or with a prompt's before them
        losses = F.cross_entropy(
            logits.detach().float().transpose(1, 2),
            targets,
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        rows = torch.stack([losses, targets.ne(IGNORE_INDEX)]).sum(2, dtype=wide(losses)).T
        # Every process gets all rows, without those that padded the last round.
        assert self._evaluated is not None
        self._evaluated.append(self.accelerator.gather_for_metrics(rows).cpu().double())

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Any]:
        """As `Trainer.prediction_step`; the model never sees `segments`."""
        inputs = {name: value for name, value in inputs.items() if name != SEGMENTS}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns.append(SEGMENTS)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; training checkpoints keep the model's own parameter names."""
        if not _internal_call or output_dir is None:  # None: by `push_to_hub`, to be published
            with published(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
                super().save_model(output_dir, _internal_call=_internal_call)
            return
        # Resuming loads by the model's names: what the published layout renames would be lost.
        with _own_names(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super().save_model(output_dir, _internal_call=True)


def _idle(objective: object) -> bool:
    return objective is None or switched_off(objective)


def _router_loss(model: nn.Module, outputs: Any) -> tuple[float, Tensor] | None:
    """The coefficient and value of the load-balancing loss that is part of the model's loss."""
    balance = outputs.get("aux_loss") if isinstance(outputs, dict) else None
    if not isinstance(balance, Tensor):
        return None
    config: Any = getattr(model, "config", None)
    for owner in (model, config, getattr(config, "text_config", None)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(coefficient := getattr(owner, name, None), (int, float)):
                return float(coefficient), balance
    raise ValueError(
        f"model: {type(model).__name__} returned an aux_loss, but neither it nor its config has a "
        "router_aux_loss_coef, so its share of the loss is unknown"
    )


@contextmanager
def published(model: nn.Module) -> Iterator[None]:
    """Take what an objective owns out of the model, for as long as it is being saved."""
    objective = model._modules.pop(OBJECTIVE, None)
    try:
        yield
    finally:
        if objective is not None:
            model.add_module(OBJECTIVE, objective)


@contextmanager
def _own_names(model: nn.Module) -> Iterator[None]:
    """Make `save_pretrained` of this one instance keep the names and shapes of its state dict."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    vars(model)["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]
