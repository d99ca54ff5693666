import math

import pytest

from meloformer.training.guard import MIN_WINDOW, SPIKE_RATIO, Guard, spike_advice


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_what_is_not_finite_is_not_admitted_and_counted(loss, norm):
    guard = Guard()
    assert guard.admits(5.0, 1.0)
    assert not guard.admits(loss, norm) and not guard.admits(loss, norm)
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    assert guard.admits(5.0, 1.0)
    assert (guard.skipped, guard.in_a_row) == (2, 0)


def test_a_spike_is_told_against_the_median():
    guard = Guard()
    for _ in range(MIN_WINDOW):
        assert guard.spike(2.0) is None
    assert guard.spike(2.0 * SPIKE_RATIO) is None
    assert guard.spike(2.0 * SPIKE_RATIO + 1) == SPIKE_RATIO + 0.5
    assert guard.spike(2.0) is None


def test_the_first_norms_of_a_run_are_no_spikes():
    guard = Guard()
    assert all(guard.spike(10.0**i) is None for i in range(MIN_WINDOW))


def test_a_restored_guard_judges_as_the_one_before():
    guard, other = Guard(), Guard()
    guard.admits(math.nan, 1.0)
    for i in range(40):
        guard.spike(1.0 + i / 100)
    other.restore(guard.state())
    assert other.state() == guard.state()
    assert other.spike(20.0) == guard.spike(20.0) is not None


@pytest.mark.parametrize("limit, says", [(1.0, "it was clipped to 1,"), (9.0, "it is not above 9,")])
def test_a_spike_comes_with_what_to_do(limit, says):
    line = spike_advice({"grad_norm": 6.0, "grad_norm_spike": 6.4}, limit)
    assert "6.4 times the median" in line and says in line
    assert "nothing need be done, unless" in line and "lower --learning_rate" in line
