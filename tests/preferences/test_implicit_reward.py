"""Fine-tuning as the learning of an implicit reward, against its mathematics (Wang et al. 2025)."""

import dataclasses
import math

import cvxpy
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.preferences import (
    ImplicitRewardSFTLoss,
    PairTokens,
    demonstration_weights,
    f_matching_dual,
    implicit_reward,
    implicit_reward_sft_loss,
    logits_as_q,
)
from minimand.preferences.f_matching import DUALS, _tilt
from minimand.stopping import Stop

F64 = torch.float64
ALL = list(DUALS)
CURVED = [name for name in ALL if name != "total_variation"]

# The table of the method, written down a second time: weight and inverse of the weight.
WEIGHTS = {
    "total_variation": lambda x: torch.ones_like(x),
    "forward_kl": lambda x: 1 / (1 + x),
    "reverse_kl": lambda x: torch.exp(-x),
    "pearson": lambda x: torch.clamp(1 - x / 2, min=0),
    "neyman": lambda x: (1 + x) ** -0.5,
    "hellinger": lambda x: (1 + x) ** -2.0,
    "jensen_shannon": lambda x: 1 / (2 * torch.exp(x) - 1),
}
INVERSES = {
    "forward_kl": lambda w: 1 / w - 1,
    "reverse_kl": lambda w: -torch.log(w),
    "pearson": lambda w: 2 * (1 - w),
    "neyman": lambda w: w**-2 - 1,
    "hellinger": lambda w: w**-0.5 - 1,
    "jensen_shannon": lambda w: torch.log((1 / w + 1) / 2),
}
# And the divergences themselves, which no variational form is needed for.
DIRECT = {
    "total_variation": lambda p, e: (p - e).abs().sum(-1) / 2,
    "forward_kl": lambda p, e: torch.xlogy(e, e / p).sum(-1),
    "reverse_kl": lambda p, e: torch.xlogy(p, p / e).sum(-1),
    "pearson": lambda p, e: ((p - e) ** 2 / e).sum(-1),
    "neyman": lambda p, e: ((p - e) ** 2 / p).sum(-1),
    "hellinger": lambda p, e: ((p.sqrt() - e.sqrt()) ** 2).sum(-1),
    "jensen_shannon": lambda p, e: torch.xlogy(e, 2 * e / (p + e)).sum(-1) + torch.xlogy(p, 2 * p / (p + e)).sum(-1),
}
CONVEX = {
    "total_variation": lambda p, e: cvxpy.norm1(p - e) / 2,
    "forward_kl": lambda p, e: cvxpy.sum(cvxpy.rel_entr(e, p)),
    "reverse_kl": lambda p, e: cvxpy.sum(cvxpy.rel_entr(p, e)),
    "pearson": lambda p, e: cvxpy.sum(cvxpy.multiply(1 / e, cvxpy.square(p - e))),
    "neyman": lambda p, e: cvxpy.sum(cvxpy.multiply(e**2, cvxpy.inv_pos(p))) - 1,
    "hellinger": lambda p, e: 2 - 2 * cvxpy.sum(cvxpy.multiply(e**0.5, cvxpy.sqrt(p))),
    "jensen_shannon": lambda p, e: (
        cvxpy.sum(cvxpy.rel_entr(e, (p + e) / 2)) + cvxpy.sum(cvxpy.rel_entr(p, (p + e) / 2))
    ),
}


def distributions(seed, rows=8, responses=6, concentration=1.0):
    """Random distributions, all their entries above zero."""
    drawn = np.random.default_rng(seed).dirichlet(np.full(responses, concentration), size=rows) + 1e-4
    return torch.from_numpy(drawn / drawn.sum(-1, keepdims=True))


def kl(p, q):
    return torch.xlogy(p, p / q).sum(-1)


def solved(expert, reference, **settings):
    found = f_matching_dual(expert, reference, tolerance=1e-13, **settings)
    assert found.status is Stop.CONVERGED
    return found


# --- phi ----------------------------------------------------------------------------------------------------------


def phi(x, divergence, max_weight=2.0):
    """Read phi off the loss: with beta = 1 and V = 0 it is minus the loss."""
    return -implicit_reward_sft_loss(x, torch.zeros_like(x), divergence=divergence, beta=1.0, max_weight=max_weight)


