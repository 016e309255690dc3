"""Weighted means over steps and processes, for training logs: read once a record."""

from typing import Any

import torch
from torch import Tensor


def wide(tensor: Tensor) -> torch.dtype:
    """float64, so that long sums lose nothing, unless the tensor's device has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class Window:
    """Weighted means over the micro-batches since the last log record, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor) -> None:
        """Add a scalar with its weight; neither is read by the host."""
        dtype = wide(value)
        weight = weight.detach().to(dtype)
        # A weight of 0 means that there was nothing to average: its value may be anything.
        product = torch.where(weight > 0, value.detach().to(dtype) * weight, 0.0)
        pair = torch.stack([product, weight])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes (one reduction, one read), without those of no weight."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
        return {
            name: total / weight
            for name, (total, weight) in zip(names, sums, strict=True)
            if weight
        }
