"""Models whose LM head has a bias that starts at the unigram distribution."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from simreg.recipe import assemble, head, models
from simreg.recipe.config import from_dict
from simreg.recipe.data import prepare
from simreg.recipe.timing import Stepper
from simreg.recipe.train import train
from tests.recipe import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
BIAS = {"head_bias": "unigram"}


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_it_starts_at_the_unigram_distribution(tmp_path: Path, text: Path, preset: str) -> None:
    config = tiny.config(tmp_path, text, {"model": {"preset": preset, **BIAS}})
    corpus = prepare(config.data)
    model = assemble.model(config, corpus)
    seen = Counter(int(token) for row in corpus.train for token in row["input_ids"])
    rest = corpus.train.tokens[len(corpus.train) * corpus.train.seq_len :]
    seen.update(int(token) for token in rest)
    share = [(1 + seen[k]) / (corpus.tokens + corpus.vocab_size) for k in range(corpus.vocab_size)]
    torch.testing.assert_close(model.lm_head.bias.exp(), torch.tensor(share))

    plain = tiny.config(tmp_path, text, {"model": {"preset": preset}})
    without = dict(assemble.model(plain, corpus).named_parameters())
    for name, value in model.named_parameters():
        assert name == "lm_head.bias" or torch.equal(value, without[name])

    entropy = -sum(n / corpus.tokens * math.log(share[k]) for k, n in seen.items())
    batch = torch.stack([corpus.train[i]["input_ids"] for i in range(len(corpus.train))])
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss
    assert loss.item() == pytest.approx(entropy, abs=0.1)
    assert entropy < math.log(300) - 0.3


def test_many_tokens_are_sampled_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SAMPLE", 1000)
    monkeypatch.setattr(head, "_BLOCK", 10)
    tokens = np.repeat(np.arange(4, dtype=np.uint16), 5000)
    model = models.build(from_dict({"model": BIAS}), tokenizer_size=5, eos_token_id=0)
    head.start_at_unigram(model, tokens)
    share = model.lm_head.bias.exp()
    assert share.sum().item() == pytest.approx(1)
    torch.testing.assert_close(share[:4], torch.full((4,), 0.2488), atol=0.003, rtol=0)
    assert share[4].item() == pytest.approx(1 / 1005)


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_it_is_trained_saved_and_loaded(tmp_path: Path, text: Path, preset: str) -> None:
    config = tiny.config(tmp_path / "whole", text, {"model": {"preset": preset, **BIAS}})
    corpus = prepare(config.data)
    start = assemble.model(config, corpus).lm_head.bias
    train(config)
    trained = load_file(Path(config.out) / tiny.LAST / "model.safetensors")["lm_head.bias"]
    assert (trained - start).abs().min() > 0

    model, info = AutoModelForCausalLM.from_pretrained(
        Path(config.out) / "model", output_loading_info=True
    )
    assert torch.equal(model.lm_head.bias, trained)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(12)[None]
    hidden = model.model(input_ids=ids).last_hidden_state
    logits = hidden @ model.lm_head.weight.T + trained
    torch.testing.assert_close(model(input_ids=ids).logits, logits)


def test_a_killed_run_ends_the_same(tmp_path: Path, text: Path) -> None:
    whole, broken = (tiny.config(tmp_path / name, text, {"model": BIAS}) for name in "ab")
    train(whole)
    tiny.run_and_die(broken, tmp_path, "step:13")
    train(broken)
    tiny.assert_same_run(whole, broken)


def test_no_weight_decay_on_it(tmp_path: Path, text: Path) -> None:
    """Muon's own groups; transformers, for AdamW, leaves out what is called a bias."""
    config = tiny.config(tmp_path, text, {"model": BIAS, "optim": {"name": "muon"}})
    stepper = Stepper(config, prepare(config.data), 1)
    decayed = [g for g in stepper.optimizer.param_groups if g["weight_decay"] > 0]
    bias = stepper.model.lm_head.bias
    assert not any(p is bias for group in decayed for p in group["params"])
