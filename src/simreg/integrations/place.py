"""Where in a model of the user's own an integration attaches an objective."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from simreg.capture import Attached, attach
from simreg.objectives import Objective

Module = nn.Module | Callable[[Any], nn.Module]
Layers = Iterable[nn.Module] | Callable[[Any], Iterable[nn.Module]]


def kept(layers: Layers | None) -> Layers | None:
    """Layers that may be asked for more than once: an iterator gives them a single time."""
    return tuple(layers) if isinstance(layers, Iterator) else layers


def attach_at(
    model: nn.Module,
    objective: Objective,
    module: Module | None,
    layers: Layers | None,
    *,
    part: nn.Module | None = None,
) -> Attached:
    """`attach`, with a `module` and `layers` that may be functions of the model.

    `part`: what of the model to attach to.
    """
    if callable(module) and not isinstance(module, nn.Module):
        module = module(model)
    if callable(layers) and not isinstance(layers, Iterable):
        layers = layers(model)
    return attach(model if part is None else part, objective, module=module, layers=layers)
