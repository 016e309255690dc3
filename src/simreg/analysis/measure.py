"""All that is measured of one model: for the sample, by frequency of the label, by position."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simreg.analysis.states import States
from simreg.geometry import collapse, groups, influence
from simreg.geometry.classes import Classes, classes, token_cosines
from simreg.geometry.margins import margins
from simreg.geometry.sample import Sample, mean
from simreg.geometry.spectrum import spectrum
from simreg.kernels.order import Form
from simreg.loss import per_token
from simreg.recipe.errors import UserError

POSITION_BINS = 4
NC1_CLASSES = 2
"""Classes a dimension of h from which on NC1 is given. With fewer, Σ_B has directions in which few
means lie, and its inverse makes NC1 a matter of their number: it peaks where K is about d."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HISTOGRAMS = {"margin": (-20.0, 15.0, 70), "margin_cos": (-0.8, 0.8, 64)}
"""Low end, high end and number of bins; what lies outside counts in the last bin on its side."""
PAIRED = ("intra_cos", "inter_cos", "intra_cos_centred", "inter_cos_centred")
"""Metrics that are means over pairs of tokens of the whole sample."""
_HISTOGRAM_GROUPS = ("all", "head", "torso", "tail")


@dataclass(frozen=True)
class Settings:
    """What is measured, beside the models and the text."""

    least: int = 5
    """Tokens that a class needs to have a mean and a variance."""
    pairs: int = collapse.PAIRS
    """Pairs of classes that CDNV is estimated from."""


@dataclass(frozen=True)
class Tokens:
    """What one model has of each token, float64.

    `values`: metric -> `[T]`, NaN where it has not. `moved`: group -> metric -> `[R]`, of means
    over pairs of tokens how each row moves the group's (`influence.of_rows`).
    """

    values: dict[str, Tensor]
    moved: dict[str, dict[str, Tensor]]


def measure(
    states: States, frequency: Tensor, length: int, settings: Settings, *, brief: bool = False
) -> tuple[dict[str, Any], Tokens]:
    """`(record, what tokens have)`; `frequency` `[V]` counts labels in the training text.

    `record["groups"]` maps all, head, torso, tail, decile-1 to -10 (1: most frequent labels) and
    position-1 to -4 to metrics. Means over tokens (`se`: standard errors, clustered by row, NaN
    where cosines of the whole sample are looked at by position) take every token against the whole
    sample; metrics of classes are of the group's own tokens. `brief` leaves out deciles and
    positions.
    """
    sample = states.sample
    found = classes(sample, settings.least)
    if not len(found.ids):
        raise UserError(f"no label has {settings.least} tokens in the sample: lower --least")
    centre = mean(sample)
    values = _per_token(states, found, centre)
    masks = group_masks(sample, frequency, length, brief=brief)
    of_labels = {name: own for name, own in masks.items() if not name.startswith("position")}
    moved = _moved(sample, values, of_labels, centre)
    by_group = {
        name: _group(states, found, Tokens(values, moved), name, mask, centre, settings)
        for name, mask in masks.items()
    }
    histograms = {
        key: {name: _histogram(values[key][masks[name]], *limits) for name in _HISTOGRAM_GROUPS}
        for key, limits in HISTOGRAMS.items()
    }
    return {"groups": by_group, "histograms": histograms}, Tokens(values, moved)


def group_masks(
    sample: Sample, frequency: Tensor, length: int, *, brief: bool = False
) -> dict[str, Tensor]:
    """Group -> bool `[T]`."""
    decile = groups.deciles(sample.labels, frequency)
    masks = {"all": torch.ones(len(sample), dtype=torch.bool)}
    masks |= {
        part: torch.isin(decile, torch.tensor(list(own))) for part, own in groups.PARTS.items()
    }
    if brief:
        return masks
    place = groups.position_bins(sample.positions, length - 1, POSITION_BINS)
    masks |= {f"decile-{i + 1}": decile == i for i in range(groups.DECILES)}
    return masks | {f"position-{i + 1}": place == i for i in range(POSITION_BINS)}


def _per_token(states: States, found: Classes, centre: Tensor) -> dict[str, Tensor]:
    """Everything that a single token has, `[T]` float64; NaN where it has not."""
    sample = states.sample
    margin = margins(sample, states.weight, states.bias)
    intra, inter = token_cosines(sample)
    intra_centred, inter_centred = token_cosines(sample, centre)
    pos, neg = _row_cosines(sample)
    bias = None if states.bias is None else states.bias[found.ids]
    return {
        "loss": margin.loss,
        "margin": margin.raw,
        "margin_cos": margin.cosine,
        "accuracy": (margin.raw > 0).double(),
        "intra_cos": intra,
        "inter_cos": inter,
        "intra_cos_centred": intra_centred,
        "inter_cos_centred": inter_centred,
        "row_pos_cos": pos,
        "row_neg_cos": neg,
        "has_positive": (~pos.isnan()).double(),
        "nc4_agreement": collapse.agreement(sample, found, states.weight[found.ids], bias),
    }


