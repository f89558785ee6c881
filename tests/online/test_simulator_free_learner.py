"""The simulator-free learner's estimates, by exact sums over all episodes of a small problem, and its exploration."""

import itertools
import math

import pytest
import torch

from minimand.online import (
    CoverExplorer,
    LinearMDP,
    PolicyCover,
    SimulatorFreeLearner,
    exploration_bonus,
    exploration_weights,
    inverse_covariance,
    linear_q_estimate,
    linear_q_weights,
    log_barrier_step,
)

F64 = torch.float64
LAYERS, STATES, ACTIONS = 3, 2, 2
SETTINGS = {
    "learning_rate": 0.5,
    "regularization": 0.05,
    "bonus_scale": 0.02,
    "exploration": 0.3,
    "half_epoch": 3,
    "known_threshold": 4.0,
}


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(dimensions=None, seed=0):
    """A random linear problem, or, without dimensions, a table."""
    mdp = LinearMDP.random_simplex(
        num_layers=LAYERS, num_states=STATES, num_actions=ACTIONS, num_dimensions=dimensions or 3, seed=seed
    )
    return mdp if dimensions else LinearMDP.tabular(mdp.transitions, mdp.initial)


def policies(seed, *batch):
    return (2 * draws(seed, *batch, LAYERS, STATES, ACTIONS)).softmax(-1)


class Episodes:
    """Every episode that exploration can lead to, and how likely it is."""

    def __init__(self, mdp, policy, members, shares, exploration):
        found = []
        choices = [(-1, None, 1 - exploration)]
        for layer, member in itertools.product(range(LAYERS), range(len(members))):
            choices.append((layer, member, exploration / LAYERS * float(shares[member])))
        pairs = list(itertools.product(range(STATES), range(ACTIONS)))
        for (explored, member, likely), path in itertools.product(choices, itertools.product(pairs, repeat=LAYERS)):
            likely = likely * float(mdp.initial[path[0][0]])
            for layer, (state, action) in enumerate(path):
                playing = members[member] if layer <= explored else policy
                likely *= float(playing[layer, state, action])
                if layer + 1 < LAYERS:
                    likely *= float(mdp.transitions[layer, state, action, path[layer + 1][0]])
            found.append((explored, path, likely))
        self.explored = torch.tensor([each[0] for each in found])
        self.states, self.actions = torch.tensor([each[1] for each in found]).unbind(-1)
        self.likely = torch.tensor([each[2] for each in found], dtype=F64)
        # One row a layer, as the estimates want them.
        self.observed = mdp.features_at(self.states, self.actions).movedim(0, 1)
        self.weights = (exploration_weights(self.explored, LAYERS) * self.likely[:, None]).T

    def sums(self, mdp, table, dilation=1.0, skip=0):
        """Add up a table along each episode from each layer on, later layers dilated, the first ones left out."""
        seen = mdp.observe(table, self.states, self.actions)
        rows = []
        for layer in range(LAYERS):
            ahead = range(layer + skip, LAYERS)
            rows.append(sum((dilation ** (i - layer) * seen[:, i] for i in ahead), torch.zeros_like(seen[:, 0])))
        return torch.stack(rows)


def world(dimensions=None, gamma=1e-10, seed=0, exploration=0.3):
    mdp, policy, members = problem(dimensions, seed), policies(seed + 1), policies(seed + 2, 2)
    shares = torch.tensor([0.3, 0.7], dtype=F64)
    episodes = Episodes(mdp, policy, members, shares, exploration)
    inverse = inverse_covariance(episodes.observed, regularization=gamma, weights=episodes.weights)
    return mdp, policy, members, shares, episodes, inverse


