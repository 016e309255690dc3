from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from simreg.analysis import states
from simreg.geometry.margins import margins
from simreg.recipe import hub
from simreg.recipe.errors import UserError
from simreg.recipe.train import train
from simreg.recipe.trained import Trained
from simreg.study import models
from tests.recipe import tiny

IDS = torch.randint(280, (5, 32), generator=torch.Generator().manual_seed(0))


def collect(target, folder, ids=IDS):
    told = []
    return states.collect(target, ids, str(folder), told.append), told


def test_states_and_labels_give_the_loss_of_the_model(study, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "_TOKENS", 64)  # several forward passes
    target = models.find([str(study / "simreg" / "1" / "seed-1")])[0]
    found, told = collect(target, tmp_path)
    assert len(told) == 3
    model = AutoModelForCausalLM.from_pretrained(target.model)
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none")
    own = margins(found.sample, found.weight, found.bias).loss
    torch.testing.assert_close(own, loss.flatten().double(), atol=1e-4, rtol=1e-4)
    assert found.sample.positions.tolist() == list(range(31)) * 5
    assert found.sample.rows.tolist() == [r for r in range(5) for _ in range(31)]


def test_a_second_look_costs_no_forward_pass(study, tmp_path):
    first, second = models.find([str(study)])[:2]
    one, told = collect(first, tmp_path)
    again, silent = collect(first, tmp_path)
    assert (len(told), len(silent)) == (1, 0)
    assert torch.equal(one.sample.hidden, again.sample.hidden)
    assert collect(second, tmp_path)[1]  # other weights
    assert collect(first, tmp_path, IDS[:4])[1]  # other text
    assert collect(first, tmp_path, IDS.view(10, 16))[1]  # other rows of the same text


def test_a_cache_that_cannot_be_is_named_by_its_option(study, tmp_path):
    (tmp_path / "file").touch()
    target = models.find([str(study)])[0]
    with pytest.raises(UserError, match=r"set --cache-dir to another folder"):
        collect(target, tmp_path / "file" / "cache")


def test_a_damaged_cache_is_made_again(study, tmp_path):
    target = models.find([str(study)])[0]
    one, _ = collect(target, tmp_path)
    before = one.sample.hidden.clone()
    file = next(Path(tmp_path).glob("hidden/*/hidden.f32"))
    file.write_bytes(b"\0" * file.stat().st_size)
    again, told = collect(target, tmp_path)
    assert told
    assert torch.equal(again.sample.hidden, before)


def test_a_checkpoint_of_experts_is_the_model_it_was(tmp_path):
    """Checkpoints keep the model's own parameter names, not the published ones."""
    text = tiny.write_text(tmp_path)
    changes = {"model": {"preset": "mixtral-test"}, "train": {"tokens": 4 * 4 * 32, "evals": 1}}
    train(tiny.config(tmp_path, text, changes), on_step=lambda record: None)
    last = Trained("x", tmp_path / "run" / "checkpoints" / "step-0000004")
    whole = Trained("x", tmp_path / "run" / "model")
    a, b = (collect(t, tmp_path / t.model.name[-4:])[0].sample.hidden for t in (last, whole))
    torch.testing.assert_close(a, b)


def test_a_head_with_other_logits_is_refused(tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    target = Trained("x", tmp_path / "gpt2")
    assert collect(target, tmp_path)[0].bias is None  # tied, and plain
    with pytest.raises(UserError, match="made for another tokenizer"):
        collect(target, tmp_path, IDS + 25)
    from transformers import CohereConfig, CohereForCausalLM

    scaled = CohereConfig(
        vocab_size=300, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, logit_scale=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CohereForCausalLM(scaled)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.save_pretrained(tmp_path / "cohere")
    with pytest.raises(UserError, match="not W·h"):
        collect(Trained("x", tmp_path / "cohere"), tmp_path)


def test_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the model x ") as caught:
        collect(Trained("x", tmp_path), tmp_path)
    assert "\n" not in str(caught.value)


def test_rows_longer_than_the_model(tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="rows of 32 tokens are longer than its 16 positions"):
        collect(Trained("x", tmp_path / "gpt2"), tmp_path)
    collect(Trained("x", tmp_path / "gpt2"), tmp_path, IDS[:, :16])


def test_a_nan_in_a_later_row_is_named(tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    token = int(IDS[3, 7])
    assert token not in IDS[0]
    with torch.no_grad():
        model.transformer.wte.weight[token] = torch.nan
    model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 8))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="hidden states are NaN or infinite"):
        collect(Trained("x", tmp_path / "gpt2"), tmp_path)
    assert not list(tmp_path.glob("hidden/*/hidden.f32"))


def test_a_model_that_reads_what_it_is_to_predict_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=300, intermediate_size=16, initializer_range=0.2, **sizes)
    for decoder in (True, False):
        config.is_decoder = decoder
        BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
        if decoder:
            hub.load(tmp_path / "bert")
            continue
        with pytest.raises(UserError, match="is no causal language model"):
            hub.load(tmp_path / "bert")


def test_a_model_that_runs_elsewhere_only_is_loaded(tmp_path, monkeypatch):
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)

    def forward(self, **kwargs):
        raise RuntimeError("this kernel needs a GPU")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    assert isinstance(hub.load(tmp_path), GPT2LMHeadModel)
