"""Dispersion loss: embeddings spread over the sphere, near neighbours first."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import OfLayers

STRAIGHT = 1 - 1e-6
"""Cosines beyond it count as it, without gradient: arccos has an infinite slope at 1."""


class Dispersion(OfLayers):
    """weight · Σ_i D(i), D = log mean_{i≠j} exp(−arccos(cos(h_i, h_j)) / (π · temperature)).

    D is one number for each segment of a row (the row if there are none), so that it weighs as
    much as the segment has tokens; the mean is over all pairs of these tokens. It is negative:
    −1 / temperature at the utmost.

    Source: "Dispersion Loss Counteracts Embedding Condensation and Improves Generalization in Small
    Language Models", arXiv 2602.00217; written from its formula, with the mean over pairs and the
    temperature of its code (KrishnaswamyLab/LM-Dispersion), which adds the mean over all layers.
    Adapted: every token of a row is used, of the final hidden states (after the final norm) and,
    with `depths`, of those fractions of the depth too, of which the mean is taken. The weight is
    that of its README. Embeddings of one direction, whose angle has no gradient, are not parted.
    """

    def __init__(
        self, weight: float = 0.1, temperature: float = 0.5, depths: Sequence[float] = ()
    ) -> None:
        super().__init__(weight, depths)
        self.temperature = terms.check("temperature", temperature, 0.02)  # sums don't underflow

    def of_layer(self, states: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        """The D of each token's segment, `[B, L]`; takes memory for L × L cosines of each row."""
        units = terms.unit(states, labels)
        angles = terms.products(units).clamp(-STRAIGHT, STRAIGHT).arccos()
        met = terms.pairs(labels, segments)
        near = (-angles / (math.pi * self.temperature)).exp().masked_fill(~met, 0)
        both = torch.stack([near.sum(-1), met.sum(-1).to(near.dtype)], -1)
        total, count = terms.share(both, segments).unbind(-1)
        alone = (count == 0) | ~terms.valid(labels)
        return (total.masked_fill(alone, 1) / count.masked_fill(alone, 1)).log()
