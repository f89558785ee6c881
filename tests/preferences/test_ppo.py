"""PPO's mathematics against its definitions: advantages, trust region, critic, divergence."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimand.preferences import clipped_policy_loss, clipped_value_loss, generalized_advantages, kl_estimate

SHARE = st.floats(0, 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(rewards, values, gamma, lam, bootstrap):
    """The sum of discounted temporal differences, term by term, in plain Python."""
    steps = len(rewards)
    after = [*values[1:], bootstrap]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, steps)) for t in range(steps)]


@given(gamma=SHARE, lam=SHARE, bootstrap=st.floats(-3, 3), steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_advantages_are_the_discounted_sums_of_temporal_differences(gamma, lam, bootstrap, steps, seed):
    rewards, values = normal(2, steps, seed=seed)
    ours = generalized_advantages(
        rewards, values, gamma=gamma, lam=lam, bootstrap=torch.tensor(bootstrap, dtype=torch.float64)
    )
    assert ours.tolist() == pytest.approx(by_definition(rewards.tolist(), values.tolist(), gamma, lam, bootstrap))


@given(gamma=SHARE)
def test_at_lambda_zero_an_advantage_looks_one_step_ahead(gamma):
    rewards, values = normal(2, 5)
    ahead = rewards + gamma * torch.cat([values[1:], torch.zeros(1)]) - values
    assert torch.allclose(generalized_advantages(rewards, values, gamma=gamma, lam=0.0), ahead)


@given(gamma=SHARE)
def test_at_lambda_one_an_advantage_is_the_return_minus_the_value(gamma):
    rewards, values = normal(2, 5)
    returns = torch.stack([sum(gamma**k * rewards[t + k] for k in range(5 - t)) for t in range(5)])
    assert torch.allclose(generalized_advantages(rewards, values, gamma=gamma, lam=1.0), returns - values)


def test_heads_are_the_scalar_advantages_head_by_head():
    rewards, values, bootstrap = normal(3, 4, 6), normal(3, 4, 6, seed=1), normal(3, 4, seed=2)
    together = generalized_advantages(rewards, values, gamma=0.9, lam=0.8, bootstrap=bootstrap)
    for head, row in itertools.product(range(3), range(4)):
        alone = generalized_advantages(
            rewards[head, row], values[head, row], gamma=0.9, lam=0.8, bootstrap=bootstrap[head, row]
        )
        assert torch.equal(together[head, row], alone)


def test_masked_steps_change_nothing_and_have_no_advantage():
    rewards, values = normal(1, 6), normal(1, 6, seed=1)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    ours = generalized_advantages(rewards, values, mask=mask, gamma=0.9)
    assert torch.allclose(ours[:, :4], generalized_advantages(rewards[:, :4], values[:, :4], gamma=0.9))
    assert (ours[:, 4:] == 0).all()


def test_with_values_of_the_policy_the_mean_advantage_is_zero_whatever_lambda():
    """Two steps with a coin each: exact values make every expected advantage vanish."""
    rewards = torch.tensor(list(itertools.product((0.0, 1.0), (0.0, 3.0))), dtype=torch.float64)
    values = torch.tensor([[2.0, 1.5]], dtype=torch.float64).expand(4, 2)
    for lam in (0.0, 0.5, 1.0):
        assert torch.allclose(generalized_advantages(rewards, values, lam=lam).mean(0), torch.zeros(2).double())


@given(log_ratio=st.floats(-1, 1), advantage=st.floats(-2, 2), clip=st.floats(0.01, 0.9))
def test_the_policy_loss_is_the_smaller_of_two_surrogates(log_ratio, advantage, clip):
    logp, old_logp, weight = torch.tensor([log_ratio, 0.0, advantage], dtype=torch.float64)
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    expected = -min(ratio * advantage, clipped * advantage)
    assert clipped_policy_loss(logp, old_logp, weight, clip=clip).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_the_policy_stops_only_where_it_has_gone_too_far_the_way_it_wants(ratio, advantage, moves):
    logp = torch.tensor(ratio).log().requires_grad_()
    clipped_policy_loss(logp, torch.zeros(()), torch.tensor(advantage)).backward()
    assert logp.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0, rel=1e-5)


def test_at_the_acting_policy_the_gradient_is_that_of_reinforce():
    logp, advantages = normal(5).requires_grad_(), normal(5, seed=1)
    clipped_policy_loss(logp, logp.detach(), advantages).sum().backward()
    assert torch.allclose(logp.grad, -advantages)


@given(value=st.floats(-2, 2), old=st.floats(-2, 2), target=st.floats(-2, 2), clip=st.floats(0.01, 1))
def test_the_critics_loss_is_the_worse_of_two_squared_errors(value, old, target, clip):
    near = old + min(max(value - old, -clip), clip)
    numbers = [torch.tensor(one, dtype=torch.float64) for one in (value, old, target)]
    expected = max((value - target) ** 2, (near - target) ** 2) / 2
    assert clipped_value_loss(*numbers, clip=clip).item() == pytest.approx(expected, abs=1e-9)
    assert clipped_value_loss(*numbers, clip=None).item() == pytest.approx((value - target) ** 2 / 2, abs=1e-9)


def test_a_critic_outside_its_region_moves_only_if_it_is_the_worse_of_the_two():
    """At 1 from old 0 with clip 0.2: towards target 2 it has gone far enough, away from target -1 it turns back."""
    value = torch.tensor([1.0, 1.0], requires_grad=True)
    clipped_value_loss(value, torch.zeros(2), torch.tensor([2.0, -1.0])).sum().backward()
    assert value.grad.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("kind", ["plain", "unbiased"])
def test_an_estimates_mean_over_the_policy_is_the_divergence(kind):
    """Summed over all actions of a categorical, no sampling."""
    logp, ref_logp = normal(6).log_softmax(0), normal(6, seed=1).log_softmax(0)
    divergence = torch.nn.functional.kl_div(ref_logp, logp, log_target=True, reduction="sum")
    assert (logp.exp() * kl_estimate(logp, ref_logp, kind=kind)).sum() == pytest.approx(divergence.item(), abs=1e-12)


def test_the_square_is_right_to_second_order_and_two_kinds_are_never_negative():
    logp = normal(6).log_softmax(0)
    errors = []
    for size in (0.1, 0.05):
        ref_logp = (logp + size * normal(6, seed=1)).log_softmax(0)
        divergence = (logp.exp() * (logp - ref_logp)).sum()
        errors.append(((logp.exp() * kl_estimate(logp, ref_logp, kind="square")).sum() - divergence).abs().item())
        assert (kl_estimate(logp, ref_logp, kind="square") >= 0).all()
        assert (kl_estimate(logp, ref_logp, kind="unbiased") >= 0).all()
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.2)  # the error is of third order


def test_old_policies_targets_and_advantages_get_no_gradient():
    fixed = [normal(3, seed=seed).requires_grad_() for seed in range(4)]
    moving = normal(3, seed=9).requires_grad_()
    (clipped_policy_loss(moving, *fixed[:2]) + clipped_value_loss(moving, *fixed[2:])).sum().backward()
    assert all(one.grad is None for one in fixed)
    assert moving.grad is not None


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: generalized_advantages(torch.ones(3), torch.ones(2)), "values must have the shape of rewards"),
        (lambda: generalized_advantages(torch.ones(3), torch.ones(3), gamma=1.5), "gamma"),
        (lambda: generalized_advantages(torch.ones(3), torch.ones(3), lam=-0.1), "lam"),
        (lambda: generalized_advantages(torch.ones(3), torch.ones(3), mask=torch.ones(2).bool()), "mask"),
        (lambda: generalized_advantages(torch.ones(3), torch.ones(3), bootstrap=torch.ones(2)), "bootstrap must have"),
        (lambda: generalized_advantages(torch.ones(3), torch.ones(3), bootstrap=torch.tensor(torch.nan)), "bootstrap"),
        (lambda: clipped_policy_loss(torch.ones(3), torch.ones(2), torch.ones(3)), "old_logp must have the shape"),
        (lambda: clipped_policy_loss(torch.ones(3), torch.ones(3), torch.ones(3), clip=0.0), "clip"),
        (lambda: clipped_value_loss(torch.ones(3), torch.ones(3), torch.ones(3), clip=-1.0), "clip"),
        (lambda: clipped_value_loss(torch.ones(3), torch.ones(3), torch.ones(2)), "targets must have the shape"),
        (lambda: kl_estimate(torch.ones(3), torch.ones(2)), "ref_logp must have the shape"),
        (lambda: kl_estimate(torch.ones(3), torch.ones(3), kind="third"), "kind must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
