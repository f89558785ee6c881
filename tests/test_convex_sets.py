"""A projection gives the nearest point: the obtuse angle says so, and so does an independent solver."""

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimand.projections import Ball, Box, Simplex, project_ball, project_simplex

SETS = [Ball(0.8), Box(-0.3, 0.6), Simplex(1.5)]
POINTS = st.lists(st.floats(-4, 4), min_size=1, max_size=7)


def inside(domain, count, size):
    """Draw points of a set by ways of their own."""
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = torch.rand(count, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if isinstance(domain, Ball):
        return domain.radius * share * noise / noise.norm(dim=1, keepdim=True)
    if isinstance(domain, Box):
        return domain.low + (domain.high - domain.low) * noise.sigmoid()
    return domain.total * (3 * noise).softmax(1)


@given(point=POINTS, which=st.sampled_from(range(3)))
def test_the_angle_to_every_point_of_the_set_is_obtuse(point, which):
    """p is the projection of v if and only if <v - p, z - p> <= 0 for all z of the set."""
    v = torch.tensor(point, dtype=torch.float64)
    p = SETS[which](v)
    others = inside(SETS[which], 64, len(point))
    assert ((others - p) @ (v - p)).max() <= 1e-9


@given(point=POINTS, total=st.floats(0.1, 5))
def test_the_simplex_is_met_exactly(point, total):
    p = project_simplex(torch.tensor(point, dtype=torch.float64), total=total)
    assert p.min() >= 0
    assert p.sum().item() == pytest.approx(total, rel=1e-12)


def test_the_simplex_agrees_with_a_quadratic_program():
    rng = np.random.default_rng(0)
    for _ in range(5):
        v = rng.normal(size=6)
        p = cvxpy.Variable(6)
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(p - v)), [p >= 0, cvxpy.sum(p) == 2]).solve()
        assert np.allclose(project_simplex(torch.tensor(v), total=2.0).numpy(), p.value, atol=1e-5)


def test_rows_may_have_totals_of_their_own_along_any_dimension():
    v = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    totals = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1)
    p = project_simplex(v, total=totals, dim=1)
    assert torch.allclose(p.sum(1), totals[:, 0].expand(3, 5))
    assert torch.allclose(p[1, :, 2], project_simplex(v[1, :, 2], total=2.0))


def test_projections_are_differentiable():
    v = torch.tensor([0.9, 0.4, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project_simplex, v)
    assert torch.autograd.gradcheck(project_ball, v)
    inner = (v.detach() / 10).requires_grad_()
    assert torch.autograd.gradcheck(project_ball, inner)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    project_ball(zero).sum().backward()
    assert torch.equal(zero.grad, torch.ones(3, dtype=torch.float64))


def test_diameters_are_attained():
    assert Ball(0.8).diameter == 1.6
    assert Simplex(2.0).diameter == pytest.approx((torch.eye(2)[0] * 2 - torch.eye(2)[1] * 2).norm().item())


@pytest.mark.untyped
def test_sets_that_are_none_are_refused():
    for build in (lambda: Ball(0.0), lambda: Box(1.0, 0.0), lambda: Simplex(-1.0)):
        with pytest.raises(ValueError, match="must be"):
            build()
    with pytest.raises(ValueError, match="empty"):
        project_simplex(torch.zeros(0))
    with pytest.raises(ValueError, match="total"):
        project_simplex(torch.zeros(3), total=torch.tensor(0.0))
