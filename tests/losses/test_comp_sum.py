"""Comp-sum losses against their mathematics (Mao, Mohri and Zhong 2023)."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from minimand.losses import CompSumLoss, comp_sum_loss

F64 = torch.float64


def batch(rows=64, classes=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    return scores, torch.randint(classes, (rows,), generator=generator)


def own_probability(scores, target):
    return torch.softmax(scores, 1).gather(1, target[:, None])[:, 0]


def phi(u, tau):
    """The paper's outer function, written out."""
    return torch.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def exponential_sum(scores, target):
    """The inner sum over the wrong classes, written out."""
    gaps = (scores - scores.gather(1, target[:, None])).exp()
    return gaps.scatter(1, target[:, None], 0.0).sum(1)


def close(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 1.0, 1.3, 1.7, 2.0, 3.0])
def test_comp_sum_is_phi_of_the_sum_of_exponentials(tau):
    scores, target = batch(scale=1.5)
    losses = comp_sum_loss(scores, target, tau=tau, reduction="none")
    close(losses, phi(exponential_sum(scores, target), tau))


def test_comp_sum_is_cross_entropy_at_tau_one():
    scores, target = batch()
    expected = -torch.log(own_probability(scores, target))
    close(comp_sum_loss(scores, target, tau=1.0, reduction="none"), expected)
    close(comp_sum_loss(scores, target), F.cross_entropy(scores, target))


def test_comp_sum_is_half_the_mean_absolute_error_at_tau_two():
    scores, target = batch()
    distance = (torch.softmax(scores, 1) - F.one_hot(target, 7)).abs().sum(1)
    close(comp_sum_loss(scores, target, tau=2.0, reduction="none"), distance / 2)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 0.99])
def test_comp_sum_is_generalized_cross_entropy_between_one_and_two(q):
    scores, target = batch()
    expected = (1 - own_probability(scores, target) ** q) / q
    close(comp_sum_loss(scores, target, tau=1 + q, reduction="none"), expected)


def test_comp_sum_is_the_sum_of_exponentials_at_tau_zero():
    scores, target = batch(scale=2.0)
    close(comp_sum_loss(scores, target, tau=0.0, reduction="none"), exponential_sum(scores, target))