def test_all_episodes_are_counted_once():
    _, _, _, _, episodes, _ = world()
    assert float(episodes.likely.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_weighted_episodes_have_the_covariance_of_policy_and_cover_mixed(exploration):
    mdp, policy, members, shares, episodes, _ = world(3, exploration=exploration)
    mixture = torch.einsum("m,mhsa->hsa", shares, mdp.occupancy(members))
    occupancy = (1 - exploration) * mdp.occupancy(policy) + exploration * mixture
    expected = torch.einsum("hsa,hsad,hsae->hde", occupancy, mdp.features, mdp.features)
    found = episodes.observed.mT @ (episodes.weights[..., None] * episodes.observed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_estimates_have_the_action_values_of_the_policy_for_their_mean(seed):
    mdp, policy, _, _, episodes, inverse = world(3, seed=seed)
    losses = mdp.linear_losses(draws(seed + 5, LAYERS, 3).sigmoid())
    theta = linear_q_weights(episodes.observed, episodes.sums(mdp, losses), inverse, weights=episodes.weights)
    torch.testing.assert_close(mdp.linear_losses(theta), mdp.action_values(policy, losses), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_bonus_is_the_dilated_sum_whatever_the_bonus(seed):
    mdp, policy, _, _, episodes, inverse = world(3, seed=seed)
    bonus = draws(seed + 6, LAYERS, STATES, ACTIONS).abs()
    assert float(LinearMDP(mdp.features, mdp.transitions, mdp.initial).linearity_residual(bonus)) > 0.01
    dilation = 1 + 1 / LAYERS
    ahead = episodes.sums(mdp, bonus, dilation, skip=1)
    found = bonus + mdp.linear_losses(linear_q_weights(episodes.observed, ahead, inverse, weights=episodes.weights))
    torch.testing.assert_close(found, mdp.action_values(policy, bonus, dilation=dilation), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dimensions", [None, 3])
def test_the_ridges_bias_is_bounded_and_paid_for_by_the_bonus(gamma, dimensions):
    mdp, policy, _, _, episodes, inverse = world(dimensions, gamma=gamma)
    losses = mdp.linear_losses(draws(5, LAYERS, mdp.num_dimensions).sigmoid())
    exact = mdp.action_values(policy, losses)
    theta = linear_q_weights(episodes.observed, episodes.sums(mdp, losses), inverse, weights=episodes.weights)
    bias = mdp.linear_losses(theta) - exact
    norms = torch.einsum("hsad,hde,hsae->hsa", mdp.features, inverse, mdp.features)
    # The weights of losses in [0, 1] have norms of at most H sqrt(d) here.
    size = LAYERS * mdp.num_dimensions**0.5
    assert (bias.abs() <= size * (gamma * norms).sqrt() + 1e-12).all()
    for beta in (0.01, 1.0):
        bonus = exploration_bonus(mdp.features, inverse, policy, scale=beta)
        assert (bias - bonus <= gamma * size**2 / (4 * beta) + 1e-12).all()


@pytest.mark.parametrize("exploration", [0.1, 0.5])
def test_exploration_bounds_the_bonus_of_known_states(exploration):
    mdp, policy, members, shares, _, inverse = world(3, gamma=1e-3, exploration=exploration)
    # A policy that never takes action 1: without exploration nothing would bound its bonus but the regularization.
    policy = torch.zeros_like(policy)
    policy[..., 0] = 1
    episodes = Episodes(mdp, policy, members, shares, exploration)
    inverse = inverse_covariance(episodes.observed, regularization=1e-3, weights=episodes.weights)
    mixture = torch.einsum("m,mhsa->hsa", shares, mdp.occupancy(members))
    features = mdp.features.flatten(1, 2)
    cover = PolicyCover(members, shares, inverse_covariance(features, regularization=1e-3, weights=mixture.flatten(1)))
    bonus = exploration_bonus(mdp.features, inverse, policy, scale=0.1)
    worst = cover.uncertainty(mdp.features).amax(-1)
    assert (bonus.amax(-1) <= 2 * 0.1 * worst / exploration + 1e-12).all()


def test_the_mean_of_single_estimates_is_the_estimate_of_many():
    features, losses = torch.nn.functional.normalize(draws(0, 7, 3), dim=-1), draws(1, 7).sigmoid()
    inverse = inverse_covariance(features, regularization=0.1)
    queries = features[:4] / 2
    single = [linear_q_estimate(queries, features[n], losses[n], inverse) for n in range(7)]
    many = queries @ linear_q_weights(features, losses, inverse)
    torch.testing.assert_close(many, torch.stack(single).mean(0))
    # With its own covariance it is ridge regression.
    ridge = torch.linalg.solve(features.T @ features / 7 + 0.1 * torch.eye(3, dtype=F64), features.T @ losses / 7)
    torch.testing.assert_close(linear_q_weights(features, losses, inverse), ridge)


def some_cover(mdp):
    members, shares = policies(2, 2), torch.tensor([0.3, 0.7], dtype=F64)
    mixture = torch.einsum("m,mhsa->hsa", shares, mdp.occupancy(members)).flatten(1)
    inverse = inverse_covariance(mdp.features.flatten(1, 2), regularization=1e-3, weights=mixture)
    return PolicyCover(members, shares, inverse)


def play(mdp, learner, losses, episodes, generator):
    for _ in range(episodes):
        states, actions = mdp.rollout(learner.policy, generator=generator)
        learner.update(states, actions, mdp.observe(losses, states, actions))


def test_an_episode_explores_through_a_random_layer_with_a_random_member_and_else_follows_the_leader():
    mdp, count = problem(3), 20_000
    cover = some_cover(mdp)
    generator = torch.Generator().manual_seed(0)
    settings = {**SETTINGS, "learning_rate": 5.0, "half_epoch": 1}
    learner = SimulatorFreeLearner(mdp.features, cover, runs=(count,), generator=generator, **settings)
    play(mdp, learner, mdp.linear_losses(draws(5, LAYERS, 3).sigmoid()), 2, generator)
    assert not torch.allclose(learner.leader, torch.full_like(learner.leader, 0.5))
    explored = learner.explored
    members = cover.policies[:, None] == learner.policy
    member = members[:, :, 0].all(-1).all(-1).double().argmax(0)
    for layer in range(LAYERS):
        expected = torch.where(
            (layer <= explored)[:, None, None], cover.policies[member, layer], learner.leader[:, layer]
        )
        assert torch.equal(learner.policy[:, layer], expected)
        share = (explored == layer).double().mean()
        assert abs(float(share) - 0.1) < 4 * math.sqrt(0.1 * 0.9 / count)
        drawn = (member[explored == layer] == 1).double()
        assert abs(float(drawn.mean()) - 0.7) < 4 * math.sqrt(0.21 / len(drawn))


def test_an_epochs_update_is_its_estimates_less_dilated_bonuses_step_by_step():
    mdp = problem(3)
    cover, half = some_cover(mdp), SETTINGS["half_epoch"]
    generator = torch.Generator().manual_seed(3)
    learner = SimulatorFreeLearner(mdp.features, cover, generator=generator, **{**SETTINGS, "exploration": 0.6})
    policy, losses = learner.leader, draws(5, LAYERS, STATES, ACTIONS).sigmoid()
    seen = []
    for _ in range(2 * half):
        assert torch.equal(learner.leader, policy)
        explored, (states, actions) = int(learner.explored), mdp.rollout(learner.policy, generator=generator)
        seen.append((explored, states.tolist(), actions.tolist()))
        learner.update(states, actions, mdp.observe(losses, states, actions))
    assert {each[0] >= 0 for each in seen} == {True, False}

    def weight(explored, layer):
        return 1.0 if explored < 0 else float(LAYERS) * (explored == layer)

    def inverse(layer):
        covariance = SETTINGS["regularization"] * torch.eye(3, dtype=F64)
        for explored, states, actions in seen[:half]:
            phi = mdp.features[layer, states[layer], actions[layer]]
            covariance = covariance + weight(explored, layer) / half * torch.outer(phi, phi)
        return torch.linalg.inv(covariance)

    bonus = torch.zeros(LAYERS, STATES, ACTIONS, dtype=F64)
    for layer, state in itertools.product(range(LAYERS), range(STATES)):
        worst = max(float(phi @ cover.inverse[layer] @ phi) for phi in mdp.features[layer, state])
        if worst <= SETTINGS["known_threshold"]:
            norms = torch.stack([phi @ inverse(layer) @ phi for phi in mdp.features[layer, state]])
            bonus[layer, state] = SETTINGS["bonus_scale"] * (norms + policy[layer, state] @ norms)
    assert (bonus == 0).any()
    assert (bonus > 0).any()
    summed = -bonus.clone()
    for layer in range(LAYERS):
        theta = torch.zeros(3, dtype=F64)
        for explored, states, actions in seen[half:]:
            place = [(i, states[i], actions[i]) for i in range(LAYERS)]
            target = sum(float(losses[place[i]]) for i in range(layer, LAYERS))
            target -= sum((4 / 3) ** (i - layer) * float(bonus[place[i]]) for i in range(layer + 1, LAYERS))
            theta = theta + weight(explored, layer) / half * target * mdp.features[place[layer]]
        summed[layer] += mdp.features[layer] @ (inverse(layer) @ theta)
    expected = log_barrier_step(summed, learning_rate=SETTINGS["learning_rate"], tolerance=1e-12).policy
    torch.testing.assert_close(learner.leader, expected, rtol=0, atol=1e-6)


def test_a_batch_of_learners_learns_as_each_does_alone_and_state_travels_within_an_epoch():
    mdp = problem(3)
    cover, losses = some_cover(mdp), draws(5, LAYERS, STATES, ACTIONS).sigmoid()
    generator = torch.Generator().manual_seed(0)
    settings = {**SETTINGS, "exploration": 0.0}
    together = SimulatorFreeLearner(mdp.features, cover, runs=(3,), generator=generator, **settings)
    alone = SimulatorFreeLearner(mdp.features, cover, generator=generator, **settings)
    for _ in range(8):
        states, actions = mdp.rollout(together.policy, generator=generator)
        seen = mdp.observe(losses, states, actions)
        together.update(states, actions, seen)
        alone.update(states[1], actions[1], seen[1])
    torch.testing.assert_close(together.leader[1], alone.leader, rtol=0, atol=1e-7)
    saved = SimulatorFreeLearner(mdp.features, cover, runs=(3,), generator=torch.Generator().manual_seed(9), **SETTINGS)
    play(mdp, saved, losses, 8, torch.Generator().manual_seed(1))
    again = SimulatorFreeLearner(mdp.features, cover, runs=(3,), **SETTINGS)
    again.load_state_dict(saved.state_dict())
    assert torch.equal(again.policy, saved.policy)
    again._generator = saved._generator.clone_state()
    for learner in (saved, again):
        play(mdp, learner, losses, 9, torch.Generator().manual_seed(2))
    assert torch.equal(again.policy, saved.policy)
    assert torch.equal(again.explored, saved.explored)
    with pytest.raises(ValueError, match="sums of shape"):
        alone.load_state_dict(saved.state_dict())


def test_what_the_policy_never_does_is_learned_by_exploration_alone():
    mdp, _, members, shares, _, _ = world()
    losses, policy = draws(5, LAYERS, STATES, ACTIONS).sigmoid(), torch.zeros(LAYERS, STATES, ACTIONS, dtype=F64)
    policy[..., 0] = 1
    found = {}
    for exploration in (0.0, 0.05):
        episodes = Episodes(mdp, policy, members, shares, exploration)
        inverse = inverse_covariance(episodes.observed, regularization=1e-10, weights=episodes.weights)
        theta = linear_q_weights(episodes.observed, episodes.sums(mdp, losses), inverse, weights=episodes.weights)
        found[exploration] = mdp.linear_losses(theta)
    exact = mdp.action_values(policy, losses)
    torch.testing.assert_close(found[0.05], exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0.0], exact * policy, rtol=0, atol=1e-6)


def test_losses_are_learned_without_ever_seeing_the_transitions():
    mdp = LinearMDP.random_simplex(num_layers=3, num_states=4, num_actions=4, num_dimensions=4, seed=0)
    generator, explorer, runs = torch.Generator().manual_seed(0), CoverExplorer(mdp.features), 8
    for _ in range(30):
        explorer.update(*mdp.rollout(explorer.policy.expand(5, -1, -1, -1), generator=generator))
    learner = SimulatorFreeLearner(
        mdp.features,
        explorer.cover(),
        learning_rate=10.0,
        regularization=0.01,
        bonus_scale=0.001,
        exploration=0.1,
        half_epoch=20,
        runs=(runs,),
        generator=generator,
    )
    losses = mdp.linear_losses(torch.rand(runs, 3, 4, generator=generator, dtype=F64))
    start = mdp.value(learner.leader, losses)
    play(mdp, learner, losses, 800, generator)
    best = mdp.value(mdp.best_policy(losses), losses)
    assert float((mdp.value(learner.leader, losses) - best).mean()) < 0.5 * float((start - best).mean())


def test_a_learner_keeps_the_dtype_of_its_features():
    mdp, generator = problem(3), torch.Generator().manual_seed(0)
    single = LinearMDP(mdp.features.float(), mdp.transitions.float(), mdp.initial.float())
    learner = SimulatorFreeLearner(single.features, some_cover(mdp), generator=generator, **SETTINGS)
    play(single, learner, draws(5, LAYERS, STATES, ACTIONS).sigmoid().float(), 7, generator)
    assert learner.policy.dtype == learner.leader.dtype == torch.float32
    assert not torch.allclose(learner.leader, torch.full_like(learner.leader, 0.5))


@pytest.mark.untyped
def test_what_cannot_be_learned_from_is_refused():
    mdp = problem(3)
    cover = some_cover(mdp)
    with pytest.raises(ValueError, match=r"explored must lie in \[-1, 2\]"):
        exploration_weights(torch.tensor([3]), 3)
    with pytest.raises(TypeError, match="explored must have an integer dtype"):
        exploration_weights(torch.tensor([0.5]), 3)
    phi, inverse = torch.eye(3, dtype=F64), torch.eye(3, dtype=F64)
    with pytest.raises(ValueError, match="loss_to_go must have shape"):
        linear_q_weights(phi, torch.ones(2, dtype=F64), inverse)
    with pytest.raises(ValueError, match="weights must be at least 0"):
        linear_q_weights(phi, torch.ones(3, dtype=F64), inverse, weights=-torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="norms of at most 1"):
        linear_q_weights(2 * phi, torch.ones(3, dtype=F64), inverse)
    for name, value in (("exploration", 1.5), ("half_epoch", 0), ("learning_rate", 0.0), ("known_threshold", 0.0)):
        with pytest.raises(ValueError, match=f"{name.removeprefix('known_')} must"):
            SimulatorFreeLearner(mdp.features, cover, **{**SETTINGS, name: value})
    with pytest.raises(ValueError, match="cover must be of layers"):
        SimulatorFreeLearner(mdp.features[:, :1], cover, **SETTINGS)
    learner = SimulatorFreeLearner(mdp.features, cover, **SETTINGS)
    path = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"losses must lie in \[0, 1\]"):
        learner.update(*path, torch.tensor([0.5, 1.5, 0.5], dtype=F64))
    with pytest.raises(ValueError, match=r"states must have shape \(3,\)"):
        learner.update(path[0][:2], path[1], torch.tensor([0.5, 0.5, 0.5], dtype=F64))
