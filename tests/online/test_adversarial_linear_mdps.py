"""Estimates, bonus and steps of policy optimization against their expectations, bounds, limits and lemmas."""

import math

import cvxpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.online import (
    AdversarialMDPLearner,
    LinearMDP,
    exploration_bonus,
    inverse_covariance,
    linear_q_estimate,
    log_barrier_step,
    magnitude_reduced_estimate,
    matrix_geometric_resampling,
)
from minimand.stopping import Stop

F64 = torch.float64
seeds = st.integers(0, 10_000)


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pairs_of(seed, count=6, dimensions=4, least=1e-4):
    """Unit features of pairs, how likely each is met (the first hardly ever), and their inverse covariance."""
    features = torch.nn.functional.normalize(draws(seed, count, dimensions), dim=-1)
    weights = draws(seed + 1, count).softmax(-1)
    weights[0] = least
    return features, weights / weights.sum()


def reduced(features, weights, index, loss, inverse, largest=3.0):
    return magnitude_reduced_estimate(
        features, features[index], loss, inverse, largest=largest, reference=features, weights=weights
    )


def problem(seed=0, layers=3, states=4, actions=3, dimensions=4):
    return LinearMDP.random_simplex(
        num_layers=layers, num_states=states, num_actions=actions, num_dimensions=dimensions, seed=seed
    )


@settings(max_examples=25, deadline=None)
@given(seed=seeds, gamma=st.floats(1e-6, 1.0))
def test_magnitude_reduction_leaves_the_expectation_as_it_is(seed, gamma):
    features, weights = pairs_of(seed)
    inverse = inverse_covariance(features, regularization=gamma, weights=weights)
    losses = 3 * draws(seed + 2, 6).sigmoid()
    plain, less = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    for index in range(6):
        plain += weights[index] * linear_q_estimate(features, features[index], losses[index], inverse)
        less += weights[index] * reduced(features, weights, index, losses[index], inverse)
    torch.testing.assert_close(less, plain, rtol=1e-10, atol=1e-10)
    # The mean of the estimates is the ridge regression of the losses on the features.
    theta = inverse @ (features.T @ (weights * losses))
    torch.testing.assert_close(plain, features @ theta, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, gamma=st.floats(1e-8, 1.0), share=st.floats(0.0, 1.0))
def test_a_reduced_estimate_is_above_minus_the_horizon_times_the_features_norm(seed, gamma, share):
    features, weights = pairs_of(seed)
    inverse = inverse_covariance(features, regularization=gamma, weights=weights)
    norms = torch.einsum("qd,de,qe->q", features, inverse, features).sqrt()
    assert (norms <= gamma**-0.5 * (1 + 1e-9)).all()
    floor = 3 * (features @ inverse @ features.T).clamp_max(0) @ weights
    for index in range(6):
        found = reduced(features, weights, index, torch.tensor(3 * share, dtype=F64), inverse)
        assert (found >= -3 * norms - 1e-9).all()
        assert (found >= floor - 1e-9 * norms.square()).all()


