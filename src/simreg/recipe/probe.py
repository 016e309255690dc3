"""A look at the geometry of a model in training (`train.analyze_every`)."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from simreg.geometry.glance import glance
from simreg.geometry.pull import gradient_ratio
from simreg.recipe.data import Rows

TOKENS = 1024
"""Of validation text that every look is at (a row, if it is longer)."""


class Probe:
    """Measures always the same validation rows, so that looks and arms can be compared.

    A forward pass without gradients or random numbers: training goes on as if it had not been.
    Every process must call it, since a sharded model takes all of them to run. `documents`: the
    regularizer keeps within them.
    """

    def __init__(self, rows: Rows, *, documents: bool = False) -> None:
        count = min(len(rows), max(1, TOKENS // rows.seq_len))
        spread = torch.linspace(0, len(rows) - 1, count).round().long().tolist()
        self.ids = torch.stack([rows[i]["input_ids"] for i in spread])
        self.segments = torch.stack([rows[i]["segments"] for i in spread]) if documents else None

    @torch.no_grad()
    def __call__(self, trainer: Any) -> dict[str, float | None]:
        """What `glance` finds in the model of a trainer, and `grad_ratio` of its regularizer."""
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        ids, training = self.ids.to(trainer.args.device), model.training
        model.eval()
        with trainer.compute_loss_context_manager():
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        model.train(training)
        layer = model.get_output_embeddings()
        head, bias = _whole(layer.weight), getattr(layer, "bias", None)
        bias = None if bias is None else _whole(bias)
        states = hidden[:, :-1].float()
        if hidden.device.type == "mps":  # which has no float64
            states, ids, head = states.cpu(), ids.cpu(), head.cpu()
            bias = None if bias is None else bias.cpu()
        looked = glance(states, ids[:, 1:], head, bias)
        if (regularizer := getattr(trainer, "regularizer", None)) is not None:
            segments = None if self.segments is None else self.segments[:, :-1].to(ids.device)
            looked["grad_ratio"] = gradient_ratio(
                states, ids[:, 1:], head, bias, regularizer, segments
            )
        return looked


def _whole(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
