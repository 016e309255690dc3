import math

import pytest
import torch

from simreg.geometry import groups, influence
from simreg.geometry.classes import token_cosines
from simreg.geometry.sample import Sample, mean, unit


def draw(rows, length, labels, dim=6, seed=0):
    """Tokens of a row have something in common."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.arange(1, labels + 1).double()
    label = torch.multinomial(wanted, rows * length, True, generator=generator)
    row = torch.arange(rows).repeat_interleave(length)
    own = torch.randn(labels, dim, generator=torch.Generator().manual_seed(9))
    shared = torch.randn(rows, dim, generator=generator)[row]
    noise = torch.randn(rows * length, dim, generator=generator)
    return Sample.of((own[label] + shared / 2 + noise + 0.5).double(), label, row)


def weighted(sample, weights, mask, centre):
    """The two means, tokens counting `weights` times, by all pairs."""
    e = unit(sample.hidden.double() - (0 if centre is None else centre))
    cosines = e @ e.T
    same = sample.labels[:, None] == sample.labels[None, :]
    same.fill_diagonal_(False)
    found = []
    for pairs in (same, sample.labels[:, None] != sample.labels[None, :]):
        partners = pairs * weights
        own = (cosines * partners).sum(1) / partners.sum(1)
        kept = mask & (pairs.sum(1) > 0)
        found.append((own * weights)[kept].sum() / weights[kept].sum())
    return torch.stack(found)


@pytest.mark.parametrize("centred", [False, True])
def test_rows_move_means_as_their_weights_do(centred):
    sample = draw(7, 9, 8)
    centre = mean(sample) if centred else None
    masks = {
        "all": torch.ones(len(sample), dtype=torch.bool),
        "few": sample.labels < 4,  # one of them has one token
        "none": sample.labels > 99,
    }
    assert (torch.bincount(sample.labels) == 1).any()
    cosines = token_cosines(sample, centre)
    found = influence.of_rows(sample, cosines, masks, centre)
    for name in ("all", "few"):
        for row in range(7):
            step = 1e-5 * (sample.rows == row).double()
            one = torch.ones(len(sample), dtype=torch.float64)
            ends = [weighted(sample, one + sign * step, masks[name], centre) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-5
            for which, (moved, values) in enumerate(zip(found[name], cosines, strict=True)):
                n = int((masks[name] & ~values.isnan()).sum())
                assert float(moved[row]) / n == pytest.approx(float(slope[which]), abs=1e-7)
                assert float(moved.sum()) == pytest.approx(0, abs=1e-9)


def test_the_error_is_how_much_samples_differ():
    """Twice what errors of the tokens' own means say, and more."""
    means, errors, own = [], [], []
    for seed in range(120):
        sample = draw(40, 25, 12, seed=seed)
        cosines = token_cosines(sample)
        mask = torch.ones(len(sample), dtype=torch.bool)
        found = influence.of_rows(sample, cosines, {"all": mask})["all"]
        means.append([float(x.mean()) for x in cosines])
        errors.append([groups.se_of_rows(moved, len(sample)) for moved in found])
        own.append([groups.mean_se(x, sample.rows)[1] for x in cosines])
    spread = torch.tensor(means).std(0)
    for which in range(2):
        error, too_small = (torch.tensor(each)[:, which].mean() for each in (errors, own))
        assert 0.8 < spread[which] / error < 1.2
        assert spread[which] / too_small > 1.5


def test_one_class_one_row():
    sample = Sample.of(torch.randn(5, 3).double(), torch.zeros(5, dtype=torch.int64))
    mask = {"all": torch.ones(5, dtype=torch.bool)}
    intra, inter = influence.of_rows(sample, token_cosines(sample), mask)["all"]
    assert float(intra) == pytest.approx(0, abs=1e-12)
    assert float(inter) == 0  # there are no others
    assert math.isnan(groups.se_of_rows(intra, 5))
    assert math.isnan(groups.se_of_rows(torch.zeros(3), 0))
