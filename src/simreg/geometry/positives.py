"""How many tokens the loss has a positive for, from the labels alone."""

import torch
from torch import Tensor


def has_positive(tokens: Tensor, length: int, chunk: int | None = None) -> Tensor:
    """Whether each label occurs again in its row, or in its chunk of the row.

    `tokens` `[N]` int64 is a stream, cut into rows of `length` (a last, partial row is dropped);
    the label of a position is the next token of its row, so a row has `length` − 1 labels.
    Returns a bool `[rows, length − 1]`. Memory O(N).
    """
    if length < 2 or (chunk is not None and chunk < 1):
        raise ValueError(f"length: expected 2 or more (got {length}); chunk: 1 or more ({chunk})")
    count = len(tokens) // length
    labels = tokens[: count * length].view(count, length)[:, 1:]
    place = torch.arange(length - 1) // (chunk or length)
    segment = torch.arange(count)[:, None] * length + place
    key = segment * (int(tokens.max()) + 1 if len(tokens) else 1) + labels
    _, where, counts = torch.unique(key, return_inverse=True, return_counts=True)
    found: Tensor = counts[where] > 1
    return found
