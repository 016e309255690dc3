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


@pytest.mark.parametrize("seed", range(6))
def test_axes_point_to_the_largest_coordinate_and_a_label_has_sixty_points(seed: int) -> None:
    hidden = torch.randn(200, 4, generator=torch.Generator().manual_seed(seed))
    found = project.project(of(hidden, [1, 2, 2, 2] * 50), [1, 2], "pca")
    assert found is not None
    assert [len(points) for points in found["points"].values()] == [50, 60]
    points = torch.tensor([point for own in found["points"].values() for point in own])
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_chosen_labels_are_the_most_frequent_that_can_be_printed() -> None:
    names = {1: "\n", 2: "a\ufffd", 3: "the", 4: "of"}
    counts = {1: (0, 9), 2: (0, 8), 3: (0, 5), 4: (0, 6), 5: (1, 9), 6: (2, 1), 7: (9, 2)}
    counts[8] = (9, 3)
    labels = [label for label, (_, count) in counts.items() for _ in range(count)]
    decile = [counts[label][0] for label in labels]
    name = lambda label: names.get(label, str(label))  # noqa: E731
    assert project.choose(torch.tensor(labels), torch.tensor(decile), name) == [4, 6, 8]
