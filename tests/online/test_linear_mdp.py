"""The exact simulator against brute force over all paths and policies, and against its own episodes."""

import itertools

import pytest
import torch

from minimand.online import LinearMDP

F64 = torch.float64


def problem(seed=0, layers=3, states=3, actions=2, dimensions=4):
    return LinearMDP.random_simplex(
        num_layers=layers, num_states=states, num_actions=actions, num_dimensions=dimensions, seed=seed
    )


def table(mdp, seed, *batch):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*batch, *mdp.features.shape[:3], generator=generator, dtype=F64)


def random_policy(mdp, seed, *batch):
    return (3 * table(mdp, seed, *batch)).softmax(-1)


def paths(mdp):
    """Every path of states and actions."""
    pairs = list(itertools.product(range(mdp.num_states), range(mdp.num_actions)))
    return itertools.product(pairs, repeat=mdp.num_layers)


def likelihood(mdp, policy, path):
    likely = float(mdp.initial[path[0][0]])
    for layer, (state, action) in enumerate(path):
        likely *= float(policy[layer, state, action])
        if layer + 1 < mdp.num_layers:
            likely *= float(mdp.transitions[layer, state, action, path[layer + 1][0]])
    return likely


def test_occupancy_and_value_are_sums_over_all_paths():
    mdp = problem()
    policy, losses = random_policy(mdp, 1), table(mdp, 2)
    expected, value = torch.zeros_like(losses), 0.0
    for path in paths(mdp):
        likely = likelihood(mdp, policy, path)
        for layer, (state, action) in enumerate(path):
            expected[layer, state, action] += likely
            value += likely * float(losses[layer, state, action])
    torch.testing.assert_close(mdp.occupancy(policy), expected, rtol=0, atol=1e-14)
    assert float(mdp.value(policy, losses)) == pytest.approx(value, abs=1e-13)


@pytest.mark.parametrize("dilation", [1.0, 4 / 3])
def test_action_values_are_dilated_sums_over_all_paths_from_a_pair(dilation):
    mdp = problem()
    policy, losses = random_policy(mdp, 1), table(mdp, 2)
    found = mdp.action_values(policy, losses, dilation=dilation)
    for first in itertools.product(range(mdp.num_states), range(mdp.num_actions)):
        expected = 0.0
        for rest in itertools.product(itertools.product(range(3), range(2)), repeat=2):
            path, likely, summed = (first, *rest), 1.0, 0.0
            for layer, (state, action) in enumerate(path):
                summed += dilation**layer * float(losses[layer, state, action])
                if layer > 0:
                    likely *= float(mdp.transitions[(layer - 1, *path[layer - 1], state)])
                    likely *= float(policy[layer, state, action])
            expected += likely * summed
        assert float(found[(0, *first)]) == pytest.approx(expected, abs=1e-13)


def test_a_constant_bonus_dilates_to_its_geometric_sum():
    mdp = problem(layers=4)
    horizon = mdp.num_layers
    bonus = torch.full(mdp.features.shape[:3], 0.3, dtype=F64)
    found = mdp.action_values(random_policy(mdp, 0), bonus, dilation=1 + 1 / horizon)
    for layer in range(horizon):
        expected = 0.3 * sum((1 + 1 / horizon) ** i for i in range(horizon - layer))
        torch.testing.assert_close(found[layer], torch.full_like(found[layer], expected), rtol=0, atol=1e-14)


def test_the_dilated_sum_is_the_mean_of_one_sample_recursions():
    mdp = problem()
    policy, bonus = random_policy(mdp, 3), table(mdp, 4)
    count, dilation = 40_000, 1 + 1 / mdp.num_layers
    states, actions = mdp.rollout(policy.expand(count, -1, -1, -1), generator=torch.Generator().manual_seed(0))
    powers = dilation ** torch.arange(mdp.num_layers, dtype=F64)
    samples = (mdp.observe(bonus, states, actions) * powers).sum(-1)
    exact = (mdp.occupancy(policy)[0] * mdp.action_values(policy, bonus, dilation=dilation)[0]).sum()
    assert abs(float(samples.mean() - exact)) < 3 * float(samples.std()) / count**0.5


