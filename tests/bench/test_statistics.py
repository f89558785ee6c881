"""The statistics against independent computations and their own theory."""

import math

import numpy as np
import pytest
from scipy import stats

from minimand.bench import statistics
from minimand.bench.statistics import compare, holm, verdict


def test_without_correction_the_comparison_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = generator.normal(1, 1, 12), generator.normal(0.5, 1, 12)
    result = compare(a, b)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


def test_the_correction_adds_the_test_train_ratio_to_one_over_n():
    differences = np.array([1.0, 2.0, 4.0, 5.0])
    expected = differences.var(ddof=1) * (1 / 4 + 0.25)
    assert statistics.corrected_variance(differences, 0.25) == pytest.approx(expected)
    plain, corrected = compare(differences, np.zeros(4)), compare(differences, np.zeros(4), test_train_ratio=0.25)
    assert corrected.high - corrected.low == pytest.approx((plain.high - plain.low) * math.sqrt((0.25 + 0.25) / 0.25))


def test_the_corrected_test_keeps_its_level_where_the_plain_one_does_not():
    """Ten overlapping halves of one sample: the mean of a random half, no true difference."""
    generator = np.random.default_rng(1)
    plain = corrected = 0
    for _ in range(400):
        sample = generator.normal(0, 1, 40)
        halves = [generator.permutation(sample)[:20].mean() for _ in range(10)]
        plain += compare(halves, np.zeros(10)).p < 0.05
        corrected += compare(halves, np.zeros(10), test_train_ratio=1.0).p < 0.05
    assert plain > 120
    assert corrected < 40


def test_lower_is_better_turns_the_sign():
    assert compare([1.0, 2.0, 2.5], [2.0, 3.5, 3.0], sign=-1).difference > 0
    assert compare([1.0, 2.0, 2.5], [2.0, 3.5, 3.0], sign=1).difference < 0


def test_bootstrap_interval_agrees_with_the_t_interval_on_many_normal_pairs():
    differences = np.random.default_rng(2).normal(0.3, 1, 400)
    result = compare(differences, np.zeros(400))
    assert result.bootstrap_low == pytest.approx(result.low, abs=0.03)
    assert result.bootstrap_high == pytest.approx(result.high, abs=0.03)


def test_holm_rejects_what_the_step_down_procedure_rejects():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.01, math.nan])[0] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("differences", "margin", "expected"),
    [
        ([0.05, 0.06, 0.055, 0.05], 0.02, "confirmed"),
        ([0.05, 0.06, 0.055, 0.05], 0.08, "inconclusive"),
        ([-0.05, -0.06, -0.055, -0.05], 0.02, "refuted"),
        ([-0.05, 0.06, -0.055, 0.05], 0.0, "inconclusive"),
        ([-0.005, -0.004, -0.006, -0.005], -0.01, "confirmed"),
        ([-0.05, -0.04, -0.06, -0.05], -0.01, "refuted"),
        ([-0.005, -0.004, -0.006, -0.005], -0.005, "inconclusive"),
    ],
)
def test_verdicts(differences, margin, expected):
    assert verdict(compare(differences, np.zeros(4)), margin) == expected


def test_one_cell_decides_nothing():
    result = compare([5.0], [1.0])
    assert result.difference == 4.0
    assert verdict(result) == "inconclusive"


def test_cells_that_are_not_numbers_are_left_out_of_the_pairing():
    result = compare([1.0, math.nan, 3.0, 2.0], [0.0, 0.0, 1.0, 0.5])
    assert result.cells == 3


def test_ranks_share_ties_and_put_the_best_first():
    ranks = statistics.average_ranks({"a": [3.0, 3.0], "b": [1.0, 3.0], "c": [0.0, 0.0]})
    assert ranks == {"a": 1.25, "b": 1.75, "c": 3.0}


def test_critical_difference_equals_demsars_table():
    # q for five classifiers at 5 % is 2.728 (Demsar 2006, table 5a).
    assert statistics.critical_difference(5, 30) == pytest.approx(2.728 * math.sqrt(5 * 6 / (6 * 30)), rel=1e-3)