def _moved(
    sample: Sample, values: dict[str, Tensor], masks: dict[str, Tensor], centre: Tensor
) -> dict[str, dict[str, Tensor]]:
    """`Tokens.moved` of the groups."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in masks}
    for names, shift in ((PAIRED[:2], None), (PAIRED[2:], centre)):
        cosines = values[names[0]], values[names[1]]
        for group, both in influence.of_rows(sample, cosines, masks, shift).items():
            found[group] |= dict(zip(names, both, strict=True))
    return found


def _row_cosines(sample: Sample) -> tuple[Tensor, Tensor]:
    """Mean cosines to positives and negatives in the whole row, whatever parts of it a run was
    trained on, so that runs compare."""
    pos, neg = torch.empty(2, len(sample), dtype=torch.float64)
    for row in torch.unique(sample.rows).tolist():
        own = sample.rows == row
        hidden = sample.hidden[sample.index[own]].float()
        form = Form(temperature=1.0, variant="out")
        _, p, n, _ = per_token(hidden, sample.labels[own], form=form)
        pos[own], neg[own] = p.double(), n.double()
    return pos, neg


def _group(
    states: States,
    everything: Classes,
    tokens: Tokens,
    group: str,
    mask: Tensor,
    centre: Tensor,
    settings: Settings,
) -> dict[str, Any]:
    part = states.sample.where(mask)
    found = classes(part, settings.least)
    metrics: dict[str, Any] = {
        "tokens": len(part),
        "classes": len(torch.unique(part.labels)),
        "classes_measured": len(found),
        "tokens_measured": int(found.count.sum()),
    }
    errors = {}
    for name, value in tokens.values.items():
        metrics[name], errors[name], n = groups.mean_se(value[mask], part.rows)
        if name in PAIRED:
            moved = tokens.moved.get(group)
            errors[name] = math.nan if moved is None else groups.se_of_rows(moved[name], n)
    for name in HISTOGRAMS:
        for q, at in zip(QUANTILES, _quantiles(tokens.values[name][mask]), strict=True):
            metrics[f"{name}_p{100 * q:.0f}"] = at
    metrics |= _class_metrics(found, everything, states.weight, centre, settings.pairs)
    metrics |= spectrum(part)._asdict()
    errors["cdnv"] = metrics.pop("cdnv_se")
    return {**_plain(metrics), "se": _plain(errors)}


def _class_metrics(
    found: Classes, everything: Classes, weight: Tensor, centre: Tensor, pairs: int
) -> dict[str, float]:
    head = weight[found.ids]
    nearest, nearest_centred = (
        float(collapse.nearest_other(found, everything, shift).nanmean())
        for shift in (None, centre)
    )
    spread = collapse.cdnv(found, pairs)
    angle, angle_sd = collapse.equiangular(found)
    return {
        "intra_variance": found.intra_variance,
        "variance_share": found.variance_share,
        "inter_max_cos": nearest,
        "inter_max_cos_centred": nearest_centred,
        "nc1": collapse.nc1(found) if len(found) >= NC1_CLASSES * len(centre) else math.nan,
        "cdnv": spread.mean,
        "cdnv_se": spread.se,
        "cdnv_median": spread.median,
        "nc2_equinorm": collapse.equinorm(found),
        "nc2_cos_mean": angle,
        "nc2_cos_sd": angle_sd,
        "nc2_etf_error": collapse.etf_error(found),
        "nc3_duality_error": collapse.duality_error(found, head),
        "nc3_alignment": float(collapse.alignment(found, head).mean())
        if len(found) > 1
        else math.nan,
    }


def _quantiles(values: Tensor) -> list[float]:
    """By sorting: `torch.quantile` refuses more than 16 M values."""
    if not len(values):
        return [math.nan] * len(QUANTILES)
    ordered = values.sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES]


def _histogram(values: Tensor, low: float, high: float, bins: int) -> list[float]:
    """The share of values in each bin."""
    place = ((values - low) / (high - low) * bins).floor().clamp(0, bins - 1).long()
    counts = torch.bincount(place, minlength=bins)
    return [round(c / max(len(values), 1), 6) for c in counts.tolist()]


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: None; six digits say all there is to say."""
    return {
        key: value
        if isinstance(value, int)
        else float(f"{value:.6g}")
        if math.isfinite(value)
        else None
        for key, value in metrics.items()
    }
