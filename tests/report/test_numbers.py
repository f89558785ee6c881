"""Numbers as people read them."""

import math

import pytest

from minimand.report import numbers


def test_numbers_have_the_digits_their_intervals_earn():
    assert numbers.decimals([(90, 92)], [91], percent=True) == 1
    assert numbers.decimals([(91.00, 91.08)], [91], percent=True) == 2
    assert numbers.decimals([(0.40, 0.44)], [0.42]) == 3
    assert numbers.decimals([(None, math.nan)], [1234.0]) == 0
    assert numbers.decimals([], [2e8]) is None
    assert numbers.decimals([], []) == 1


@pytest.mark.parametrize(
    ("value", "places", "signed", "text"),
    [
        (1.25, 1, False, "1.2"),
        (-0.04, 1, True, "0.0"),
        (2.0, 1, True, "+2.0"),
        (-2.0, 1, True, "−2.0"),
        (12345.678, 1, False, "12\u202f345.7"),
        (1e-9, None, False, "1e−09"),
        *((nothing, 1, True, "—") for nothing in (math.nan, math.inf, None, True, "7", 10**400)),
    ],
)
def test_a_number_is_written(value, places, signed, text):
    assert numbers.number(value, places, signed=signed) == text


def test_an_interval_without_an_end_is_one_dash():
    assert numbers.interval(-0.5, 1.25, 1, signed=True) == "−0.5 to +1.2"
    assert numbers.interval(-math.inf, 1, 1) == numbers.interval(1, None, 1) == "—"


@pytest.mark.parametrize(
    ("p", "text"), [(0.0, "< 0.001"), (0.001, "0.001"), (0.0496, "0.050"), (1.0, "1.000"), (None, "—")]
)
def test_a_p_value_is_written(p, text):
    assert numbers.p_value(p) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.42 s"), (12.3, "12 s"), (754.2, "12 min 34 s"), (7261, "2 h 1 min"), (None, "—")],
)
def test_a_duration_is_written(seconds, text):
    assert numbers.duration(seconds) == text
