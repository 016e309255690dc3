import pytest
import torch

from simreg.geometry.classes import classes, token_cosines
from simreg.geometry.sample import Sample
from tests.geometry import problems


@pytest.fixture(scope="module")
def sample():
    return problems.sample()


@pytest.mark.parametrize("least", [1, 5])
def test_statistics_equal_those_of_each_class_alone(sample, least):
    found, truth = classes(sample, least), problems.by_label(sample, least)
    assert found.ids.tolist() == list(truth)
    assert found.count.tolist() == [len(h) for h in truth.values()]
    means = torch.stack([h.mean(0) for h in truth.values()])
    torch.testing.assert_close(found.mean, means)
    apart = [h - h.mean(0) for h in truth.values()]
    torch.testing.assert_close(
        found.variance, torch.stack([x.square().sum(1).mean() for x in apart])
    )
    everything, pooled = torch.cat(list(truth.values())), torch.cat(apart)
    torch.testing.assert_close(found.within, pooled.T @ pooled / len(pooled))
    torch.testing.assert_close(found.centre, everything.mean(0))
    total = (everything - everything.mean(0)).square().sum(1).mean()
    assert found.total == pytest.approx(float(total))
    assert found.intra_variance == pytest.approx(float(pooled.square().sum(1).mean()))
    # the law of total variance: what is not within lies between the means, weighted by count
    weights = found.count / found.count.sum()
    between = (weights * (means - everything.mean(0)).square().sum(1)).sum()
    assert 1 - found.variance_share == pytest.approx(float(between / total))
    torch.testing.assert_close(found.centred, means - means.mean(0))


def test_a_chosen_part_of_the_sample_is_what_is_measured(sample):
    mask = sample.labels % 2 == 0
    part = sample.where(mask)
    copy = Sample.of(sample.hidden[mask], sample.labels[mask], sample.rows[mask])
    torch.testing.assert_close(classes(part).mean, classes(copy).mean)
    torch.testing.assert_close(token_cosines(part), token_cosines(copy), equal_nan=True)
    assert part.positions.tolist() == sample.positions[mask].tolist()


@pytest.mark.parametrize("centred", [False, True])
def test_cosines_equal_means_over_the_whole_matrix(sample, centred):
    h = sample.hidden.double()
    centre = h.mean(0) if centred else None
    matrix = problems.cosines(h - h.mean(0) if centred else h)
    same = sample.labels[:, None] == sample.labels
    others = ~same
    same.fill_diagonal_(False)
    intra, inter = token_cosines(sample, centre)
    torch.testing.assert_close(intra, (matrix * same).sum(1) / same.sum(1), equal_nan=True)
    torch.testing.assert_close(inter, (matrix * others).sum(1) / others.sum(1))
    assert int(intra.isnan().sum()) == 1  # the class of one


def test_one_class_has_no_others():
    intra, inter = token_cosines(Sample.of(torch.eye(3), torch.tensor([4, 4, 4])))
    assert intra.tolist() == [0, 0, 0]
    assert inter.isnan().all()


def test_a_zero_vector_has_cosine_zero():
    h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    intra, _ = token_cosines(Sample.of(h, torch.zeros(3, dtype=torch.int64)))
    assert intra.tolist() == [0, 0.5, 0.5]


def test_one_class_has_no_others_whatever_is_rounded():
    torch.manual_seed(0)
    alone = Sample.of(torch.randn(50, 64), torch.zeros(50, dtype=torch.int64))
    assert token_cosines(alone)[1].isnan().all()
