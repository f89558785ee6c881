"""CVaR against its definitions (Rockafellar and Uryasev 2000)."""

import pytest
import torch
from scipy.optimize import linprog

from minimand.risks import CVaR

F64 = torch.float64
LEVELS = [0.0, 0.1, 0.5, 0.77, 0.9, 0.99]


def losses_of(seed, size=37):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("level", LEVELS)
def test_cvar_is_the_minimum_of_rockafellar_and_uryasevs_function(level):
    losses = losses_of(0)
    # The function is piecewise linear with its kinks at the losses, so its minimum is at one of them.
    values = losses + (losses[None] - losses[:, None]).relu().mean(1) / (1 - level)
    torch.testing.assert_close(CVaR(level)(losses), values.min(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_cvar_is_the_maximum_over_weights_capped_at_their_share(level):
    losses = losses_of(1, 23)
    cap = max(1 / ((1 - level) * 23), 1 / 23)
    found = linprog(-losses.numpy(), A_eq=[[1.0] * 23], b_eq=[1.0], bounds=(0, min(cap, 1)))
    assert CVaR(level)(losses).item() == pytest.approx(-found.fun, abs=1e-10)


def test_cvar_of_a_whole_number_of_examples_is_their_mean():
    losses = losses_of(2, 40)
    expected = losses.sort().values[-10:].mean()
    torch.testing.assert_close(CVaR(0.75)(losses), expected, rtol=0, atol=1e-12)


def test_the_boundary_example_counts_by_the_fraction_that_is_left():
    losses = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    value = CVaR(0.5)(losses)  # two and a half of five
    value.backward()
    assert value.item() == pytest.approx((5 + 4 + 0.5 * 3) / 2.5)
    torch.testing.assert_close(losses.grad, torch.tensor([0.4, 0, 0.4, 0, 0.2], dtype=F64))


def test_cvar_is_the_mean_at_level_zero_and_the_maximum_below_one_examples_share():
    losses = losses_of(3)
    torch.testing.assert_close(CVaR(0.0)(losses), losses.mean())
    for level in (1 - 1 / 37, 0.99, 0.9999):
        torch.testing.assert_close(CVaR(level)(losses), losses.max())


def test_cvar_rises_with_its_level():
    losses = losses_of(4)
    values = [CVaR(level)(losses).item() for level in LEVELS]
    assert values == sorted(values)


def test_tied_boundary_examples_get_the_left_over_weight_between_them():
    losses = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=F64, requires_grad=True)
    CVaR(0.5)(losses).backward()
    assert losses.grad.sum().item() == pytest.approx(1.0)
    assert losses.grad[0].item() == pytest.approx(0.5)
    assert losses.grad[1:3].sum().item() == pytest.approx(0.5)


@pytest.mark.untyped
@pytest.mark.parametrize("level", [-0.1, 1.0, float("nan")])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(ValueError, match="level must lie in"):
        CVaR(level)
