"""What a penalty leaves of a violation is known."""

import pytest
import torch

from minimand.constraints import exact_penalty, log_barrier, quadratic_penalty


def minimiser(penalty, *, start=0.0, steps=3000, lr=5e-3):
    """Minimise (x - 2)^2 + penalty(x - 1): the constrained minimum is 1, its multiplier 2."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr)
    tail = []
    for step in range(steps):
        optimizer.zero_grad()
        ((x - 2).square() + penalty(x - 1)).backward()
        optimizer.step()
        if step > steps - 500:
            tail.append(x.item())
    return sum(tail) / len(tail)


@pytest.mark.parametrize("weight", [1.0, 10.0, 100.0])
def test_the_quadratic_penalty_leaves_multiplier_over_weight(weight):
    # 2 (x - 2) + w (x - 1) = 0, so x - 1 = 2 / (2 + w): the multiplier over the weight, for large weights.
    assert minimiser(lambda g: quadratic_penalty(g, weight=weight)) - 1 == pytest.approx(2 / (2 + weight), abs=1e-6)


def test_the_exact_penalty_is_exact_above_the_multiplier_and_not_below():
    assert minimiser(lambda g: exact_penalty(g, weight=2.5)) == pytest.approx(1.0, abs=5e-3)
    assert minimiser(lambda g: exact_penalty(g, weight=1.0)) == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize("sharpness", [5.0, 20.0])
def test_the_barrier_stays_inside_and_is_suboptimal_by_at_most_one_over_sharpness(sharpness):
    x = minimiser(lambda g: log_barrier(g, sharpness=sharpness))
    assert x < 1
    assert (x - 2) ** 2 - 1 <= 1 / sharpness + 1e-9


def test_the_barrier_starts_from_a_point_that_violates():
    assert minimiser(lambda g: log_barrier(g, sharpness=10.0), start=5.0) == pytest.approx(
        minimiser(lambda g: log_barrier(g, sharpness=10.0)), abs=1e-6
    )


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 40.0])
def test_the_barrier_and_its_slope_are_continuous_where_the_tangent_takes_over(sharpness):
    edge = -1 / sharpness**2
    step = abs(edge) * 1e-7
    g = torch.tensor([edge - step, edge + step], dtype=torch.float64, requires_grad=True)
    values = torch.stack([log_barrier(one.view(1), sharpness=sharpness) for one in g])
    (slopes,) = torch.autograd.grad(values.sum(), g)
    assert values[0].item() == pytest.approx(values[1].item(), abs=4 * step * sharpness)
    assert slopes[0].item() == pytest.approx(slopes[1].item(), rel=1e-6)
    assert slopes[1].item() == pytest.approx(sharpness)


def test_equalities_are_priced_on_both_sides():
    g = torch.tensor([1.0, -2.0])
    assert quadratic_penalty(g, weight=2.0, equality=True).item() == 5.0
    assert quadratic_penalty(g, weight=2.0).item() == 1.0
    assert exact_penalty(g, weight=2.0, equality=True).item() == 6.0
    assert exact_penalty(g, weight=2.0).item() == 2.0


@pytest.mark.untyped
@pytest.mark.parametrize("penalty", [quadratic_penalty, exact_penalty, log_barrier])
def test_bad_violations_are_refused(penalty):
    with pytest.raises(ValueError, match="NaN"):
        penalty(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match="empty"):
        penalty(torch.zeros(0))
    with pytest.raises(TypeError, match="floating"):
        penalty(torch.zeros(2, dtype=torch.int64))
