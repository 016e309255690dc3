"""SimReg at layers within a model, besides the final hidden states."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from simreg.loss import SimRegLoss, is_number
from simreg.objectives import Reads, labelled, labels_at, layer_at, moved

DEPTHS = (0.25, 0.5)
"""Where by default: a quarter of the way and in the middle (docs/results.md, "Which defaults, and
why?")."""
EARLIER = (0.5,)
"""What was the default before: in the configs of runs from then."""


def default_depths(layers: int) -> list[float]:
    """`DEPTHS`, in a model of one layer none, and of two layers the middle: the first."""
    at = {layer_at(depth, layers): depth for depth in DEPTHS}
    return [depth for layer, depth in at.items() if layer < layers]


def _default_offset(depth: float) -> int:
    """The token before in the first quarter, the one after the next beyond (docs/results.md)."""
    return -2 if depth <= 0.25 else 1


def layers_within(depths: Sequence[float], layers: int) -> list[int]:
    """The layers at these depths, of so many, counted from 1.

    Raises:
        ValueError: two are one layer, or one is the last, whose λ would count twice; or there is
            but one.
    """
    if layers == 1 and depths:
        raise ValueError("depths: a model of one layer has none within it")
    at = [layer_at(depth, layers) for depth in depths]
    if len({*at, layers}) <= len(at):
        fewer = f": give {default_depths(layers)}" if tuple(depths) == DEPTHS else ""
        raise ValueError(
            f"depths: {list(depths)} are layers {at} of {layers}, each may come once, and the last "
            f"has SimReg anyway{fewer}"
        )
    return at


def offsets_at(depths: Sequence[float], offset: int | Sequence[int] | None) -> tuple[int, ...]:
    """One for each of the depths, of one for all, of a list, or (None) by default.

    Raises:
        ValueError: for what is no whole number, and a list of another length.
    """
    given = [offset] * len(depths) if isinstance(offset, int) else offset
    if given is None:
        given = [_default_offset(depth) for depth in depths]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"offset: expected a whole number, or one for each depth, got {offset!r}")
    if any(type(each) is not int for each in given):
        raise ValueError(f"offset: expected whole numbers, got {offset!r}")
    if len(given) != len(depths):
        raise ValueError(f"offset: {len(given)} for {len(depths)} of depths: {offset!r}")
    return tuple(given)


class AtDepths(nn.Module):
    """SimReg at hidden states within the model besides the final ones: the losses add.

    Not of the paper, which has the final ones alone; what it is worth is in docs/results.md.

    Args:
        simreg: a `SimRegLoss`, or that compiled; not one whose sequences are spread over processes.
        depths: where else, as fractions of the depth between 0 and 1 (`Reads.depths`): a list,
            each of another layer. Default: a quarter of the way and in the middle, which takes
            three layers; a model of two has but `[0.5]`.
        offset: which label they are compared by, everywhere or a list, one for each of the
            depths: 0, that of the final hidden states, the next token; 1, that of the position
            after it in the row and segment, the token after the next, and so on; −1 is the token
            itself, −2 the one before it. Default: −2 up to depth 0.25, 1 beyond.

    The metrics are those of the final hidden states, and `earlier`, the mean of `loss` elsewhere,
    over the same number of labels: those that have none at the offset count 0.

    Raises:
        ValueError: for an objective that is no `SimRegLoss` of whole sequences, depths that are no
            fractions, or stand twice, and an offset that is no whole number, or as many as depths.
    """

    def __init__(
        self,
        simreg: nn.Module,
        depths: Sequence[float] = DEPTHS,
        *,
        offset: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        inner = getattr(simreg, "_orig_mod", simreg)
        if not isinstance(inner, SimRegLoss) or hasattr(inner, "group"):
            raise ValueError(f"simreg: expected a SimRegLoss() of whole sequences, got {simreg!r}")
        if isinstance(depths, str) or not isinstance(depths, Sequence) or not depths:
            raise ValueError(f"depths: expected a list of fractions, got {depths!r}")
        if not all(is_number(depth) and 0 < depth < 1 for depth in depths):
            raise ValueError(f"depths: expected fractions between 0 and 1, got {depths!r}")
        if len(set(depths)) < len(depths):
            raise ValueError(f"depths: each once, got {depths!r}")
        self.simreg, self.offsets = simreg, offsets_at(depths, offset)
        self.reads = Reads(depths=tuple(map(float, depths)))

    @property
    def weight(self) -> float:
        """λ, of each layer: where it is 0 trainers leave the objective out."""
        return self._inner.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._inner.weight = value

    @property
    def _inner(self) -> SimRegLoss:
        """`simreg`, not compiled."""
        return cast(SimRegLoss, getattr(self.simreg, "_orig_mod", self.simreg))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        earlier: Sequence[Tensor] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective`; `earlier`: hidden states `[B, L, d]`, one for each of the depths.

        Raises:
            ValueError: as `SimRegLoss`, and for more or fewer of `earlier`.
        """
        if len(earlier) != len(self.reads.depths):
            raise ValueError(
                f"earlier: expected hidden states at depths {list(self.reads.depths)}, got "
                f"{len(earlier)} (`attach` takes them from the model)"
            )
        loss, metrics = self.simreg(hidden, labels, segments, num_items=num_items)
        ignored = self._inner.ignore_index
        labels_by = {at: labels_at(labels, segments, at, ignored) for at in set(self.offsets)}
        count = {at: labelled(y, ignored).sum().clamp_min(1) for at, y in labels_by.items()}
        items = count[0] if 0 in count else labelled(labels, ignored).sum().clamp_min(1)
        num_items = items if num_items is None else num_items
        below = []
        for states, at in zip(earlier, self.offsets, strict=True):
            here = (moved(v, states.device) for v in (labels_by[at], segments, num_items))
            ids, documents, divisor = here
            own, found = self.simreg(states, ids, documents, num_items=divisor)
            loss = loss + own.to(loss.device)
            # Of what the mean is over, those that have a label here.
            share = (count[at].to(loss.dtype) / items).to(loss.device)
            below.append(share * found["loss"].to(loss.device))
        return loss, {**metrics, "earlier": torch.stack(below).mean()}

    def check_layers(self, layers: int) -> None:
        """ValueError if a model of so many layers has not one of its own for each depth."""
        layers_within(self.reads.depths, layers)

    def extra_repr(self) -> str:
        """The depths, for `print(model)`."""
        offset = self.offsets[0] if len(set(self.offsets)) == 1 else list(self.offsets)
        return f"depths={list(self.reads.depths)}, offset={offset}"
