"""EnsLoss against its mathematics (Dai 2025)."""

import math

import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.losses import EnsLoss, calibrated_derivatives, check_cc, inverse_box_cox

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=200, seed=0, scale=2.0):
    generator = seeded(seed)
    scores = scale * torch.randn(rows, generator=generator, dtype=F64)
    return scores, torch.randint(2, (rows,), generator=generator)


def gradient(loss, scores, target):
    scores = scores.clone().requires_grad_()
    loss(scores, target).backward()
    return scores.grad


def margins_of(scores, target):
    return (2 * target - 1) * scores


@settings(max_examples=100, deadline=None)
@given(
    margins=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40),
    lam=st.sampled_from([-1.0, -0.3, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_drawn_derivatives_are_those_of_a_convex_calibrated_loss_with_a_bounded_tail(margins, lam, seed):
    s = torch.tensor(margins, dtype=F64)
    draws = inverse_box_cox(torch.randn(len(s), generator=seeded(seed), dtype=F64), lam)
    g = calibrated_derivatives(s, draws)
    assert check_cc(s, g)
    assert (g <= -1e-6).all()
    assert (g.abs() <= 1 + 1e-6).all()
    assert (g.abs() <= 1 / s.clamp_min(1) + 1e-6).all()


def test_the_smallest_margin_gets_the_largest_draw():
    s, _ = batch(50)
    s = s - s.max() + 1  # below the tail
    draws = torch.rand(50, generator=seeded(1), dtype=F64)
    g = calibrated_derivatives(s, draws)
    torch.testing.assert_close(g[s.argsort()], -draws.sort(descending=True).values - 1e-6, rtol=0, atol=1e-15)


def test_the_gradient_with_respect_to_a_margin_is_its_derivative_over_the_batch_size():
    scores, target = batch()
    for reduction, scale in (("mean", 200), ("sum", 1)):
        found = gradient(EnsLoss(generator=seeded(3), reduction=reduction), scores, target)
        draws = inverse_box_cox(torch.randn(200, 1, generator=seeded(3))[:, 0].to(F64), 0.0)
        g = calibrated_derivatives(margins_of(scores, target), draws)
        torch.testing.assert_close(found, (2 * target - 1) * g / scale, rtol=0, atol=1e-12)
        assert (g < 0).all()


def test_some_convex_decreasing_loss_has_these_derivatives():
    s, _ = batch(300)
    g = calibrated_derivatives(s, inverse_box_cox(torch.randn(300, generator=seeded(4), dtype=F64), 0.0))
    order = s.argsort()
    x, slope = s[order], g[order]
    # The piecewise linear loss whose slope right of each margin is the derivative there.
    phi = torch.cat([torch.zeros(1, dtype=F64), (x.diff() * slope[:-1]).cumsum(0)])
    slopes = phi.diff() / x.diff()
    assert (slopes < 0).all()
    assert (slopes.diff() >= -1e-9).all()


@pytest.mark.parametrize("lam", [-0.9, -0.2, 0.0, 0.3, 1.0])
def test_inverse_box_cox_inverts_the_box_cox_transform(lam):
    xi = torch.linspace(-0.9, 0.9, 41, dtype=F64)
    found = inverse_box_cox(xi, lam)
    back = found.log() if lam == 0 else (found**lam - 1) / lam
    torch.testing.assert_close(back, xi, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, torch.from_numpy(scipy.special.inv_boxcox(xi.numpy(), lam)), rtol=1e-12, atol=0)
    torch.testing.assert_close(inverse_box_cox(xi, torch.tensor(lam, dtype=F64)), found)


def test_inverse_box_cox_tends_to_the_exponential():
    xi = torch.linspace(-3, 3, 41, dtype=F64)
    for lam in (1e-7, -1e-7):
        torch.testing.assert_close(inverse_box_cox(xi, lam), xi.exp(), rtol=1e-6, atol=0)


def test_inverse_box_cox_outside_its_domain_is_zero_or_infinite_and_still_clipped():
    xi = torch.tensor([-5.0, 5.0], dtype=F64)
    assert inverse_box_cox(xi, 0.5)[0] == 0
    assert inverse_box_cox(xi, -0.5)[1] == math.inf
    g = calibrated_derivatives(torch.zeros(2, dtype=F64), inverse_box_cox(xi, -0.5))
    assert (g >= -1 - 1e-6).all()


def test_large_batches_converge_to_the_quantiles():
    size = 100_000
    s = torch.rand(size, generator=seeded(5), dtype=F64)
    draws = inverse_box_cox(torch.randn(size, generator=seeded(6), dtype=F64), 0.0)
    g = calibrated_derivatives(s, draws)
    u = (s.argsort().argsort() + 0.5) / size
    limit = -torch.special.ndtri(1 - u).exp().clamp_max(1)
    assert (g - limit).abs().max() < 0.02
    assert (g[u < 0.49] == -1 - 1e-6).all()


def test_evaluation_mode_draws_nothing_and_takes_the_quantiles():
    scores, target = batch(64)
    state = torch.random.get_rng_state()
    found = gradient(EnsLoss(reduction="sum").eval(), scores, target)
    assert torch.equal(state, torch.random.get_rng_state())
    s = margins_of(scores, target)
    u = (torch.arange(64, dtype=F64) + 0.5) / 64
    expected = torch.zeros(64, dtype=F64)
    expected[s.argsort()] = torch.special.ndtri(1 - u).exp().clamp_max(1)
    expected = -(expected / s.clamp_min(1)) - 1e-6
    torch.testing.assert_close(found, (2 * target - 1) * expected, rtol=0, atol=1e-9)


def test_constant_draws_without_tail_give_the_linear_loss_and_the_hinge_below_one():
    s, _ = batch()
    g = calibrated_derivatives(s, torch.ones_like(s), tail=None, eps=1e-12)
    torch.testing.assert_close(g, torch.full_like(g, -1.0), rtol=0, atol=1e-11)
    below = s < 1
    x = s.clone().requires_grad_()
    (1 - x).relu().sum().backward()
    torch.testing.assert_close(g[below], x.grad[below], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("derivative", "reference"),
    [
        (lambda s: -torch.sigmoid(-s), lambda s: F.softplus(-s)),
        (lambda s: -(s < 1).to(s.dtype), lambda s: (1 - s).relu()),
        (lambda s: -(-s).exp(), lambda s: (-s).exp()),
    ],
    ids=["logistic", "hinge", "exponential"],
)
def test_a_fixed_derivative_reproduces_the_gradient_of_its_loss(derivative, reference):
    scores, target = batch()
    x = scores.clone().requires_grad_()
    reference(margins_of(x, target)).mean().backward()
    torch.testing.assert_close(gradient(EnsLoss(derivative=derivative), scores, target), x.grad, rtol=0, atol=1e-12)
    s = margins_of(scores, target)
    # The hinge is flat on the right, so its slope is only non-positive there.
    assert check_cc(s, derivative(s) - 1e-9)


def test_the_logistic_derivative_is_bce_with_logits():
    scores, target = batch()
    x = scores.clone().requires_grad_()
    F.binary_cross_entropy_with_logits(x, target.to(F64)).backward()
    found = gradient(EnsLoss(derivative=lambda s: -torch.sigmoid(-s)), scores, target)
    torch.testing.assert_close(found, x.grad, rtol=0, atol=1e-7)


def test_permuting_the_batch_permutes_the_derivatives():
    scores, target = batch()
    order = torch.randperm(200, generator=seeded(7))
    together = gradient(EnsLoss(generator=seeded(8)), scores, target)
    permuted = gradient(EnsLoss(generator=seeded(8)), scores[order], target[order])
    torch.testing.assert_close(permuted, together[order], rtol=0, atol=1e-15)


def test_all_shapes_of_binary_scores_agree():
    scores, target = batch()
    expected = gradient(EnsLoss(generator=seeded(9)), scores, target)
    column = gradient(EnsLoss(generator=seeded(9)), scores[:, None], target[:, None].to(F64))
    torch.testing.assert_close(column[:, 0], expected)
    signed = gradient(EnsLoss(generator=seeded(9), targets="signed"), scores, 2 * target - 1)
    torch.testing.assert_close(signed, expected)
    two = torch.stack([torch.full_like(scores, 3.0), scores + 3.0], 1)
    both = gradient(EnsLoss(generator=seeded(9)), two, target)
    torch.testing.assert_close(both, torch.stack([-expected, expected], 1))


def test_more_classes_are_one_binary_problem_each_against_the_rest():
    generator = seeded(10)
    scores = torch.randn(50, 4, generator=generator, dtype=F64)
    target = torch.randint(4, (50,), generator=generator)
    loss = EnsLoss(reduction="none").eval()
    columns = [loss(scores[:, k].contiguous(), (target == k).long()) for k in range(4)]
    torch.testing.assert_close(loss(scores, target), torch.stack(columns).sum(0))
    drawn = gradient(EnsLoss(generator=seeded(11), reduction="sum"), scores, target)
    for k in range(4):
        sign = 2 * (target == k) - 1
        assert check_cc(sign * scores[:, k], sign * drawn[:, k])


def test_tail_switch_only_changes_margins_above_one():
    s, _ = batch()
    draws = torch.rand(200, generator=seeded(12), dtype=F64)
    with_tail, without = calibrated_derivatives(s, draws), calibrated_derivatives(s, draws, tail=None)
    assert torch.equal(with_tail[s <= 1], without[s <= 1])
    torch.testing.assert_close(with_tail[s > 1] + 1e-6, (without[s > 1] + 1e-6) / s[s > 1])


def test_random_lambda_is_redrawn_every_period_and_on_demand():
    scores, target = batch(16)
    loss = EnsLoss("random", period=3, generator=seeded(13))
    seen = []
    for _ in range(7):
        loss(scores, target)
        seen.append(loss.current_lambda.item())
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5] != seen[6]
    loss.eval()(scores, target)
    assert loss.current_lambda.item() == seen[6]
    loss.resample()
    assert loss.current_lambda.item() != seen[6]
    once = EnsLoss("random", generator=seeded(13))
    for _ in range(5):
        once(scores, target)
    assert once.current_lambda.item() == seen[0]
    draws = []
    for _ in range(400):
        once.resample()
        draws.append(once.current_lambda.item())
    assert -1 <= min(draws) < -0.95
    assert 0.95 < max(draws) <= 1


def test_the_same_seed_gives_the_same_loss_and_successive_calls_do_not():
    scores, target = batch()
    one, two = EnsLoss(generator=seeded(14)), EnsLoss(generator=seeded(14))
    first = one(scores, target)
    assert torch.equal(first, two(scores, target))
    assert not torch.equal(first, one(scores, target))


def test_check_cc_refuses_what_is_not_convex_or_not_falling():
    s = torch.tensor([-1.0, 0.0, 1.0])
    assert check_cc(s, torch.tensor([-3.0, -2.0, -1.0]))
    assert not check_cc(s, torch.tensor([-1.0, -2.0, -3.0]))
    assert not check_cc(s, torch.tensor([-3.0, -2.0, 0.0]))
    assert check_cc(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([-1.0, -2.0, -0.5]))


def test_link_of_raw_scores_is_the_logistic_function():
    scores, _ = batch(5)
    expected = torch.stack([torch.sigmoid(-scores), torch.sigmoid(scores)], 1)
    for shape in ((5,), (5, 1)):
        torch.testing.assert_close(EnsLoss().link(scores.reshape(shape)), expected)


@pytest.mark.untyped
def test_bad_settings_and_batches_are_refused():
    with pytest.raises(ValueError, match="boxcox_lambda"):
        EnsLoss("any")
    with pytest.raises(ValueError, match="boxcox_lambda"):
        EnsLoss(float("nan"))
    with pytest.raises(ValueError, match="period"):
        EnsLoss("random", period=0)
    with pytest.raises(ValueError, match="clip"):
        EnsLoss(clip=0.0)
    with pytest.raises(ValueError, match="tail"):
        EnsLoss(tail="log")
    with pytest.raises(ValueError, match="nothing to draw"):
        EnsLoss().resample()
    scores, target = batch(8)
    with pytest.raises(ValueError, match="target must have shape"):
        EnsLoss()(scores[:, None], target[None])
    with pytest.raises(ValueError, match="target must hold 0 and 1 only"):
        EnsLoss()(scores, 2 * target - 1)
    with pytest.raises(ValueError, match="target must hold -1 and 1 only"):
        EnsLoss(targets="signed")(scores, target * 0)
    with pytest.raises(ValueError, match="target must hold class indices"):
        EnsLoss()(torch.zeros(4, 3), torch.tensor([0, 1, -100, 2]))
    with pytest.raises(ValueError, match="draws must have the shape"):
        calibrated_derivatives(scores, scores[:3].abs())
    with pytest.raises(ValueError, match="draws must be non-negative"):
        calibrated_derivatives(scores, -scores.abs())


def test_doubtful_settings_and_batches_draw_a_warning():
    with pytest.warns(UserWarning, match="boxcox_lambda is 2"):
        EnsLoss(2.0)
    with pytest.warns(UserWarning, match="one example"):
        EnsLoss()(torch.zeros(1), torch.ones(1))
