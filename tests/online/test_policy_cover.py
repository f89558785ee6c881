"""Exploration without rewards against exact values of what is left to explore, and a lock that chance hardly opens."""

import math

import pytest
import torch

from minimand.online import CoverExplorer, LinearMDP, PolicyCover

F64 = torch.float64


def problem(seed=0, layers=3, states=4, actions=3, dimensions=4):
    return LinearMDP.random_simplex(
        num_layers=layers, num_states=states, num_actions=actions, num_dimensions=dimensions, seed=seed
    )


def lock(layers=6, actions=3):
    """Two states; one action of each layer, action 1, keeps the first, and nothing leads back to it."""
    transitions = torch.zeros(layers - 1, 2, actions, 2, dtype=F64)
    transitions[:, :, :, 1] = 1
    transitions[:, 0, 1] = torch.tensor([1.0, 0.0], dtype=F64)
    return LinearMDP.tabular(transitions, torch.tensor([1.0, 0.0], dtype=F64))


def explored(mdp, rounds, seed=0, episodes=1, **settings):
    explorer, generator = CoverExplorer(mdp.features, **settings), torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        explorer.update(*mdp.rollout(explorer.policy.expand(episodes, -1, -1, -1), generator=generator))
    return explorer


@pytest.mark.parametrize("seed", range(5))
def test_values_are_optimistic_about_the_uncertainty_any_policy_meets(seed):
    mdp = problem(seed)
    # Self-normalised bound for values in [0, H] over 4 dimensions, with the ridge's bias.
    error = 3 * (math.sqrt(4 * math.log(1 + 200 / 4) + 2 * math.log(100)) + math.sqrt(4))
    for rounds in (1, 10, 200):
        explorer = explored(mdp, rounds, seed, bonus_scale=error)
        reward = explorer.uncertainty
        best = mdp.action_values(mdp.best_policy(-reward), reward)
        assert (explorer.values >= best - 1e-12).all()


def test_with_all_known_but_one_pair_the_explorer_goes_there_by_the_best_way():
    mdp = problem(1)
    table = LinearMDP.tabular(mdp.transitions, mdp.initial)
    explorer = CoverExplorer(table.features, bonus_scale=1e-3, regularization=1e-3)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.full((40_000, 3, 4, 3), 1 / 3, dtype=F64)
    states, actions = table.rollout(uniform, generator=generator)
    # Take out all episodes that end in one pair: its uncertainty alone stays large.
    kept = ~((states[:, 2] == 2) & (actions[:, 2] == 1))
    explorer.update(states[kept], actions[kept])
    reach = torch.zeros(3, 4, 3, dtype=F64)
    reach[2, 2, 1] = 1
    best = float(table.value(table.best_policy(-reach), reach))
    assert float(table.value(explorer.policy, reach)) > 0.97 * best
    assert float(table.value(uniform[0], reach)) < 0.5 * best


def test_uncertainty_met_adds_up_to_no_more_than_the_elliptical_potential():
    mdp, regularization, rounds = problem(), 1.0, 300
    explorer, generator = CoverExplorer(mdp.features, regularization=regularization), torch.Generator().manual_seed(0)
    met = torch.zeros(3, dtype=F64)
    for _ in range(rounds):
        squares = explorer.uncertainty.square()
        states, actions = mdp.rollout(explorer.policy, generator=generator)
        met += mdp.observe(squares, states, actions)
        explorer.update(states, actions)
    # sum_n |phi_n|^2 in the inverse of its time is at most 2 ln det(Lambda / lambda), so at most 2 d ln(1 + n / (d l)).
    inverse = explorer.cover().inverse / rounds
    potential = -2 * torch.logdet(regularization * inverse)
    assert (met <= potential + 1e-9).all()
    assert (potential <= 2 * 4 * math.log(1 + rounds / 4)).all()


