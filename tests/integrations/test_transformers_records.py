"""What the Trainer records, in training and in evaluation."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from simreg import SimRegLoss

transformers = pytest.importorskip("transformers")
from simreg.integrations.transformers import SimRegTrainer  # noqa: E402
from simreg.integrations.window import Window  # noqa: E402
from tests.integrations.test_transformers import (  # noqa: E402
    SIMREG,
    arguments,
    build,
    records,
    relative,
    rows,
    train,
    truth,
    weights,
)


def test_log_records_are_means_over_the_tokens_of_the_window(tmp_path):
    model, data = build("mixtral"), rows()
    for row in (*data[4:6], data[13]):  # of one label: no negatives, in one micro-batch nowhere
        row["input_ids"] = torch.full_like(row["input_ids"], 5)
        row["labels"] = row["labels"].where(row["labels"] == -100, 5)
    run = train(
        tmp_path,
        model,
        data=data,
        objective=SimRegLoss(**SIMREG),
        learning_rate=0.0,
        max_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        logging_steps=2,
        max_grad_norm=1e-6,
    )
    assert len(records(run)) == 2
    for n, record in enumerate(records(run)):
        window = data[8 * n : 8 * n + 8]
        whole = truth(model, window)
        parts = [truth(model, window[i : i + 2]) for i in range(0, 8, 2)]
        assert record["ce"] == pytest.approx((whole.ce / whole.tokens).item(), rel=1e-5)
        for key in ("pos_cos", "neg_cos", "pos_fraction", "neg_fraction"):
            assert record[key] == pytest.approx(whole.metrics[key].item(), rel=1e-4), key
        assert record["simreg"] == pytest.approx(whole.metrics["loss"].item(), rel=1e-5)
        router = sum(part.aux * part.tokens for part in parts) / whole.tokens
        assert record["router_loss"] == pytest.approx(router.item(), rel=1e-5)
        assert record["clipped"] == 1.0
        assert {"loss", "grad_norm", "learning_rate"} <= record.keys()


def test_what_has_no_weight_is_in_no_mean():
    window, one = Window(), torch.ones(())
    window.add("never", one, 0 * one)
    window.add("once", one, one)
    window.add("once", torch.nan * one, 0 * one)
    accelerator = SimpleNamespace(reduce=lambda sums, kind: sums)
    assert window.means(accelerator) == {"once": 1.0}
    for value in (2.0**25, 1.0):  # which float32 does not tell from their sum
        window.add("long", value * one, one)
    assert window.means(accelerator)["long"] == (2**25 + 1) / 2


def test_clipped_is_a_fraction_of_steps(tmp_path):
    run = train(
        tmp_path, build(), max_steps=4, learning_rate=0.0, logging_steps=4, max_grad_norm=1e9
    )
    assert records(run)[0]["clipped"] == 0.0
    norms = [
        r["grad_norm"]
        for r in records(train(tmp_path, build(), max_steps=4, learning_rate=0.0), "grad_norm")
    ]
    limit = (sorted(norms)[2] + sorted(norms)[3]) / 2
    run = train(
        tmp_path, build(), max_steps=4, learning_rate=0.0, logging_steps=4, max_grad_norm=limit
    )
    assert records(run)[0]["clipped"] == 0.25
    assert records(train(tmp_path, build(), max_grad_norm=0.0))[0]["clipped"] == 0.0


def test_collapsed_embeddings_are_told_once_and_not_at_the_start(tmp_path):
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1.0)  # so all hidden states are one
    options = {"max_steps": 8, "learning_rate": 0.0, "logging_steps": 1}
    with pytest.warns(UserWarning, match="embeddings have collapsed: after 25% of the") as told:
        train(tmp_path, model, objective=SimRegLoss(), **options)
    assert sum("collapsed" in str(each.message) for each in told) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(tmp_path, build(), objective=SimRegLoss(), **options)
        train(tmp_path, model, objective=SimRegLoss(weight=0.0), **options)
    assert not any("collapsed" in str(each.message) for each in told)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_eval_ce_is_cross_entropy_alone_over_all_tokens(tmp_path, smoothing):
    model = build("mixtral")
    data = rows(7)
    run = SimRegTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=3, label_smoothing_factor=smoothing),
        eval_dataset=data,
        objective=SimRegLoss(**SIMREG),
    )
    whole = truth(model, data)
    metrics = run.evaluate()
    assert metrics["eval_ce"] == pytest.approx((whole.ce / whole.tokens).item(), rel=1e-6)
    assert metrics["eval_ce"] == run.state.log_history[-1]["eval_ce"]
    assert abs(metrics["eval_loss"] - metrics["eval_ce"]) > 1e-5
    assert "test_ce" in run.predict(data).metrics


def test_eval_ce_of_a_set_without_labels_and_of_logits_in_bfloat16(tmp_path):
    run = SimRegTrainer(build().bfloat16(), arguments(tmp_path))
    bare = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows(2)]
    assert math.isnan(run.evaluate(bare)["eval_ce"])
    batch = {key: torch.stack([row[key] for row in rows(5)]) for key in ("input_ids", "labels")}
    logits = run.model(batch["input_ids"]).logits.float()[:, :-1].mT
    expected = F.cross_entropy(logits, batch["labels"][:, 1:]).item()
    assert run.evaluate(rows(5))["eval_ce"] == pytest.approx(expected, rel=1e-5)


def test_eval_ce_with_a_fused_head(tmp_path):
    class Fused(transformers.LlamaForCausalLM):  # as the Liger kernels have it
        def forward(self, input_ids, labels=None, skip_logits=None, **kwargs):
            out = super().forward(input_ids, labels=labels, **kwargs)
            return transformers.modeling_outputs.CausalLMOutput(
                loss=out.loss, logits=None if skip_logits else out.logits
            )

    run = SimRegTrainer(Fused(build().config), arguments(tmp_path), eval_dataset=rows(7))
    run.args.use_liger_kernel = True
    whole = truth(run.model, rows(7))
    assert run.evaluate()["eval_ce"] == pytest.approx((whole.ce / whole.tokens).item(), rel=1e-6)


class Halving(transformers.Trainer):
    """Takes a loss of its own from the model's outputs, as trainers of TRL do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss / 2
        return (loss, outputs) if return_outputs else loss


