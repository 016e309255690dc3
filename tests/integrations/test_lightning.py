"""The Lightning callback: its gradients are those of the sum written by hand, and it leaves."""

import logging
import os
import socket
import warnings
from copy import deepcopy
from functools import wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from simreg import AtDepths, SimRegLoss, simreg_loss
from simreg.baselines.center import Center
from simreg.capture import shift_left
from simreg.integrations.lightning import SimRegCallback, _field
from simreg.objectives import Sum
from tests.processes import leave, spawn

WEIGHT, ROWS, LENGTH, WORDS = 0.7, 8, 24, 16
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=WORDS, num_attention_heads=2, use_cache=False, **sizes)
    return LlamaForCausalLM(config).double()


def make_rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(LENGTH) // 10).expand(ROWS, -1)
    return [{"labels": y, "documents": d} for y, d in zip(ids, documents, strict=True)]


class Module(LightningModule):
    """Cross-entropy alone, returned in one of the forms that Lightning takes."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.model, self.form = make_model(), form
        self.automatic_optimization = form != "manual"

    def training_step(self, batch: Any) -> Any:  # without batch_idx, which is optional
        if self.form == "fails":
            raise RuntimeError("in the step")
        if self.form == "skipped":
            return None
        labels = batch["labels"]
        loss = self.model(labels, labels=labels).loss
        if self.form == "looked at and skipped":
            self.form = "tensor"
            return None
        return {"loss": loss, "extra": 1} if self.form == "mapping" else loss

    def validation_step(self, batch: Any) -> None:
        labels = batch["labels"]
        self.log("val", self.model(labels, labels=labels).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Recorder(Callback):
    """Gradients of each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor | None]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        assert getattr(module, "form", None) != "mapping" or outputs["extra"] == 1

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        found = [p.grad for p in module.parameters()]
        self.gradients.append([None if grad is None else grad.clone() for grad in found])


def trainer(*callbacks: Callback, steps: int = 1, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"accelerator": "cpu", "enable_model_summary": False, **quiet, **options}
    return Trainer(max_steps=steps, callbacks=list(callbacks), **options)


def fit(
    callback: Callback, module: Module, *, batch: int = ROWS, steps: int = 1, **options: Any
) -> tuple[list[list[Tensor | None]], Trainer]:
    recorder = Recorder()
    run = trainer(callback, recorder, steps=steps, **options)
    run.fit(module, DataLoader(make_rows(), batch_size=batch))
    return recorder.gradients, run


def by_hand(documents: bool = False, weight: float = WEIGHT) -> tuple[list[Tensor], Tensor]:
    """Gradients of cross-entropy + λ × SimReg on all rows, and SimReg."""
    model, rows = make_model(), make_rows()
    labels = torch.stack([row["labels"] for row in rows])
    segments = torch.stack([row["documents"] for row in rows]) if documents else None
    hidden = model.get_decoder()(labels).last_hidden_state
    targets = shift_left(labels)
    ce = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
    added = simreg_loss(hidden, targets, segments=segments, push=2)
    (ce + weight * added).backward()
    return [p.grad for p in model.parameters()], added.detach()