def test_episodes_are_played_as_often_as_the_occupancy_says():
    mdp = problem()
    policies = random_policy(mdp, 5, 2)
    count = 40_000
    states, actions = mdp.rollout(policies.expand(count, -1, -1, -1, -1), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(2, *mdp.features.shape[:3], dtype=F64)
    for which, layer, state, action in itertools.product(range(2), range(3), range(3), range(2)):
        met = (states[:, which, layer] == state) & (actions[:, which, layer] == action)
        seen[which, layer, state, action] = met.double().mean()
    exact = mdp.occupancy(policies)
    assert ((seen - exact).abs() <= 4.5 * (exact * (1 - exact) / count).sqrt() + 1e-12).all()


def test_no_policy_does_better_than_the_best_of_all_deterministic_ones():
    mdp = problem(states=2)
    losses = table(mdp, 6, 3)
    choices = torch.tensor(list(itertools.product(range(2), repeat=6))).view(-1, 3, 2)
    every = torch.nn.functional.one_hot(choices, 2).double()
    values = mdp.value(every[:, None], losses)
    best = mdp.best_policy(losses)
    assert ((best == 0) | (best == 1)).all()
    torch.testing.assert_close(mdp.value(best, losses), values.amin(0), rtol=0, atol=1e-14)


def test_regret_is_against_the_best_fixed_policy_so_far():
    mdp = problem()
    losses, policies = table(mdp, 7, 5, 2), random_policy(mdp, 8, 5, 2)
    regret = mdp.regret(mdp.value(policies, losses), losses)
    for run, last in itertools.product(range(2), range(5)):
        paid = sum(float(mdp.value(policies[k, run], losses[k, run])) for k in range(last + 1))
        best = mdp.best_policy(losses[: last + 1, run].sum(0))
        fixed = sum(float(mdp.value(best, losses[k, run])) for k in range(last + 1))
        assert float(regret[last, run]) == pytest.approx(paid - fixed, abs=1e-12)
    best = mdp.best_policy(losses.sum(0))
    torch.testing.assert_close(
        mdp.regret(mdp.value(best, losses), losses)[-1], torch.zeros(2, dtype=F64), rtol=0, atol=1e-12
    )


def test_action_values_of_a_linear_problem_are_linear_whatever_the_policy():
    mdp = problem(states=6, actions=3)
    generator = torch.Generator().manual_seed(0)
    losses = mdp.linear_losses(torch.rand(2, 3, 4, generator=generator, dtype=F64))
    values = mdp.action_values(random_policy(mdp, 9), losses)
    assert float(mdp.linearity_residual(losses)) < 1e-12
    assert float(mdp.linearity_residual(values)) < 1e-12
    assert float(mdp.linearity_residual(table(mdp, 10))) > 0.05
    bent = mdp.transitions.square()
    assert float(LinearMDP(mdp.features, bent / bent.sum(-1, keepdim=True), mdp.initial).linearity_residual()) > 0.01


def test_every_table_is_linear_in_a_feature_for_each_pair():
    mdp = problem()
    embedded = LinearMDP.tabular(mdp.transitions, mdp.initial)
    losses, policy = table(mdp, 11), random_policy(mdp, 12)
    assert embedded.num_dimensions == 6
    assert float(embedded.linearity_residual(losses)) == 0
    torch.testing.assert_close(embedded.linear_losses(losses.flatten(1)), losses)
    torch.testing.assert_close(embedded.value(policy, losses), mdp.value(policy, losses))


def test_observed_losses_and_features_are_those_of_the_path():
    mdp = problem()
    states, actions = torch.tensor([[0, 2, 1], [1, 1, 0]]), torch.tensor([[1, 0, 0], [0, 1, 1]])
    losses = table(mdp, 13)
    for row, layer in itertools.product(range(2), range(3)):
        at = (layer, int(states[row, layer]), int(actions[row, layer]))
        assert mdp.observe(losses, states, actions)[row, layer] == losses[at]
        assert torch.equal(mdp.features_at(states, actions)[row, layer], mdp.features[at])


@pytest.mark.untyped
def test_what_is_no_problem_is_refused():
    mdp = problem()
    with pytest.raises(ValueError, match="features must have norms of at most 1"):
        LinearMDP(2 * mdp.features, mdp.transitions, mdp.initial)
    with pytest.raises(ValueError, match="transitions must hold probabilities"):
        LinearMDP(mdp.features, 2 * mdp.transitions, mdp.initial)
    with pytest.raises(ValueError, match=r"transitions must have shape \(2, 3, 2, 3\)"):
        LinearMDP(mdp.features, mdp.transitions[:1], mdp.initial)
    with pytest.raises(ValueError, match="initial must hold probabilities"):
        LinearMDP(mdp.features, mdp.transitions, -mdp.initial)
    with pytest.raises(ValueError, match="policy must hold probabilities"):
        mdp.value(2 * random_policy(mdp, 0), table(mdp, 0))
    with pytest.raises(ValueError, match="losses contains NaN"):
        mdp.best_policy(table(mdp, 0) * float("nan"))
    with pytest.raises(ValueError, match=r"states must lie in \[0, 2\]"):
        mdp.observe(table(mdp, 0), torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1]))
    with pytest.raises(TypeError, match="actions must have an integer dtype"):
        mdp.observe(table(mdp, 0), torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="incurred must have shape"):
        mdp.regret(torch.zeros(4, dtype=F64), table(mdp, 0, 5))
