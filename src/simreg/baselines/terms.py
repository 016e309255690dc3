"""Terms that the rival objectives are made of, and the checks on their options."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from simreg.kernels.pairs import wide
from simreg.kernels.reference import EPS
from simreg.loss import is_number


def valid(labels: Tensor) -> Tensor:
    """Where there is a label."""
    return labels >= 0


def unit(hidden: Tensor, labels: Tensor) -> Tensor:
    """Embeddings divided by their norm, in float32 or wider; 0 where the label is ignored.

    What ignored positions hold, NaN too, is never read.
    """
    return torch.nn.functional.normalize(seen(hidden, labels), dim=-1, eps=EPS)


def products(states: Tensor) -> Tensor:
    """`[B, L, L]`: of each two of `[B, L, d]`, cosines if their norm is 1; no autocast."""
    there = torch.amp.is_autocast_available(states.device.type)  # not on "meta"
    with torch.autocast(states.device.type, enabled=False) if there else nullcontext():
        return states @ states.mT


def seen(hidden: Tensor, labels: Tensor) -> Tensor:
    """Hidden states in float32 or wider; 0 where the label is ignored."""
    return hidden.to(wide(hidden.dtype)).masked_fill(~valid(labels).unsqueeze(-1), 0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`[B, L]` of each token, in float32 or wider; 0 where the label is ignored."""
    exact = seen(logits, labels)
    losses = exact.logsumexp(-1) - pick(exact, labels)
    return losses.masked_fill(~valid(labels), 0)


def pick(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each label, `[B, L]`; of token 0 where the label is ignored."""
    return logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def pairs(labels: Tensor, segments: Tensor | None) -> Tensor:
    """`[B, L, L]`: which other tokens each token meets: both have a label, and one segment."""
    there = valid(labels)
    found = there.unsqueeze(2) & there.unsqueeze(1)
    if segments is not None:
        found = found & (segments.unsqueeze(2) == segments.unsqueeze(1))
    return found & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)


def share(values: Tensor, segments: Tensor | None) -> Tensor:
    """Sums of `values [B, L, n]` over each segment of a row, given to all of its positions."""
    if segments is None:
        return values.sum(1, keepdim=True).expand_as(values)
    # Segments numbered from 0 within each row, wherever their tokens lie: L sums are enough.
    ordered, order = segments.long().sort(1)
    steps = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    number = torch.zeros_like(order).scatter(1, order, steps.long().cumsum(1))
    where = number.unsqueeze(-1).expand_as(values)
    return torch.zeros_like(values).scatter_add(1, where, values).gather(1, where)


def together(labels: Tensor, segments: Tensor | None, offset: int) -> Tensor:
    """`[B, L - offset]`: where a token and the one `offset` after it are of one segment.

    Both have a label.
    """
    length = max(labels.shape[1] - offset, 0)
    there = valid(labels)
    found = there[:, :length] & there[:, offset:]
    if segments is not None:
        found = found & (segments[:, :length] == segments[:, offset:])
    return found


def check(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A number in [low, high]; ValueError names the argument."""
    if not (is_number(value) and low <= value <= high and math.isfinite(value)):
        upper = "" if high == math.inf else f" to {high:g}"
        raise ValueError(f"{name}: expected a finite number from {low:g}{upper}, got {value!r}")
    return float(value)


def check_count(name: str, value: Any, low: int) -> int:
    """A whole number, at least `low`; ValueError names the argument."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: expected a whole number from {low}, got {value!r}")
    return value


def check_whole(name: str, value: Any) -> int:
    """A whole number, negative or not; ValueError names the argument."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return value


def check_word(name: str, value: Any, words: tuple[str, ...]) -> str:
    """One of the words; ValueError names the argument."""
    if value not in words:
        raise ValueError(f"{name}: expected one of {words}, got {value!r}")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False; ValueError names the argument."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def check_depths(name: str, value: Any) -> tuple[float, ...]:
    """Fractions of the depth, for `Reads`; ValueError names the argument."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name}: expected a list of fractions of the depth, got {value!r}")
    return tuple(check(name, depth, 0.001, 1) for depth in value)
