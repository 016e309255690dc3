"""Small samples, and what is true of them by the definitions, in loops and whole matrices."""

import torch
from torch import Tensor

from simreg.geometry.sample import Sample


def sample(tokens: int = 2300, d: int = 6, labels: int = 40, seed: int = 0) -> Sample:
    """More tokens than a block; labels from frequent to single ones; rows of 50 tokens."""
    draw = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1.0, labels + 1) ** 1.5
    y = torch.multinomial(weights, tokens, replacement=True, generator=draw) * 3  # gaps in the ids
    y[7] = 3 * labels + 1  # a class of one
    centres = torch.randn(3 * labels + 2, d, generator=draw, dtype=torch.float64)
    noise = torch.randn(tokens, d, generator=draw, dtype=torch.float64)
    h = (0.5 + centres[y] + noise).float()
    return Sample.of(h, y, torch.arange(tokens) // 50)


def head_of(found: Sample, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Weight [V, d] and bias [V] of an LM head for the labels of a sample, and some more."""
    draw = torch.Generator().manual_seed(seed)
    size = int(found.labels.max()) + 4
    weight = torch.randn(size, found.hidden.shape[1], generator=draw)
    return weight, torch.randn(size, generator=draw)


def by_label(found: Sample, least: int = 1) -> dict[int, Tensor]:
    """Label -> hidden states [n, d] in float64."""
    h = found.hidden.double()[found.index]
    labels = sorted(set(found.labels.tolist()))
    groups = {c: h[found.labels == c] for c in labels}
    return {c: own for c, own in groups.items() if len(own) >= least}


def cosines(vectors: Tensor) -> Tensor:
    """The whole matrix."""
    e = vectors / vectors.norm(dim=1, keepdim=True)
    return e @ e.T