@pytest.mark.parametrize("step", [1e-7, -1e-7, 1e-12, 1e-15])
def test_comp_sum_is_continuous_in_tau_through_one(step):
    scores, target = batch(scale=10.0)
    at_one = comp_sum_loss(scores, target, tau=1.0, reduction="none")
    losses = comp_sum_loss(scores, target, tau=1 + step, reduction="none")
    # To first order they differ by (tau - 1) (log p)^2 / 2, which float64 resolves only if nothing cancels.
    torch.testing.assert_close(losses, at_one - step * at_one**2 / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_gradient_is_p_to_the_tau_minus_one_times_the_residual(tau, rho):
    scores, target = batch(scale=1.0)
    scores.requires_grad_()
    comp_sum_loss(scores, target, tau=tau, rho=rho, reduction="sum").backward()
    p = torch.softmax(scores.detach() / rho, 1)
    own = p.gather(1, target[:, None])
    close(scores.grad, own ** (tau - 1) * (p - F.one_hot(target, 7)) / rho)
    close(scores.grad.sum(1) / scores.grad.abs().amax(1), torch.zeros(64, dtype=F64))


@given(
    scores=st.lists(st.floats(-8, 8), min_size=2, max_size=6),
    low=st.floats(0, 3),
    gap=st.floats(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_comp_sum_never_rises_with_tau(scores, low, gap):
    input, target = torch.tensor([scores], dtype=F64), torch.tensor([0])
    smaller = comp_sum_loss(input, target, tau=low)
    larger = comp_sum_loss(input, target, tau=low + gap)
    assert larger <= smaller * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize(("tau", "value"), [(0.0, 1.0), (1.0, math.log(2)), (2.0, 0.5)])
def test_two_tied_classes_cost_phi_of_one(tau, value):
    assert comp_sum_loss(torch.zeros(1, 2, dtype=F64), torch.tensor([0]), tau=tau).item() == pytest.approx(value)


def test_comp_sum_ignores_a_shift_of_the_scores():
    scores, target = batch()
    close(comp_sum_loss(scores + 5.0, target, tau=0.5), comp_sum_loss(scores, target, tau=0.5), atol=1e-8)


def test_rho_divides_the_scores():
    scores, target = batch(scale=1.0)
    close(comp_sum_loss(scores, target, tau=1.4, rho=0.3), comp_sum_loss(scores / 0.3, target, tau=1.4))


def test_label_smoothing_is_that_of_cross_entropy_at_tau_one():
    scores, target = batch()
    close(comp_sum_loss(scores, target, label_smoothing=0.2), F.cross_entropy(scores, target, label_smoothing=0.2))


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.6])
def test_label_smoothing_mixes_in_the_mean_over_all_labels(tau):
    scores, target = batch(scale=1.0)
    every = torch.stack(
        [comp_sum_loss(scores, torch.full_like(target, label), tau=tau, reduction="none") for label in range(7)]
    )
    expected = 0.7 * comp_sum_loss(scores, target, tau=tau, reduction="none") + 0.3 * every.mean(0)
    close(comp_sum_loss(scores, target, tau=tau, label_smoothing=0.3, reduction="none"), expected)


def test_weight_and_ignore_index_are_those_of_cross_entropy_at_tau_one():
    scores, target = batch()
    target[::5] = 3
    weight = torch.linspace(0.2, 2.0, 7, dtype=F64)
    expected = F.cross_entropy(scores, target, weight=weight, ignore_index=3)
    close(comp_sum_loss(scores, target, weight=weight, ignore_index=3), expected)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_tau_is_finite_with_finite_slope_for_extreme_scores(tau, dtype):
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = comp_sum_loss(scores, torch.tensor([0, 0]), tau=tau)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_sum_exponential_goes_on_along_its_tangent_where_the_exponential_would_overflow():
    # The ceiling in float32 is half the logarithm of the largest number, 44.36.
    gaps = torch.tensor([40.0, 60.0, 70.0])
    scores = torch.stack([torch.zeros(3), gaps], 1).requires_grad_()
    losses = comp_sum_loss(scores, torch.zeros(3, dtype=torch.int64), tau=0.0, reduction="none")
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(math.exp(40), rel=1e-5)
    top = math.sqrt(torch.finfo(torch.float32).max)
    assert losses[2].item() - losses[1].item() == pytest.approx(10 * top, rel=1e-4)
    assert scores.grad[2, 1].item() == pytest.approx(top, rel=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.9])
def test_link_recovers_the_class_probabilities_at_the_population_minimiser(tau):
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    scores = (0.7 / (2 - tau) * probabilities.log())[None].requires_grad_()
    losses = comp_sum_loss(scores.expand(3, 3), torch.arange(3), tau=tau, rho=0.7, reduction="none")
    (probabilities * losses).sum().backward()
    close(scores.grad, torch.zeros(1, 3, dtype=F64))
    close(CompSumLoss(tau, rho=0.7).link(scores.detach())[0], probabilities)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompSumLoss(-0.1), "tau must be a finite number of at least 0, got -0.1"),
        (lambda: CompSumLoss(float("nan")), "tau"),
        (lambda: CompSumLoss(rho=0.0), "rho must be a finite number above 0, got 0.0"),
        (lambda: CompSumLoss(label_smoothing=1.0), "label_smoothing"),
        (lambda: comp_sum_loss(torch.zeros(1, 2), torch.tensor([0]), tau=-1.0), "tau"),
        (lambda: comp_sum_loss(torch.zeros(1, 2), torch.tensor([2])), "target"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
