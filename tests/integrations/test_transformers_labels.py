"""Whose labels are shifted, and models that are no ordinary causal LM in `SimRegTrainer`."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from simreg.capture import shift_left
from simreg.loss import SimRegLoss, simreg_loss
from simreg.parallel import ShardedSimRegLoss

transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

from simreg.integrations.transformers import SimRegTrainer  # noqa: E402
from tests.integrations.test_transformers import SMALL, arguments, build  # noqa: E402


class Own(nn.Module):
    """A model of one's own, whose labels are targets; `prompt` positions stand before them."""

    def __init__(self, prompt=0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(24, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.prompt = prompt

    def forward(self, input_ids, labels=None):
        states = F.pad(self.embed(input_ids), (0, 0, self.prompt, 0))
        logits = self.head(self.norm(states))
        own = logits[:, self.prompt :]
        loss = None if labels is None else F.cross_entropy(own.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def bart():
    torch.manual_seed(0)
    size = {"d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    config = transformers.BartConfig(vocab_size=24, dropout=0.0, **size)
    return transformers.BartForCausalLM(config)


def t5():
    torch.manual_seed(0)
    size = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def items():
    """Targets as they are in such models' labels; some are to be ignored."""
    rows = torch.randint(3, 12, (4, 11), generator=torch.Generator().manual_seed(1))
    targets = rows[:, 1:].clone()
    targets[0, :3] = -100
    return [{"input_ids": i, "labels": t} for i, t in zip(rows[:, :-1], targets, strict=True)]


def trainer(model, folder, data=None, **changes):
    data = data or items()
    settings = {"train_dataset": data, "eval_dataset": data, **changes}
    return SimRegTrainer(model, arguments(folder, learning_rate=0.0), **settings)


def logged(trainer, name):
    return next(record[name] for record in trainer.state.log_history if name in record)


ALIGNED = {
    "own": (Own, {"module": lambda model: model.norm, "shift": False}),
    "bart": (bart, {"module": lambda model: model.get_decoder()}),
    "t5": (t5, {"objective": None}),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_labels_that_are_aligned_are_not_shifted(tmp_path, name):
    build_model, how = ALIGNED[name]
    given = {"objective": SimRegLoss(0.3, push=0), "schedule": "constant", **how}
    model = build_model()
    found = trainer(model, tmp_path, **given)
    metrics = found.evaluate()
    assert metrics["eval_ce"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    found.train()
    if name != "bart":  # which ignores the divisor that it says it takes
        assert logged(found, "ce") == pytest.approx(metrics["eval_ce"], rel=1e-5)
    if given["objective"] is not None:
        batch = {key: torch.stack([row[key] for row in items()]) for key in items()[0]}
        module, seen = given["module"](model), []
        hook = module.register_forward_hook(lambda m, i, out: seen.append(out))
        model(batch["input_ids"])
        hook.remove()
        hidden = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0].last_hidden_state
        hidden = hidden.detach()
        truth = simreg_loss(hidden, batch["labels"])
        assert logged(found, "simreg") == pytest.approx(float(truth), rel=1e-4)
        twice = simreg_loss(hidden, shift_left(batch["labels"]))
        assert abs(float(truth - twice)) > 1e-3 * float(truth)


def test_models_without_logits_of_their_labels_are_evaluated_as_by_trainer(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=3)
    judge = transformers.LlamaForSequenceClassification(config)
    classes = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(items())]
    config = transformers.LlamaConfig(
        **SMALL, num_labels=3, problem_type="multi_label_classification"
    )
    several = transformers.LlamaForSequenceClassification(config)
    sets = [{**row, "labels": torch.tensor([0.0, 1.0, 1.0])} for row in items()]
    for model, data in ((judge, classes), (several, sets), (Own(prompt=3), items())):
        found = trainer(model, tmp_path, data=data)
        found.train()
        plain = transformers.Trainer(model, found.args, eval_dataset=data)
        metrics, expected = found.evaluate(), plain.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"])
        assert "eval_ce" not in metrics
    assert "ce" not in trainer_log(judge, classes, tmp_path)
    assert "ce" not in trainer_log(several, sets, tmp_path)


def test_the_model_never_sees_segments_where_there_are_no_labels(tmp_path):
    data = [{"input_ids": row["input_ids"], "segments": row["labels"]} for row in items()]
    logits = trainer(Own(), tmp_path, data=data).predict(data).predictions
    assert logits.shape == (4, 10, 24)


class Bare(Own):
    """Without a loss: logits alone, in one of the forms that models return."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, input_ids):
        return self.form(super().forward(input_ids).logits)


@pytest.mark.parametrize(
    "form", [lambda x: (x,), lambda x: x, lambda x: {"logits": x}], ids=["tuple", "bare", "mapping"]
)
@pytest.mark.parametrize("rows", [1, 2])  # in an evaluation batch
def test_models_that_return_no_loss_are_evaluated(tmp_path, form, rows):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs
        logits = logits[0] if isinstance(logits, tuple) else logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    places = {"module": lambda model: model.norm, "shift": False}
    found = trainer(Bare(form), tmp_path, compute_loss_func=loss, objective=SimRegLoss(), **places)
    found.args.per_device_eval_batch_size = rows
    found.label_names = ["labels"]
    data = [row for row in items() if row["labels"].min() >= 0][:4]  # as many labels in each row
    metrics = found.evaluate(data)
    assert metrics["eval_ce"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def trainer_log(model, data, folder):
    found = trainer(model, folder, data=data)
    found.train()
    return {key for record in found.state.log_history for key in record}


def test_labels_of_another_shape_are_refused_by_an_objective(tmp_path):
    data = [{**row, "labels": row["labels"][0]} for row in items()]
    model = build()
    model.forward = lambda **kwargs: CausalLMOutput(loss=model.lm_head.weight.sum() * 0)
    with pytest.raises(ValueError, match=r"expected `labels` \[B, L\] in every training batch"):
        trainer(model, tmp_path, data=data, objective=SimRegLoss()).train()


def test_sequences_spread_over_processes_are_refused(tmp_path):
    objective = ShardedSimRegLoss(0.3)
    trainer(build("llama"), tmp_path, objective=objective)  # each process has whole rows
    objective.group = object()  # one that several processes would make
    with pytest.raises(ValueError, match="objective: sequences spread over processes"):
        trainer(build("llama"), tmp_path, objective=objective)


@pytest.mark.parametrize("size", ["get_cp_size", "get_sp_size", "n_gpu"])
def test_other_ways_to_spread_a_batch_are_refused(tmp_path, monkeypatch, size):
    settings = arguments(tmp_path)
    if size == "n_gpu":
        settings._n_gpu, says = 2, r"args: DataParallel \(n_gpu > 1\) is not supported"
    else:
        monkeypatch.setattr(SimRegTrainer, size, lambda self: 2)
        says = "args: context and sequence parallelism are not supported"
    with pytest.raises(ValueError, match=says):
        SimRegTrainer(build(), settings, train_dataset=items(), objective=SimRegLoss())


def test_a_pass_that_failed_leaves_no_graph(tmp_path, monkeypatch):
    model = build()
    found = trainer(model, tmp_path, objective=SimRegLoss())

    def fail(states):
        raise torch.OutOfMemoryError("of the head")

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        found.train()
    gc.collect()
    assert found._reg._hidden is None