@pytest.mark.parametrize("form", ["tensor", "mapping"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_those_of_the_sum(form: str, accumulate: int) -> None:
    callback = SimRegCallback(SimRegLoss(WEIGHT, push=2))
    gradients, run = fit(
        callback, Module(form), batch=ROWS // accumulate, accumulate_grad_batches=accumulate
    )
    expected, added = by_hand()
    torch.testing.assert_close(gradients, [expected])
    assert run.callback_metrics["simreg/weight"] == pytest.approx(WEIGHT)
    if accumulate == 1:
        torch.testing.assert_close(run.callback_metrics["simreg/loss"].double(), added)
    assert {"simreg/pos_cos", "simreg/neg_cos", "simreg/pos_fraction"} < set(run.callback_metrics)


def test_a_frozen_teacher_is_not_taken_for_the_model() -> None:
    class Distilled(Module):
        def __init__(self) -> None:
            super().__init__()
            student = self._modules.pop("model")
            self.teacher, self.model = make_model().requires_grad_(False), student

        def training_step(self, batch: Any) -> Any:
            self.teacher(batch["labels"])
            return super().training_step(batch)

    gradients, _ = fit(SimRegCallback(SimRegLoss(WEIGHT, push=2)), Distilled())
    torch.testing.assert_close([g for g in gradients[0] if g is not None], by_hand()[0])


def test_fields_by_key_and_by_function() -> None:
    expected, _ = by_hand(documents=True)
    keys = {"segments": "documents"}
    functions = {
        "labels": lambda batch: shift_left(batch["labels"]),
        "segments": lambda batch: batch["documents"],
        "shift": False,
        "module": lambda module: module.model.model.norm,
    }
    for options in (keys, functions):
        gradients, _ = fit(SimRegCallback(SimRegLoss(WEIGHT, push=2), **options), Module())
        torch.testing.assert_close(gradients, [expected])


class Weights(Callback):
    """λ of each optimizer step; it ends the fit after so many of them."""

    def __init__(self, objective: SimRegLoss, last: int) -> None:
        self.objective, self.last = objective, last
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.seen.append(self.objective.weight)
        trainer.should_stop = len(self.seen) == self.last


class Endless(IterableDataset):  # type: ignore[type-arg]
    """The rows, of a length that it does not say."""

    def __iter__(self) -> Any:
        return iter(make_rows())


@pytest.mark.parametrize(
    ("schedule", "length", "shares"),
    [
        ("decay", {"max_steps": 4}, [1, 0.75, 0.5, 0.25]),
        ("decay", {"max_epochs": 2}, [1, 0.5]),
        ("decay", {"max_epochs": 3, "max_steps": 2}, [1, 0.5]),  # whichever is first
        ("warmup", {"max_steps": -1, "max_epochs": -1}, [1, 1, 1]),  # it does not know the end
        ("constant", {"max_steps": 3}, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("rows", [make_rows(), Endless()], ids=["rows", "stream"])
def test_weight_follows_the_schedule(
    schedule: Any, length: Any, shares: list[float], rows: Any
) -> None:
    objective = SimRegLoss(WEIGHT)
    weights = Weights(objective, len(shares))
    callbacks = [SimRegCallback(Sum(None, objective), schedule=schedule), weights]
    run = trainer(*callbacks, accumulate_grad_batches=2, **({"steps": -1} | renamed(length)))
    run.fit(Module(), DataLoader(rows, batch_size=ROWS // 2))
    if length == {"max_epochs": 2} and isinstance(rows, Endless):
        shares = [1, 1]
    assert weights.seen == pytest.approx([WEIGHT * share for share in shares])
    assert objective.weight == WEIGHT


def renamed(length: dict[str, int]) -> dict[str, int]:
    return {key.replace("max_steps", "steps"): value for key, value in length.items()}


def test_weight_follows_epochs_where_accumulation_changes() -> None:
    objective = SimRegLoss(WEIGHT)
    weights = Weights(objective, 6)
    more = GradientAccumulationScheduler({0: 1, 1: 2})
    within = SimRegCallback(AtDepths(objective, [0.5]))
    run = trainer(within, weights, more, steps=-1, max_epochs=2)
    run.fit(Module(), DataLoader(make_rows(), batch_size=ROWS // 4))
    shares = [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 2 / 8]
    assert weights.seen == pytest.approx([WEIGHT * share for share in shares])


def left_alone(module: Module) -> bool:
    hooks = sum(len(m._forward_hooks) for m in module.modules())
    return "training_step" not in vars(module) and hooks == 0


def test_fit_again_adds_once_and_leaves_nothing() -> None:
    callback, module = SimRegCallback(SimRegLoss(WEIGHT, push=2)), Module()
    for _ in range(2):
        gradients, _ = fit(callback, module)
        torch.testing.assert_close(gradients, [by_hand()[0]])
        assert left_alone(module)


def test_two_callbacks_add_twice_and_leave_nothing() -> None:
    module = Module()
    halves = [SimRegCallback(SimRegLoss(WEIGHT / 2, push=2)) for _ in range(2)]
    recorder = Recorder()
    trainer(*halves, recorder).fit(module, DataLoader(make_rows(), ROWS))
    torch.testing.assert_close(recorder.gradients, [by_hand()[0]])
    assert left_alone(module)


class Decorated(Module):
    """Its step is behind a wrapper, and does not take `batch_idx`."""

    @wraps(Module.training_step)
    def training_step(self, *given: Any) -> Any:
        return Module.training_step(self, *given)


def test_a_decorated_step_gets_what_it_takes() -> None:
    gradients, _ = fit(SimRegCallback(SimRegLoss(WEIGHT, push=2)), Decorated())
    torch.testing.assert_close(gradients, [by_hand()[0]])


class ByTraining(Module):
    def validation_step(self, batch: Any) -> None:
        self.log("val", self.training_step(batch))


@pytest.mark.parametrize("kind", [Module, ByTraining])
def test_validation_within_fit_is_without_it(kind: type[Module]) -> None:
    module = kind()
    run = trainer(SimRegCallback(SimRegLoss(WEIGHT, push=2)))
    run.fit(module, DataLoader(make_rows(), ROWS), DataLoader(make_rows(), ROWS))
    labels = torch.stack([row["labels"] for row in make_rows()])
    ce = make_model()(labels, labels=labels).loss
    torch.testing.assert_close(run.callback_metrics["val"], ce.detach().float())


def test_a_copy_of_the_module_has_its_own_step() -> None:
    copies: list[Module] = []

    class Average(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            copies.append(deepcopy(module))

    module = Module()
    batch = {"labels": torch.stack([row["labels"] for row in make_rows()])}
    run = trainer(SimRegCallback(SimRegLoss(WEIGHT)), Average())
    run.fit(module, DataLoader(make_rows(), ROWS))
    assert copies[0].training_step.__self__ is copies[0]
    torch.testing.assert_close(copies[0].training_step(batch), module.training_step(batch))


def test_an_error_in_the_step_leaves_nothing() -> None:
    module = Module("fails")
    with pytest.raises(RuntimeError, match="in the step"):
        fit(SimRegCallback(SimRegLoss()), module)
    assert left_alone(module)


def test_skipped_batches_stay_skipped() -> None:
    gradients, _ = fit(SimRegCallback(SimRegLoss()), Module("skipped"))
    assert set(gradients[0]) == {None}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "two forward passes")  # one of them is given up
        fit(SimRegCallback(SimRegLoss()), Module("looked at and skipped"), batch=ROWS // 2, steps=2)


def test_a_step_that_was_set_on_the_instance_is_put_back() -> None:
    module = Module()
    step = module.training_step
    module.training_step = step
    fit(SimRegCallback(SimRegLoss()), module)
    assert vars(module)["training_step"] is step


def test_an_objective_with_a_state_goes_where_the_module_is() -> None:
    objective = Center(hidden_size=4, vocab_size=8)
    module = Module().to("meta")
    SimRegCallback(objective).on_fit_start(trainer(), module)
    assert module.device.type == "meta"
    assert {buffer.device.type for buffer in objective.buffers()} == {"meta"}


def test_the_module_may_be_given_itself() -> None:
    module = Module()
    gradients, _ = fit(
        SimRegCallback(SimRegLoss(WEIGHT, push=2), module=module.model.model), module
    )
    torch.testing.assert_close(gradients, [by_hand()[0]])


@pytest.mark.parametrize("given", ["itself", "a function"])
def test_the_layers_may_be_given(given: str) -> None:
    module = Module()
    parts: dict[str, Any] = {
        "module": lambda module: module.model.model.norm,
        "layers": lambda module: module.model.model.layers,
    }
    if given == "itself":
        parts = {name: of(module) for name, of in parts.items()}
    gradients, _ = fit(SimRegCallback(AtDepths(SimRegLoss(WEIGHT), [0.5]), **parts), module)
    expected, _ = fit(SimRegCallback(AtDepths(SimRegLoss(WEIGHT), [0.5])), Module())
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    if given == "itself":  # an iterator, for two fits
        parts["layers"] = iter(parts["layers"])
        callback = SimRegCallback(AtDepths(SimRegLoss(WEIGHT), [0.5]), **parts)
        for _ in range(2):
            torch.testing.assert_close(fit(callback, module)[0], expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="so it needs all its layers in their order"):
        fit(
            SimRegCallback(AtDepths(SimRegLoss(), [0.5]), module=lambda m: m.model.model.norm),
            Module(),
        )


def test_the_layers_may_be_given_alone() -> None:
    parts: dict[str, Any] = {"layers": lambda module: list(module.model.model.layers)[::-1]}
    gradients, _ = fit(SimRegCallback(AtDepths(SimRegLoss(WEIGHT), [0.5]), **parts), Module())
    parts["module"] = lambda module: module.model.model
    expected, _ = fit(SimRegCallback(AtDepths(SimRegLoss(WEIGHT), [0.5]), **parts), Module())
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="layers: SimRegLoss reads none within the model"):
        fit(SimRegCallback(SimRegLoss(), layers=parts["layers"]), Module())


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"labels": "y"}, "labels: the batch has no 'y'"), ({"segments": "y"}, "segments: the batch")],
)
def test_a_field_that_the_batch_lacks_is_named(fields: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(SimRegCallback(SimRegLoss(), **fields), Module())


@pytest.mark.parametrize("batch", [(1, 2), [1, 2], torch.ones(2, 3)], ids=["tuple", "list", "one"])
def test_a_key_of_a_batch_that_has_none_is_named(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"labels: the batch has no 'labels' \(it is \w+\): give"):
        _field("labels", batch, "labels")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="automatic optimization"):
        fit(SimRegCallback(SimRegLoss()), Module("manual"))
    module = Module()
    module.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="get_decoder"):
        fit(SimRegCallback(SimRegLoss()), module)


def _ddp(rank: int, port: int) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2"}
    strategy = DDPStrategy(process_group_backend="gloo")
    callback = SimRegCallback(SimRegLoss(WEIGHT, push=2))
    options = {"strategy": strategy, "devices": 2, "plugins": [TorchElasticEnvironment()]}
    gradients, _ = fit(callback, Module(), batch=ROWS // 2, **options)
    assert dist.get_world_size() == 2
    torch.testing.assert_close(gradients, [by_hand()[0]])
    leave()


def test_two_processes_of_ddp_equal_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_ddp, (port,))