def test_the_cover_opens_a_lock_that_uniform_play_hardly_ever_opens():
    mdp = lock()
    uniform = torch.full((6, 2, 3), 1 / 3, dtype=F64)
    assert float(mdp.occupancy(uniform)[-1, 0].sum()) == pytest.approx(3**-5)
    cover = explored(mdp, 150).cover()
    reached = mdp.occupancy(cover.policies)[:, -1, 0].sum(-1) @ cover.shares
    assert float(reached) > 20 * 3**-5
    known = cover.known(mdp.features, threshold=50.0)
    assert bool(known[1:].all())
    assert known[0].tolist() == [True, False]  # no episode begins in the second state


def test_the_covers_inverse_is_that_of_the_mixtures_covariance():
    mdp = problem()
    explorer = explored(mdp, 20, episodes=2000)
    cover = explorer.cover()
    occupancy = torch.einsum("m,mhsa->hsa", cover.shares, mdp.occupancy(cover.policies))
    covariance = torch.einsum("hsa,hsad,hsae->hde", occupancy, mdp.features, mdp.features)
    ridge = torch.eye(4, dtype=F64) / 40_000
    torch.testing.assert_close(torch.linalg.inv(cover.inverse), covariance + ridge, rtol=0, atol=0.01)
    features = mdp.features[1, 2, 0]
    assert float(cover.uncertainty(mdp.features)[1, 2, 0]) == pytest.approx(
        float(features @ cover.inverse[1] @ features)
    )


def test_members_are_drawn_as_often_as_they_were_played():
    mdp, generator = problem(), torch.Generator().manual_seed(0)
    explorer = CoverExplorer(mdp.features)
    for episodes in (1, 3, 6):
        explorer.update(*mdp.rollout(explorer.policy.expand(episodes, -1, -1, -1), generator=generator))
    torch.testing.assert_close(explorer.cover().shares, torch.tensor([0.1, 0.3, 0.6], dtype=F64))


def test_a_state_is_known_when_none_of_its_actions_is_uncertain():
    features = torch.eye(4, dtype=F64).view(1, 2, 2, 4)
    policies = torch.full((1, 1, 2, 2), 0.5, dtype=F64)
    inverse = torch.diag(torch.tensor([4.0, 5.0, 1.0, 2.0], dtype=F64))[None]
    cover = PolicyCover(policies, torch.ones(1, dtype=F64), inverse)
    assert cover.known(features, threshold=4.5).tolist() == [[False, True]]
    assert cover.known(features, threshold=5.0).tolist() == [[True, True]]
    assert cover.known(features, threshold=1.5).tolist() == [[False, False]]


@pytest.mark.untyped
def test_what_is_no_cover_is_refused():
    mdp = problem()
    with pytest.raises(RuntimeError, match="no cover before the first update"):
        CoverExplorer(mdp.features).cover()
    with pytest.raises(ValueError, match="bonus_scale must be a finite number above 0"):
        CoverExplorer(mdp.features, bonus_scale=0.0)
    with pytest.raises(ValueError, match="features must have norms of at most 1"):
        CoverExplorer(2 * mdp.features)
    with pytest.raises(ValueError, match=r"states must have shape \(\*batch, 3\)"):
        CoverExplorer(mdp.features).update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 2\]"):
        CoverExplorer(mdp.features).update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]))
    policies, inverse = torch.full((2, 3, 4, 3), 1 / 3, dtype=F64), torch.eye(4, dtype=F64).expand(3, 4, 4)
    shares = torch.tensor([0.5, 0.5], dtype=F64)
    with pytest.raises(ValueError, match="policies must hold probabilities"):
        PolicyCover(2 * policies, shares, inverse)
    with pytest.raises(ValueError, match=r"shares must have shape \(2,\)"):
        PolicyCover(policies, shares[:1], inverse)
    with pytest.raises(ValueError, match="inverse must have shape"):
        PolicyCover(policies, shares, inverse[:2])
    with pytest.raises(ValueError, match="threshold must be above 0"):
        PolicyCover(policies, shares, inverse).known(mdp.features, threshold=0.0)
