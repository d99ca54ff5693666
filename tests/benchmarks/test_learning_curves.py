import pytest

from benchmarks.learning.curves import first_reached, lowest_until

DOWN_AND_UP = ([10, 20, 30], [4.0, 2.0, 3.0])


def test_lowest_value_is_at_a_point_or_interpolated_at_the_end():
    assert [lowest_until(DOWN_AND_UP, end) for end in (10, 15, 20, 29, 30)] == [4.0, 3.0, 2.0, 2.0, 2.0]


def test_there_is_no_lowest_value_before_the_first_point():
    assert lowest_until(DOWN_AND_UP, 9.9) is None


def test_a_value_is_reached_on_the_line_before_the_first_point_below_it():
    assert first_reached(DOWN_AND_UP, 2.5) == 17.5
    assert first_reached(DOWN_AND_UP, 2.0) == 20
    assert first_reached(DOWN_AND_UP, 4.5) == 10
    assert first_reached(DOWN_AND_UP, 1.9) is None


@pytest.mark.parametrize("end", [15, 30])
def test_curves_may_be_lists_of_integers(end):
    assert isinstance(lowest_until(([10, 20, 30], [4, 2, 3]), end), float)
