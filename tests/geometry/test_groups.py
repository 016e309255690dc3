import math

import pytest
import torch

from simreg.geometry import groups
from simreg.geometry.positives import has_positive


def test_deciles_hold_tenths_of_the_tokens_by_training_frequency():
    # 20 labels of 5 tokens each; label 19 is the most frequent in the training text
    labels = torch.arange(20).repeat(5)
    found = groups.deciles(labels, torch.arange(20) + 1)
    assert found[labels == 19].tolist() == [0] * 5
    assert found[labels == 0].tolist() == [9] * 5
    assert torch.bincount(found).tolist() == [10] * 10


def test_a_frequent_label_is_not_split():
    labels = torch.tensor([0] * 60 + list(range(1, 41)))
    frequency = torch.tensor([1000] + [1] * 40)
    found = groups.deciles(labels, frequency)
    assert found[:60].unique().tolist() == [3]  # the middle of its mass is at 30 of 100 tokens
    assert torch.bincount(found).tolist()[4:] == [0, 0, 10, 10, 10, 10]


def test_labels_unseen_in_training_come_last():
    labels = torch.arange(10)
    frequency = torch.tensor([0, *range(9, 0, -1)])
    assert groups.deciles(labels, frequency)[0] == 9


def test_parts_cover_the_deciles_once():
    assert sorted(i for own in groups.PARTS.values() for i in own) == list(range(10))


def test_position_bins():
    assert groups.position_bins(torch.arange(7), 7, 4).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert groups.position_bins(torch.arange(8), 8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_error_of_a_mean_counts_rows_not_tokens():
    draw = torch.Generator().manual_seed(0)
    rows = torch.arange(300) // 10
    values = torch.randn(30, generator=draw).double().repeat_interleave(10)
    values = values + 0.1 * torch.randn(300, generator=draw).double()
    values[3] = torch.nan
    mean, se, n = groups.mean_se(values, rows)
    kept = values[~values.isnan()]
    assert (mean, n) == (pytest.approx(float(kept.mean())), 299)
    sums = [sum(float(v) - mean for v in values[rows == r] if not v.isnan()) for r in range(30)]
    assert se == pytest.approx(math.sqrt(30 / 29 * sum(s * s for s in sums)) / 299)
    of_rows = values.view(30, 10).nanmean(1)
    assert se == pytest.approx(float(of_rows.std()) / math.sqrt(30), rel=0.02)


def test_the_error_of_equal_rows_of_one_token_is_the_usual_one():
    values = torch.tensor([1.0, 4.0, 7.0, 8.0]).double()
    assert groups.mean_se(values, torch.arange(4))[1] == pytest.approx(float(values.std()) / 2)


def test_nothing_to_average():
    nan = torch.tensor([torch.nan])
    assert groups.mean_se(nan, torch.tensor([0]))[2] == 0
    assert math.isnan(groups.mean_se(nan + 1, torch.tensor([0]))[0])


@pytest.mark.parametrize(("length", "chunk"), [(16, None), (16, 5), (10, 10), (7, 3), (50, 1)])
def test_positives_equal_loops(length, chunk):
    tokens = torch.randint(12, (160,), generator=torch.Generator().manual_seed(length))
    found = has_positive(tokens, length, chunk)
    rows = len(tokens) // length
    assert found.shape == (rows, length - 1)
    for r in range(rows):
        y = tokens[r * length + 1 : (r + 1) * length].tolist()
        for i in range(length - 1):
            same = [
                j for j in range(length - 1)
                if j != i and y[j] == y[i] and (chunk is None or i // chunk == j // chunk)
            ]  # fmt: skip
            assert found[r, i] == bool(same)


def test_the_rate_is_what_the_loss_reports():
    from simreg import SimRegLoss

    tokens = torch.randint(30, (240,), generator=torch.Generator().manual_seed(0))
    rows = tokens.view(10, 24)
    loss = SimRegLoss(weight=1.0, chunk_size=8)
    _, metrics = loss(torch.randn(10, 23, 4), rows[:, 1:].contiguous())
    rate = has_positive(tokens, 24, 8).double().mean()
    torch.testing.assert_close(metrics["pos_fraction"].double(), rate, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("length", "chunk"), [(1, None), (8, 0)])
def test_lengths_that_mean_nothing(length, chunk):
    with pytest.raises(ValueError, match="length"):
        has_positive(torch.arange(20), length, chunk)
