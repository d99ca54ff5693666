import pytest

from benchmarks.learning.curves import first_reached, lowest_until, shared_stretch, stretches

DOWN_AND_UP = ([10, 20, 30], [4.0, 2.0, 3.0])


def test_the_lowest_value_so_far_is_of_a_point_or_of_the_line_at_the_end():
    assert [lowest_until(DOWN_AND_UP, end) for end in (10, 15, 20, 29, 30)] == [4.0, 3.0, 2.0, 2.0, 2.0]


def test_a_value_is_reached_on_the_line_before_the_first_point_below_it():
    assert first_reached(DOWN_AND_UP, 2.5) == 17.5
    assert first_reached(DOWN_AND_UP, 2.0) == 20
    assert first_reached(DOWN_AND_UP, 4.5) == 10
    assert first_reached(DOWN_AND_UP, 1.9) is None


def test_what_curves_share():
    assert shared_stretch([([1, 5], [0, 0]), ([2, 9], [0, 0])]) == (2, 5)
    first, last = shared_stretch([([1, 2], [0, 0]), ([3, 4], [0, 0])])
    assert first > last


def test_stretches_change_where_the_means_cross():
    falls, level = ([0, 10, 20, 30], [4.0, 3.0, 2.0, 1.0]), ([0, 30], [2.5, 2.5])
    assert stretches([falls], [level]) == [(1, 0, 10), (0, 20, 30)]
    assert stretches([level], [falls]) == [(0, 0, 10), (1, 20, 30)]
    lower = ([0, 10, 20, 30], [2.0, 1.0, 0.0, -1.0])  # its mean with the first crosses earlier
    assert stretches([falls, lower], [level]) == [(1, 0, 0), (0, 10, 30)]


def test_stretches_begin_and_end_on_all_curves():
    assert stretches([([0, 40], [1.0, 1.0])], [([10, 20], [2.0, 2.0])]) == [(0, 10, 20)]


def test_a_point_of_equal_values_ends_no_stretch():
    assert stretches([([0, 1, 2], [1.0, 2.0, 1.0])], [([0, 1, 2], [2.0, 2.0, 2.0])]) == [(0, 0, 2)]


@pytest.mark.parametrize("end", [15, 30])
def test_curves_may_be_lists_of_integers(end):
    assert isinstance(lowest_until(([10, 20, 30], [4, 2, 3]), end), float)
