"""The protocol that SimReg and its rivals share: trainers and studies know no particular one."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reads:
    """What an objective reads of a forward pass besides the final hidden states.

    Each comes as a keyword of the call, with gradients, in the dtype that the model computed it in.
    """

    logits: bool = False
    """`logits`: `[B, L, V]`, those that the model returns and its cross-entropy sees: after a
    scale or a soft cap, if it has one."""
    depths: tuple[float, ...] = ()
    """`earlier`: for each fraction of the depth, the hidden states `[B, L, d]` that leave the layer
    there (of n layers, layer ⌈fraction · n⌉), before any norm."""
    head: bool = False
    """`head`: the LM head, to be called on other states of width d; its parameters must be whole
    by then."""

    def __or__(self, other: "Reads") -> "Reads":
        """What both read; depths without repetition, in the order of their first mention."""
        depths = tuple(dict.fromkeys((*self.depths, *other.depths)))
        return Reads(self.logits or other.logits, depths, self.head or other.head)


def reads(objective: object) -> Reads:
    """What `objective` declares in its attribute `reads`; nothing more if it has none.

    ValueError for one that is no `Reads`.
    """
    declared = getattr(objective, "reads", None)
    if declared is not None and not isinstance(declared, Reads):
        raise ValueError(f"objective.reads: expected a simreg.Reads, got {declared!r}")
    return declared or Reads()


def layer_at(depth: float, layers: int) -> int:
    """Which of so many layers is at a fraction of the depth, counted from 1: ⌈depth · layers⌉."""
    # Rounded, since 0.28 · 25 is a little more than 7.
    return max(1, math.ceil(round(depth * layers, 6)))


def moved(value: Any, device: torch.device | None) -> Any:
    """A tensor on that device, anything else as it is: layers may be spread over devices."""
    return value.to(device) if isinstance(value, Tensor) else value


def labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """Where there is a label: it is neither `ignore_index` nor negative."""
    return (labels >= 0) & (labels != ignore_index)


def labels_at(
    labels: Tensor, segments: Tensor | None, offset: int, ignore_index: int = -100
) -> Tensor:
    """`[..., L]`: for each token the label `offset` positions later, earlier if it is negative.

    Ignored where the token's own label is, and where that position is of another segment or has no
    label.
    """
    if offset == 0:
        return labels
    found = torch.full_like(labels, ignore_index)
    here = slice(0, max(labels.shape[-1] - abs(offset), 0))
    there = slice(abs(offset), None)
    if offset < 0:
        here, there = there, here
    known = labelled(labels[..., here], ignore_index)
    if segments is not None:
        known &= segments[..., here] == segments[..., there]
    found[..., here] = labels[..., there].where(known, ignore_index)
    return found


def by_rows(objective: object) -> bool:
    """Whether its loss of a row depends on that row alone, so that any split of a batch into
    micro-batches gives the same sum: yes, unless its attribute `by_rows` says no."""
    return bool(getattr(objective, "by_rows", True))


def check_layers(objective: object, layers: int) -> None:
    """ValueError if `objective` can't do with so many layers: what its `check_layers` says."""
    own = getattr(objective, "check_layers", None)
    if own is not None:
        own(layers)


class Objective(Protocol):
    """An auxiliary loss on the final hidden states, added to cross-entropy.

    ``hidden`` is ``[B, L, d]``: the input of the LM head. ``labels`` is ``[B, L]`` int64, already
    shifted (the label of a position is the token that follows it), -100 where ignored.
    ``segments`` is ``[B, L]`` int or None. The loss is *summed* over tokens and divided by
    ``num_items`` (a number or a scalar tensor; None: the valid labels of this call), the divisor of
    cross-entropy, so that gradient accumulation and data parallelism stay exact. Returns the
    weighted scalar loss and a dict of detached scalar metrics: ``loss``, the mean without the
    weight, and whatever else.

    An objective that needs more declares it in an attribute ``reads`` (a `Reads`) and gets it as
    keywords. One that owns parameters or buffers is an `nn.Module`. One whose loss of a row depends
    on more than that row has an attribute ``by_rows = False``. One whose attribute ``weight`` is
    the number 0 is off; its ``ignore_index``, if it has one, is what labels are filled with; one
    whose rows are spread over processes has a ``group``, and ``refuse(*devices)``, which is called
    in place of the loss where there are no arguments for it, lest other processes wait;
    ``check_layers(n)`` raises ValueError for a model of n layers that will not do.
    """

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted scalar loss, and its metrics."""
        ...


def switched_off(objective: object) -> bool:
    """Whether its attribute `weight`, if that is a number, is 0 (a trainer's schedule may say)."""
    weight = getattr(objective, "weight", None)
    return isinstance(weight, Real) and weight == 0


class Sum(nn.Module):
    """SimReg and another objective as one: their losses add.

    What `simreg` ignores the other does too. The metrics are those of `simreg`, and the other's
    `loss` as `auxiliary`.
    """

    def __init__(self, simreg: Objective | None, auxiliary: Objective) -> None:
        super().__init__()
        if any(hasattr(each, "group") for each in (simreg, auxiliary)):
            raise ValueError(
                "Sum: objectives of tokens that are spread over processes do not add: attach one, "
                "whose rows the other would see a part of"
            )
        self.simreg, self.auxiliary = simreg, auxiliary
        self.reads = reads(simreg) | reads(auxiliary)
        self.by_rows = by_rows(simreg) and by_rows(auxiliary)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        **read: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Objective`."""
        ignored = getattr(self.simreg, "ignore_index", -1)
        others = labels.masked_fill(labels == ignored, -1) if ignored >= 0 else labels
        loss, metrics = self.auxiliary(
            hidden, others, segments, num_items=num_items, **self._share(self.auxiliary, read)
        )
        found = {"auxiliary": metrics["loss"]}
        if self.simreg is not None and not switched_off(self.simreg):
            own, metrics = self.simreg(
                hidden, labels, segments, num_items=num_items, **self._share(self.simreg, read)
            )
            loss, found = loss + own, found | metrics
        return loss, found

    def check_layers(self, layers: int) -> None:
        """Of both."""
        check_layers(self.simreg, layers)
        check_layers(self.auxiliary, layers)

    def _share(self, objective: Objective, read: dict[str, Any]) -> dict[str, Any]:
        """Of all that was read, what this objective asked for."""
        wanted = reads(objective)
        share = {name: read[name] for name in ("logits", "head") if getattr(wanted, name)}
        if wanted.depths:
            at = dict(zip(self.reads.depths, read["earlier"], strict=True))
            share["earlier"] = tuple(at[depth] for depth in wanted.depths)
        return share
