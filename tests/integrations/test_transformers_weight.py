"""λ in the Trainer: what it follows, and an objective without any."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simreg import Schedule, SimRegLoss

transformers = pytest.importorskip("transformers")
from simreg.integrations.transformers import SimRegTrainer  # noqa: E402
from tests.integrations.test_transformers import (  # noqa: E402
    SIMREG,
    SMALL,
    arguments,
    build,
    records,
    relative,
    rows,
    train,
    weights,
)


def test_an_idle_objective_asks_nothing_of_the_model(tmp_path):
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL))
    objective = SimRegLoss(weight=0.0)
    run = SimRegTrainer(model, arguments(tmp_path), objective=objective)
    batch = {"input_ids": rows()[0]["input_ids"][None], "labels": torch.zeros(1, dtype=torch.long)}
    model.train()
    assert run.compute_loss(model, batch) > 0
    objective.weight = 1.0
    with pytest.raises(ValueError, match="the next token"):
        run.compute_loss(model, batch)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [({}, [1, 0.75, 0.5, 0.25]), ({"schedule": Schedule("stop", 0.5)}, [1, 1, 0, 0])],
    ids=["default", "stop"],
)
def test_weight_follows_the_schedule(tmp_path, schedule, shares):
    objective = SimRegLoss(**SIMREG)
    run = train(tmp_path, build(), objective=objective, extra=schedule, max_steps=4)
    assert len(records(run)) == 4
    for record, share in zip(records(run), shares, strict=True):
        added = share * SIMREG["weight"] * record["simreg"] if share else 0
        assert record["loss"] == pytest.approx(record["ce"] + added, rel=1e-5)
    assert objective.weight == SIMREG["weight"]


def test_weight_follows_from_what_model_init_made_it(tmp_path):
    objective = SimRegLoss(**SIMREG)

    def init():
        objective.weight = 0.5
        return build()

    extra = {"model_init": init}
    run = train(tmp_path, None, objective=objective, extra=extra, max_steps=2)
    assert [record["simreg_weight"] for record in records(run)] == [0.5, 0.25]
    assert objective.weight == 0.5


def test_a_model_that_was_refused_while_there_was_no_weight_is_refused_by_name(tmp_path):
    """And not for the handle of the model before it, which is detached."""
    objective, models = SimRegLoss(weight=0.0), [build(), torch.nn.Linear(2, 2)]
    run = SimRegTrainer(build(), arguments(tmp_path), objective=objective)
    for model in models:
        run._attach(model)
    assert run._reg is None
    run._attach(models[0])
    assert run._reg is not None


def test_weight_follows_on_resuming(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = train(tmp_path, build(), objective=SimRegLoss(**SIMREG), **settings)
    again = SimRegTrainer(
        build(),
        arguments(tmp_path, **settings),
        train_dataset=rows(),
        objective=SimRegLoss(**SIMREG),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [[record["simreg_weight"] for record in records(run)] for run in (first, again)]
    assert logged[0] == logged[1] == [SIMREG["weight"] * share for share in (1, 0.75, 0.5, 0.25)]


def test_weight_is_constant_if_asked_to_be(tmp_path):
    settings = {"objective": SimRegLoss(**SIMREG), "extra": {"schedule": "constant"}}
    run = train(tmp_path, build(), **settings, max_steps=3)
    for record in records(run):
        expected = record["ce"] + SIMREG["weight"] * record["simreg"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="schedule: expected one of"):
        SimRegTrainer(build(), arguments(tmp_path), schedule="linear")


class Own(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_ids"])
        loss = outputs.logits.sum() * 0
        return (loss, outputs) if return_outputs else loss


@pytest.mark.skipif(
    not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"), reason="an older transformers"
)
@pytest.mark.parametrize("divided", [None, False, True])
@pytest.mark.parametrize("takes", [False, True], ids=["plain model", "model with a divisor"])
def test_the_objective_is_divided_once_whatever_a_trainer_says_of_its_loss(
    tmp_path, divided, takes
):
    class Regularized(SimRegTrainer, Own):
        loss_is_scaled_for_ga = divided

    class Model(transformers.LlamaForCausalLM):
        accepts_loss_kwargs = takes

    data = [row | {"labels": row["input_ids"]} for row in rows()]  # as many labels in each
    moved = []
    for size, steps in ((16, 1), (4, 4)):
        model = Model(build().config)
        model.load_state_dict(build().state_dict())
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        run = Regularized(
            model,
            arguments(tmp_path, **settings),
            train_dataset=data,
            objective=SimRegLoss(**SIMREG),
        )
        assert run.model_accepts_loss_kwargs == takes
        run.train()
        moved.append(weights(model) - weights(build()))
    assert relative(moved[1], moved[0]) < 1e-5


@pytest.mark.parametrize("averages", [False, True])
def test_the_objective_is_scaled_as_cross_entropy_is(tmp_path, monkeypatch, averages):
    """To undo the mean over data-parallel ranks: here 8 processes, two of tensor parallelism."""
    objective = SimRegLoss(**SIMREG)
    settings = arguments(tmp_path, average_tokens_across_devices=averages)
    run = SimRegTrainer(build(), settings, objective=objective, schedule="constant")
    monkeypatch.setattr(type(run.accelerator), "num_processes", 8)
    run.model._tp_size = 2
    ids = rows()[0]["input_ids"][None]
    given, items = {"input_ids": ids, "labels": ids}, torch.tensor(30)
    plain, _ = transformers.Trainer.compute_loss(run, run.model, given, True, items)
    alone = run.model(**given, num_items_in_batch=items).loss
    loss = run.compute_loss(run.model.train(), given, num_items_in_batch=items)
    found = run._window.means(SimpleNamespace(reduce=lambda sums, kind: sums))
    simreg = SIMREG["weight"] * found["simreg"] * 9 / 30
    assert float(plain / alone) == pytest.approx(4 if averages else 1)
    assert float(loss / plain) == pytest.approx(float((alone + simreg) / alone), rel=1e-5)
    assert found["ce"] * 9 / 30 == pytest.approx(alone.item(), rel=1e-5)


def test_each_training_begins_with_the_whole_weight(tmp_path):
    class Fails(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise InterruptedError

    objective = SimRegLoss(**SIMREG)
    run = SimRegTrainer(
        build(), arguments(tmp_path, max_steps=2), train_dataset=rows(), objective=objective
    )
    run.train()
    run.train()
    seen = [record["simreg_weight"] for record in run.state.log_history if "ce" in record]
    assert seen == [SIMREG["weight"], SIMREG["weight"] / 2]
    run.args.max_steps = 4
    run.add_callback(Fails())
    with pytest.raises(InterruptedError):
        run.train()
    assert objective.weight == SIMREG["weight"]


class Forgets(SimRegTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_ids"], labels=inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_subclass_that_leaves_the_objective_out_is_told(tmp_path):
    settings = {"train_dataset": rows(), "objective": SimRegLoss(**SIMREG)}
    with pytest.raises(RuntimeError, match=r"Forgets\.compute_loss leaves the objective out"):
        Forgets(build(), arguments(tmp_path), **settings).train()
    Forgets(build(), arguments(tmp_path), train_dataset=rows()).train()


def test_records_hold_no_attempt_with_a_batch_that_was_too_large(tmp_path):
    class Fails(transformers.TrainerCallback):
        failed = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    settings = {"logging_steps": 2, "max_steps": 2, "learning_rate": 0.0}
    objective = SimRegLoss(**SIMREG)
    extra = {"callbacks": [Fails()]}
    run = train(
        tmp_path, build(), objective=objective, extra=extra, auto_find_batch_size=True, **settings
    )
    size = run._train_batch_size
    assert size < run.args.per_device_train_batch_size
    settings["per_device_train_batch_size"] = size
    plain = train(tmp_path, build(), objective=objective, **settings)
    for name in ("ce", "simreg", "pos_cos"):
        assert records(run)[0][name] == records(plain)[0][name]


def test_graphs_are_not_kept_outside_of_training(tmp_path):
    model = build()

    def kept():
        hidden = weakref.ref(model.model(rows()[0]["input_ids"][None]).last_hidden_state)
        gc.collect()
        return hidden() is not None

    run = SimRegTrainer(model, arguments(tmp_path), objective=SimRegLoss(**SIMREG))
    model.train()
    assert not kept()
    del run
    gc.collect()
    run = train(tmp_path, model, objective=SimRegLoss(**SIMREG), max_steps=1)
    model.train()
    assert not kept()
    hooks = [model.model._forward_hooks, model.model._forward_pre_hooks]
    assert [len(h) for h in hooks] == [1, 1]
    del run
    gc.collect()
    assert [len(h) for h in hooks] == [0, 0]


def test_the_last_layer_may_be_on_another_device(tmp_path):
    def objective(hidden, labels, segments=None, *, num_items=None):
        assert {hidden.device} == {x.device for x in (labels, segments, num_items)}
        return hidden.sum() / num_items, {"loss": hidden.sum()}

    run = SimRegTrainer(build(), arguments(tmp_path), objective=objective)
    with FakeTensorMode(), torch.no_grad():
        first, last = torch.device("cuda:0"), torch.device("cuda:1")
        run._reg._hidden = torch.empty(2, 8, 16, device=last)
        labels = torch.zeros(2, 8, dtype=torch.int64, device=first)
        items = torch.tensor(14, device=first)
        loss = run._training_loss(torch.zeros((), device=first), None, labels, labels, items)
    assert loss.device == first


def test_weight_may_begin_at_nothing(tmp_path):
    class Begin(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            objective.weight = SIMREG["weight"]

    objective = SimRegLoss(**SIMREG | {"weight": 0.0})
    extra = {"callbacks": [Begin()]}
    run = train(tmp_path, build(), objective=objective, extra=extra, max_steps=2)
    first, second = records(run)[:2]
    assert "simreg" not in first
    assert second["simreg"] > 0
    assert second["loss"] > second["ce"]
    assert run._reg._hidden is None
