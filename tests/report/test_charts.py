"""The geometry of the charts: scales, cliques, labels, frontier, curves."""

import itertools
import math
import re

import pytest

from minimand.report import charts


def test_a_scale_maps_its_ends_to_the_margins_and_keeps_order():
    linear, log = charts.scale([0, 10], pad=0.0), charts.scale([0.01, 100], log=True, pad=0.0)
    assert [linear(x) for x in (0, 5, 10, 99, math.nan, None)] == [0, 50, 100, 100, None, None]
    assert [log(x) for x in (0.01, 1, 100, 0, -1)] == [0, 50, 100, 0, 0]
    assert [label for _, label in linear.ticks] == ["0.0", "2.5", "5.0", "7.5", "10.0"]
    assert not charts.scale([1, 4], log=True).log
    assert charts.scale([3, 3])(3) == 50
    assert charts.scale([0, 0])(0) == 50
    assert charts.scale([])(0.5) == 50


def test_cliques_are_the_maximal_runs_within_the_critical_difference():
    found = charts.cliques([1, 2, 3, 5, 5.5, 9], 2)
    assert sorted(run for column in found for run in column) == [(0, 2), (2, 3), (3, 4)]
    assert charts.cliques([1, 2, 3], 0.5) == []
    assert charts.cliques([1, 2, 3], 10) == [[(0, 2)]]
    for column in charts.cliques([1, 1.5, 2, 2.5, 3, 3.5], 1.2):
        assert all(one[1] < other[0] for one, other in itertools.pairwise(column))


def test_labels_keep_their_order_and_distance_and_stay_on_the_chart():
    wanted = [5, 6, 7, 100, 101, 255, 259, 260]
    found = charts.spread_labels(wanted, 260, 18)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert min(gaps) >= 18 - 0.2
    assert min(found) >= 9
    assert max(found) <= 251.1
    assert charts.spread_labels([50, 150], 260, 18) == [50, 150]
    assert charts.spread_labels([100, 100], 260, 18) == [91, 109]


def test_the_frontier_is_what_nothing_beats_in_both():
    points = [(1, 0.5), (2, 0.7), (3, 0.6), (4, 0.9), (0.5, 0.2)]
    assert charts.frontier(points, 1) == [4, 0, 1, 3]
    assert charts.frontier(points, -1) == [4]


def test_a_curve_is_the_mean_of_the_seeds_broken_where_there_is_none():
    cells = [
        {"contender": "a", "curves": {"loss": [0.0, 4.0, None, 2.0]}},
        {"contender": "a", "curves": {"loss": [2.0, 8.0, math.nan, 4.0]}},
        {"contender": "b", "curves": {}},
    ]
    drawn = charts.curves(cells, "loss", ["b", "a"])
    (panel,) = drawn["panels"]
    assert panel["last"] == 3
    assert panel["line"].count("M") == 2
    assert [float(x) for x in re.findall(r"[ML]([\d.]+)", panel["line"])] == [0.0, 33.3, 100.0]
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", panel["line"])]
    assert ys[0] - ys[1] == pytest.approx((6 - 1) / (8 * 1.08) * 100, abs=0.1)
    assert charts.curves(cells, "absent", ["a"]) is None
