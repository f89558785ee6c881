"""The guarded safe learner: absorbing rollouts, limits that reduce to plain planning, and the constrained step."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal

from minimand.constraints import Multiplier
from minimand.policies import (
    OGSRL,
    ChristoffelGuardian,
    CountGuardian,
    DoseSimulator,
    GaussianPolicy,
    KernelDensityGuardian,
    NearestNeighborModel,
    Predicted,
    RegressionModel,
    TabularCMDP,
    Transitions,
    guarded_rollout,
    logged_rows,
)


class Fixed(KernelDensityGuardian):
    """A guardian that holds rows to be inside where a function of them says so."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def inside(self, rows):
        return self.rule(rows)


class Walk(nn.Module):
    """A policy that always goes one step ahead."""

    def forward(self, observation):
        one = torch.ones_like(observation)
        return Independent(Normal(one, 1e-6 * one), 1)


class Table(nn.Module):
    """A policy over choices by state number."""

    def __init__(self, states, actions):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(states, actions, dtype=torch.float64))

    def forward(self, observation):
        return Categorical(logits=self.logits[observation[:, 0].long()], validate_args=False)


def ahead(observation, action):
    after = observation + action
    return Predicted(after, after[:, 0], after.square(), after[:, 0] > 5.5)


def setting(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    simulator = DoseSimulator()
    log = simulator.log(60, generator=generator)
    torch.manual_seed(seed)
    policy = GaussianPolicy(2, 1, low=0.0, high=1.0, hidden=(16,))
    model = RegressionModel(cost=simulator.cost).fit(log)
    given = {"action_range": (0.0, 1.0), "critic_hidden": (16,), "critic_steps": 5, "generator": generator, **changes}
    return OGSRL(policy, log, model, **given), log


def parameters(learner):
    return torch.cat([parameter.detach().flatten() for parameter in learner.policy.parameters()])


def test_once_outside_an_episode_stays_where_it_is_pays_each_step_and_costs_nothing():
    guardian = Fixed(lambda rows: rows[:, 0] < 2.5)
    found = guarded_rollout(Walk(), ahead, torch.tensor([[0.0], [1.0]]), horizon=5, guardian=guardian)
    assert found.outside.tolist() == [[False, False, False, True, True], [False, False, True, True, True]]
    torch.testing.assert_close(found.observation[0, :, 0], torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.reward[0], torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.cost[0, :, 0], torch.tensor([1.0, 4.0, 9.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    # The action that led outside mattered; those after it did not.
    assert found.active.tolist() == [[True, True, True, True, False], [True, True, True, False, False]]
    learner, _ = setting(guardian=guardian)
    streams = learner.streams(found)
    assert torch.equal((streams[0] + learner.penalty * streams[1])[:, 3:], torch.full((2, 2), -25.0))


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_outside_the_values_are_exact_so_that_leaving_is_judged_by_all_it_costs(discount):
    learner, _ = setting(guardian=Fixed(lambda rows: rows[:, 2] < 0.4), discount=discount)
    episodes = learner.rollout()
    values, streams = learner.values(episodes), learner.streams(episodes)
    frozen = episodes.outside & ~episodes.active
    assert frozen.any()
    sums = torch.zeros_like(streams[..., 0])
    for step in reversed(range(20)):
        sums = streams[..., step] + discount * sums
        at = frozen[:, step]
        torch.testing.assert_close(values[:, at, step], sums[:, at])


def test_an_episode_that_ends_gives_nothing_more_and_is_not_outside():
    found = guarded_rollout(Walk(), ahead, torch.tensor([[4.0]]), horizon=4)
    torch.testing.assert_close(found.reward, torch.tensor([[5.0, 6.0, 0.0, 0.0]]), atol=1e-4, rtol=0)
    assert found.ended.tolist() == [[False, False, True, True]]
    assert not found.outside.any()
    assert torch.equal(found.active, ~found.ended)


def test_the_guardian_sees_the_history_with_the_first_pair_in_place_of_what_came_before():
    seen = []

    def rule(rows):
        seen.append(rows)
        return torch.ones(len(rows), dtype=torch.bool)

    guarded_rollout(Walk(), ahead, torch.zeros(1, 1), horizon=3, guardian=Fixed(rule), history=2)
    wanted = [[[0.0, 1.0, 0.0, 1.0]], [[0.0, 1.0, 1.0, 1.0]], [[1.0, 1.0, 2.0, 1.0]]]
    torch.testing.assert_close(torch.stack(seen), torch.tensor(wanted), atol=1e-4, rtol=0)


def test_actions_are_held_to_their_range_before_model_and_guardian_see_them():
    found = guarded_rollout(Walk(), ahead, torch.zeros(1, 1), horizon=2, action_range=(0.0, 0.25))
    torch.testing.assert_close(found.observation[0, 1], torch.tensor([0.25]))
    assert found.action.min() > 0.9


def test_a_guardian_that_lets_everything_in_is_none():
    plain, _ = setting()
    guarded, _ = setting(guardian=Fixed(lambda rows: torch.ones(len(rows), dtype=torch.bool)))
    for _ in range(3):
        assert plain.step().reward == guarded.step().reward
    assert torch.equal(parameters(plain), parameters(guarded))


def test_a_guardian_that_lets_nothing_in_leaves_the_penalty_and_nothing_to_learn():
    learner, _ = setting(guardian=Fixed(lambda rows: torch.zeros(len(rows), dtype=torch.bool)), discount=0.9)
    before = parameters(learner).clone()
    for _ in range(2):
        seen = learner.step()
        assert seen.reward == 0
        assert seen.left == 1
        assert seen.outside == pytest.approx((1 - 0.9**20) / (1 - 0.9), rel=1e-5)
    learner.critic.body[-1].weight.data.zero_()
    learner.critic.body[-1].bias.data.zero_()
    # With values that do not depend on the state all advantages are alike: only noise moves the policy.
    assert (parameters(learner) - before).abs().max() < 0.5


def test_limits_that_are_never_near_change_nothing():
    plain, _ = setting()
    loose, _ = setting(cost_limits=[1e6])
    lagrangian, _ = setting(cost_limits=[1e6], algorithm="lagrangian")
    for _ in range(3):
        wanted = plain.step().reward
        assert loose.step().reward == pytest.approx(wanted, rel=1e-4)
        assert lagrangian.step().reward == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(parameters(loose), parameters(plain), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(parameters(lagrangian), parameters(plain), rtol=1e-3, atol=1e-4)


def test_violations_are_discounted_sums_less_limits_and_are_not_normalised():
    learner, _ = setting(cost_limits=[0.5], outside_limit=0.25, discount=0.9, guardian=Fixed(lambda x: x[:, 2] < 0.6))
    state = copy.deepcopy(learner.generator.get_state())
    episodes = learner.rollout()
    learner.generator.set_state(state)
    seen = learner.step()
    weights = 0.9 ** torch.arange(20)
    assert seen.violations[0].item() == pytest.approx(
        (episodes.cost[..., 0] * weights).sum(1).mean().item() - 0.5, abs=1e-5
    )
    assert seen.violations[1].item() == pytest.approx(
        (episodes.outside * weights).sum(1).mean().item() - 0.25, abs=1e-4
    )
    assert seen.reward == pytest.approx((episodes.reward * weights).sum(1).mean().item(), rel=1e-5)


def bandit(costs, limit, algorithm, **changes):
    """One state, one step, three choices: an occupancy is the policy itself."""
    reward, cost = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor(costs).double()
    state, done = torch.zeros(3, 1).double(), torch.ones(3, dtype=torch.bool)
    log = Transitions(state, torch.arange(3), reward, state, done, ~done, cost[:, None])
    model = NearestNeighborModel(num_actions=3).fit(log)
    problem = TabularCMDP(
        torch.zeros(1, 3, 1).double(), reward[None], torch.ones(1).double(), discount=1.0, cost=cost[None, None]
    )
    generator = torch.Generator().manual_seed(0)
    learner = OGSRL(
        Table(1, 3), log, model, num_actions=3, horizon=1, discount=1.0, cost_limits=[limit], algorithm=algorithm,
        num_episodes=400, max_kl=0.02, damping=1e-3, critic_hidden=(), critic_steps=1, generator=generator, **changes,
    )  # fmt: skip
    return learner, problem


@pytest.mark.parametrize("algorithm", ["cpo", "lagrangian"])
def test_on_a_bandit_it_reaches_the_value_of_the_linear_program(algorithm):
    changes = {"multiplier": Multiplier(0.3, damping=4.0)} if algorithm == "lagrangian" else {}
    learner, problem = bandit([0.0, 0.2, 1.0], 0.4, algorithm, **changes)
    wanted = problem.solve(torch.tensor([0.4]).double())
    steps = [learner.step() for _ in range(60)][30:]
    # Steps of the trust region's full length circle a saddle point: their average is near it.
    assert sum(step.reward for step in steps) / 30 == pytest.approx(wanted.value.item(), abs=0.1)
    assert sum(step.costs.item() for step in steps) / 30 == pytest.approx(0.4, abs=0.05)
    multiplier = sum(step.multipliers.item() for step in steps) / 30
    assert multiplier == pytest.approx(wanted.multipliers.item(), rel=0.35)


def test_from_an_unsafe_policy_it_recovers_before_it_gains():
    learner, problem = bandit([0.0, 0.2, 1.0], 0.1, "cpo")
    learner.policy.logits.data = torch.tensor([[0.0, 0.0, 3.0]]).double()
    first = learner.step()
    assert not first.feasible
    costs = [problem.evaluate(learner.policy.logits.softmax(-1).detach()).costs.item()]
    for _ in range(30):
        assert learner.step().kl <= 0.02
        costs.append(problem.evaluate(learner.policy.logits.softmax(-1).detach()).costs.item())
    assert costs[0] < 0.94
    assert costs[-1] < 0.13


def test_a_penalty_keeps_a_policy_inside_and_without_it_the_model_leads_it_out():
    left, doses = {}, {}
    for guarded in (True, False):
        learner, log = setting(num_episodes=32, max_kl=0.05, outside_penalty=-2.0)
        with torch.no_grad():  # about what clinicians give
            learner.policy.body[-1].bias.fill_(-0.35)
            learner.policy.log_std.fill_(math.log(0.2))
        if guarded:
            learner.guardian = ChristoffelGuardian(alpha=0.02).fit(logged_rows(log))
        for _ in range(15):
            seen = learner.step()
        left[guarded] = seen.left
        doses[guarded] = learner.policy.act(log.observation).mean().item()
    assert left[True] < 0.5
    assert doses[True] < doses[False]


def test_state_makes_learning_go_on_as_it_would_have():
    learner, _ = setting(cost_limits=[0.1], algorithm="lagrangian")
    learner.step()
    state = learner.state_dict()
    wanted = learner.step().reward, parameters(learner)
    other, _ = setting(seed=1, cost_limits=[0.1], algorithm="lagrangian")
    other.starts = learner.starts
    other.model = learner.model
    other.critic.load_state_dict(learner.critic.state_dict())
    other.load_state_dict(state)
    assert other.step().reward == wanted[0]
    assert torch.equal(parameters(other), wanted[1])


def test_history_and_discrete_actions_go_together():
    states, ends = torch.arange(12.0)[:, None] % 3, torch.arange(1, 13) % 4 == 0
    actions = states[:, 0].long() % 2
    log = Transitions(states, actions, states[:, 0], (states + 1) % 3, torch.zeros_like(ends), ends)
    model = NearestNeighborModel(num_actions=2).fit(log)
    guardian = CountGuardian(1).fit(logged_rows(log, history=2, num_actions=2))
    learner = OGSRL(
        Table(3, 2).float(), log, model, guardian=guardian, history=2, num_actions=2, horizon=4,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    first = learner.step()
    for _ in range(15):
        last = learner.step()
    assert last.left < first.left


def test_the_dose_simulator_is_its_equations_and_its_clinicians_are_as_the_card_found_them():
    simulator, generator = DoseSimulator(), torch.Generator().manual_seed(0)
    found = simulator.step(torch.tensor([[0.5, 0.3]]), torch.tensor([[0.8]]), noise=False)
    torch.testing.assert_close(found.next_observation, torch.tensor([[0.5 + 0.03 - 0.08 * 0.64, 0.255 + 0.225 + 0.04]]))
    torch.testing.assert_close(found.reward, -found.next_observation[:, 0])
    assert found.cost.tolist() == [[1.0]]
    log = simulator.log(3000, generator=generator)
    assert log.episode_returns().mean().item() == pytest.approx(-13.04, abs=0.1)
    assert log.cost.sum() == 0
    assert log.num_episodes == 3000
    noisy = simulator.step(torch.full((20_000, 2), 0.5), torch.full((20_000, 1), 0.2), generator=generator)
    torch.testing.assert_close(noisy.next_observation.std(0), torch.tensor([0.02, 0.01]), rtol=0.03, atol=0)
    assert log.action.max() <= 0.6 + 1e-6


def test_a_gaussian_policy_is_a_normal_law_around_the_middle_of_the_range_and_acts_within_it():
    policy = GaussianPolicy(2, 1, low=-1.0, high=3.0, log_std=math.log(0.5))
    law = policy(torch.randn(50, 2))
    torch.testing.assert_close(law.mean, torch.ones(50, 1), atol=0.1, rtol=0)
    torch.testing.assert_close(law.stddev, torch.ones(50, 1))
    policy.body[-1].bias.data.fill_(9.0)
    assert policy.act(torch.randn(50, 2)).max() == 3.0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: setting(algorithm="ppo"), ValueError, "algorithm"),
        (lambda: setting(cost_limits=[0.1, 0.1]), ValueError, "cost_limits must be one a cost"),
        (lambda: setting(cost_limits=[math.nan]), ValueError, "cost_limits contains NaN"),
        (lambda: setting(outside_limit=0.1), ValueError, "wants a guardian"),
        (lambda: setting(outside_penalty=1.0), ValueError, "minus outside_penalty"),
        (lambda: setting(horizon=0), ValueError, "horizon"),
        (lambda: setting(discount=0.0), ValueError, "discount"),
        (lambda: GaussianPolicy(2, 1, low=1.0, high=0.0), ValueError, "low must be below"),
        (lambda: GaussianPolicy(0, 1, low=0.0, high=1.0), ValueError, "observation_size"),
        (lambda: DoseSimulator(0), ValueError, "horizon"),
        (lambda: DoseSimulator().step(torch.zeros(2, 3), torch.zeros(2, 1)), ValueError, "state and dose"),
        (lambda: guarded_rollout(Walk(), ahead, torch.zeros(0, 1), horizon=2), ValueError, "start must have shape"),
        (lambda: guarded_rollout(Walk(), ahead, torch.zeros(1, 1), horizon=2, history=0), ValueError, "history"),
        (lambda: guarded_rollout(nn.Identity(), ahead, torch.zeros(1, 1), horizon=2), TypeError, "policy must return"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