def test_plain_estimates_are_far_more_negative_than_reduced_ones():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]], dtype=F64)
    weights = torch.tensor([1 - 2e-4, 1e-4, 1e-4], dtype=F64)
    inverse = inverse_covariance(features, regularization=1e-4, weights=weights)
    loss = torch.tensor(3.0, dtype=F64)
    plain = linear_q_estimate(features, features[1], loss, inverse).min()
    assert float(plain) < -0.25 * 3 / 1e-4
    assert float(reduced(features, weights, 1, loss, inverse).min()) > -3 / 1e-2


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_second_moment_of_a_reduced_estimate_is_bounded_by_the_covariance(seed):
    features, weights = pairs_of(seed)
    inverse = inverse_covariance(features, regularization=1e-2, weights=weights)
    covariance = features.T @ (weights[:, None] * features)
    bound = 2 * 9 * torch.einsum("qd,de,qe->q", features, inverse @ covariance @ inverse, features)
    losses = 3 * draws(seed + 2, 6).sigmoid()
    moment = sum(weights[i] * reduced(features, weights, i, losses[i], inverse).square() for i in range(6))
    assert (moment <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("kind", ["plain", "reduced"])
def test_with_a_feature_for_each_pair_estimates_tend_to_importance_weighting(kind):
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64)
    features = torch.eye(4, dtype=F64)
    inverse = inverse_covariance(features, regularization=1e-9, weights=weights)
    loss = torch.tensor(1.7, dtype=F64)
    for index in range(4):
        expected = torch.zeros(4, dtype=F64)
        expected[index] = 1.7 / weights[index]
        if kind == "plain":
            found = linear_q_estimate(features, features[index], loss, inverse)
        else:
            found = reduced(features, weights, index, loss, inverse)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_layers_are_estimated_together_as_they_are_alone():
    shared, weights = pairs_of(0)
    features = torch.stack([shared, shared.flip(1)])
    weights = torch.stack([weights, weights.flip(0)]).expand(5, 2, 6)
    inverse = inverse_covariance(features.expand(5, 2, 6, 4), regularization=0.01, weights=weights)
    observed, losses = features[:, 2].expand(5, 2, 4), draws(3, 5, 2).sigmoid()
    largest = torch.tensor([2.0, 1.0], dtype=F64)
    found = magnitude_reduced_estimate(
        features, observed, losses, inverse, largest=largest, reference=features, weights=weights
    )
    for run in range(5):
        for layer in range(2):
            alone = magnitude_reduced_estimate(
                features[layer],
                observed[run, layer],
                losses[run, layer],
                inverse[run, layer],
                largest=float(largest[layer]),
                reference=features[layer],
                weights=weights[run, layer],
            )
            torch.testing.assert_close(found[run, layer], alone)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, learning_rate=st.floats(1e-3, 10.0), spread=st.floats(0.0, 100.0), actions=st.integers(1, 12))
