"""The Z-loss and its spherical family against their mathematics (de Brébisson and Vincent 2016)."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from minimand.losses import SphericalLoss, SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss, ZLoss, zloss

F64 = torch.float64
FAMILY = {
    "z": lambda **kw: ZLoss(0.7, margin=2.0, **kw),
    "squared error": SquaredErrorLoss,
    "Taylor softmax": TaylorSoftmaxLoss,
    "spherical softmax": lambda **kw: SphericalSoftmaxLoss(0.05, **kw),
}


def batch(rows=32, classes=7, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    return scores, torch.randint(classes, (rows,), generator=generator)


def z_scores(scores):
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)


def gradient(loss, scores, target):
    scores = scores.clone().requires_grad_()
    loss(scores, target).backward()
    return scores.grad


def test_z_loss_is_the_softplus_of_the_targets_z_score():
    scores, target = batch()
    z = z_scores(scores).gather(1, target[:, None])[:, 0]
    losses = zloss(scores, target, sharpness=0.7, margin=2.0, eps=1e-16, reduction="none")
    expected = torch.log1p(torch.exp(0.7 * (2.0 - z))) / 0.7
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


@given(shift=st.floats(-1e3, 1e3), scale=st.floats(0.1, 1e3), seed=st.integers(0, 99))
def test_z_loss_ignores_a_shift_and_a_positive_scale_of_the_scores(shift, scale, seed):
    scores, target = batch(rows=8, seed=seed)
    moved = zloss(scale * scores + shift, target, margin=2.0, eps=1e-16, reduction="none")
    still = zloss(scores, target, margin=2.0, eps=1e-16, reduction="none")
    torch.testing.assert_close(moved, still, rtol=0, atol=1e-10)


def test_gradient_of_the_z_loss_is_orthogonal_to_ones_and_to_the_scores():
    scores, target = batch()
    slope = gradient(ZLoss(margin=2.0, eps=1e-30, reduction="sum"), scores, target)
    assert slope.abs().amax() > 0.01
    assert slope.sum(1).abs().amax() < 1e-12
    assert (slope * scores).sum(1).abs().amax() < 1e-12


def test_gradient_of_the_z_loss_is_its_closed_form_and_has_its_norm():
    scores, target = batch()
    slope = gradient(ZLoss(0.7, margin=2.0, eps=1e-30, reduction="sum"), scores, target)
    z = z_scores(scores)
    own = z.gather(1, target[:, None])
    ratio = -torch.sigmoid(0.7 * (2.0 - own)) / scores.std(1, correction=0, keepdim=True)
    expected = ratio * (F.one_hot(target, 7).to(F64) - 1 / 7 - own * z / 7)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)
    norm = ratio.square() * (1 - 1 / 7 - own.square() / 7)
    torch.testing.assert_close(slope.square().sum(1, keepdim=True), norm, rtol=0, atol=1e-12)


def test_z_loss_is_least_where_the_target_alone_stands_out():
    scores = torch.eye(7, dtype=F64)
    loss = ZLoss(0.7, margin=2.0, eps=1e-30, reduction="none")
    bound = F.softplus(torch.tensor(0.7 * (2.0 - math.sqrt(6)), dtype=F64)) / 0.7
    torch.testing.assert_close(loss(scores, torch.arange(7)), bound.expand(7), rtol=0, atol=1e-12)
    loss.reduction = "sum"
    assert gradient(loss, scores, torch.arange(7)).abs().amax() < 1e-12
    random, target = batch(rows=200)
    loss.reduction = "none"
    assert (loss(random, target) >= bound - 1e-12).all()


def test_z_loss_is_a_hinge_when_sharp_and_a_straight_line_when_blunt():
    scores, target = batch()
    z = z_scores(scores).gather(1, target[:, None])[:, 0]
    sharp = zloss(scores, target, sharpness=1e6, margin=1.0, reduction="none")
    torch.testing.assert_close(sharp, (1.0 - z).clamp_min(0), rtol=0, atol=1e-6)
    blunt = zloss(scores, target, sharpness=1e-6, margin=1.0, reduction="none")
    torch.testing.assert_close(blunt - math.log(2) / 1e-6, (1.0 - z) / 2, rtol=0, atol=1e-5)


def test_z_loss_in_float32_survives_scores_whose_mean_dwarfs_their_spread():
    scores, target = batch()
    exact = zloss(scores, target, reduction="none")
    shifted = (scores + 4096.0).float()
    torch.testing.assert_close(zloss(shifted, target, reduction="none"), exact.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_gradient_is_a_common_shift_a_pull_to_zero_and_a_push_on_the_target(name):
    scores, target = batch()
    loss = FAMILY[name](reduction="sum")
    own = scores.gather(1, target[:, None])[:, 0]
    value, by_own, by_square, by_sum = loss.value_and_partials(own, scores.square().sum(1), scores.sum(1), 7)
    expected = by_sum[:, None] + 2 * by_square[:, None] * scores + by_own[:, None] * F.one_hot(target, 7)
    torch.testing.assert_close(gradient(loss, scores, target), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(scores, target), value.sum(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FAMILY)
def test_partials_are_the_derivatives_of_the_value_each_on_its_own(name):
    scores, target = batch()
    parts = [
        part.clone().requires_grad_()
        for part in (scores.gather(1, target[:, None])[:, 0], scores.square().sum(1), scores.sum(1))
    ]
    value, *partials = FAMILY[name]().value_and_partials(*parts, 7)
    slopes = torch.autograd.grad(value.sum(), parts, allow_unused=True)
    for slope, partial in zip(slopes, partials, strict=True):
        expected = torch.zeros_like(partial) if slope is None else slope
        torch.testing.assert_close(partial, expected, rtol=0, atol=1e-12)


def test_squared_error_is_the_mean_squared_error_of_the_one_hot_target_summed():
    scores, target = batch()
    expected = F.mse_loss(scores, F.one_hot(target, 7).to(F64), reduction="sum")
    torch.testing.assert_close(SquaredErrorLoss(reduction="sum")(scores, target), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["Taylor softmax", "spherical softmax"])
def test_log_losses_are_minus_the_log_of_their_link(name):
    scores, target = batch()
    loss = FAMILY[name](reduction="none")
    expected = -loss.link(scores).gather(1, target[:, None])[:, 0].log()
    torch.testing.assert_close(loss(scores, target), expected, rtol=0, atol=1e-12)


def test_taylor_softmax_tends_to_the_softmax_for_small_scores():
    scores, target = batch(scale=1e-3)
    expected = F.cross_entropy(scores, target)
    assert abs(TaylorSoftmaxLoss()(scores, target) - expected) < 1e-8
    assert abs(SphericalSoftmaxLoss()(scores, target) - expected) > 1e-5


def test_spherical_softmax_is_even_and_its_ranking_with_it():
    scores, target = batch()
    loss = SphericalSoftmaxLoss()
    torch.testing.assert_close(loss(-scores, target), loss(scores, target))
    assert torch.equal(loss.link(scores).argsort(1), loss.ranking(scores).argsort(1))
    taylor = TaylorSoftmaxLoss()
    torch.testing.assert_close(taylor(-2 - scores, target), taylor(scores, target))
    assert torch.equal(taylor.link(scores).argsort(1), taylor.ranking(scores).argsort(1))


def test_link_of_the_squared_error_is_the_nearest_distribution():
    scores, _ = batch(rows=50)
    nearest = SquaredErrorLoss().link(scores)
    torch.testing.assert_close(nearest.sum(1), torch.ones(50, dtype=F64))
    # The projection's condition: no direction towards another point of the simplex makes an acute angle.
    towards = (scores - nearest)[:, None, :] @ (torch.eye(7, dtype=F64) - nearest[:, None, :]).mT
    assert towards.amax() < 1e-10
    torch.testing.assert_close(SquaredErrorLoss().link(nearest), nearest)


def test_every_member_is_a_spherical_loss_and_cross_entropy_is_none():
    assert all(isinstance(make(), SphericalLoss) for make in FAMILY.values())
    assert not isinstance(torch.nn.CrossEntropyLoss(), SphericalLoss)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ZLoss(0.0), "sharpness"),
        (lambda: ZLoss(margin=float("nan")), "margin"),
        (lambda: ZLoss(eps=0.0), "eps"),
        (lambda: SphericalSoftmaxLoss(0.0), "eps"),
        (lambda: zloss(torch.randn(3, 2), torch.tensor([0, 1, 0])), "at least 3 classes"),
        (lambda: zloss(torch.randn(3, 4), torch.tensor([0, 4, 0])), "target must hold"),
    ],
)
def test_bad_settings_two_classes_and_a_target_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
