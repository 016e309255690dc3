"""The map of embeddings: what there is to see, and when there is nothing."""

import pytest
import torch

from simreg.analysis import project
from simreg.geometry.sample import Sample


def of(hidden: torch.Tensor, labels: list[int]) -> Sample:
    return Sample.of(hidden, torch.tensor(labels), torch.zeros(len(labels), dtype=torch.int64))


def test_two_axes_hold_the_spread_of_tokens_in_a_plane() -> None:
    angle = torch.linspace(0, 5, 8)
    flat = torch.stack([angle.cos(), angle.sin(), torch.zeros(8)], 1)
    found = project.project(of(3 * flat, [1, 2] * 4), [2, 1], "pca")
    assert found is not None
    assert list(found["points"]) == ["2", "1"]
    assert sum(found["explained"]) == pytest.approx(1, abs=1e-3)
    points = torch.tensor(found["points"]["2"])
    wanted = torch.pdist(flat[1::2])
    torch.testing.assert_close(torch.pdist(points), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("hidden", "chosen"),
    [(torch.randn(3, 4), [1]), (torch.randn(3, 4), []), (torch.ones(3, 4), [1, 2])],
    ids=["one token", "no label", "one point"],
)
def test_nothing_to_see(hidden: torch.Tensor, chosen: list[int]) -> None:
    assert project.project(of(hidden, [1, 2, 2]), chosen, "pca") is None


def test_points_that_cannot_be_told_apart_are_one() -> None:
    near = torch.ones(40, 4) + 1e-6 * torch.randn(40, 4)
    assert project.project(of(near, [1, 2] * 20), [1, 2], "pca") is None