def test_a_barrier_step_meets_its_optimality_conditions_and_ignores_constants(seed, learning_rate, spread, actions):
    losses = spread * draws(seed, 3, actions)
    found = log_barrier_step(losses, learning_rate=learning_rate, tolerance=1e-13)
    assert found.status in (Stop.CONVERGED, Stop.STALLED)
    assert found.residual < 1e-12
    torch.testing.assert_close(found.policy.sum(-1), torch.ones(3, dtype=F64), rtol=0, atol=1e-12)
    multiplier = 1 / found.policy - learning_rate * losses
    torch.testing.assert_close(multiplier, found.multiplier[:, None].expand_as(multiplier), rtol=1e-10, atol=1e-9)
    shifted = log_barrier_step(losses + 17.0, learning_rate=learning_rate, tolerance=1e-13)
    torch.testing.assert_close(shifted.policy, found.policy, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("seed", range(4))
def test_a_barrier_step_is_the_solution_of_a_conic_solver(seed):
    losses, learning_rate = 5 * draws(seed, 7), 0.8
    p = cvxpy.Variable(7)
    objective = learning_rate * losses.numpy() @ p - cvxpy.sum(cvxpy.log(p))
    cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(p) == 1]).solve(
        solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    found = log_barrier_step(losses, learning_rate=learning_rate, tolerance=1e-12).policy
    # As near as the conic solver itself comes to the optimality conditions, which ours meets to 1e-12.
    torch.testing.assert_close(found, torch.from_numpy(p.value), rtol=0, atol=5e-6)


def test_a_barrier_step_of_two_actions_is_the_root_of_a_quadratic():
    # 1/nu + 1/(nu + g) = 1, with g the scaled difference.
    g = 2.0 * 1.5
    root = (2 - g + math.sqrt(g * g + 4)) / 2
    found = log_barrier_step(torch.tensor([0.0, 1.5], dtype=F64), learning_rate=2.0, tolerance=1e-14)
    assert float(found.multiplier) == pytest.approx(root, abs=1e-13)
    torch.testing.assert_close(found.policy, torch.tensor([1 / root, 1 / (root + g)], dtype=F64))


def test_newton_needs_few_steps_from_one_action_to_thousands_and_from_equal_losses_to_extreme_ones():
    for actions in (2, 100, 5000):
        for spread in (0.0, 1e-6, 1.0, 1e3, 1e8):
            found = log_barrier_step(spread * draws(0, 4, actions), learning_rate=1.0, tolerance=1e-10)
            assert found.status is Stop.CONVERGED
            assert found.iterations <= 20
    single = log_barrier_step(torch.tensor([[3.0]]), learning_rate=1.0)
    assert single.iterations == 0
    assert float(single.policy) == 1.0


def test_a_barrier_step_in_single_precision_stops_where_rounding_does():
    found = log_barrier_step(draws(0, 50, 300).float() * 30, learning_rate=1.0, tolerance=1e-12)
    assert found.status is Stop.STALLED
    assert found.residual < 1e-5
    assert found.policy.dtype == torch.float32


def test_the_barrier_is_stable_under_any_losses_and_the_entropy_is_not():
    # max_z <x - z, c> - D(z, x) / eta <= (eta / 2) sum_i x_i c_i^2 for every c, at the maximiser z.
    count, actions = 20_000, 5
    generator = torch.Generator().manual_seed(0)
    x = (2 * draws(1, count, actions)).softmax(-1)
    size = 10 ** (7 * torch.rand(count, 1, generator=generator, dtype=F64) - 2)
    c = draws(2, count, actions) * size
    c[: count // 2] = -c[: count // 2].abs()
    eta = 0.03
    z = log_barrier_step(c + 1 / (eta * x), learning_rate=eta, tolerance=1e-9).policy
    divergence = (z / x - 1 - (z / x).log()).sum(-1)
    gain = ((x - z) * c).sum(-1) - divergence / eta
    bound = eta / 2 * (x * c.square()).sum(-1)
    assert (gain <= bound * (1 + 1e-9) + 1e-9).all()
    assert float((gain / bound).max()) > 0.2

    # The maximum for the entropy has a closed form. One very negative loss of a rare action breaks it.
    rare = torch.tensor([1e-6, 1 - 1e-6], dtype=F64)
    losses = torch.tensor([-1e3, 0.0], dtype=F64)
    value = (rare * losses).sum() + (rare.log() - eta * losses).logsumexp(-1) / eta
    assert float(value / (eta * (rare * losses.square()).sum())) > 10
    z = log_barrier_step(losses + 1 / (eta * rare), learning_rate=eta, tolerance=1e-9).policy
    gain = ((rare - z) * losses).sum() - (z / rare - 1 - (z / rare).log()).sum() / eta
    assert float(gain / (eta * (rare * losses.square()).sum())) <= 0.5


def test_an_inverse_covariance_is_the_inverse_and_weights_are_repeated_samples():
    features, _ = pairs_of(0)
    found = inverse_covariance(features, regularization=0.3)
    torch.testing.assert_close(found, torch.linalg.inv(0.3 * torch.eye(4, dtype=F64) + features.T @ features / 6))
    counts = torch.tensor([1, 2, 3, 1, 2, 3])
    repeated = features.repeat_interleave(counts, 0)
    weighted = inverse_covariance(features, regularization=0.3, weights=counts / 12.0)
    torch.testing.assert_close(weighted, inverse_covariance(repeated, regularization=0.3))


def test_enough_samples_sandwich_the_covariance_between_a_half_and_three_halves():
    gamma, dimensions, trials = 0.05, 4, 100
    samples = round(20 / gamma * math.log(dimensions))
    support = torch.nn.functional.normalize(draws(0, 20, dimensions) * torch.tensor([1, 0.3, 0.1, 0.03]), dim=-1)
    weights = draws(1, 20).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(weights, trials * samples, replacement=True, generator=generator)
    found = inverse_covariance(support[picks].view(trials, samples, -1), regularization=gamma)
    exact = gamma * torch.eye(4, dtype=F64) + support.T @ (weights[:, None] * support)
    # Eigenvalues of the regularised sample covariance relative to the exact one.
    relative = 1 / torch.linalg.eigvals(exact @ found).real
    inside = ((relative >= 0.5) & (relative <= 1.5)).all(-1)
    assert int(inside.sum()) >= 95


def test_geometric_resampling_converges_to_the_inverse_covariance_and_is_the_worse_estimate():
    gamma, dimensions = 0.1, 4
    length = math.ceil(2 / gamma * math.log(1 / (0.1 * gamma)))
    support = torch.nn.functional.normalize(draws(0, 10, dimensions), dim=-1)
    weights = draws(1, 10).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(weights, 5 * 100 * length, replacement=True, generator=generator)
    features = support[picks].view(5, 100, length, dimensions)
    exact = inverse_covariance(support, regularization=gamma, weights=weights)

    def error(found):
        return torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)

    resampled = error(matrix_geometric_resampling(features, regularization=gamma))
    direct = error(inverse_covariance(features.flatten(1, 2), regularization=gamma))
    assert float(resampled.mean()) < 0.05
    assert float(direct.mean()) < float(resampled.mean())


def test_geometric_resampling_of_one_feature_is_a_geometric_sum():
    phi, gamma, length = torch.tensor([0.8], dtype=F64), 0.2, 7
    ratio = 1 - (gamma + 0.64) / 2
    found = matrix_geometric_resampling(phi.expand(1, length, 1), regularization=gamma)
    assert float(found) == pytest.approx(0.5 * sum(ratio**n for n in range(length + 1)), abs=1e-14)


def test_a_bonus_is_twice_the_mean_uncertainty_and_never_above_its_bound():
    mdp, gamma, beta = problem(), 1e-3, 0.2
    policy = draws(0, 3, 4, 3).softmax(-1)
    features = mdp.features.flatten(1, 2)
    inverse = inverse_covariance(features, regularization=gamma, weights=mdp.occupancy(policy).flatten(-2))
    bonus = exploration_bonus(mdp.features, inverse, policy, scale=beta)
    for layer, state, action in ((0, 1, 2), (2, 3, 0)):
        norms = [
            float(mdp.features[layer, state, a] @ inverse[layer] @ mdp.features[layer, state, a]) for a in range(3)
        ]
        mean = sum(float(policy[layer, state, a]) * norms[a] for a in range(3))
        assert float(bonus[layer, state, action]) == pytest.approx(beta * (norms[action] + mean), rel=1e-12)
    dilated = mdp.action_values(policy, bonus, dilation=4 / 3)
    assert (dilated <= 2 * beta / gamma * 3 * (4 / 3) ** 3).all()
    # In expectation over the policy, a bonus is twice beta times tr(Sigma^+ Sigma), at most 2 beta d.
    expected = (mdp.occupancy(policy) * bonus).sum((-1, -2))
    covariance = torch.linalg.inv(inverse) - gamma * torch.eye(4, dtype=F64)
    trace = (inverse @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(expected, 2 * beta * trace, rtol=1e-9, atol=1e-12)


def test_one_state_and_a_feature_for_each_action_are_exp3_with_implicit_exploration():
    actions, gamma, eta = 4, 0.05, 0.3
    mdp = LinearMDP(torch.eye(actions, dtype=F64)[None, None], torch.ones(0, 1, actions, 1).double(), torch.ones(1))
    settings_ = {"learning_rate": eta, "regularization": gamma, "bonus_scale": 0.0}
    learner = AdversarialMDPLearner(mdp, **settings_, estimator="plain")
    summed = torch.zeros(actions, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    for loss in draws(0, 30).sigmoid():
        policy = torch.softmax(-eta * summed, 0)
        torch.testing.assert_close(learner.policy[0, 0], policy, rtol=0, atol=1e-12)
        states, taken = mdp.rollout(learner.policy, generator=generator)
        learner.update(states, taken, loss[None])
        summed[taken] += loss / (policy[taken] + gamma)


def test_an_update_is_the_estimate_less_the_dilated_bonus_layer_by_layer():
    mdp, eta, gamma, beta = problem(), 0.7, 0.02, 0.05
    states, actions = torch.tensor([1, 3, 0]), torch.tensor([2, 0, 1])
    losses = torch.tensor([0.9, 0.2, 0.5], dtype=F64)
    learner = AdversarialMDPLearner(mdp, learning_rate=eta, regularization=gamma, bonus_scale=beta)
    policy = learner.policy
    torch.testing.assert_close(policy, torch.full_like(policy, 1 / 3))
    learner.update(states, actions, losses)
    occupancy, expected = mdp.occupancy(policy), torch.zeros_like(policy)
    following = torch.zeros(4, 3, dtype=F64)
    for layer in reversed(range(3)):
        features = mdp.features[layer].flatten(0, 1)
        covariance = features.T @ (occupancy[layer].flatten()[:, None] * features)
        inverse = torch.linalg.inv(covariance + gamma * torch.eye(4, dtype=F64))
        x = mdp.features[layer] @ inverse @ mdp.features[layer, states[layer], actions[layer]]
        left = 3 - layer
        cross = (features @ inverse @ features.T).clamp_max(0) @ occupancy[layer].flatten()
        estimate = x * losses[layer:].sum() - left * x.clamp_max(0) + left * cross.view(4, 3)
        norms = torch.einsum("sad,de,sae->sa", mdp.features[layer], inverse, mdp.features[layer])
        bonus = beta * (norms + (policy[layer] * norms).sum(-1, keepdim=True))
        if layer < 2:
            ahead = (policy[layer + 1] * following).sum(-1)
            bonus = bonus + 4 / 3 * (mdp.transitions[layer] @ ahead)
        following = bonus
        expected[layer] = estimate - bonus
    torch.testing.assert_close(learner.policy, torch.softmax(-eta * expected, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["plain", "reduced"])
def test_an_estimate_has_the_action_values_for_its_mean_where_covariances_have_full_rank(estimator):
    # All paths of one episode, weighed by how likely they are: no sampling.
    mdp = LinearMDP.tabular(problem(layers=2, states=2, actions=2).transitions, torch.full((2,), 0.5, dtype=F64))
    losses = draws(0, 2, 2, 2).sigmoid()
    base = {"learning_rate": 1.0, "regularization": 1e-9, "bonus_scale": 0.0, "estimator": estimator}
    mean = torch.zeros(2, 2, 2, dtype=F64)
    uniform = torch.full((2, 2, 2), 0.5, dtype=F64)
    for code in range(16):
        s0, a0, s1, a1 = (code >> 3) & 1, (code >> 2) & 1, (code >> 1) & 1, code & 1
        likely = 0.5 * 0.5 * float(mdp.transitions[0, s0, a0, s1]) * 0.5
        learner = AdversarialMDPLearner(mdp, **base)
        states, actions = torch.tensor([s0, s1]), torch.tensor([a0, a1])
        learner.update(states, actions, mdp.observe(losses, states, actions))
        mean += likely * learner.state_dict()["summed"]
    torch.testing.assert_close(mean, mdp.action_values(uniform, losses), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("regularizer", ["entropy", "log-barrier"])
def test_the_settings_by_theory_meet_the_conditions_of_the_analysis(regularizer):
    mdp, horizon = problem(), 3
    for scale in (0.1, 1.0, 30.0):
        learner = AdversarialMDPLearner.for_episodes(
            mdp,
            1000,
            regularizer=regularizer,
            estimator="reduced" if regularizer == "entropy" else "plain",
            scale=scale,
        )
        eta, gamma, beta = learner.learning_rate, learner.regularization, learner.bonus_scale
        spread = 3 if regularizer == "log-barrier" else math.log(3)
        assert eta == pytest.approx(scale * math.sqrt(spread / (4 * 81 * 1000)), rel=1e-12)
        assert 8 * eta * horizon**2 <= beta * (1 + 1e-12)
        assert 12 * eta * beta * horizon**2 <= gamma * (1 + 1e-12)
        assert eta * (horizon / gamma**0.5 + 6 * beta * horizon / gamma) <= 1
    with pytest.raises(ValueError, match="too negative"):
        AdversarialMDPLearner.for_episodes(mdp, 1000, estimator="plain")


def test_a_batch_of_learners_learns_as_each_does_alone_and_state_travels():
    mdp = problem()
    base = {"learning_rate": 0.5, "regularization": 0.01, "bonus_scale": 0.01, "regularizer": "log-barrier"}
    together, alone = AdversarialMDPLearner(mdp, **base, runs=(3,)), AdversarialMDPLearner(mdp, **base)
    generator = torch.Generator().manual_seed(0)
    for episode in range(5):
        states, actions = mdp.rollout(together.policy, generator=generator)
        losses = draws(episode, 3, 3).sigmoid()
        together.update(states, actions, losses)
        alone.update(states[1], actions[1], losses[1])
    torch.testing.assert_close(together.policy[1], alone.policy, rtol=1e-6, atol=1e-9)
    again = AdversarialMDPLearner(mdp, **base, runs=(3,))
    again.load_state_dict(together.state_dict())
    assert torch.equal(again.policy, together.policy)
    with pytest.raises(ValueError, match="sums of shape"):
        alone.load_state_dict(together.state_dict())


def test_many_simulated_episodes_learn_as_exact_occupancies_do():
    mdp = problem()
    base = {"learning_rate": 0.5, "regularization": 0.05, "bonus_scale": 0.02}
    generator = torch.Generator().manual_seed(0)
    exact = AdversarialMDPLearner(mdp, **base)
    simulated = AdversarialMDPLearner(mdp, **base, num_simulated=20_000, generator=generator)
    states, actions = mdp.rollout(exact.policy, generator=generator)
    losses = torch.tensor([0.3, 0.9, 0.6], dtype=F64)
    for learner in (exact, simulated):
        learner.update(states, actions, losses)
    torch.testing.assert_close(simulated.policy, exact.policy, rtol=0, atol=0.02)


@pytest.mark.parametrize(("estimator", "regularizer"), [("reduced", "entropy"), ("plain", "log-barrier")])
def test_regret_against_losses_that_change_grows_slower_than_the_episodes(estimator, regularizer):
    mdp, episodes, runs = problem(actions=4), 800, 16
    learner = AdversarialMDPLearner(
        mdp,
        learning_rate=2 / episodes**0.5,
        regularization=4 / episodes,
        bonus_scale=0.02 / episodes**0.5,
        estimator=estimator,
        regularizer=regularizer,
        runs=(runs,),
    )
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(runs, 3, 4, generator=generator, dtype=F64)
    noise = 0.6 * torch.rand(episodes, runs, 3, 4, generator=generator, dtype=F64) - 0.3
    losses = mdp.linear_losses((center + noise).clamp(0, 1))
    uniform, incurred = learner.policy, []
    for each in losses:
        incurred.append(mdp.value(learner.policy, each))
        states, actions = mdp.rollout(learner.policy, generator=generator)
        learner.update(states, actions, mdp.observe(each, states, actions))
    regret = mdp.regret(torch.stack(incurred), losses).mean(1)
    still = mdp.regret(mdp.value(uniform, losses), losses).mean(1)
    assert float(regret[-1]) < 0.6 * float(still[-1])
    growth = math.log(float(regret[-1] / regret[episodes // 4])) / math.log(4)
    assert growth < 0.8


def test_a_loss_above_one_by_rounding_is_a_loss_of_one():
    mdp, path = problem(), (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    learners = [AdversarialMDPLearner.for_episodes(mdp, 10, scale=30.0) for _ in range(2)]
    learners[0].update(*path, torch.tensor([1 + 1e-15, 0.5, -1e-15], dtype=F64))
    learners[1].update(*path, torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    assert torch.equal(learners[0].policy, learners[1].policy)


@pytest.mark.untyped
def test_what_cannot_be_estimated_or_learned_from_is_refused():
    features, weights = pairs_of(0)
    inverse = inverse_covariance(features, regularization=0.1, weights=weights)
    loss = torch.tensor(1.0, dtype=F64)
    with pytest.raises(ValueError, match="regularization must be a finite number above 0"):
        inverse_covariance(features, regularization=0.0)
    with pytest.raises(ValueError, match="positive definite"):
        inverse_covariance(torch.ones(2, 2), regularization=1e-12)
    with pytest.raises(ValueError, match="weights must be at least 0"):
        inverse_covariance(features, regularization=0.1, weights=-weights)
    with pytest.raises(ValueError, match="weights must hold one weight for each of 6 rows"):
        inverse_covariance(features, regularization=0.1, weights=weights[:5])
    with pytest.raises(ValueError, match="features must have norms of at most 1"):
        linear_q_estimate(2 * features, features[0], loss, inverse)
    with pytest.raises(ValueError, match="loss_to_go must lie between 0 and largest"):
        reduced(features, weights, 0, 4 * loss, inverse)
    with pytest.raises(ValueError, match=r"inverse must have shape \(4, 4\)"):
        linear_q_estimate(features, features[0], loss, inverse[:3])
    with pytest.raises(ValueError, match=r"regularization must lie in \(0, 1\]"):
        matrix_geometric_resampling(features[None], regularization=1.5)
    with pytest.raises(ValueError, match="losses is empty"):
        log_barrier_step(torch.zeros(2, 0), learning_rate=1.0)
    mdp = problem()
    learner = AdversarialMDPLearner.for_episodes(mdp, 10)
    path = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"losses must lie in \[0, 1\]"):
        learner.update(*path, torch.tensor([0.5, 1.5, 0.5], dtype=F64))
    with pytest.raises(ValueError, match=r"losses must have shape \(3,\)"):
        learner.update(*path, torch.tensor([0.5, 0.5], dtype=F64))
    with pytest.raises(ValueError, match="estimator must be one of"):
        AdversarialMDPLearner(mdp, learning_rate=1.0, regularization=1.0, bonus_scale=0.0, estimator="mixed")
    with pytest.raises(ValueError, match="num_simulated must be at least 1"):
        AdversarialMDPLearner(mdp, learning_rate=1.0, regularization=1.0, bonus_scale=0.0, num_simulated=0)
