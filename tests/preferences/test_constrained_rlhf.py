"""Constrained RLHF ends where the Karush-Kuhn-Tucker conditions of its problem hold, and mixes by its formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, root

from minimand.preferences import (
    RewardMultipliers,
    generalized_advantages,
    mix_advantages,
    proxy_point,
)

RESPONSES = 12
MULTIPLIER = st.floats(0.01, 0.99)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARDS = normal(2, RESPONSES).sigmoid()
REF_LOGP = (0.3 * normal(RESPONSES, seed=5)).log_softmax(0)


def tilted(k, rewards=REWARDS):
    """The policy proportional to the reference times exp(k r): log-probabilities."""
    return (REF_LOGP + torch.as_tensor(k, dtype=torch.float64) @ rewards).log_softmax(0)


def values(logp, rewards=REWARDS):
    return rewards @ logp.exp()


def with_multipliers(thresholds, multipliers, kind, **settings):
    part = RewardMultipliers(torch.tensor(thresholds, dtype=torch.float64), kind=kind, **settings)
    multipliers = torch.as_tensor(multipliers, dtype=torch.float64)
    part.multiplier.dual.copy_(multipliers.atanh() if kind == "exactly" else multipliers.logit())
    return part


def train(part, rewards=REWARDS, *, steps=600, step=0.3):
    """Natural policy gradient of a softmax with exact expectations: logits climb along the raw advantages."""
    logp = REF_LOGP
    for _ in range(steps):
        part.update(values(logp, rewards))
        logp = (logp + step * part(rewards, REF_LOGP - logp, normalize=False)).log_softmax(0)
    return logp


@given(first=MULTIPLIER, second=MULTIPLIER)
def test_the_mixed_advantage_is_the_formula(first, second):
    advantages, kl_advantages = normal(2, 4, 3), normal(4, 3, seed=1)
    for kind in ("exactly", "at least"):
        part = with_multipliers([0.7, 0.6], [first, second], kind)
        expected = (2 - first - second) * kl_advantages + first * advantages[0] + second * advantages[1]
        assert torch.allclose(part(advantages, kl_advantages, normalize=False), expected, atol=1e-12)
    part = with_multipliers([0.7, 0.6], [first, second], "at most", kl_weight=0.3)
    expected = 0.3 * kl_advantages + (1 - first) * advantages[0] + (1 - second) * advantages[1]
    assert torch.allclose(part(advantages, kl_advantages, normalize=False), expected, atol=1e-12)


def test_at_multipliers_zero_only_the_divergence_counts_n_fold():
    advantages, kl_advantages = normal(2, 5), normal(5, seed=1)
    part = RewardMultipliers(torch.tensor([0.7, 0.6], dtype=torch.float64))
    assert torch.equal(part(advantages, kl_advantages, normalize=False), 2 * kl_advantages)


@given(first=MULTIPLIER, second=MULTIPLIER)
def test_weights_add_up_to_the_number_of_rewards(first, second):
    for kind in ("exactly", "at least"):
        part = with_multipliers([0.7, 0.6], [first, second], kind)
        assert (part.weights.sum() + part.kl_weight).item() == pytest.approx(2)


@given(
    dual=st.floats(-3, 3), value=st.floats(-1, 1), theta=st.floats(-1, 1), kind=st.sampled_from(("exactly", "at least"))
)
def test_the_dual_step_descends_squash_times_value_minus_threshold(dual, value, theta, kind):
    part = RewardMultipliers(torch.tensor([theta]).double(), kind=kind, lr=1.0, momentum=0.0, max_norm=None)
    part.multiplier.dual.fill_(dual)
    leaf = torch.tensor(dual, dtype=torch.float64, requires_grad=True)
    squashed = leaf.tanh() if kind == "exactly" else leaf.sigmoid()
    (squashed * (torch.tensor(value).double() - part.thresholds[0])).backward()
    part.update(torch.tensor([value]).double())
    assert part.multiplier.dual.item() == pytest.approx(dual - leaf.grad.item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["exactly", "at least", "at most"])
def test_a_reward_short_of_its_threshold_gains_weight_and_one_beyond_it_loses_some(kind):
    part = RewardMultipliers(torch.tensor([0.5, 0.5]), kind=kind)
    before = part.weights
    violation = part.update(torch.tensor([0.4, 0.6]))
    assert part.weights[0] > before[0]
    assert part.weights[1] < before[1]
    assert torch.allclose(violation, torch.tensor([0.1, -0.1]) * (-1 if kind == "at most" else 1))


@given(k=st.floats(0.01, 20))
def test_at_the_tilted_policy_with_matching_multiplier_no_response_has_an_advantage(k):
    """N = 1: pi of exp(k r) is stationary for (1 - m)(-KL) + m E r where k = m / (1 - m)."""
    rewards = REWARDS[:1]
    for kind in ("exactly", "at least"):
        part = with_multipliers([0.5], [k / (1 + k)], kind)
        mixed = part(rewards, REF_LOGP - tilted([k], rewards), normalize=False)
        assert (mixed - mixed.mean()).abs().max() < 1e-13


@pytest.mark.parametrize("kind", ["exactly", "at least"])
def test_the_fixed_point_is_the_kkt_point_of_one_active_threshold(kind):
    """Max -KL with E r = theta has pi of exp(k r); k by root finding."""
    rewards, theta = REWARDS[:1], 0.65
    k = brentq(lambda k: values(tilted([k], rewards), rewards).item() - theta, 0, 50, xtol=1e-14)
    part = RewardMultipliers(torch.tensor([theta]).double(), kind=kind, lr=8.0, max_norm=None)
    part.set_thresholds(torch.tensor([theta], dtype=torch.float64))
    logp = train(part, rewards, steps=1000)
    assert values(logp, rewards).item() == pytest.approx(theta, abs=1e-6)
    assert (logp - tilted([k], rewards)).abs().max() < 1e-6
    assert part.weights.item() / part.kl_weight.item() == pytest.approx(k, rel=1e-6)


def test_two_thresholds_are_met_from_both_sides_and_a_reward_above_its_own_is_weighed_down():
    """N = 2: k_i = m_i / (2 - m_1 - m_2)."""
    rewards = 5 * REWARDS
    thetas = values(REF_LOGP, rewards) + torch.tensor([0.4, -0.3], dtype=torch.float64)
    found = root(lambda k: (values(tilted(k, rewards), rewards) - thetas).numpy(), [0.0, 0.0], tol=1e-12)
    assert found.success
    part = RewardMultipliers(thetas, lr=0.4, max_norm=None)
    logp = train(part, rewards)
    assert (logp - tilted(found.x, rewards)).abs().max() < 1e-6
    assert torch.allclose(part.weights / part.kl_weight, torch.from_numpy(found.x), atol=1e-6)
    assert part.weights[1] < 0


def test_bounded_multipliers_cannot_push_a_single_reward_down_beyond_a_half():
    """tanh gives k = m / (1 - m) above -1/2: a threshold that would need more is not met, and the multiplier says so."""
    rewards = REWARDS[:1]
    lowest = values(tilted([-0.5], rewards), rewards)
    part = RewardMultipliers(lowest - 0.1, lr=8.0, max_norm=None)
    logp = train(part, rewards)
    assert part.weights.item() < -0.99
    assert values(logp, rewards).item() == pytest.approx(lowest.item(), abs=1e-3)


def test_exactly_and_at_least_agree_where_both_thresholds_press_from_below():
    thetas = values(REF_LOGP) + 0.05
    first, second = (
        train(RewardMultipliers(thetas, kind=kind, lr=8.0, max_norm=None)) for kind in ("exactly", "at least")
    )
    assert (first - second).abs().max() < 1e-6


def test_a_threshold_that_holds_already_leaves_the_reference_alone():
    part = RewardMultipliers(values(REF_LOGP)[:1] - 0.2, kind="at least", lr=50.0, max_norm=None)
    logp = train(part, REWARDS[:1])
    assert part.weights.item() < 1e-3
    assert (logp - REF_LOGP).abs().max() < 1e-3


def test_caps_bind_or_let_the_reward_run_to_the_optimum_under_the_divergence():
    rewards, beta = REWARDS[:1], 0.5
    free = tilted([1 / beta], rewards)
    highest = values(free, rewards).item()
    settings = {"kind": "at most", "kl_weight": beta, "lr": 8.0, "max_norm": None}
    loose = train(RewardMultipliers(torch.tensor([highest + 0.2]).double(), **settings), rewards)
    assert (loose - free).abs().max() < 2e-3
    theta = (highest + values(REF_LOGP, rewards).item()) / 2
    part = RewardMultipliers(torch.tensor([theta], dtype=torch.float64), **settings)
    bound = train(part, rewards)
    assert values(bound, rewards).item() == pytest.approx(theta, abs=1e-6)
    assert (bound - tilted([part.weights.item() / beta], rewards)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["exactly", "at least", "at most"])
def test_damping_answers_to_the_last_violation_within_the_multipliers_range(kind):
    part = RewardMultipliers(torch.tensor([0.5, 0.5]).double(), kind=kind, damping=3.0)
    violation = part.update(torch.tensor([0.1, 0.6]).double())
    raw = part.multiplier.dual + 3.0 * violation
    multipliers = raw.tanh() if kind == "exactly" else raw.sigmoid()
    assert torch.allclose(part.weights, 1 - multipliers if kind == "at most" else multipliers)
    if kind != "at most":
        assert part.kl_weight.item() == pytest.approx(2 - multipliers.sum().item())


def test_damping_ends_the_swinging_and_leaves_the_solution_where_it_is():
    rewards = 5 * REWARDS[:1]
    theta = values(REF_LOGP, rewards) + 0.4

    def distance(damping):
        part = RewardMultipliers(theta, lr=1.0, max_norm=None, damping=damping)
        # A policy that follows slowly swings around the threshold.
        return (values(train(part, rewards, steps=100, step=0.1), rewards) - theta).abs().item()

    assert distance(0.0) > 1e-2
    assert distance(3.0) < 1e-7


def test_each_advantage_is_normalised_by_itself():
    advantages, kl_advantages = 3 + 5 * normal(2, 7, 4), normal(7, 4, seed=1)
    for head, weights in enumerate(torch.eye(2, dtype=torch.float64)):
        mixed = mix_advantages(advantages, kl_advantages, weights=weights, kl_weight=0.0)
        assert mixed.mean().item() == pytest.approx(0, abs=1e-12)
        assert mixed.std().item() == pytest.approx(1, abs=1e-12)
        assert torch.corrcoef(torch.stack([mixed.flatten(), advantages[head].flatten()]))[0, 1] > 1 - 1e-12


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_the_scale_of_a_reward_does_not_matter(scale, shift):
    advantages, kl_advantages, weights = normal(2, 9), normal(9, seed=1), torch.tensor([0.3, -0.2]).double()
    other = torch.stack([scale * advantages[0] + shift, advantages[1]])
    assert torch.allclose(
        mix_advantages(advantages, kl_advantages, weights=weights),
        mix_advantages(other, kl_advantages, weights=weights),
        atol=1e-9,
    )


def test_permuting_the_rewards_permutes_the_multipliers_and_nothing_else():
    thetas, earned = torch.tensor([0.7, 0.4, 0.6]), torch.tensor([0.5, 0.5, 0.9])
    order = torch.tensor([2, 0, 1])
    one, other = RewardMultipliers(thetas), RewardMultipliers(thetas[order])
    for _ in range(5):
        one.update(earned)
        other.update(earned[order])
    assert torch.allclose(one.weights[order], other.weights)
    advantages, kl_advantages = normal(3, 6).float(), normal(6, seed=1).float()
    assert torch.allclose(one(advantages, kl_advantages), other(advantages[order], kl_advantages), atol=1e-6)


def test_a_constant_advantage_becomes_zero_and_not_noise():
    constant = torch.full((1, 1000), 0.1) + 0.2
    mixed = mix_advantages(constant, torch.full((1000,), -7.3), weights=torch.ones(1))
    assert (mixed == 0).all()


def test_masked_steps_count_for_nothing():
    advantages, kl_advantages, weights = normal(2, 3, 6), normal(3, 6, seed=1), torch.tensor([0.4, 0.1]).double()
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    mixed = mix_advantages(advantages, kl_advantages, weights=weights, mask=mask)
    alone = mix_advantages(advantages[:, mask], kl_advantages[mask], weights=weights)
    assert torch.allclose(mixed[mask], alone)
    assert (mixed[~mask] == 0).all()


def test_heads_of_the_critic_mix_as_their_rewards_do():
    """With one set of values for all heads, mixing raw advantages is the advantage of the mixed reward."""
    rewards, kl_reward, critic = normal(2, 4, 6), normal(4, 6, seed=1), normal(3, 4, 6, seed=2)
    weights, kl_weight = torch.tensor([0.7, -0.3]).double(), 1.6
    heads = generalized_advantages(torch.cat([rewards, kl_reward[None]]), critic, gamma=0.9)
    mixed = mix_advantages(heads[:2], heads[2], weights=weights, kl_weight=kl_weight, normalize=False)
    total = torch.cat([weights, torch.tensor([kl_weight]).double()])
    together = generalized_advantages(
        torch.tensordot(total, torch.cat([rewards, kl_reward[None]]), 1), torch.tensordot(total, critic, 1), gamma=0.9
    )
    assert torch.allclose(mixed, together)


def test_a_proxy_point_without_smoothing_is_the_best_policy():
    policies, evaluations = normal(20, 3), normal(20, seed=1)
    assert torch.equal(proxy_point(policies, evaluations, bandwidth=0.0), policies[evaluations.argmax()])


@pytest.mark.parametrize("seed", range(20))
def test_a_proxy_point_smooths_as_the_kernels_formula_says(seed):
    policies, evaluations, width = normal(15, 2, seed=seed), normal(15, seed=seed + 100), 0.6
    scaled = policies / policies.std(0) / width
    smooth = []
    for point in scaled:
        kernel = [math.exp(-float((point - other).square().sum()) / 2) for other in scaled]
        smooth.append(sum(k * f for k, f in zip(kernel, evaluations.tolist(), strict=True)) / sum(kernel))
    best = policies[max(range(15), key=smooth.__getitem__)]
    assert torch.equal(proxy_point(policies, evaluations, bandwidth=width), best)


def test_a_lucky_evaluation_does_not_move_a_smoothed_proxy_point():
    policies = torch.cartesian_prod(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21)).double()
    evaluations = 1 - (policies - 0.5).square().sum(1)
    evaluations[0] += 2.0
    assert torch.equal(proxy_point(policies, evaluations, bandwidth=0.0), policies[0])
    assert (proxy_point(policies, evaluations) - 0.5).abs().max() < 0.06


def test_reached_is_five_percent_of_each_threshold():
    part = RewardMultipliers(torch.tensor([0.5, -2.0]))
    assert part.reached(torch.tensor([0.524, -1.91]))
    assert not part.reached(torch.tensor([0.526, -2.0]))
    assert not part.reached(torch.tensor([0.5, -2.11]))
    part.set_thresholds(torch.tensor([0.526, -2.0]))
    assert part.reached(torch.tensor([0.526, -2.0]), tolerance=1e-6)


def test_a_refused_value_leaves_the_multipliers_as_they_were():
    part = RewardMultipliers(torch.tensor([0.5, 0.5]))
    before = part.multiplier.dual.clone()
    with pytest.raises(ValueError, match="values contains NaN"):
        part.update(torch.tensor([0.1, float("nan")]))
    assert torch.equal(part.multiplier.dual, before)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RewardMultipliers(torch.ones(0)), "thresholds is empty"),
        (lambda: RewardMultipliers(torch.ones(1, 2)), "thresholds must have shape"),
        (lambda: RewardMultipliers(torch.tensor([float("inf")])), "thresholds contains NaN"),
        (lambda: RewardMultipliers(torch.ones(2), kind="eq"), "kind must be one of"),
        (lambda: RewardMultipliers(torch.ones(2), kl_weight=-1.0), "kl_weight"),
        (lambda: RewardMultipliers(torch.ones(2), momentum=1.0), "momentum"),
        (lambda: RewardMultipliers(torch.ones(2), damping=-1.0), "damping"),
        (lambda: RewardMultipliers(torch.ones(2)).update(torch.ones(3)), r"values must have shape \(2,\), got \(3,\)"),
        (lambda: RewardMultipliers(torch.ones(2)).set_thresholds(torch.ones(1)), "thresholds must have shape"),
        (lambda: RewardMultipliers(torch.ones(2))(torch.ones(3, 4), torch.ones(4)), r"weights must have shape \(3,\)"),
        (lambda: RewardMultipliers(torch.ones(2))(torch.ones(2, 4), torch.ones(5)), "kl_advantages"),
        (lambda: RewardMultipliers(torch.ones(2))(torch.ones(2, 1), torch.ones(1)), "at least 2 steps, got 1"),
        (lambda: RewardMultipliers(torch.ones(2))(torch.ones(2, 3), torch.ones(3), mask=torch.ones(2) > 0), "mask"),
        (lambda: proxy_point(torch.ones(3, 2), torch.ones(2)), "values must have shape"),
        (lambda: proxy_point(torch.ones(3, 2), torch.ones(3), bandwidth=-1.0), "bandwidth"),
        (lambda: proxy_point(torch.ones(0, 2), torch.ones(0)), "values is empty"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
