import math

import pytest
import torch

from simreg.geometry import collapse
from simreg.geometry.classes import Classes, classes
from simreg.geometry.sample import Sample
from tests.geometry import problems


@pytest.fixture(scope="module")
def sample():
    return problems.sample()


@pytest.fixture(scope="module")
def found(sample):
    return classes(sample, 3)


@pytest.fixture(scope="module")
def head(sample, found):
    return problems.head_of(sample)[0][found.ids]


def points(means, variance=None):
    """Classes with given means; every one counts alike."""
    mean = torch.as_tensor(means, dtype=torch.float64)
    k, d = mean.shape
    v = torch.zeros(k) if variance is None else torch.as_tensor(variance)
    return Classes(
        torch.arange(k), torch.ones(k).long(), mean, v.double(), torch.eye(d).double(),
        mean.mean(0), 1.0,
    )  # fmt: skip


def simplex(k):
    return torch.eye(k, dtype=torch.float64) - 1 / k


def test_nc1(found):
    m = found.mean - found.mean.mean(0)
    between = sum(torch.outer(x, x) for x in m) / len(m)
    truth = (found.within @ torch.linalg.inv(between)).trace() / len(m)
    assert collapse.nc1(found) == pytest.approx(float(truth))


def test_nc1_with_fewer_classes_than_dimensions_uses_the_pseudoinverse():
    # means on one axis: Σ_B = diag(1, 0), Σ_W = I, so tr(Σ_W Σ_B⁺) / K = 1 / 2
    assert collapse.nc1(points([[1.0, 5.0], [-1.0, 5.0]])) == pytest.approx(0.5)


def pairwise_cdnv(found):
    k = len(found)
    return [
        float((found.variance[i] + found.variance[j])
              / (2 * (found.mean[i] - found.mean[j]).square().sum()))
        for i in range(k) for j in range(i + 1, k)
    ]  # fmt: skip


