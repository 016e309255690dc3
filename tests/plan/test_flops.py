"""FLOPs of the formulas against those of matrix products that torch counts while they run."""

import pytest
import torch
from torch import Tensor

from simreg.kernels import blockwise
from simreg.kernels.order import Form
from simreg.plan import costs, models
from simreg.recipe import models as recipe
from simreg.recipe.presets import PRESETS
from tests.plan.counting import counted, fixed_spans, problem

VARIANTS = ("out", "in", "decoupled")


def kernel(hidden: Tensor, labels: Tensor, segments: Tensor | None, variant: str):
    """FLOPs of the forward and backward pass of the blockwise kernel, not of the operator."""
    form, saved = Form(0.1, variant), []
    with torch.no_grad():
        forward = counted(lambda: saved.extend(blockwise.forward(hidden, labels, segments, form)))
        grad, rest = torch.ones_like(saved[0]), tuple(saved[3:])
        backward = counted(lambda: blockwise.backward(grad, hidden, labels, segments, rest, form))
    return forward, backward


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blockwise, "block", lambda device: 64)
    return 64


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [256, 1024])
def test_symmetric_kernels(variant: str, length: int, tile: int) -> None:
    hidden, labels = problem(2, length, 64)
    forward, backward = kernel(hidden, labels, None, variant)
    formula = costs.symmetric_flops(2 * length, length, 64, tile=tile)
    if variant == "decoupled":
        share = costs.positive_share(length, tile)
        assert forward / formula.forward - 1 == pytest.approx(share, rel=0.05)
    else:
        assert formula.forward == pytest.approx(forward, rel=0.05)
    assert formula.backward == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("document", [211, 333, 997])
def test_documents(document: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels = problem(1, 4096, 32)
    segments = torch.arange(4096)[None] // document
    ending_with_documents = sum(kernel(hidden, labels, segments, "out"))
    monkeypatch.setattr(blockwise, "_spans", fixed_spans)
    forward, backward = kernel(hidden, labels, segments, "out")
    saved = {211: 0.3, 333: 0.1, 997: 0.1}[document]
    assert ending_with_documents < (1 - saved) * (forward + backward)
    job = costs.Job(models.find("llama-tiny"), 4096, document=document)
    covered = costs.covered(job, costs.Setting(), tile)
    formula = costs.symmetric_flops(4096, covered, 32, tile=tile)
    assert formula.total == pytest.approx(forward + backward, rel=0.05)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_models_that_are_trained(preset: str) -> None:
    config = recipe.model_config(preset, vocab_size=32_000, seq_len=256)
    total, active = recipe.count_parameters(config)
    model = models.find(preset)
    assert model.parameters == total
    assert model.multiplied == active - 32_000 * model.hidden
    attention = 12 * model.layers * model.hidden * 256
    assert 6 * model.multiplied + attention == recipe.flops_per_token(config, active, 256)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-8b", 8.03), ("llama-70b", 70.55), ("llama-405b", 405.85), ("mixtral-8x22b", 140.62)],
)
def test_published_sizes(name: str, billions: float) -> None:
    assert round(models.find(name).parameters / 1e9, 2) == billions


@pytest.mark.parametrize("length", [64, 512])
def test_model(length: int) -> None:
    model = models.find("llama-tiny")
    config = recipe.model_config("llama-tiny", vocab_size=32_000, seq_len=length)
    config._attn_implementation = "eager"  # which multiplies the masked half, too
    network = recipe._model(config)
    ids = torch.randint(32_000, (1, length))
    flops = counted(lambda: network(ids).logits.sum().backward())
    whole = costs.model_flops(costs.Job(model, length))
    masked = 6 * model.layers * model.hidden * length * length
    assert whole + masked == pytest.approx(flops, rel=0.05)
    assert whole == 6 * length * model.multiplied + masked
