"""What an archive keeps, picks and assigns."""

import pytest
import torch
from scipy.spatial import ConvexHull

from minimand.policies import ParetoArchive, crowding_distance, hypervolume, non_dominated, weight_grid


def draw(count, objectives, seed=0):
    return torch.randn(count, objectives, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sphere(count, objectives=2):
    points = draw(count, objectives).abs()
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)


def filled(points, reference=-10.0, **settings):
    archive = ParetoArchive(torch.full((points.shape[1],), reference, dtype=torch.float64), **settings)
    archive.add(points, list(range(len(points))))
    return archive


def test_the_archive_is_the_front_of_all_it_saw_in_whatever_parts_it_saw_it():
    points = draw(80, 3)
    whole, parts = filled(points), ParetoArchive(torch.full((3,), -10.0))
    for start in range(0, 80, 7):
        parts.add(points[start : start + 7], list(range(start, min(start + 7, 80))))
    assert sorted(whole.payloads) == sorted(parts.payloads) == non_dominated(points).nonzero().squeeze(1).tolist()
    assert whole.hypervolume() == pytest.approx(parts.hypervolume())
    assert whole.hypervolume() == pytest.approx(float(hypervolume(points, torch.full((3,), -10.0).double())))


def test_add_tells_which_of_the_new_policies_stay_and_of_equal_ones_keeps_the_first():
    archive = ParetoArchive(torch.zeros(2))
    assert archive.add(torch.tensor([[1.0, 1.0], [-1.0, 5.0]]), ["a", "below"]).tolist() == [True, False]
    assert archive.add(torch.tensor([[1.0, 1.0], [0.5, 0.5], [2.0, 0.0]]), ["b", "c", "d"]).tolist() == [
        False,
        False,
        True,
    ]
    assert archive.payloads == ["a", "d"]


def test_a_full_archive_keeps_what_is_least_crowded():
    points = sphere(40)
    archive = filled(points, capacity=10)
    widest = crowding_distance(points).topk(10).indices
    assert sorted(archive.payloads) == sorted(widest.tolist())


def test_select_takes_the_ends_first_and_nothing_twice():
    points = sphere(12)
    archive = filled(points)
    first = [one.payload for one in archive.select(5)]
    assert set(points.argmax(0).tolist()) <= set(first[:2])
    seen = [*first, *(one.payload for one in archive.select(5)), *(one.payload for one in archive.select(5))]
    assert sorted(seen) == list(range(12))
    assert archive.select(5) == []


def test_a_preference_is_assigned_a_policy_on_the_convex_hull_that_none_beats():
    points = draw(60, 2)
    archive = filled(points)
    hull = set(ConvexHull(points.numpy()).vertices.tolist())
    for weights in weight_grid(2, divisions=20)[1:-1].double():
        chosen = archive.assign(weights)
        assert chosen.payload in hull
        assert float(weights @ chosen.returns) == pytest.approx(float((points @ weights).max()))


@pytest.mark.parametrize("objectives", [1, 2, 3, 9])
def test_the_front_is_drawn_with_a_mark_for_every_policy(objectives):
    archive = filled(sphere(7, objectives), reference=0.0)
    axes = archive.figure([f"r{i}" for i in range(objectives)]).axes[0]
    marks = axes.lines if objectives > 2 else axes.lines[0].get_xdata()
    assert len(marks) >= len(archive)


@pytest.mark.untyped
def test_errors_name_the_argument():
    archive = ParetoArchive(torch.zeros(2))
    with pytest.raises(ValueError, match="empty"):
        archive.assign(torch.ones(2))
    with pytest.raises(ValueError, match="empty"):
        archive.figure()
    with pytest.raises(ValueError, match="2 columns"):
        archive.add(torch.ones(1, 3), ["a"])
    with pytest.raises(ValueError, match="weights"):
        archive.assign(torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="NaN"):
        archive.add(torch.tensor([[float("nan"), 1.0]]), ["a"])
    with pytest.raises(ValueError, match="capacity"):
        ParetoArchive(torch.zeros(2), capacity=0)
