"""Where in a model of the user's own an integration attaches an objective."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from simreg.capture import Attached, attach
from simreg.objectives import Objective

Module = nn.Module | Callable[[Any], nn.Module]
Layers = Iterable[nn.Module] | Callable[[Any], Iterable[nn.Module]]


def attach_at(
    model: nn.Module, objective: Objective, module: Module | None, layers: Layers | None
) -> Attached:
    """`attach`, with a `module` and `layers` that may be functions of the model."""
    if module is not None and not isinstance(module, nn.Module):
        module = module(model)
    if layers is not None and not isinstance(layers, Iterable):
        layers = layers(model)
    return attach(model, objective, module=module, layers=layers)
