"""The cheap part of an analysis, for a look at a model in training."""

import math

import torch
from torch import Tensor

from simreg.geometry.classes import token_cosines
from simreg.geometry.margins import margins
from simreg.geometry.sample import Sample

QUANTILES = (0.1, 0.5, 0.9)


@torch.no_grad()
def glance(
    hidden: Tensor, labels: Tensor, head: Tensor, bias: Tensor | None = None
) -> dict[str, float | None]:
    """Cosines, effective rank and quantiles of margins of `[R, L, d]` hidden states; None for NaN.

    `labels` `[R, L]` are shifted; `head` `[V, d]`, `bias` `[V]`. `intra_cos`, `inter_cos`: means
    over tokens of `token_cosines` within these rows. All on the device of `hidden`.
    """
    sample = Sample.of(hidden.flatten(0, 1), labels.flatten())
    intra, inter = token_cosines(sample)
    found = {
        "intra_cos": float(intra.nanmean()),
        "inter_cos": float(inter.nanmean()),
        "effective_rank": _effective_rank(sample.hidden.float()),
    }
    margin = margins(sample, head, bias)
    for name, values in (("margin", margin.raw), ("margin_cos", margin.cosine)):
        at = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
        for q, value in zip(QUANTILES, values.quantile(at).tolist(), strict=True):
            found[f"{name}_p{100 * q:.0f}"] = value
    return {name: v if math.isfinite(v) else None for name, v in found.items()}


def _effective_rank(hidden: Tensor) -> float:
    """As in `spectrum`, from the smaller of the covariance and the Gram matrix."""
    x = hidden - hidden.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    if not bool(gram.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return math.exp(float(torch.special.entr(values / values.sum()).sum()))