class Regularized(SimRegTrainer, Halving):
    pass


def test_the_loss_of_another_trainer_is_left_as_it_is(tmp_path):
    plain, ours = build("mixtral"), build("mixtral")
    data = [{k: v for k, v in row.items() if k != "segments"} for row in rows()]
    accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    expected = train(tmp_path, plain, data=data, trainer=Halving, **accumulated)
    objective = SimRegLoss(weight=1e-9)
    run = Regularized(
        ours, arguments(tmp_path, **accumulated), train_dataset=data, objective=objective
    )
    run.train()
    start = weights(build("mixtral"))
    assert relative(weights(ours) - start, weights(plain) - start) < 1e-6
    [record], [theirs] = records(run, "simreg"), records(expected, "learning_rate")
    assert record["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert not {"ce", "router_loss"} & record.keys()  # nobody knows which part of it they are


def test_records_of_others_leave_the_window_alone(tmp_path):
    class Talkative(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            run.log({"loss": 5.0})  # perhaps in one process alone: no collective may follow

    settings = arguments(tmp_path, max_steps=2, logging_steps=2, learning_rate=0.0)
    run = SimRegTrainer(build(), settings, train_dataset=rows(), callbacks=[Talkative()])
    run.train()
    [record] = records(run)
    whole = truth(build(), rows()[:8])
    assert record["ce"] == pytest.approx((whole.ce / whole.tokens).item(), rel=1e-5)
    assert [r for r in records(run, "loss") if r["loss"] == 5.0 and len(r) > 3] == []


class Talks(nn.Module):
    """An objective whose metrics have the names of the Trainer's own records."""

    def forward(self, hidden, labels, segments=None, *, num_items=None):
        names = ("loss", "ce", "grad_norm", "other")
        return 0 * hidden.sum(), {name: torch.tensor(1000.0) for name in names}


def test_metrics_leave_the_trainers_records_alone(tmp_path):
    [record] = records(train(tmp_path, build(), objective=Talks(), max_steps=1))
    assert record["ce"] < 10
    assert record["grad_norm"] < 100
    names = ("simreg", "simreg_ce", "simreg_grad_norm", "other")
    assert [record[name] for name in names] == [1000.0] * 4


@pytest.mark.parametrize("metric", ["ce", "eval_ce", "eval_books_ce"])
def test_the_highest_cross_entropy_is_not_the_best(tmp_path, metric):
    run = arguments(tmp_path, metric_for_best_model=metric, greater_is_better=None)
    with pytest.raises(ValueError, match=f"lowest {metric} is the best: set greater_is_better=F"):
        SimRegTrainer(build(), run)
    for known in {"greater_is_better": False}, {"metric_for_best_model": "eval_performance"}:
        SimRegTrainer(build(), arguments(tmp_path, **({"metric_for_best_model": metric} | known)))
