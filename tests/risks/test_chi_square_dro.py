"""Chi-square DRO against its primal (Namkoong and Duchi 2017)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from minimand.risks import ChiSquareDRO, chi_square_dro_weights

F64 = torch.float64
RADII = [1e-4, 0.1, 0.7, 2.0, 8.0, 25.0]


def losses_of(seed, size=31, heavy=False):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(size, generator=generator, dtype=F64)
    return losses.exp().square() if heavy else losses


def divergence(q):
    return (len(q) * q - 1).square().mean().item()


@pytest.mark.parametrize("radius", [0.1, 0.7, 2.0, 5.0])
def test_scipy_finds_no_worse_weights_and_the_same_value(radius):
    losses = losses_of(0, 9).numpy()
    found = minimize(
        lambda q: -q @ losses,
        np.full(9, 1 / 9),
        jac=lambda q: -losses,
        bounds=[(0, 1)] * 9,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones(9)},
            {"type": "ineq", "fun": lambda q: radius - ((9 * q - 1) ** 2).mean(), "jac": lambda q: -2 * (9 * q - 1)},
        ],
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert ChiSquareDRO(radius)(torch.from_numpy(losses)).item() == pytest.approx(-found.fun, abs=1e-6)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("heavy", [False, True])
def test_there_is_no_gap_between_the_value_and_the_dual(radius, heavy):
    losses = losses_of(1, heavy=heavy)
    x = losses.numpy()

    def value(eta):  # inf over eta of eta + sqrt(1 + rho) (E (l - eta)_+^2)^(1/2)
        return eta + math.sqrt((1 + radius) * (np.maximum(x - eta, 0) ** 2).mean())

    starts = x.max() - np.geomspace(1e-6, 1e4, 800)
    at = int(np.argmin([value(start) for start in starts]))
    bounds = (starts[min(at + 1, 799)], starts[max(at - 1, 0)])
    dual = minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-12}).fun
    assert ChiSquareDRO(radius)(losses).item() == pytest.approx(dual, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("heavy", [False, True])
def test_the_worst_weights_lie_on_the_surface_of_the_ball(radius, heavy):
    q = chi_square_dro_weights(losses_of(2, heavy=heavy), radius=radius)
    assert q.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (q >= 0).all()
    assert divergence(q) == pytest.approx(radius, rel=1e-9)


def test_while_no_weight_is_zero_it_is_the_mean_plus_a_multiple_of_the_standard_deviation():
    losses = losses_of(3)
    for radius in (1e-6, 1e-2, 0.2):
        assert (chi_square_dro_weights(losses, radius=radius) > 0).all()
        expected = losses.mean() + (radius * losses.var(correction=0)).sqrt()
        torch.testing.assert_close(ChiSquareDRO(radius)(losses), expected, rtol=0, atol=1e-12)


def test_some_weights_are_zero_for_larger_radii():
    losses = losses_of(3)
    q = chi_square_dro_weights(losses, radius=3.0)
    kept = q > 0
    assert 1 < kept.sum() < 31
    assert losses[kept].min() > losses[~kept].max()
    # On those that stay, weights are linear in the losses.
    slope = (q[kept] - q[kept].min())[1:] / (losses[kept] - losses[kept].min())[1:]
    torch.testing.assert_close(slope[torch.isfinite(slope)], slope[-1].expand(int(torch.isfinite(slope).sum())))


@pytest.mark.parametrize("ties", [1, 3])
def test_the_largest_losses_share_all_weight_once_the_ball_holds_that(ties):
    losses = losses_of(4)
    losses[:ties] = 9.0
    edge = 31 / ties - 1
    for radius in (edge + 1e-9, edge + 1, 1e6):
        q = chi_square_dro_weights(losses, radius=radius)
        torch.testing.assert_close(q, (losses == 9.0).to(F64) / ties, rtol=0, atol=1e-12)
    assert divergence(chi_square_dro_weights(losses, radius=edge - 1e-3)) == pytest.approx(edge - 1e-3, rel=1e-9)


def test_it_is_the_mean_at_radius_zero():
    losses = losses_of(5)
    torch.testing.assert_close(ChiSquareDRO(0.0)(losses), losses.mean(), rtol=0, atol=1e-14)


def test_the_gradient_is_the_worst_weights():
    losses = losses_of(6).requires_grad_()
    ChiSquareDRO(2.0)(losses).backward()
    torch.testing.assert_close(losses.grad, chi_square_dro_weights(losses, radius=2.0), rtol=0, atol=1e-14)


@settings(max_examples=150, deadline=None)
@given(
    losses=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12),
    radius=st.floats(1e-4, 12.0),
    gap=st.sampled_from([1.0, 1e-3, 1e-9]),
)
def test_the_solver_is_feasible_and_tight_for_any_losses(losses, radius, gap):
    x = gap * torch.tensor(losses, dtype=F64)
    q = chi_square_dro_weights(x, radius=radius)
    saturated = radius >= len(x) / int((x == x.max()).sum()) - 1
    assert (q >= 0).all()
    assert q.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (q[x.argsort()].diff() >= -1e-15).all()
    assert saturated or divergence(q) == pytest.approx(radius, rel=1e-5)


@pytest.mark.untyped
@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(ValueError, match="radius must be"):
        ChiSquareDRO(radius)
