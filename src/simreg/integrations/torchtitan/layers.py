"""Hidden states within a model of torchtitan: taken as its layers return them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from simreg.depths import layers_within


class Layers:
    """What layers of a model return, kept from each forward pass with gradients until taken.

    ValueError if two depths are one layer, or one is the last. Build it when the model is
    parallelized, before its first call: compiled layers see no hooks that come later.
    """

    def __init__(self, model: nn.Module, depths: Sequence[float]) -> None:
        layers = list(model.get_submodule("layers").children())
        self._states: dict[int, Tensor] = {}
        self._wanted = len(depths)
        for i, number in enumerate(layers_within(depths, len(layers))):
            layers[number - 1].register_forward_hook(partial(self._keep, i))

    def take(self, like: Tensor, tp: ProcessGroup | None) -> list[Tensor]:
        """Those of the last forward pass `[B, l, D]`, plain, with the tokens of `like`, which left
        the model; on each rank of tensor parallelism the same, with the whole gradient."""
        states, self._states = self._states, {}
        return [_spread_as(like, states[i], tp) for i in range(self._wanted)]

    def _keep(self, index: int, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        # Activation checkpointing wraps the whole layer: this does not run again in its backward.
        if torch.is_grad_enabled():
            self._states[index] = output


def _spread_as(like: Tensor, states: Tensor, tp: ProcessGroup | None) -> Tensor:
    """Sequence parallelism spreads what layers return along the row: gather it."""
    if isinstance(states, DTensor):
        assert isinstance(like, DTensor)
        return states.redistribute(placements=like.placements).to_local()
    if tp is None or states.shape[1] == like.shape[1]:
        return states
    gathered: Tensor = spmd.redistribute(states, tp, src=spmd.S(1), dst=spmd.I)
    return gathered
