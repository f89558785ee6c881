"""KL-DRO against its primal and dual (Ben-Tal et al. 2013)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from minimand.risks import KLDRO, kl_dro_weights

F64 = torch.float64
RADII = [1e-6, 1e-3, 0.05, 0.5, 2.0, 3.0]


def losses_of(seed, size=31, heavy=False):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(size, generator=generator, dtype=F64)
    return losses.exp().square() if heavy else losses


def divergence(q):
    return (torch.special.xlogy(q, q).sum() + math.log(len(q))).item()


def dual(losses, radius):
    """Minimise the one-dimensional dual by scipy, over the logarithm of eta."""
    x = losses.numpy()

    def value(log_eta):
        eta = math.exp(log_eta)
        return eta * (logsumexp(x / eta) - math.log(len(x))) + eta * radius

    starts = np.linspace(-12, 12, 200)
    best = starts[np.argmin([value(start) for start in starts])]
    found = minimize_scalar(value, bounds=(best - 0.3, best + 0.3), method="bounded", options={"xatol": 1e-12})
    return found.fun


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("heavy", [False, True])
def test_there_is_no_gap_between_the_value_and_the_dual(radius, heavy):
    losses = losses_of(0, heavy=heavy)
    assert KLDRO(radius)(losses).item() == pytest.approx(dual(losses, radius), rel=1e-8)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("heavy", [False, True])
def test_the_worst_weights_lie_on_the_surface_of_the_ball(radius, heavy):
    q = kl_dro_weights(losses_of(1, heavy=heavy), radius=radius)
    assert q.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert divergence(q) == pytest.approx(radius, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0])
def test_no_other_weights_of_the_ball_are_worse(radius):
    losses = losses_of(2)
    value = KLDRO(radius)(losses)
    generator = np.random.default_rng(0)
    tried = torch.from_numpy(generator.dirichlet(np.full(31, 0.3), size=4000))
    q = kl_dro_weights(losses, radius=radius)
    # Random points, and points near the optimum; each pulled towards the uniform weights until it is in the ball.
    tried = torch.cat([tried, 0.9 * q + 0.1 * tried, 0.99 * q + 0.01 * tried])
    kl = torch.special.xlogy(tried, tried).sum(1) + math.log(31)
    share = torch.ones(len(tried), dtype=F64)
    for _ in range(60):
        mixed = share[:, None] * tried + (1 - share[:, None]) / 31
        outside = torch.special.xlogy(mixed, mixed).sum(1) + math.log(31) > radius
        share = torch.where(outside, 0.9 * share, share)
    mixed = share[:, None] * tried + (1 - share[:, None]) / 31
    assert (kl > radius).any()
    assert (mixed @ losses <= value + 1e-10).all()


@pytest.mark.parametrize("ties", [1, 3])
def test_the_largest_losses_share_all_weight_once_the_ball_holds_that(ties):
    losses = losses_of(3)
    losses[:ties] = 9.0
    edge = math.log(31 / ties)
    for radius in (edge, edge + 1, 100.0):
        q = kl_dro_weights(losses, radius=radius)
        expected = (losses == 9.0).to(F64) / ties
        torch.testing.assert_close(q, expected, rtol=0, atol=1e-12)
    near = kl_dro_weights(losses, radius=edge - 1e-3)
    assert divergence(near) == pytest.approx(edge - 1e-3, abs=1e-9)


def test_a_small_radius_adds_a_multiple_of_the_standard_deviation():
    losses = losses_of(4, 500)
    assert KLDRO(0.0)(losses).item() == pytest.approx(losses.mean().item(), abs=1e-14)
    for radius in (1e-8, 1e-6):
        extra = (KLDRO(radius)(losses) - losses.mean()).item()
        assert extra == pytest.approx(math.sqrt(2 * radius * losses.var(correction=0).item()), rel=2e-3)


def test_the_gradient_is_the_worst_weights():
    losses = losses_of(5).requires_grad_()
    KLDRO(0.3)(losses).backward()
    torch.testing.assert_close(losses.grad, kl_dro_weights(losses, radius=0.3), rtol=0, atol=1e-14)


@settings(max_examples=150, deadline=None)
@example(losses=[0.0, 1e-30, -1.0], radius=1.0, gap=1.0)
@given(
    losses=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12),
    radius=st.floats(1e-6, 3.0),
    gap=st.sampled_from([1.0, 1e-3, 1e-9]),
)
def test_the_solver_is_feasible_and_tight_for_any_losses(losses, radius, gap):
    x = gap * torch.tensor(losses, dtype=F64)
    q = kl_dro_weights(x, radius=radius)
    # Losses apart by less than this share of their range are equal to the solver, whose temperature has an end.
    tied = x.max() - x <= 1e-22 * (x.max() - x.min())
    saturated = radius >= math.log(len(x) / int(tied.sum()))
    assert divergence(q) <= radius + 1e-8 or saturated
    assert saturated or divergence(q) == pytest.approx(radius, rel=1e-5, abs=1e-9)
    assert (q >= 0).all()
    assert (q[x.argsort()].diff() >= -1e-15).all()


def test_sixteen_bit_losses_of_a_large_batch_keep_a_total_weight_of_one():
    losses = torch.full((4096,), 3.0, dtype=torch.bfloat16)
    losses[:7] = 2.0
    assert 2.98 <= KLDRO(0.1)(losses).item() <= 3.0


@pytest.mark.untyped
@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(ValueError, match="radius must be"):
        KLDRO(radius)
