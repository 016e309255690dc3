"""A Lightning callback that adds an objective on the final hidden states to the training loss.

trainer = Trainer(callbacks=[SimRegCallback(SimRegLoss(weight=0.3))])
trainer.fit(module)  # whose `training_step` returns cross-entropy
"""

import inspect
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import update_wrapper
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from simreg.capture import Attached
from simreg.integrations.following import Following, as_schedule, regularizer
from simreg.integrations.place import Layers, Module, attach_at, kept
from simreg.objectives import Objective
from simreg.schedule import SCHEDULE, Schedule, ScheduleName

Field = str | Callable[[Any], Tensor]


class SimRegCallback(Callback):
    """Adds `objective` to what `training_step` returns, a loss or a mapping with a "loss".

    Lightning lets no callback change the loss, so for the time of `fit` the `training_step` of the
    module is wrapped: what it returns is completed within the forward pass of DDP. It must run one
    forward pass of the language model. The objective's divisor is the labels of the batch, as that
    of the usual mean cross-entropy; Lightning then averages over accumulated batches and ranks,
    which equals one large batch where all hold the same number of labels. Logs the objective's
    metrics as `simreg/loss` (unweighted) and so on, of the last micro-batch of the first process,
    as Lightning's `log` does. Validation is without the objective.

    Args:
        objective: such as `SimRegLoss(weight=0.3)`. Its own parameters, if any, are not trained.
        labels: key of the batch, or a function of the batch: `[B, L]` int64, -100 where ignored.
        segments: the same for the document of each position, `[B, L]`; None: rows are whole.
        shift: False if position t of the labels already holds the token that follows it.
        module: the submodule whose output enters the LM head, or a function of the LightningModule
            that gives it; None: the decoder of the first causal LM of transformers in it that has
            something to train.
        layers: for an objective that reads hidden states within the model (`AtDepths`): all its
            layers in their order, or a function of the LightningModule; None, without `module`:
            those of the decoder.
        schedule: what the `weight` of a `SimRegLoss` follows during `fit`, from what it is at the
            start, by default down to 0 over the run ("decay"), whose length `max_steps` or
            `max_epochs` says (1000 epochs to Lightning, if you give neither). With "constant" it is
            left alone, and so it is where both are -1, and from where another callback, say, has
            set it to another value.

    Raises:
        ValueError: an unknown `schedule`; in `fit`: under manual optimization, or where no decoder
            is found.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        labels: Field = "labels",
        segments: Field | None = None,
        shift: bool = True,
        module: Module | None = None,
        layers: Layers | None = None,
        schedule: Schedule | ScheduleName = SCHEDULE,
    ) -> None:
        self.objective = objective
        self.labels, self.segments, self.shift = labels, segments, shift
        self.module, self.layers = module, kept(layers)
        self.schedule = as_schedule(schedule)
        self._reg: Attached | None = None
        self._following: Following | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the objective and wrap `training_step`."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "pl_module: expected automatic optimization; in a training_step that calls "
                "manual_backward, attach the objective yourself and add it to the loss there"
            )
        if isinstance(self.objective, nn.Module):  # it may have a state
            self.objective.to(pl_module.device)
        self._reg = self._attach(pl_module)
        vars(pl_module)["training_step"] = _Step(self, pl_module)
        if (found := regularizer(self.objective)) is not None:
            self._following = Following(found, self.schedule)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the objective the weight that it has in this step."""
        done = _done(trainer, batch_idx)
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if self._following is not None and done is not None and begins:
            self._following.at(done)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the module as it was."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._detach(pl_module)

    def _attach(self, pl_module: LightningModule) -> Attached:
        part = pl_module if self.module is not None else _language_model(pl_module)
        return attach_at(pl_module, self.objective, self.module, self.layers, part=part)

    def _detach(self, pl_module: LightningModule) -> None:
        if self._reg is None:
            return
        self._reg.detach()
        self._reg = None
        if self._following is not None:
            self._following.end()
            self._following = None
        # The fit is over for all callbacks, and the last to come need not be the first to leave.
        attributes = vars(pl_module)
        while isinstance(step := attributes.get("training_step"), _Step):
            del attributes["training_step"]
            attributes.update(step.before)

    def _complete(self, output: STEP_OUTPUT, batch: Any, pl_module: LightningModule) -> STEP_OUTPUT:
        assert self._reg is not None
        if output is None:  # a batch that is skipped
            self._reg.forget()
            return None
        if not pl_module.trainer.training:  # validation may be by training_step
            return output
        segments = None if self.segments is None else _field("segments", batch, self.segments)
        labels = _field("labels", batch, self.labels)
        added = self._reg(labels, segments, shift=self.shift)
        metrics = {f"simreg/{key}": value for key, value in self._reg.metrics.items()}
        if (found := regularizer(self.objective)) is not None:
            metrics["simreg/weight"] = torch.tensor(found.weight, dtype=torch.float32)
        pl_module.log_dict(metrics, on_step=True, on_epoch=False)
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + added}
        return output + added


def _language_model(module: nn.Module) -> nn.Module:
    """The first causal LM of transformers in a module that is not frozen, as a teacher is."""
    models = [m for m in module.modules() if callable(getattr(m, "get_decoder", None))]
    trained = (m for m in models if any(p.requires_grad for p in m.parameters()))
    return next(trained, next(iter(models), module))


class _Step:
    """The `training_step` of a module, completed by a callback."""

    def __init__(self, callback: SimRegCallback, module: LightningModule) -> None:
        self.before = {k: v for k, v in vars(module).items() if k == "training_step"}
        self._callback, self._module, self._step = callback, module, module.training_step
        # Lightning reads the signature, and looks behind one wrapper for it.
        update_wrapper(self, inspect.unwrap(self._step))

    def __call__(self, batch: Any, *rest: Any, **named: Any) -> STEP_OUTPUT:
        return self._callback._complete(self._step(batch, *rest, **named), batch, self._module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copy of the module has (EMA): its own step, without the callback's objective."""
        return deepcopy(self._step, memo)


def _done(trainer: Trainer, batch: int) -> float | None:
    """The part of the fit before this batch, by its steps or epochs, whatever is further."""
    parts = []
    if trainer.max_steps > 0:
        parts.append(trainer.global_step / trainer.max_steps)
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    if epochs > 0 and batches < math.inf:
        parts.append((trainer.current_epoch + batch / batches) / epochs)
    return max(parts, default=None)


def _field(name: str, batch: Any, field: Field) -> Tensor:
    if not isinstance(field, str):
        return field(batch)
    try:
        value: Tensor = batch[field]
    except (KeyError, TypeError, IndexError):
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name}: the batch has no {field!r} (it is {found}): give a key, or a function of the "
            "batch"
        ) from None
    return value
