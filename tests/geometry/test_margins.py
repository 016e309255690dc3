import pytest
import torch

from simreg.geometry.classes import token_cosines
from simreg.geometry.glance import glance
from simreg.geometry.margins import margins
from simreg.geometry.sample import Sample
from simreg.geometry.spectrum import spectrum
from tests.geometry import problems


def test_margins_and_loss_equal_loops_over_tokens():
    sample = problems.sample(700)
    weight, bias = problems.head_of(sample)
    found = margins(sample, weight, bias)
    h, w, b = sample.hidden.double(), weight.double(), bias.double()
    for i in range(0, len(sample), 13):
        y = int(sample.labels[i])
        scores = w @ h[i] + b
        cosines = torch.cosine_similarity(w, h[i][None])
        others = torch.arange(len(w)) != y
        truth = (
            scores.logsumexp(0) - scores[y],
            scores[y] - scores[others].max(),
            cosines[y] - cosines[others].max(),
        )
        for value, true in zip(found, truth, strict=True):
            torch.testing.assert_close(value[i], true, atol=1e-5, rtol=1e-5)


def test_without_a_bias():
    sample = Sample.of(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
    found = margins(sample, torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    assert found.raw.tolist() == [4 - 6]
    torch.testing.assert_close(found.cosine, torch.tensor([0.8 - 0.6]).double())


def test_a_glance_is_the_same_as_the_whole():
    sample = problems.sample(300, 5)
    weight, bias = problems.head_of(sample)
    hidden, labels = sample.hidden.view(6, 50, 5), sample.labels.view(6, 50)
    found = glance(hidden, labels, weight, bias)
    intra, inter = token_cosines(sample)
    margin = margins(sample, weight, bias)
    truth = {
        "intra_cos": intra.nanmean(),
        "inter_cos": inter.nanmean(),
        "effective_rank": torch.tensor(spectrum(sample).effective_rank),
        "margin_p10": margin.raw.quantile(0.1),
        "margin_p50": margin.raw.quantile(0.5),
        "margin_cos_p90": margin.cosine.quantile(0.9),
    }
    for name, value in truth.items():
        torch.testing.assert_close(
            torch.tensor(found[name]).double(), value.double(), rtol=1e-5, atol=1e-5
        )


def test_the_rank_of_few_tokens_is_that_of_their_gram_matrix():
    sample = problems.sample(60, 90)
    hidden, labels = sample.hidden[None, :40], sample.labels[None, :40]
    found = glance(hidden, labels, problems.head_of(sample)[0])
    truth = spectrum(Sample.of(hidden[0], labels[0])).effective_rank
    assert abs(found["effective_rank"] - truth) < 1e-3 * truth


def test_what_is_not_known_is_none():
    found = glance(torch.randn(1, 3, 4), torch.tensor([[0, 1, 2]]), torch.randn(3, 4))
    assert found["intra_cos"] is None
    assert found["inter_cos"] is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_glance_at_what_is_not_finite_says_so(value):
    """Where training goes wrong, it is training that says it."""
    hidden, labels = torch.randn(1, 20, 6), torch.arange(20)[None] % 4
    hidden[0, 3, 2] = value
    found = glance(hidden, labels, torch.randn(8, 6))
    assert found["effective_rank"] is None
