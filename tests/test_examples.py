"""The examples run, learn, and compute what they say; what pages show in Python runs."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch.nn import functional as F

from simreg import SimRegLoss, attach, simreg_loss
from tests.test_capture import SMALL, batch

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop_learns() -> None:
    losses = load("plain_loop").main(steps=30)
    assert len(losses) == 30
    assert losses[0] > 5
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_plain_loop_has_the_gradients_of_the_sum(micro_batches: int) -> None:
    example = load("plain_loop")
    torch.manual_seed(0)
    model = example.Model().double()
    rows = torch.randint(40, (6, 33))
    hidden = []
    with model.norm.register_forward_hook(lambda module, args, out: hidden.append(out)):
        logits = model(rows[:, :-1])
    ce = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    expected = ce + 0.3 * simreg_loss(hidden[0], rows[:, 1:], push=2)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    reg = attach(model, SimRegLoss(weight=0.3, push=2), module=model.norm)
    assert example.backward(model, reg, rows, micro_batches) == pytest.approx(expected.item())
    torch.testing.assert_close([p.grad for p in model.parameters()], list(gradients))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_callback_learns(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load("lightning_callback").main(steps=15)
    assert metrics["ce"] < 4  # from log 256 = 5.5
    assert 0 < metrics["simreg/loss"] < 10
    assert metrics["simreg/pos_cos"] >= metrics["simreg/neg_cos"]


@pytest.mark.parametrize("page", ["README.md", "docs/loss.md"])
def test_the_snippets_of_a_page_run(page: str) -> None:
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 3})
    model, (ids, _) = transformers.AutoModelForCausalLM.from_config(config), batch()
    names = {"model": model, "input_ids": ids, "labels": ids, "steps": 3}
    names["tokens"] = ids.flatten()
    names["batches"] = 3 * [{"input_ids": ids, "labels": ids}]
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    assert names["loss"].requires_grad
