"""λ in training, which follows a schedule."""

import pytest
import torch
from torch import nn

from simreg import Schedule, SimRegLoss
from simreg.depths import AtDepths
from simreg.integrations.following import Following, as_schedule, collapsed, regularizer
from simreg.objectives import Sum


def test_a_weight_follows_until_something_else_sets_it():
    loss = SimRegLoss(weight=2.0)
    following = Following(loss, Schedule("decay"))
    following.at(0.25)
    assert loss.weight == 1.5
    following.at(0.25)  # another micro-batch of the step
    following.at(0.5)
    assert loss.weight == 1.0
    following.end()
    assert loss.weight == 2.0
    following = Following(loss, Schedule("decay"))
    following.at(0.5)
    loss.weight = 3.0
    following.at(0.75)
    following.end()
    assert loss.weight == 3.0


def test_the_regularizer_is_found_in_what_holds_it():
    loss = SimRegLoss()
    assert regularizer(loss) is loss
    assert regularizer(torch.compile(loss)) is loss
    assert regularizer(Sum(None, Sum(loss, nn.Identity()))) is loss
    assert regularizer(Sum(AtDepths(torch.compile(loss), [0.5]), nn.Identity())) is loss
    for whole in (AtDepths(loss, [0.5]), Sum(loss, nn.Identity())):
        assert regularizer(torch.compile(whole)) is loss
    assert regularizer(Sum(None, nn.Identity())) is None
    assert regularizer(None) is None


def test_collapsed_are_embeddings_that_are_nearly_one():
    assert collapsed(0.98, 1.0) is None
    assert collapsed(0.995, 1.0).startswith("embeddings have collapsed: after 100% of the steps")


def test_a_schedule_is_one_or_a_name_of_one():
    half = Schedule("stop", 0.5)
    assert as_schedule(half) is half
    assert as_schedule("constant") == Schedule("constant")
    with pytest.raises(ValueError, match=r"schedule: expected one of 'constant', .* got None"):
        as_schedule(None)
