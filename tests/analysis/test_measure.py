"""Each metric of a group is what its name says, by the functions of `geometry`."""

import pytest
import torch

from simreg.analysis import measure
from simreg.geometry import collapse
from simreg.geometry.classes import classes, token_cosines
from simreg.geometry.margins import margins
from simreg.geometry.sample import mean
from simreg.geometry.spectrum import spectrum
from tests.geometry import problems


@pytest.mark.parametrize("group", ["all", "tail"])
def test_each_metric_is_what_its_name_says(group):
    sample = problems.sample(2000, 5, 60)
    weight, bias = problems.head_of(sample)
    frequency = torch.bincount(sample.labels, minlength=len(weight))
    settings = measure.Settings(least=4, pairs=20)
    record, _ = measure.measure(measure.States(sample, weight, bias, ""), frequency, 51, settings)
    own, mask = record["groups"][group], measure.group_masks(sample, frequency, 51)[group]
    part, centre = sample.where(mask), mean(sample)
    found, everything = classes(part, 4), classes(sample, 4)
    assert len(found) > 5
    head, spread = weight[found.ids], collapse.cdnv(found, 20)
    margin, (plain, centred) = (
        margins(sample, weight, bias),
        (token_cosines(sample, shift) for shift in (None, centre)),
    )
    ids = everything.ids
    agreement = collapse.agreement(sample, everything, weight[ids], bias[ids])
    rows = sample.rows[:, None] == sample.rows
    same = rows & (sample.labels[:, None] == sample.labels)
    per_token = {
        "loss": margin.loss,
        "margin": margin.raw,
        "margin_cos": margin.cosine,
        "accuracy": margin.raw > 0,
        **dict(zip(("intra_cos", "inter_cos"), plain, strict=True)),
        **dict(zip(("intra_cos_centred", "inter_cos_centred"), centred, strict=True)),
        "has_positive": same.sum(1) > 1,
        "nc4_agreement": agreement,
    }
    expected = {name: value[mask].double().nanmean() for name, value in per_token.items()}
    expected |= {
        **{"tokens": len(part), "classes": len(part.labels.unique())},
        **{"classes_measured": len(found), "tokens_measured": found.count.sum()},
        **{"intra_variance": found.intra_variance, "variance_share": found.variance_share},
        **{"cdnv": spread.mean, "cdnv_median": spread.median},
        "nc2_equinorm": collapse.equinorm(found),
        **dict(zip(("nc2_cos_mean", "nc2_cos_sd"), collapse.equiangular(found), strict=True)),
        "nc2_etf_error": collapse.etf_error(found),
        "nc3_duality_error": collapse.duality_error(found, head),
        "nc3_alignment": collapse.alignment(found, head).mean(),
        **spectrum(part)._asdict(),
    }
    for key in ("raw", "cosine"):
        name = "margin" if key == "raw" else "margin_cos"
        ordered = getattr(margin, key)[mask].sort().values
        for percent in (5, 25, 50, 75, 95):
            at = ordered[round(percent / 100 * (len(ordered) - 1))]
            expected[f"{name}_p{percent}"] = at
    for name, value in expected.items():
        assert own[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert own["se"]["cdnv"] == pytest.approx(spread.se, rel=1e-5)
    low, high, bins = measure.HISTOGRAMS["margin"]
    counts = torch.histc(margin.raw[mask].clamp(low, high), bins, low, high)
    assert record["histograms"]["margin"][group] == pytest.approx(
        (counts / len(part)).tolist(), abs=1e-6
    )


def test_rows_have_more_in_common_within_labels():
    """Of labels that are near their centres the mean cosine to positives is the larger."""
    sample = problems.sample(300, 6, 8)
    pos, neg = measure._row_cosines(sample)
    assert float(pos.nanmean()) > float(neg.nanmean()) + 0.1
