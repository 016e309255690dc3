"""The protocol that SimReg and its rivals share: trainers and studies know no particular one."""

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """An auxiliary loss on the final hidden states, added to cross-entropy.

    ``hidden`` is ``[B, L, d]``: the input of the LM head. ``labels`` is ``[B, L]`` int64, already
    shifted (the label of a position is the token that follows it), -100 where ignored.
    ``segments`` is ``[B, L]`` int or None. The loss is *summed* over tokens and divided by
    ``num_items`` (a number or a scalar tensor; None: the valid labels of this call), the divisor of
    cross-entropy, so that gradient accumulation and data parallelism stay exact (design: per-token
    and additive). Returns the weighted scalar loss and a dict of detached scalar metrics.
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
