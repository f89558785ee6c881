"""Measures of a front, against pymoo and against brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance

from minimand.policies import (
    crowding_distance,
    expected_utility,
    hypervolume,
    non_dominated,
    sparsity,
    weight_grid,
)

F64 = torch.float64


def draw(count, objectives, seed=0):
    return torch.randn(count, objectives, generator=torch.Generator().manual_seed(seed), dtype=F64)


def front(count, objectives, seed=0):
    """Points on a sphere: none dominates another."""
    points = draw(count, objectives, seed).abs()
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)


# Integers make ties, duplicates and points on the edge of the reference common.
GRIDS = (
    st.integers(1, 5)
    .flatmap(lambda n: st.lists(st.lists(st.integers(-1, 3), min_size=n, max_size=n), min_size=1, max_size=5))
    .map(lambda rows: torch.tensor(rows, dtype=F64))
)


def inclusion_exclusion(points):
    """The volume of a union of boxes from the origin, by the signs of all intersections."""
    boxes = points.clamp_min(0)
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for subset in itertools.combinations(range(len(boxes)), size):
            total += (-1) ** (size + 1) * float(boxes[list(subset)].amin(0).prod())
    return total


@given(GRIDS)
@settings(max_examples=150, deadline=None)
def test_the_hypervolume_is_that_of_inclusion_and_exclusion(points):
    volume = hypervolume(points, torch.zeros(points.shape[1], dtype=F64))
    assert float(volume) == pytest.approx(inclusion_exclusion(points), abs=1e-9)


@pytest.mark.parametrize(("objectives", "count"), [(1, 9), (2, 200), (3, 120), (4, 60), (5, 40), (6, 30), (9, 14)])
def test_the_hypervolume_is_that_of_pymoo(objectives, count):
    points, reference = front(count, objectives) + 0.1 * draw(count, objectives, 1), -torch.ones(objectives, dtype=F64)
    peer = HV(ref_point=-reference.numpy())(-points.numpy())  # pymoo minimises
    assert float(hypervolume(points, reference)) == pytest.approx(peer, rel=1e-10)


def test_a_staircase_of_boxes_in_nine_dimensions_is_computed_in_parts():
    points = front(36, 9)
    one_by_one = [float(hypervolume(points[:k], torch.zeros(9, dtype=F64))) for k in (12, 24, 36)]
    assert one_by_one == sorted(one_by_one)
    scaled = hypervolume(2 * points, torch.zeros(9, dtype=F64))
    assert float(scaled) == pytest.approx(2**9 * one_by_one[-1], rel=1e-12)
    torch.testing.assert_close(scaled, hypervolume(2 * points[:, torch.arange(8, -1, -1)], torch.zeros(9, dtype=F64)))


@given(GRIDS)
@settings(max_examples=100, deadline=None)
def test_one_policy_more_never_lowers_hypervolume_or_expected_utility(points):
    weights = weight_grid(points.shape[1], divisions=3)
    reference = torch.full((points.shape[1],), -1.0, dtype=F64)
    for measure in (lambda rows: hypervolume(rows, reference), lambda rows: expected_utility(rows, weights)):
        if len(points) > 1:
            assert measure(points) >= measure(points[1:]) - 1e-12


@given(GRIDS)
@settings(max_examples=100, deadline=None)
def test_the_front_is_that_of_brute_force_whatever_the_order_and_filtering_again_changes_nothing(points):
    by_hand = [not any(bool((other >= one).all()) and bool((other > one).any()) for other in points) for one in points]
    kept = non_dominated(points)
    assert kept.tolist() == by_hand
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    assert torch.equal(non_dominated(points[order]), kept[order])
    assert non_dominated(points[kept]).all()


@pytest.mark.parametrize(("objectives", "count"), [(2, 30), (3, 17), (9, 40)])
def test_the_crowding_distance_is_that_of_pymoo_times_the_objectives(objectives, count):
    points = front(count, objectives)
    peer = objectives * calc_crowding_distance(-points.numpy())
    np.testing.assert_allclose(crowding_distance(points).numpy(), peer, rtol=1e-9)


def test_an_objective_in_which_all_agree_does_not_count_for_crowding():
    points = front(12, 2)
    flat = torch.cat([points, torch.full((12, 1), 3.0, dtype=F64)], 1)
    torch.testing.assert_close(crowding_distance(flat), crowding_distance(points))
    assert crowding_distance(points[:2]).isinf().all()


@pytest.mark.parametrize("objectives", [2, 3, 9])
def test_sparsity_and_expected_utility_are_their_definitions_in_loops(objectives):
    points, weights = front(25, objectives), weight_grid(objectives, divisions=4).double()
    gaps = 0.0
    for column in points.T.tolist():
        ordered = sorted(column)
        gaps += sum((after - before) ** 2 for before, after in itertools.pairwise(ordered))
    assert float(sparsity(points)) == pytest.approx(gaps / 24, rel=1e-10)
    best = [
        max(sum(w * g for w, g in zip(row, point, strict=True)) for point in points.tolist())
        for row in weights.tolist()
    ]
    assert float(expected_utility(points, weights)) == pytest.approx(sum(best) / len(best))


def test_expected_utility_is_at_least_that_of_any_single_policy():
    points, weights = draw(20, 3), weight_grid(3, divisions=6).double()
    assert (expected_utility(points, weights) >= (weights @ points.T).mean(0)).all()


@pytest.mark.parametrize(("objectives", "divisions", "count"), [(2, 5, 6), (3, 10, 66), (9, 3, 165)])
def test_the_grid_of_weights_is_complete_and_on_the_simplex(objectives, divisions, count):
    weights = weight_grid(objectives, divisions=divisions)
    assert weights.shape == (count, objectives)
    assert len({tuple(row) for row in weights.tolist()}) == count
    torch.testing.assert_close(weights.sum(1), torch.ones(count))
    assert (weights >= 0).all()


def test_policies_below_the_reference_add_nothing_and_an_empty_front_has_no_volume():
    points = torch.tensor([[1.0, 1.0], [-1.0, 9.0], [0.0, 5.0]])
    assert hypervolume(points, torch.zeros(2)) == 1
    assert hypervolume(points[:0], torch.zeros(2)) == 0
    assert sparsity(points[:1]) == 0


@pytest.mark.untyped
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="reference"):
        hypervolume(torch.ones(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"returns must have shape \(policies, objectives\)"):
        non_dominated(torch.ones(3))
    with pytest.raises(ValueError, match="weights"):
        expected_utility(torch.ones(2, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="divisions"):
        weight_grid(9, divisions=0)
