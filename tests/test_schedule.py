"""How λ changes over a run."""

import numpy as np
import pytest

from simreg import Schedule


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("warmup", [0, 0.5, 1, 1, 1]),
        ("decay", [1, 1, 1, 0.5, 0]),
        ("stop", [1, 1, 0, 0, 0]),
    ],
)
def test_share_over_a_run(name, shares):
    half, unsaid = Schedule(name, 0.5), Schedule(name)
    assert [half(done) for done in (0, 0.25, 0.5, 0.75, 1)] == shares
    assert unsaid(0.25) == (0.75 if name == "decay" else shares[1])


def test_numbers_of_numpy():
    assert Schedule("decay", np.float32(0.5))(0.75) == 0.5


def test_a_run_that_goes_on_stays_at_its_end():
    assert Schedule("decay")(1.5) == 0
    assert Schedule("warmup")(1.5) == 1


NO_FRACTIONS = 0, 0.0, -0.5, 1.5, float("nan"), True, "x"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("linear",), "schedule: expected one of 'constant', 'warmup', 'decay', 'stop', got 'lin"),
        *((("decay", bad), f"fraction: .* above 0, up to 1; got {bad!r}$") for bad in NO_FRACTIONS),
    ],
)
def test_what_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Schedule(*wrong)