def test_cdnv_of_all_pairs(found):
    truth = pairwise_cdnv(found)
    estimate = collapse.cdnv(found, pairs=10**6)
    assert estimate.mean == pytest.approx(sum(truth) / len(truth))
    assert (estimate.se, estimate.pairs) == (0, len(truth))
    assert abs(estimate.median - sorted(truth)[len(truth) // 2]) < 1e-9 or len(truth) % 2 == 0


def test_cdnv_of_drawn_pairs_is_right_and_knows_its_error(found):
    truth = sum(pairwise_cdnv(found)) / len(pairwise_cdnv(found))
    draws = [collapse.cdnv(found, pairs=400, seed=s) for s in range(60)]
    deviations = torch.tensor([(d.mean - truth) / d.se for d in draws])
    assert abs(float(deviations.mean())) < 0.5
    assert 0.75 < float(deviations.square().mean().sqrt()) < 1.35
    assert draws[0].pairs == 400


def test_cdnv_by_hand():
    found = points([[0.0, 0.0], [2.0, 0.0]], [1.0, 3.0])
    assert collapse.cdnv(found).mean == pytest.approx(4 / (2 * 4))


def test_equinorm(found):
    norms = (found.mean - found.mean.mean(0)).norm(dim=1)
    assert collapse.equinorm(found) == pytest.approx(float(norms.std(correction=0) / norms.mean()))


def test_equiangular(found):
    m = found.mean - found.mean.mean(0)
    pairs = ~torch.eye(len(m), dtype=torch.bool)
    truth = problems.cosines(m)[pairs]
    mean, sd = collapse.equiangular(found)
    assert mean == pytest.approx(float(truth.mean()))
    assert sd == pytest.approx(float(truth.std(correction=0)))


def structure_error(a, b):
    k = len(a)
    gram = a @ b.T
    ideal = (torch.eye(k).double() - 1 / k) / math.sqrt(k - 1)
    return float((gram / gram.norm() - ideal).norm())


def test_etf_and_duality_errors(found, head):
    m = found.mean - found.mean.mean(0)
    assert collapse.etf_error(found) == pytest.approx(structure_error(m, m))
    assert collapse.duality_error(found, head) == pytest.approx(structure_error(head.double(), m))


def test_a_collapsed_simplex_is_recognized():
    ideal = points(simplex(5) * 3 + 0.7)
    assert collapse.equinorm(ideal) < 1e-9
    assert collapse.equiangular(ideal) == pytest.approx((-1 / 4, 0), abs=1e-7)
    assert collapse.etf_error(ideal) < 1e-7
    assert collapse.duality_error(ideal, simplex(5) * 2) < 1e-7
    torch.testing.assert_close(
        collapse.alignment(ideal, simplex(5) + 0.3), torch.ones(5, dtype=torch.float64)
    )
    assert collapse.duality_error(ideal, -simplex(5)) == pytest.approx(2)


def test_alignment(found, head):
    m, w = found.mean - found.mean.mean(0), head.double() - head.double().mean(0)
    truth = torch.cosine_similarity(m, w)
    torch.testing.assert_close(collapse.alignment(found, head), truth)


def test_the_nearest_other_mean_over_several_tiles():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randperm(2100, generator=draw) % 700
    many = Sample.of(torch.randn(2100, 3, generator=draw), labels)
    few, everything = classes(many.where(many.labels % 2 == 0)), classes(many)
    assert len(everything) > 2 * 256
    cosines = problems.cosines(torch.cat([few.mean, everything.mean]))[: len(few), len(few) :]
    cosines[few.ids[:, None] == everything.ids] = -2
    torch.testing.assert_close(collapse.nearest_other(few, everything), cosines.amax(1))


def test_the_nearest_other_mean_with_the_mean_of_all_tokens_taken_out(sample, found):
    everything, h = classes(sample), sample.hidden.double()
    own, theirs = (
        {c: torch.stack([x - h.mean(0) for x in h[sample.labels == c]]).mean(0) for c in each}
        for each in (found.ids.tolist(), everything.ids.tolist())
    )
    truth = [
        max(float(torch.cosine_similarity(x, y, dim=0)) for d, y in theirs.items() if d != c)
        for c, x in own.items()
    ]
    centred = collapse.nearest_other(found, everything, h.mean(0))
    assert centred.tolist() == pytest.approx(truth)
    assert float((centred - collapse.nearest_other(found, everything)).abs().max()) > 0.05


def test_a_class_without_others_has_no_nearest():
    assert collapse.nearest_other(points([[1.0]]), points([[1.0]])).isnan().all()


def test_agreement(sample, found):
    weight, bias = (t[found.ids] for t in problems.head_of(sample))
    h = sample.hidden.double()
    chosen = (h @ weight.double().T + bias).argmax(1)
    nearest = torch.cdist(h, found.mean).argmin(1)
    truth = (chosen == nearest).double()
    assert 0 < truth.mean() < 1
    assert collapse.agreement(sample, found, weight, bias).tolist() == truth.tolist()


def test_too_few_classes_are_nan():
    one = points([[1.0, 2.0]])
    values = [
        collapse.nc1(one), collapse.cdnv(one).mean, collapse.equinorm(one),
        collapse.equiangular(one)[0], collapse.etf_error(one),
        collapse.duality_error(one, torch.ones(1, 2)),
    ]  # fmt: skip
    assert all(map(math.isnan, values))


def test_of_two_classes_a_simplex_is_no_finding():
    two = points([[1.0, 2.0], [-3.0, 0.5]])
    values = [
        collapse.equinorm(two), *collapse.equiangular(two), collapse.etf_error(two),
        collapse.duality_error(two, torch.randn(2, 2)),
    ]  # fmt: skip
    assert all(map(math.isnan, values))
    three = points([[1.0, 2.0], [-3.0, 0.5], [2.0, 0.0]])
    assert collapse.equinorm(three) > 0
    assert collapse.etf_error(three) > 0


def test_equals_the_package_neural_collapse(sample):
    """What github.com/rhubarbwu/neural-collapse (not on PyPI) gave for this very sample.

    Its covariance_ratio, variability_cdnv, simplex_etf_error, self_duality_error, similarities,
    mean_norms and clf_ncc_agreement, in float64; some of its tiles are float32.
    """
    found = classes(sample)
    weight = problems.head_of(sample)[0][found.ids].double()
    near = {"rel": 1e-5}
    assert collapse.nc1(found) == pytest.approx(0.18465314888887, **near)
    assert collapse.cdnv(found).mean == pytest.approx(0.63102853298197, **near)
    assert collapse.etf_error(found) == pytest.approx(1.13943905316167, **near)
    assert collapse.duality_error(found, weight) == pytest.approx(1.4525063841950, **near)
    alignment = collapse.alignment(found, weight)
    assert float(alignment.mean()) == pytest.approx(-0.13450886031410, **near)
    assert alignment[:3].tolist() == pytest.approx([-0.6582, 0.3057, -0.3434], abs=5e-5)
    assert collapse.equinorm(found) == pytest.approx(0.29738702468244, **near)
    agreement = collapse.agreement(sample, found, weight)
    assert float(agreement.mean()) == pytest.approx(0.00695652173913, **near)


def test_all_pairs_of_classes_have_no_sampling_error():
    torch.manual_seed(0)
    found = classes(Sample.of(torch.randn(40, 5), torch.arange(40) % 5))
    every = collapse.cdnv(found, pairs=10)
    assert (every.se, every.pairs) == (0, 10)


def test_means_that_are_all_one_point_have_no_structure():
    one = points([[1.0, 2.0]] * 4)
    values = [
        collapse.equinorm(one), collapse.etf_error(one), collapse.cdnv(one).mean,
        collapse.duality_error(one, torch.randn(4, 2)),
    ]  # fmt: skip
    assert all(map(math.isnan, values))


def test_roundings_of_a_simplex_are_no_roots_of_negative_numbers():
    for k in range(3, 40):
        ideal = points(simplex(k))
        assert collapse.etf_error(ideal) < 1e-6
        assert collapse.equiangular(ideal) == pytest.approx((-1 / (k - 1), 0), abs=1e-7)


def test_a_mean_at_the_centre_has_cosine_zero():
    found = points([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert collapse.equiangular(found) == pytest.approx((-1 / 3, math.sqrt(2 / 9)))
