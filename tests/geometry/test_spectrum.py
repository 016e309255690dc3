import math

import numpy as np
import pytest
import torch

from simreg.geometry.glance import glance
from simreg.geometry.sample import Sample
from simreg.geometry.spectrum import spectrum
from tests.geometry import problems


def of(hidden):
    return spectrum(Sample.of(hidden, torch.zeros(len(hidden), dtype=torch.int64)))


def test_effective_rank_and_pairs_equal_their_definitions():
    sample = problems.sample()
    h = sample.hidden.double().numpy()
    values = np.linalg.eigvalsh(np.cov(h.T))
    p = values / values.sum()
    found = spectrum(sample)
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    cosines = problems.cosines(sample.hidden.double())
    off = ~torch.eye(len(cosines), dtype=torch.bool)
    assert found.pair_cos == pytest.approx(float(cosines[off].mean()))


def test_isoscore_equals_the_steps_of_its_paper():
    """Rudman et al., definition 4.1: the defect of the normalized eigenvalues from all ones."""
    sample = problems.sample()
    d = sample.hidden.shape[1]
    values = np.linalg.eigvalsh(np.cov(sample.hidden.double().numpy().T))
    normal = math.sqrt(d) * values / np.linalg.norm(values)
    defect = np.linalg.norm(normal - 1) / math.sqrt(2 * (d - math.sqrt(d)))
    used = (d - defect**2 * (d - math.sqrt(d))) ** 2 / d**2
    assert spectrum(sample).isoscore == pytest.approx((d * used - 1) / (d - 1))


def test_isoscore_equals_the_package():
    """What IsoScore 2.0.1 from PyPI gave for this very sample."""
    found = of(problems.sample().hidden.double())
    assert found.isoscore == pytest.approx(0.89776689370059, rel=1e-4)


def test_a_line_and_a_sphere():
    t = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    line = of(t * torch.tensor([[1.0, 2.0, -1.0]]) + 3)
    assert line.effective_rank == pytest.approx(1, abs=1e-3)
    assert line.isoscore == pytest.approx(0, abs=1e-6)
    cross = torch.cat([torch.eye(4), -torch.eye(4)])
    assert of(cross).effective_rank == pytest.approx(4)
    assert of(cross).isoscore == pytest.approx(1)
    assert of(cross).pair_cos == pytest.approx(-1 / 7)


def test_without_spread_there_is_no_rank():
    same = of(torch.ones(5, 3))
    assert math.isnan(same.effective_rank)
    assert same.pair_cos == pytest.approx(1)
    assert math.isnan(of(torch.ones(1, 3)).pair_cos)


def test_in_one_dimension_there_is_no_isotropy():
    found = of(torch.tensor([[1.0], [2.0], [-4.0]]))
    assert found.effective_rank == pytest.approx(1)
    assert math.isnan(found.isoscore)


@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_that_are_rounded_below_zero_count_as_zero(seed):
    draw = torch.Generator().manual_seed(seed)
    line = torch.randn(40, 1, generator=draw) * torch.randn(12, generator=draw)
    assert of(line.double()).effective_rank == pytest.approx(1, abs=1e-6)
    labels = torch.arange(40)[None] % 4
    found = glance(line[None], labels, torch.randn(8, 12, generator=draw))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