@pytest.mark.parametrize("divergence", ALL)
def test_phi_starts_at_zero_with_slope_one_and_is_concave(divergence):
    zero = torch.zeros((1,), dtype=F64, requires_grad=True)
    value = phi(zero, divergence)
    (slope,) = torch.autograd.grad(value.sum(), zero)
    assert value.item() == 0
    assert slope.item() == pytest.approx(1.0, abs=1e-12)
    grid = torch.linspace(-6, 6, 4001, dtype=F64, requires_grad=True)
    (slopes,) = torch.autograd.grad(phi(grid, divergence).sum(), grid)
    assert (slopes.diff() <= 1e-12).all()
    assert (slopes >= 0).all()
    torch.testing.assert_close(
        phi(grid, divergence).diff() / grid.diff(), (slopes[1:] + slopes[:-1]) / 2, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("divergence", CURVED)
@pytest.mark.parametrize("max_weight", [1.5, 2.0, 10.0])
def test_phi_goes_on_straight_where_the_weight_reaches_its_largest_and_is_smooth_there(divergence, max_weight):
    start = INVERSES[divergence](torch.tensor(max_weight, dtype=F64))
    around = (start + torch.tensor([-1e-9, 0.0, 1e-9], dtype=F64)).requires_grad_()
    values = phi(around, divergence, max_weight)
    (slopes,) = torch.autograd.grad(values.sum(), around)
    torch.testing.assert_close(slopes, torch.full_like(slopes, max_weight), rtol=0, atol=1e-6)
    assert (values.diff() - 1e-9 * max_weight).abs().max() < 1e-14
    far = phi(start - torch.tensor([1.0, 2.0], dtype=F64), divergence, max_weight)
    torch.testing.assert_close(far.diff(), torch.tensor([-max_weight], dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", CURVED)
def test_weights_are_those_of_the_table_and_the_gradient_is_a_weighted_cross_entropys(divergence):
    domain = torch.linspace(-0.25, 3, 50, dtype=F64)
    torch.testing.assert_close(
        demonstration_weights(domain, divergence=divergence, max_weight=5.0),
        WEIGHTS[divergence](domain),
        rtol=0,
        atol=1e-12,
    )
    beta, generator = 0.3, torch.Generator().manual_seed(0)
    logits = torch.randn(30, 7, generator=generator, dtype=F64, requires_grad=True)
    reference, target = torch.randn(30, 7, generator=generator, dtype=F64), torch.arange(30) % 7
    nll = F.cross_entropy(logits, target, reduction="none")
    ref_logp = -F.cross_entropy(reference, target, reduction="none")
    (ours,) = torch.autograd.grad(
        implicit_reward_sft_loss(-nll, ref_logp, divergence=divergence, beta=beta).sum(), logits, retain_graph=True
    )
    weights = demonstration_weights(implicit_reward(-nll, ref_logp, beta=beta), divergence=divergence).detach()
    (weighted,) = torch.autograd.grad((weights * nll).sum(), logits)
    torch.testing.assert_close(ours, weighted, rtol=0, atol=1e-12)
    # From the table and the straight continuation, without this library.
    expected = WEIGHTS[divergence](beta * (-nll - ref_logp).detach()).nan_to_num(nan=math.inf)
    outside = beta * (-nll - ref_logp) < INVERSES[divergence](torch.tensor(2.0, dtype=F64))
    torch.testing.assert_close(weights, torch.where(outside, 2.0, expected), rtol=0, atol=1e-12)


# --- the loss -----------------------------------------------------------------------------------------------------


def demonstrations(seed=0, batch=6, tokens=5, dtype=F64):
    """Log-probabilities of policy and reference, and a mask that pads some rows."""
    generator = torch.Generator().manual_seed(seed)
    logp, ref_logp = (-4 * torch.rand(batch, tokens, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    return logp.requires_grad_(), ref_logp, torch.arange(tokens) < lengths


@pytest.mark.parametrize("beta", [1e-3, 0.1, 7.0])
def test_total_variation_is_cross_entropy_whatever_beta(beta):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=F64, requires_grad=True)
    target = torch.randint(11, (3, 5), generator=generator)
    ignored = target.masked_fill(torch.tensor([[False] * 3 + [True] * 2] * 3), -100)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    logp = -F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
    loss = ImplicitRewardSFTLoss("total_variation", beta=beta)
    assert not loss.needs_reference
    value = loss(logp, None, ignored != -100)
    torch.testing.assert_close(value, cross_entropy, rtol=0, atol=1e-13)
    ref_logp = torch.full_like(logp, -2.0).detach()
    torch.testing.assert_close(loss(logp, ref_logp, ignored != -100), cross_entropy - 2.0, rtol=0, atol=1e-13)
    (ours,) = torch.autograd.grad(value, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(cross_entropy, logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("divergence", "value"),
    [(name, value) for name in ALL for value in ("zero", "optimal")] + [(name, "learned") for name in CURVED],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_at_the_reference_every_member_has_the_gradient_of_cross_entropy(divergence, value, level):
    logp, _, mask = demonstrations()
    loss = ImplicitRewardSFTLoss(divergence, value=value, level=level, beta=0.4)
    loss(logp, logp.detach().clone(), mask).backward()
    expected = mask.double() / (mask.sum() if level == "token" else len(mask))
    torch.testing.assert_close(logp.grad, -expected, rtol=0, atol=1e-12)
    if value == "learned":
        assert loss.learned_value.grad == 0


@pytest.mark.parametrize("divergence", ALL)
def test_vanishing_beta_gives_cross_entropy_less_the_references(divergence):
    logp, ref_logp, _ = demonstrations()
    losses = implicit_reward_sft_loss(logp, ref_logp, divergence=divergence, beta=1e-9)
    torch.testing.assert_close(losses, ref_logp - logp, rtol=0, atol=1e-7)


def test_sequences_are_the_sums_of_their_tokens():
    logp, ref_logp, mask = demonstrations()
    loss = ImplicitRewardSFTLoss("hellinger", level="sequence", reduction="none")
    total = (logp * mask).sum(-1), (ref_logp * mask).sum(-1)
    torch.testing.assert_close(loss(logp, ref_logp, mask), loss(*total))
    torch.testing.assert_close(loss(*total), implicit_reward_sft_loss(*total, divergence="hellinger"))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reductions_count_what_is_no_padding(level):
    logp, ref_logp, mask = demonstrations()
    each = ImplicitRewardSFTLoss(level=level, reduction="none")(logp, ref_logp, mask)
    counted = each[mask] if level == "token" else each
    for reduction, expected in (("mean", counted.mean()), ("sum", counted.sum()), (torch.amax, counted.amax())):
        found = ImplicitRewardSFTLoss(level=level, reduction=reduction)(logp, ref_logp, mask)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert level == "sequence" or (each[~mask] == 0).all()


@pytest.mark.parametrize("value", ["zero", "optimal", "learned"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_trainer_on_pairs_trains_the_chosen_answers_whatever_padding_holds(level, value):
    logp, ref_logp, mask = demonstrations()
    loss = ImplicitRewardSFTLoss("neyman", level=level, value=value, beta=0.3)
    expected = loss(logp, ref_logp, mask)
    for filler in (0.0, -1e30, math.nan):
        padded = [torch.where(mask, each, filler) for each in (logp, ref_logp)]
        rejected = torch.full((6, 2), -1.0, dtype=F64, requires_grad=True)
        tokens = PairTokens(padded[0], rejected, mask, rejected < 0, padded[1], rejected.detach())
        found = loss.from_tokens(tokens)
        assert torch.equal(found, expected)
        gradient, none = torch.autograd.grad(found, (logp, rejected), allow_unused=True)
        assert torch.isfinite(gradient).all()
        assert none is None


def test_total_variation_on_pairs_is_their_plain_fine_tuning():
    logp, _, mask = demonstrations()
    tokens = PairTokens(logp, logp.detach(), mask, mask)
    plain = ImplicitRewardSFTLoss("total_variation", level="sequence").from_tokens(tokens)
    torch.testing.assert_close(plain, -(logp * mask).sum(-1).mean())


@pytest.mark.parametrize("divergence", CURVED)
@pytest.mark.parametrize("value", [0.0, 0.3, "optimal"])
def test_gradients_are_those_of_differences(divergence, value):
    logp, ref_logp, mask = demonstrations(batch=2, tokens=3)
    assert torch.autograd.gradcheck(
        lambda x: implicit_reward_sft_loss(x, ref_logp, mask, divergence=divergence, value=value).sum(), (logp,)
    )


@pytest.mark.parametrize("divergence", CURVED)
def test_the_loss_is_finite_and_pushes_no_harder_than_its_largest_weight_at_any_ratio(divergence):
    logp = torch.tensor([-1e4, -50.0, -1.0, -1e-3], requires_grad=True)
    ref_logp = torch.tensor([-1e-3, -1.0, -50.0, -1e4])
    losses = implicit_reward_sft_loss(logp, ref_logp, divergence=divergence, beta=1.0)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert ((logp.grad <= 0) & (logp.grad >= -2.00001)).all()
    assert (losses.diff() <= 0).all()


@pytest.mark.untyped
@pytest.mark.parametrize("divergence", ALL)
def test_the_loss_compiles_whole_and_maps_over_batches(divergence):
    logp, ref_logp, _ = demonstrations()
    loss = ImplicitRewardSFTLoss(divergence)
    rows = torch.func.vmap(lambda a, b: loss(a, b))(logp, ref_logp)
    torch.testing.assert_close(rows, torch.stack([loss(a, b) for a, b in zip(logp, ref_logp, strict=True)]))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logp, ref_logp), loss(logp, ref_logp))


# --- the value ----------------------------------------------------------------------------------------------------


def test_pearsons_best_value_is_minus_the_mean_and_the_loss_is_mean_less_a_quarter_of_variance():
    logp, ref_logp, mask = demonstrations()
    beta = 0.2
    u = (beta * (logp - ref_logp))[mask]
    closed = -(u.mean() - u.var(correction=0) / 4) / beta
    ours = ImplicitRewardSFTLoss("pearson", value="optimal", beta=beta)(logp, ref_logp, mask)
    torch.testing.assert_close(ours, closed, rtol=0, atol=1e-12)
    given = implicit_reward_sft_loss(logp, ref_logp, mask, beta=beta, value=-u.mean())
    torch.testing.assert_close(ours, given.sum() / mask.sum(), rtol=0, atol=1e-12)
    (first,) = torch.autograd.grad(closed, logp, retain_graph=True)
    (second,) = torch.autograd.grad(ours, logp)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_reverse_kls_best_value_makes_the_loss_a_log_mean_exp():
    logp, ref_logp, _ = demonstrations()
    beta = 0.2
    u = beta * (logp - ref_logp)
    tilted = (torch.logsumexp(-u.flatten(), 0) - math.log(u.numel())) / beta
    loss = ImplicitRewardSFTLoss("reverse_kl", value="optimal", beta=beta, max_weight=50.0)
    torch.testing.assert_close(loss(logp, ref_logp), tilted, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), divergence=st.sampled_from(CURVED), beta=st.floats(0.05, 2.0))
def test_no_other_single_value_gives_a_smaller_loss_than_the_optimal_one_and_its_weights_average_one(
    seed, divergence, beta
):
    logp, ref_logp, mask = demonstrations(seed)
    loss = ImplicitRewardSFTLoss(divergence, value="optimal", beta=beta)
    best = loss(logp, ref_logp, mask)
    for value in torch.linspace(-6, 6, 13, dtype=F64):
        assert loss(logp, ref_logp, mask, value=value) >= best - 1e-12
    (gradient,) = torch.autograd.grad(best, logp)
    assert -gradient.sum() == pytest.approx(1.0, abs=1e-9)  # the gradient of each is -weight / count


def test_with_the_best_value_pearson_is_the_worst_case_over_reweightings():
    generator = torch.Generator().manual_seed(3)
    u = 3 * torch.randn(12, generator=generator, dtype=F64)  # so spread out that some weights are zero
    loss = ImplicitRewardSFTLoss("pearson", value="optimal", beta=1.0, max_weight=1e6)(u, torch.zeros_like(u))
    weights = cvxpy.Variable(12, nonneg=True)
    worst = cvxpy.Problem(
        cvxpy.Minimize((weights @ u.numpy() + cvxpy.sum_squares(weights - 1)) / 12), [cvxpy.sum(weights) == 12]
    )
    worst.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    assert (weights.value < 1e-6).any()
    assert -loss.item() == pytest.approx(worst.value, abs=1e-8)


def test_a_learned_value_descends_to_the_optimal_one():
    logp, ref_logp, mask = demonstrations()
    loss = ImplicitRewardSFTLoss("hellinger", value="learned", beta=0.3).double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(logp.detach(), ref_logp, mask).backward()
        optimizer.step()
    best = ImplicitRewardSFTLoss("hellinger", value="optimal", beta=0.3)(logp, ref_logp, mask)
    torch.testing.assert_close(loss(logp, ref_logp, mask), best, rtol=0, atol=1e-12)
    assert loss.learned_value.abs() > 1e-3


def test_a_value_head_takes_part_and_under_total_variation_cancels():
    logp, ref_logp, mask = demonstrations()
    head = torch.randn(6, 1, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)
    found = ImplicitRewardSFTLoss("neyman", beta=0.3, reduction="sum")(logp, ref_logp, mask, value=head)
    u = 0.3 * (logp - ref_logp) + head
    expected = (head - 2 * ((1 + u).clamp_min(0.25).sqrt() - 1) - 2 * (u + 0.75).clamp_max(0)) / 0.3
    torch.testing.assert_close(found, (expected * mask).sum())
    found.backward()
    assert (head.grad != 0).any()
    plain = ImplicitRewardSFTLoss("total_variation")
    assert torch.equal(plain(logp, ref_logp, mask, value=head), plain(logp, ref_logp, mask))


# --- the exact problem --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", CURVED)
def test_the_reward_of_the_table_attains_the_divergence(divergence):
    policy, expert = distributions(0), distributions(1)
    reward = INVERSES[divergence](policy / expert)
    gained = (expert * phi(reward, divergence, max_weight=1e12)).sum(-1) - (policy * reward).sum(-1)
    torch.testing.assert_close(gained, DIRECT[divergence](policy, expert), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), divergence=st.sampled_from(CURVED))
def test_no_reward_gains_more_than_the_divergence(seed, divergence):
    policy, expert = distributions(seed), distributions(seed + 1)
    lowest = max(DUALS[divergence].lowest, -3.0)
    reward = lowest + (torch.rand(8, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)) * 4
    gained = (expert * DUALS[divergence].objective(reward)).sum(-1) - (policy * reward).sum(-1)
    assert (gained <= DIRECT[divergence](policy, expert) + 1e-12).all()


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_primal_and_dual_agree_at_the_solution(divergence, beta):
    expert, reference = distributions(2), distributions(3)
    found = solved(expert, reference, divergence=divergence, beta=beta)
    primal = DIRECT[divergence](found.policy, expert) + beta * kl(found.policy, reference)
    torch.testing.assert_close(found.objective, primal, rtol=1e-9, atol=1e-9)
    # The KL-regularised best response to the reward, and its value.
    value = beta * (reference.log() + found.reward / beta).logsumexp(-1)
    torch.testing.assert_close(found.value, value, rtol=0, atol=1e-9)
    best = torch.softmax(reference.log() + found.reward / beta, -1)
    torch.testing.assert_close(found.policy, best, rtol=0, atol=1e-12)
    torch.testing.assert_close((found.policy * found.reward).sum(-1) - beta * kl(found.policy, reference), value)
    if divergence != "total_variation":
        torch.testing.assert_close(found.policy, expert * WEIGHTS[divergence](found.reward), rtol=1e-9, atol=1e-12)
    for _ in range(20):  # no other policy does better
        other = 0.99 * found.policy + 0.01 * distributions(int(torch.randint(10**6, ())))
        assert (DIRECT[divergence](other, expert) + beta * kl(other, reference) >= primal - 1e-12).all()


@pytest.mark.parametrize("divergence", ALL)
def test_an_independent_convex_solver_finds_the_same_policy(divergence):
    expert, reference, beta = distributions(4, rows=1)[0], distributions(5, rows=1)[0], 0.3
    policy = cvxpy.Variable(6)
    objective = CONVEX[divergence](policy, expert.numpy()) + beta * cvxpy.sum(cvxpy.rel_entr(policy, reference.numpy()))
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(policy) == 1])
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    found = solved(expert, reference, divergence=divergence, beta=beta)
    assert found.objective.item() == pytest.approx(problem.value, abs=1e-9)
    np.testing.assert_allclose(found.policy, policy.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_a_response_that_one_side_hardly_knows_is_no_harder(divergence, beta):
    even, uneven = torch.tensor([[0.5, 0.5], [1e-6, 1 - 1e-6]], dtype=F64)
    for expert, reference in ((even, uneven), (uneven, even)):
        found = solved(expert, reference, divergence=divergence, beta=beta)
        best = torch.softmax(reference.log() + found.reward / beta, -1)
        torch.testing.assert_close(found.policy, best, rtol=1e-9, atol=1e-12)
        if divergence != "total_variation":
            reward = INVERSES[divergence](found.policy / expert)
            torch.testing.assert_close(found.reward, reward, rtol=1e-9, atol=1e-9)
        assert found.iterations <= 20


def test_reverse_kl_is_solved_by_the_geometric_mean():
    expert, reference, beta = distributions(6), distributions(7), 0.7
    mean = torch.softmax((expert.log() + beta * reference.log()) / (1 + beta), -1)
    found = solved(expert, reference, divergence="reverse_kl", beta=beta)
    torch.testing.assert_close(found.policy, mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("divergence", ALL)
def test_large_beta_keeps_the_reference_and_small_beta_copies_the_expert(divergence):
    expert, reference = distributions(8), distributions(9)
    far = solved(expert, reference, divergence=divergence, beta=1e7).policy
    torch.testing.assert_close(far, reference, rtol=0, atol=1e-5)
    near = solved(expert, reference, divergence=divergence, beta=1e-7).policy
    torch.testing.assert_close(near, expert, rtol=0, atol=1e-5)


@pytest.mark.parametrize("divergence", ALL)
def test_the_exact_problem_bounds_the_kl_by_the_references_own_divergence_over_beta(divergence):
    """What cross-entropy lacks: no step size enters."""
    expert, reference = distributions(10, rows=50), distributions(11, rows=50)
    for beta in (0.01, 0.3, 3.0):
        found = solved(expert, reference, divergence=divergence, beta=beta)
        assert (beta * kl(found.policy, reference) <= DIRECT[divergence](reference, expert) + 1e-12).all()


@pytest.mark.parametrize("divergence", ALL)
def test_what_the_expert_never_says_keeps_the_mass_that_the_end_of_the_domain_leaves(divergence):
    expert, reference, beta = distributions(12), distributions(13), 0.6
    expert = torch.where(torch.arange(6) < 2, 0.0, expert)
    expert = expert / expert.sum(-1, keepdim=True)
    found = solved(expert, reference, divergence=divergence, beta=beta)
    unseen = found.policy[:, :2]
    if divergence in ("reverse_kl", "pearson"):
        assert (unseen == 0).all()
    else:
        end = {"total_variation": -0.5, "jensen_shannon": -math.log(2)}.get(divergence, -1.0)
        left = reference[:, :2] * torch.exp((end - found.value[:, None]) / beta)
        torch.testing.assert_close(unseen, left, rtol=1e-9, atol=0)
    # And it is the limit of experts that hardly ever say it.
    rare = 0.999999 * expert + 1e-6 * torch.where(torch.arange(6) < 2, 0.5, 0.0)
    near = solved(rare, reference, divergence=divergence, beta=beta)
    torch.testing.assert_close(near.policy, found.policy, rtol=0, atol=3e-2)


@pytest.mark.parametrize("divergence", CURVED)
def test_descending_the_loss_over_all_responses_with_learned_values_reaches_the_exact_policy(divergence):
    """The loss is the dual: with every response weighed by the expert and V learned, both reach the same policy."""
    expert, reference, beta = distributions(14, rows=3), distributions(15, rows=3), 0.8
    exact = solved(expert, reference, divergence=divergence, beta=beta)
    logits = reference.log().clone().requires_grad_()
    value = torch.zeros(3, 1, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits, value], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        losses = implicit_reward_sft_loss(
            logits.log_softmax(-1), reference.log(), divergence=divergence, beta=beta, value=value, max_weight=1e3
        )
        total = (expert * losses).sum()
        total.backward()
        return total

    optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(-1), exact.policy, rtol=0, atol=1e-6)
    torch.testing.assert_close(value.squeeze(-1), exact.value, rtol=0, atol=1e-6)
    assert -closure().item() * beta == pytest.approx(exact.objective.sum().item(), abs=1e-9)


@pytest.mark.parametrize("divergence", CURVED)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_equation_of_one_response_is_solved_at_any_ratio_in_few_newton_steps(divergence, beta, dtype):
    size, steps = torch.logspace(-8, 6, 200, dtype=dtype), []
    ratio = torch.cat([-size.flip(0), torch.zeros(1, dtype=dtype), size])
    exact = DUALS[divergence]
    counted = dataclasses.replace(exact, reward=lambda s: steps.append(1) or exact.reward(s))
    tilt = _tilt(ratio, counted, divergence, beta)
    scaled = exact.reward(tilt) / beta
    error = (scaled - tilt - ratio).abs() / (scaled.abs() + tilt.abs() + ratio.abs()).clamp_min(1e-30)
    assert error.max() < 20 * torch.finfo(dtype).eps
    assert len(steps) <= 15


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_solver_converges_in_a_few_steps_on_sharp_distributions_too(divergence, beta, dtype):
    expert, reference = distributions(16, 40, 20, 0.2).to(dtype), distributions(17, 40, 20, 0.2).to(dtype)
    found = f_matching_dual(expert, reference, divergence=divergence, beta=beta)
    assert found.status is Stop.CONVERGED
    assert found.iterations <= 25
    assert found.residual < 2e-6
    assert found.policy.dtype == dtype


# --- the learning rate --------------------------------------------------------------------------------------------


def tuned_by_sgd(rate, steps, reference, target, **settings):
    logits = reference.log().clone().requires_grad_()
    loss = ImplicitRewardSFTLoss(**settings)
    ref_logp = reference.log()[target]
    optimizer = torch.optim.SGD([logits], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)[target], ref_logp).backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def test_under_total_variation_only_the_sum_of_the_steps_bounds_the_kl():
    """A gradient of cross-entropy in the scores spans at most 2, and scores that moved by a range R cost R^2 / 8."""
    reference = distributions(18, rows=1)[0]
    for rate, steps in ((0.01, 10), (0.1, 10), (0.3, 3)):
        policy = tuned_by_sgd(rate, steps, reference, torch.tensor([0]), divergence="total_variation")
        assert 0 < kl(policy, reference) <= (2 * rate * steps) ** 2 / 8
    lasting = tuned_by_sgd(20.0, 300, reference, torch.tensor([0]), divergence="total_variation")
    assert kl(lasting, reference) == pytest.approx(-math.log(reference[0]), abs=1e-2)  # all that there is


def test_halving_a_small_learning_rate_quarters_the_kl():
    reference = distributions(19, rows=1)[0]
    far, near = (
        kl(tuned_by_sgd(rate, 20, reference, torch.tensor([0, 1]), divergence="total_variation"), reference)
        for rate in (2e-4, 1e-4)
    )
    assert far / near == pytest.approx(4.0, abs=0.02)


# --- scores as a Q-function ---------------------------------------------------------------------------------------


def test_rewards_of_tokens_add_up_to_the_first_value_plus_the_answers_log_probability():
    generator = torch.Generator().manual_seed(5)
    logits, ref_logits = (torch.randn(4, 5, 9, generator=generator, dtype=F64) for _ in range(2))
    targets = torch.randint(9, (4, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [4]])
    logp = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ref_logp = ref_logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    for reference, ratio in ((None, logp), (ref_logits, logp - ref_logp)):
        found = logits_as_q(logits, targets, mask, beta=0.3, ref_logits=reference)
        torch.testing.assert_close(
            found.reward.sum(-1), found.value[:, 0] + 0.3 * (ratio * mask).sum(-1), rtol=0, atol=1e-10
        )
        torch.testing.assert_close(found.q - found.value, 0.3 * ratio * mask, rtol=0, atol=1e-12)
        assert (found.reward[~mask] == 0).all()


def test_values_read_off_the_scores_solve_the_soft_bellman_equation_of_their_rewards():
    """A tree of all answers of two tokens: soft value iteration on the rewards finds the policy again."""
    generator, beta, size = torch.Generator().manual_seed(6), 0.5, 3
    first, second = (
        torch.randn(size, generator=generator, dtype=F64),
        torch.randn(size, size, generator=generator, dtype=F64),
    )
    prior = [torch.randn(size, generator=generator, dtype=F64), torch.randn(size, size, generator=generator, dtype=F64)]
    answers = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    logits = torch.stack([first.expand(9, -1), second[answers[:, 0]]], 1)
    ref_logits = torch.stack([prior[0].expand(9, -1), prior[1][answers[:, 0]]], 1)
    reward = logits_as_q(logits, answers, beta=beta, ref_logits=ref_logits).reward.view(size, size, 2)
    log_prior = [each.log_softmax(-1) for each in prior]
    later = reward[..., 1]
    later_value = beta * (log_prior[1] + later / beta).logsumexp(-1)
    now = reward[:, 0, 0] + later_value
    policy = torch.softmax(log_prior[0] + now / beta, -1), torch.softmax(log_prior[1] + later / beta, -1)
    torch.testing.assert_close(policy[0], first.softmax(-1))
    torch.testing.assert_close(policy[1], second.softmax(-1))
    values = logits_as_q(logits, answers, beta=beta, ref_logits=ref_logits).value.view(size, size, 2)
    torch.testing.assert_close(values[0, 0, 0], beta * (log_prior[0] + now / beta).logsumexp(-1))
    torch.testing.assert_close(values[:, 0, 1], later_value)


def test_shifting_the_scores_of_a_state_shapes_the_rewards_but_not_the_policy():
    generator = torch.Generator().manual_seed(7)
    logits, targets = (
        torch.randn(2, 4, 6, generator=generator, dtype=F64),
        torch.randint(6, (2, 4), generator=generator),
    )
    potential = torch.randn(2, 4, 1, generator=generator, dtype=F64)
    plain, shifted = logits_as_q(logits, targets, beta=1.0), logits_as_q(logits + potential, targets, beta=1.0)
    torch.testing.assert_close(shifted.q - shifted.value, plain.q - plain.value)
    after = F.pad(potential.squeeze(-1), (0, 1))[:, 1:]
    torch.testing.assert_close(shifted.reward - plain.reward, potential.squeeze(-1) - after)


def test_rewards_of_fine_tuning_and_of_dpo_after_it_add_up():
    base, tuned, final = (distributions(seed).log() for seed in (20, 21, 22))
    both = implicit_reward(tuned, base) + implicit_reward(final, tuned)
    torch.testing.assert_close(both, implicit_reward(final, base))
    assert implicit_reward(tuned, base, beta=0.3)[0, 0] == pytest.approx(0.3 * (tuned - base)[0, 0].item())


# --- errors -------------------------------------------------------------------------------------------------------

ONE, TWO = torch.zeros(3), torch.zeros(2, 3)
EVEN = torch.full((3,), 1 / 3)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImplicitRewardSFTLoss("chi2"), "divergence must be one of"),
        (lambda: ImplicitRewardSFTLoss(beta=0.0), "beta must be"),
        (lambda: ImplicitRewardSFTLoss(level="word"), "level must be one of"),
        (lambda: ImplicitRewardSFTLoss(value="best"), "value must be one of"),
        (lambda: ImplicitRewardSFTLoss("total_variation", value="learned"), "V cancels"),
        (lambda: ImplicitRewardSFTLoss(max_weight=1.0), "max_weight must be"),
        (lambda: ImplicitRewardSFTLoss(max_weight=math.inf), "max_weight must be"),
        (lambda: ImplicitRewardSFTLoss(reduction="median"), "reduction must be"),
        (lambda: ImplicitRewardSFTLoss()(ONE), "ref_logp is missing"),
        (lambda: ImplicitRewardSFTLoss()(ONE, torch.zeros(2)), "ref_logp must have shape"),
        (lambda: ImplicitRewardSFTLoss()(ONE, ONE.clone().requires_grad_()), "ref_logp requires a gradient"),
        (lambda: ImplicitRewardSFTLoss()(ONE, ONE / 0), "ref_logp contains NaN"),
        (lambda: ImplicitRewardSFTLoss()(torch.zeros(0), torch.zeros(0)), "logp is empty"),
        (lambda: ImplicitRewardSFTLoss()(TWO, TWO, TWO > 0), "without a token"),
        (lambda: ImplicitRewardSFTLoss(level="sequence")(TWO, TWO, TWO > 0), "without a token"),
        (lambda: ImplicitRewardSFTLoss()(TWO, TWO, TWO), "mask must hold booleans"),
        (lambda: ImplicitRewardSFTLoss()(TWO, TWO, value=torch.zeros(2)), "value must broadcast"),
        (lambda: ImplicitRewardSFTLoss()(ONE, ONE, value=TWO), "value must broadcast"),
        (lambda: implicit_reward_sft_loss(ONE, ONE, value="zero"), "value must be one of"),
        (lambda: implicit_reward_sft_loss(ONE, ONE, value=math.nan), "value must be finite"),
        (lambda: logits_as_q(TWO[None], torch.full((1, 2), 3)), "vocabulary of 3"),
        (lambda: logits_as_q(TWO[None], torch.zeros(1, 3, dtype=torch.long)), "logits must have shape"),
        (
            lambda: logits_as_q(
                torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.long), torch.tensor([[True, False, True]])
            ),
            "unbroken",
        ),
        (lambda: f_matching_dual(EVEN, torch.tensor([0.0, 0.5, 0.5])), "p_ref must be above 0"),
        (lambda: f_matching_dual(-EVEN, EVEN), "p_expert must not be negative"),
        (lambda: f_matching_dual(EVEN, EVEN / 2), "p_ref must add up to 1"),
        (lambda: f_matching_dual(EVEN, torch.full((4,), 0.25)), "p_ref must have shape"),
        (lambda: f_matching_dual(EVEN, EVEN, divergence="chi2"), "divergence must be one of"),
        (lambda: f_matching_dual(EVEN, EVEN, tolerance=-1.0), "tolerance"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.untyped
def test_integers_are_no_log_probabilities():
    for call in (ImplicitRewardSFTLoss(), implicit_reward):
        with pytest.raises(TypeError, match="logp must have a floating-point dtype"):
            call(torch.zeros(3, dtype=torch.long), ONE)
