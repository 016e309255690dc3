"""Hidden states within a model of torchtitan: taken as its layers return them."""

from collections.abc import Sequence
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from simreg.depths import layers_within


class Layers:
    """What layers of a model return, kept from each forward pass with gradients until taken.

    Build it when the model is parallelized, before its first call: compiled layers see no hooks
    that come later.
    """

    def __init__(self, model: nn.Module, depths: Sequence[float]) -> None:
        layers = list(model.get_submodule("layers").children())
        self._kept = [_Kept(number) for number in layers_within(depths, len(layers))]
        for kept in self._kept:
            layers[kept.number - 1].register_forward_hook(kept)

    def take(self, like: Tensor, tp: ProcessGroup | None) -> list[Tensor]:
        """Those of the last forward pass `[B, l, D]`, plain, with the tokens of `like`, which left
        the model; on each rank of tensor parallelism the same, with the whole gradient.

        Raises:
            RuntimeError: a layer returned none in the pass.
        """
        return [_spread_as(like, kept.taken(), tp) for kept in self._kept]

    def forget(self) -> None:
        """Let go of them instead."""
        for kept in self._kept:
            kept.states = None


class _Kept:
    """The forward hook of a layer. One object each: Dynamo would guard on the size of a dict, and
    compile the layer again for each depth."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.states: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        # Activation checkpointing wraps the whole layer: this does not run again in its backward.
        if torch.is_grad_enabled():
            self.states = output

    def taken(self) -> Tensor:
        states, self.states = self.states, None
        if not isinstance(states, Tensor):
            raise RuntimeError(
                f"loss.depths: layer {self.number} gave no hidden states in this forward pass, but "
                f"{type(states).__name__}"
            )
        return states


def _spread_as(like: Tensor, states: Tensor, tp: ProcessGroup | None) -> Tensor:
    """Sequence parallelism spreads what layers return along the row: gather it."""
    if isinstance(states, DTensor) and isinstance(like, DTensor):
        return states.redistribute(placements=like.placements).to_local()
    if tp is None or states.shape[1] == like.shape[1]:
        return states
    gathered: Tensor = spmd.redistribute(states, tp, src=spmd.S(1), dst=spmd.I)
    return gathered
