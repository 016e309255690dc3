"""Models whose LM head has a bias that starts at the unigram distribution."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simreg.recipe import assemble, head, loop, models
from simreg.recipe.config import from_dict
from simreg.recipe.data import prepare
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


def test_the_lines_of_the_documents_do_the_same() -> None:
    page = (tiny.ROOT / "docs/loss.md").read_text()
    [lines] = re.findall(r"```python\n(counts = .*?)```", page, re.DOTALL)
    tokens = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    ours = models.build(from_dict({"model": BIAS}), tokenizer_size=300, eos_token_id=0)
    head.start_at_unigram(ours, tokens)
    model = models.build(from_dict({}), tokenizer_size=300, eos_token_id=0)
    exec(lines, {"torch": torch, "model": model, "tokens": torch.from_numpy(tokens).long()})
    torch.testing.assert_close(model.lm_head.bias, ours.lm_head.bias)
    ids = torch.randint(0, 300, (2, 8))
    expected = model.model(ids)[0] @ model.lm_head.weight.T + ours.lm_head.bias
    torch.testing.assert_close(model(ids).logits, expected)


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
    assert model.loss_type == "ForCausalLM"
    plain = tiny.config(tmp_path / "plain", text, {"model": {"preset": preset}})
    assemble.model(plain, corpus).save_pretrained(tmp_path / "plain")
    names = load_file(Path(config.out) / "model/model.safetensors").keys()
    assert names - {"lm_head.bias"} == load_file(tmp_path / "plain/model.safetensors").keys()
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_no_weight_decay_on_it(
    tmp_path: Path, text: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[loop.RunTrainer] = []
    create = loop.RunTrainer.create_optimizer
    monkeypatch.setattr(
        loop.RunTrainer, "create_optimizer", lambda self, *a: made.append(self) or create(self, *a)
    )
    config = tiny.config(tmp_path, text, {"model": BIAS, "optim": {"name": name}})
    train(config)
    model: Any = made[0].model
    groups = made[0].optimizer.param_groups
    (group,) = [g for g in groups if any(p is model.lm_head.bias for p in g["params"])]
    assert group["weight_decay"] == 0
    assert any(g["weight_decay"] > 0 for g in groups)


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_transformers_takes_it_for_a_causal_model(tmp_path: Path, text: Path, preset: str) -> None:
    """By name: its label smoothing shifts the labels of these alone."""
    config = tiny.config(tmp_path, text, {"model": {"preset": preset, **BIAS}})
    model: Any = assemble.model(config, prepare(config.data))
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
