from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from simreg.depths import AtDepths
from simreg.loss import SimRegLoss

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Trainer,
    TrainingArguments,
)

from simreg.integrations.documents import documents  # noqa: E402
from simreg.integrations.transformers import SimRegTrainer, _router_loss  # noqa: E402

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COEFFICIENT = 0.5
SIMREG = {"weight": 0.7, "temperature": 0.2}


def build(name="llama"):
    torch.manual_seed(0)
    if name == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            **SMALL,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=COEFFICIENT,
        )
    )


def rows(count=16, length=10):
    """Rows with very unequal numbers of labels, two documents each."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for i in range(count):
        ids = torch.randint(3, 24, (length,), generator=generator)
        ids[1::2] = ids[1]  # so that labels repeat
        labels = ids.clone()
        labels[: (0, 1, 2, 3, 4, 5, 7)[i % 7]] = -100
        out.append({"input_ids": ids, "labels": labels, "segments": torch.arange(length) // 6})
    return out


def collate(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "log_level": "error",
    }
    return TrainingArguments(**(settings | changes))


def train(
    folder, model, *, data=None, objective=None, trainer=SimRegTrainer, extra=None, **changes
):
    kwargs = dict(extra or {})
    if trainer is SimRegTrainer:
        kwargs["objective"] = objective
    run = trainer(model, arguments(folder, **changes), train_dataset=data or rows(), **kwargs)
    run.train()
    return run


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def truth(model, data, *, num_items=None, weight=0.0):
    """Sums over the rows, in plain PyTorch."""
    batch = collate(data)
    out = model(batch["input_ids"])
    hidden = model.model(batch["input_ids"]).last_hidden_state
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    tokens = targets.ne(-100).sum()
    ce = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    objective = SimRegLoss(**(SIMREG | {"weight": weight}))
    simreg, metrics = objective(hidden, targets, batch["segments"], num_items=num_items or tokens)
    return SimpleNamespace(
        ce=ce, tokens=tokens, simreg=simreg, metrics=metrics, aux=out.get("aux_loss")
    )


def records(run, key="ce"):
    return [record for record in run.state.log_history if key in record]


def only_objective(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum() * 0


@pytest.mark.parametrize("term", ["ce", "simreg", "both"])
def test_accumulation_equals_a_larger_batch(tmp_path, term):
    objective = None if term == "ce" else SimRegLoss(**SIMREG)
    extra = {"compute_loss_func": only_objective} if term == "simreg" else {}
    moved, logged = [], []
    for size, steps in ((16, 1), (4, 4), (2, 8)):
        model = build()
        before = weights(model)
        run = train(
            tmp_path,
            model,
            objective=objective,
            extra=extra,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        moved.append(weights(model) - before)
        logged.append(run.state.log_history[0])
    for actual, record in zip(moved[1:], logged[1:], strict=True):
        assert relative(actual, moved[0]) < 1e-5
        for key, value in logged[0].items():
            assert record[key] == pytest.approx(value, rel=1e-5), key
    # ... and the large batch moves by the gradient of the definition.
    model = build()
    sums = truth(model, rows(), weight=0.0 if term == "ce" else SIMREG["weight"])
    ce = 0.0 if term == "simreg" else sums.ce / sums.tokens
    (ce + sums.simreg).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    parts, start = [], 0
    for name, parameter in model.named_parameters():
        end = start + parameter.numel()
        if name in names:
            parts.append(moved[0][start:end])
        start = end
    assert relative(-torch.cat(parts), expected) < 1e-5


def test_per_micro_batch_means_where_the_model_takes_no_divisor(tmp_path):
    class NoKwargs(transformers.LlamaForCausalLM):
        accepts_loss_kwargs = False

    model = NoKwargs(build().config)
    model.load_state_dict(build().state_dict())
    before = weights(model)
    run = train(tmp_path, model, objective=SimRegLoss(**SIMREG), gradient_accumulation_steps=4)
    assert not run.model_accepts_loss_kwargs
    reference = build()
    parts = [truth(reference, rows()[i : i + 4], weight=SIMREG["weight"]) for i in range(0, 16, 4)]
    sum((part.ce / part.tokens + part.simreg) / 4 for part in parts).backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert relative(before - weights(model), expected) < 1e-5
    total = sum(part.ce for part in parts) / sum(part.tokens for part in parts)
    assert records(run)[0]["ce"] == pytest.approx(total.item(), rel=1e-5)


def test_router_loss_under_accumulation(tmp_path):
    model = build("mixtral")
    before = weights(model)
    run = train(tmp_path, model, objective=SimRegLoss(**SIMREG), gradient_accumulation_steps=4)
    reference = build("mixtral")
    items = sum(truth(reference, [row]).tokens for row in rows())
    parts = [
        truth(reference, rows()[i : i + 4], num_items=items, weight=SIMREG["weight"])
        for i in range(0, 16, 4)
    ]
    router = sum(part.aux * part.tokens for part in parts) / items
    ce = sum(part.ce for part in parts) / items
    loss = ce + sum(part.simreg for part in parts) + COEFFICIENT * router
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert relative(before - weights(model), expected) < 1e-5
    record = records(run)[0]
    assert record["router_loss"] == pytest.approx(router.item(), rel=1e-5)
    assert record["ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_unknown_router_coefficient_is_refused():
    with pytest.raises(ValueError, match=r"Linear returned an aux_loss, .* router_aux_loss_coef"):
        _router_loss(torch.nn.Linear(1, 1), {"aux_loss": torch.tensor(1.0)})


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "aux_loss_coef"])
@pytest.mark.parametrize("part", ["config", "text_config"])
def test_the_router_coefficient_may_be_of_the_text(name, part):
    model, owner = nn.Linear(1, 1), SimpleNamespace(**{name: 0.25})
    model.config = owner if part == "config" else SimpleNamespace(text_config=owner)
    assert _router_loss(model, {"aux_loss": torch.tensor(1.0)}) == (0.25, 1.0)


@pytest.mark.parametrize(("name", "steps"), [("llama", 2), ("mixtral", 1)])
@pytest.mark.parametrize("objective", [None, SimRegLoss(weight=0.0)])
def test_without_weight_it_is_the_plain_trainer(tmp_path, name, steps, objective):
    settings = {
        "max_steps": 5,
        "gradient_accumulation_steps": steps,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    extra = {"eval_dataset": rows(5)}
    plain, ours = build(name), build(name)
    data = [{k: v for k, v in row.items() if k != "segments"} for row in rows()]
    first = train(tmp_path, plain, data=data, trainer=Trainer, extra=extra, **settings)
    second = train(tmp_path, ours, data=data, objective=objective, extra=extra, **settings)
    assert torch.equal(weights(plain), weights(ours))
    assert not torch.equal(weights(plain), weights(build(name)))
    for expected, actual in zip(first.state.log_history, second.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "train_loss"):
            assert expected.get(key) == actual.get(key)
        assert "simreg" not in actual
    assert second._reg is None or second._reg._hidden is None


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].mT
    return F.cross_entropy(logits, labels[:, 1:], reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.1}, {"extra": {"compute_loss_func": own_loss}}],
    ids=lambda settings: next(iter(settings)),
)
def test_another_loss_passes_through_and_the_objective_is_added(tmp_path, settings):
    plain, ours = build("mixtral"), build("mixtral")
    settings |= {"data": [{k: v for k, v in row.items() if k != "segments"} for row in rows()]}
    train(tmp_path, plain, trainer=Trainer, **settings)
    run = train(tmp_path, ours, **settings)
    assert torch.equal(weights(plain), weights(ours))
    assert not records(run)
    run = train(tmp_path, build(), objective=SimRegLoss(**SIMREG), **settings)
    assert "simreg" in run.state.log_history[0]


def test_segments_reach_the_objective_and_nothing_else(tmp_path):
    seen = []

    def objective(hidden, labels, segments=None, *, num_items=None):
        seen.append((labels, segments, num_items))
        return hidden.sum() * 0, {}

    train(tmp_path, build(), objective=objective)
    batch = collate(rows()[:4])
    labels, segments, items = seen[0]
    assert torch.equal(segments, batch["segments"])
    assert torch.equal(labels, F.pad(batch["labels"][:, 1:], (0, 1), value=-100))
    assert items == batch["labels"][:, 1:].ne(-100).sum()


@pytest.mark.parametrize(
    "returned",
    [
        {},
        {"position_ids_start": 2},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
    ],
    ids=lambda options: next(iter(options), "position_ids"),
)
def test_packed_without_padding_is_as_in_rows_of_their_own(tmp_path, returned):
    loss, sizes = SimRegLoss(**SIMREG), []

    def objective(hidden, labels, segments=None, *, num_items=None):
        if segments is not None:
            sizes.append(segments.unique(return_counts=True)[1].tolist())
        return loss(hidden, labels, segments, num_items=num_items)

    data = [{k: v for k, v in row.items() if k != "segments"} for row in rows()]
    alone = train(tmp_path, build(), data=data, objective=objective)
    assert not sizes
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **returned)
    lists = [{k: v.tolist() for k, v in row.items()} for row in data]
    packed = train(
        tmp_path, build(), data=lists, objective=objective, extra={"data_collator": collator}
    )
    assert sizes == [[10] * 4]
    if "return_position_ids" not in returned:  # else attention has no mask here
        for name in ("ce", "simreg"):
            assert records(packed)[0][name] == pytest.approx(records(alone)[0][name], rel=1e-5)


def test_documents_of_one_token_and_positions_for_every_row():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for positions, expected in (
        ([5, 6, 0, 0, 1], [0, 0, 1, 2, 2]),  # a row that begins within a document
        ([0, 1, 0, 0, 1], [0, 0, 1, 2, 2]),
        ([1, 1, 0, 1, 2], [0, 1, 2, 2, 2]),  # padded on the left
        ([0, 1, 1, 1, 2], [0, 0, 0, 0, 0]),  # a picture of three tokens
    ):
        found = documents({"input_ids": ids, "position_ids": torch.tensor([positions])})
        assert torch.equal(found, torch.tensor([expected] * 2))
    rows = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 1, 2]])  # of their own
    found = documents({"input_ids": ids, "position_ids": rows, "seq_idx": ids[:1]})
    assert torch.equal(found, torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]))
    plain = documents({"input_ids": ids, "position_ids": torch.arange(5)[None]})
    assert torch.equal(plain, torch.zeros_like(ids))
    for other in ({}, {"position_ids": torch.zeros(3, 2, 5)}, {"cu_seq_lens_q": ids[0]}):
        assert documents({"input_ids": ids, **other}) is None


def test_batches_without_labels_are_refused(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    with pytest.raises(ValueError, match=r"expected `labels` \[B, L\] in every training batch"):
        train(
            tmp_path,
            build(),
            data=data,
            objective=SimRegLoss(),
            extra={"compute_loss_func": only_objective},
        )
    idle = SimRegLoss(weight=0.0)
    train(tmp_path, build(), data=data, objective=idle, extra={"compute_loss_func": only_objective})


def test_model_init_gets_the_objective(tmp_path):
    run = train(
        tmp_path, None, objective=SimRegLoss(**SIMREG), extra={"model_init": lambda: build()}
    )
    assert len(run.model.get_decoder()._forward_hooks) == 1
    assert "simreg" in records(run)[0]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_resume_is_exact_and_the_final_model_is_an_ordinary_one(tmp_path, name):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "train_sampling_strategy": "random",
    }
    objective = SimRegLoss(**SIMREG)
    whole, resumed = build(name), build(name)
    first = train(tmp_path / "run", whole, objective=objective, **settings)
    second = SimRegTrainer(
        resumed, arguments(tmp_path / "run", **settings), train_dataset=rows(), objective=objective
    )
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    drop = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    for a, b in zip(first.state.log_history[:4], second.state.log_history[:4], strict=True):
        assert {k: v for k, v in a.items() if k not in drop} == {
            k: v for k, v in b.items() if k not in drop
        }
    first.save_model(str(tmp_path / "model"))
    plain = build(name)
    plain.save_pretrained(tmp_path / "plain")
    names = [sorted(_tensor_names(tmp_path / f)) for f in ("model", "plain")]
    assert names[0] == names[1]  # the published layout
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(loaded), weights(whole))


def _tensor_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


class Hidden(nn.Module):
    """A model that does not say where its parts are."""

    loss_type = "ForCausalLM"  # by which Trainer counts labels

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(**SMALL | {"num_hidden_layers": 2})
        self.first = AutoModelForCausalLM.from_config(config)

    def forward(self, input_ids, labels, **rest):
        return self.first(input_ids, labels=labels, **rest)


def test_a_model_of_ones_own_says_where_its_parts_are(tmp_path):
    def trained(model, **places):
        torch.manual_seed(0)
        objective = AtDepths(SimRegLoss(**SIMREG), [0.5])
        return train(tmp_path, model, objective=objective, extra=places, max_steps=3)

    expected = trained(Hidden().first)
    places = {"module": lambda m: m.first.model.norm, "layers": lambda m: m.first.model.layers}
    for kind in ("functions", "modules", "model_init"):
        model = Hidden()
        given = {key: find(model) for key, find in places.items()} if kind == "modules" else places
        if kind == "model_init":
            run = trained(None, model_init=Hidden, **given)
        else:
            run = trained(model, **given)
        assert relative(weights(run.model), weights(expected.model)) < 1e-6, kind
    model = Hidden()
    run = SimRegTrainer(
        model,
        arguments(tmp_path),
        objective=AtDepths(SimRegLoss(), [0.5]),
        module=model.first.model.norm,
        layers=iter(model.first.model.layers),
    )
    run._attach(model)  # as for a second model: an iterator would have nothing left
    with pytest.raises(ValueError, match="pass module="):
        trained(Hidden())
    with pytest.raises(ValueError, match="module: expected a submodule of the model, got 'norm'"):
        trained(Hidden(), module="norm")
