"""What the rival objectives share: how per-token losses become the loss that trainers add."""

import math
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
"""Least norm that embeddings are divided by, as in `simreg_loss`."""


def weigh(
    weight: float, per_token: Tensor, labels: Tensor, num_items: Tensor | float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What an `Objective` returns, from its losses `[B, L]`, which are 0 where they do not apply.

    The sum is divided by `num_items`, or by the valid labels of this call; `loss` among the metrics
    is without `weight`, over the valid labels of this call.
    """
    total, count = per_token.sum(), valid(labels).sum().clamp_min(1)
    loss = weight * (total / (count if num_items is None else num_items))
    return loss, {"loss": total.detach() / count}


def valid(labels: Tensor) -> Tensor:
    """Where there is a label."""
    return labels >= 0


def unit(hidden: Tensor, labels: Tensor) -> Tensor:
    """Embeddings divided by their norm, in float32 or wider; 0 where the label is ignored.

    What ignored positions hold, NaN too, is never read.
    """
    return torch.nn.functional.normalize(seen(hidden, labels), dim=-1, eps=EPS)


def seen(hidden: Tensor, labels: Tensor) -> Tensor:
    """Hidden states in float32 or wider; 0 where the label is ignored."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide).masked_fill(~valid(labels).unsqueeze(-1), 0)


def check(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A number in [low, high]; ValueError names the argument."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high and math.isfinite(value)):
        upper = "" if high == math.inf else f" to {high:g}"
        raise ValueError(f"{name}: expected a finite number from {low:g}{upper}, got {value!r}")
    return float(value)
