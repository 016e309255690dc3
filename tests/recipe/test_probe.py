import pytest
import torch
from safetensors.torch import load_file

from simreg.recipe.progress import log_line
from simreg.recipe.train import train
from tests.recipe import tiny

CHANGES = {"train": {"analyze_every": 4, "evals": 2}}


def silent(record):
    log_line({**record, "mfu": None}, total=record["steps"])  # every record has a line


def weights(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_training_goes_on_as_if_nobody_had_looked(text, tmp_path, one_thread, weight):
    arm = {"simreg": {"weight": weight}}
    looked, blind = tmp_path / "looked", tmp_path / "blind"
    train(tiny.config(looked, text, {**CHANGES, **arm}), on_step=silent)
    train(tiny.config(blind, text, {"train": {"evals": 2}, **arm}), on_step=silent)
    one, other = weights(looked), weights(blind)
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = tiny.metrics(str(looked / "run"))
    found = [r for r in lines if r["kind"] == "geometry"]
    assert [r["step"] for r in found] == [4, 8, 12, 16, 20]
    assert [r for r in lines if r["kind"] != "geometry"] == tiny.metrics(str(blind / "run"))
    assert found[0]["effective_rank"] != found[-1]["effective_rank"]
    ratios = [r["grad_ratio"] for r in found if "grad_ratio" in r]
    assert len(ratios) == (5 if weight else 0)
    assert all(0 < ratio < 10 for ratio in ratios)
    assert found[0]["tokens"] == 4 * 4 * 32


@pytest.mark.parametrize("scope", ["row", "document"])
def test_what_is_seen_is_the_model_at_that_step(text, tmp_path, one_thread, scope):
    from transformers import AutoModelForCausalLM

    from simreg import SimRegLoss
    from simreg.geometry.glance import glance
    from simreg.geometry.pull import gradient_ratio
    from simreg.recipe.data import prepare
    from simreg.recipe.probe import Probe

    settings = {"weight": 0.3, "push": 0, "depths": [], "schedule": "constant", "scope": scope}
    config = tiny.config(tmp_path, text, {**CHANGES, "simreg": settings})
    train(config, on_step=silent)
    seen = [r for r in tiny.metrics(config.out) if r["kind"] == "geometry"][-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    probe = Probe(prepare(config.data).validation, documents=True)
    ids, segments = probe.ids, probe.segments[:, :-1] if scope == "document" else None
    assert ids.numel() <= 1024
    assert probe.segments.any(), "rows of one document each would show nothing"
    with torch.no_grad():
        hidden = model.get_decoder()(ids).last_hidden_state
    truth = glance(hidden[:, :-1], ids[:, 1:], model.lm_head.weight)
    assert {k: seen[k] for k in truth} == pytest.approx(truth, rel=1e-4)
    given = hidden[:, :-1], ids[:, 1:], model.lm_head.weight, None
    pull = gradient_ratio(*given, SimRegLoss(0.3, push=0), segments)
    assert seen["grad_ratio"] == pytest.approx(pull, rel=1e-4)


def test_a_resumed_run_looks_as_the_whole_one(text, tmp_path, one_thread):
    whole, parts = (tiny.config(tmp_path / n, text, CHANGES) for n in ("whole", "parts"))
    train(whole, on_step=silent)

    def stop(record):
        if record["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, on_step=stop)
    train(parts, on_step=silent)
    assert tiny.metrics(whole.out) == tiny.metrics(parts.out)


def test_the_flag_has_a_short_name(monkeypatch):
    from simreg import cli
    from simreg.recipe import train as train_module

    seen = []
    monkeypatch.setattr(train_module, "train", seen.append)
    assert cli.main(["train", "--analyze-every", "5"]) == 0
    assert cli.main(["train", "--train.analyze-every", "6"]) == 0
    assert [config.train.analyze_every for config in seen] == [5, 6]


def test_a_look_neither_draws_random_numbers_nor_leaves_the_model_changed(text, tmp_path):
    from types import SimpleNamespace

    from transformers import GPT2Config, GPT2LMHeadModel

    from simreg.recipe.data import prepare
    from simreg.recipe.probe import Probe

    size = {"vocab_size": 300, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size)).train()  # has dropout
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m, keep_torch_compile: m),
        args=SimpleNamespace(device=torch.device("cpu")),
        compute_loss_context_manager=torch.no_grad,
        model=model,
    )
    probe = Probe(prepare(tiny.config(tmp_path, text).data).validation)
    before = torch.get_rng_state()
    assert probe(trainer) == probe(trainer)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
