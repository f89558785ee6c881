"""The agent with a stock: its loss is quantile regression, its edits are true, and it learns what is exactly known."""

import itertools
import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_pinball_loss
from torch import nn

from minimand.policies import (
    ExpectedUtility,
    MDPEnvironment,
    StockAgent,
    StockMDP,
    StockQuantileNetwork,
    StockReplay,
    StockTransitions,
    quantile_huber_loss,
    stock_update,
    train_stock_agent,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gamble():
    """Twice: one unit for sure, or three or nothing with even odds."""
    transition = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], dtype=torch.float64).expand(2, 2, 2)
    reward = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]], dtype=torch.float64).expand(2, 2, 2)
    return StockMDP(transition, reward, discount=1.0)


def agent_for(environment, utility, *, discount=1.0, seed=0):
    torch.manual_seed(seed)
    network = StockQuantileNetwork(
        environment.num_features,
        environment.num_actions,
        num_quantiles=16,
        hidden=(32, 32),
        stock_scale=4.0,
        return_scale=4.0,
    )
    return StockAgent(network, utility, discount=discount, kappa=0.1)


class Table(nn.Module):
    """Quantiles that are what they are, whatever is observed."""

    def __init__(self, quantiles):
        super().__init__()
        self.quantiles = nn.Parameter(quantiles.clone())

    def forward(self, observation, stock):
        return self.quantiles.expand(len(observation), -1, -1)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0, 2.5])
def test_the_loss_is_its_formula_pair_by_pair(kappa):
    input, target = draw(3, 4), 2 * draw(3, 5, seed=1)
    wanted = torch.zeros(3, dtype=torch.float64)
    for b, i, j in itertools.product(range(3), range(4), range(5)):
        u, tau = float(target[b, j] - input[b, i]), (2 * i + 1) / 8
        huber = u * u / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)
        wanted[b] += abs(tau - (u < 0)) * (huber / kappa if kappa else abs(u)) / 5
    assert torch.allclose(quantile_huber_loss(input, target, kappa=kappa, reduction="none"), wanted, rtol=1e-12)
    assert quantile_huber_loss(input, target, kappa=kappa).item() == pytest.approx(wanted.mean().item())
    assert torch.autograd.gradcheck(
        lambda q, y: quantile_huber_loss(q, y, kappa=0.3), (input.requires_grad_(), target.requires_grad_())
    )


def test_without_smoothing_the_loss_is_the_pinball_loss_of_scikit_learn():
    input, target = draw(1, 7), draw(1, 30, seed=1)
    wanted = sum(
        mean_pinball_loss(target[0], np.full(30, input[0, i].item()), alpha=(2 * i + 1) / 14) for i in range(7)
    )
    assert quantile_huber_loss(input, target, kappa=0.0).item() == pytest.approx(wanted, rel=1e-12)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_gradient_at_the_quantiles_of_the_sample_is_no_more_than_one_of_its_atoms(count, samples, seed):
    target = draw(1, samples, seed=seed)
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    quantiles = torch.quantile(target[0], levels, interpolation="lower")[None].requires_grad_()
    quantile_huber_loss(quantiles, target, kappa=0.0).backward()
    assert quantiles.grad.abs().max() <= 1 / samples + 1e-12


@given(st.integers(1, 30), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_mean_of_midpoint_quantiles_is_near_that_of_the_law(count, seed):
    atoms = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    quantiles = torch.quantile(atoms, levels, interpolation="lower")
    # The step from the law's own quantile function to that of 50 atoms costs another atom's share.
    assert abs(quantiles.mean() - atoms.mean()) <= 1 / (2 * count) + 1 / 50


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_the_target_is_the_reward_and_the_quantiles_of_what_is_best_with_the_new_stock(discount):
    quantiles = torch.tensor([[[0.0, 8.0], [2.2, 2.2]]], dtype=torch.float64)  # two actions
    agent = StockAgent(Table(quantiles), ExpectedUtility.lower_tail(), discount=discount, kappa=0.5)
    with torch.no_grad():
        agent.network.quantiles.add_(1.0)  # the target network is another
    batch = StockTransitions(
        observation=draw(3, 2),
        stock=torch.tensor([-5.0, 2.0, -5.0], dtype=torch.float64),
        action=torch.tensor([1, 0, 0]),
        reward=torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
        next_observation=draw(3, 2),
        terminal=torch.tensor([False, False, True]),
    )
    # From -4 the sure 2.2 is better, from -4 / 0.8 the chance of 8; above zero both are worth nothing: the first.
    best = quantiles[0, 1 if discount == 1 else 0]
    predicted = 1.0 + quantiles[0][[1, 0, 0]]
    followed = torch.stack([1 + discount * best, 1 + discount * quantiles[0, 0], torch.ones(2).double()])
    wanted = quantile_huber_loss(predicted, followed, kappa=0.5)
    loss = agent.loss(batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    loss.backward()
    assert agent.target_network.quantiles.grad is None
    assert agent.network.quantiles.grad is not None


def test_it_acts_by_the_mean_utility_of_stock_plus_return():
    quantiles = draw(1, 3, 6)
    stocks = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for utility in (ExpectedUtility.target(), ExpectedUtility.lower_tail(), ExpectedUtility.shortfall(2.0)):
        agent = StockAgent(Table(quantiles), utility, discount=1.0)
        wanted = [int(utility(c + quantiles[0]).mean(1).argmax()) for c in stocks]
        assert agent.act(torch.zeros(13, 2, dtype=torch.float64), stocks).tolist() == wanted
        assert int(agent.act(torch.zeros(2, dtype=torch.float64), -3.0)) == wanted[0]
        law = agent.return_law(torch.zeros(2, dtype=torch.float64), -3.0)
        assert torch.equal(law.atoms, quantiles[0, wanted[0]].sort().values)
        assert agent.return_law(torch.zeros(2), 0.0, action=2).mean().item() == pytest.approx(quantiles[0, 2].mean())


def test_random_actions_are_as_many_as_asked_for_and_follow_the_generator():
    agent = StockAgent(Table(torch.tensor([[[0.0], [1.0], [0.0], [0.0]]])), ExpectedUtility.mean(), discount=1.0)
    observation, stock = torch.zeros(20_000, 1), torch.zeros(20_000)
    drawn = [
        agent.act(observation, stock, epsilon=0.4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert (drawn[0] != 1).double().mean().item() == pytest.approx(0.4 * 3 / 4, abs=0.015)


def test_the_first_stock_for_a_tail_mean_is_minus_a_quantile_and_promises_the_tail_mean():
    quantiles = torch.arange(10.0)[None, None].double() ** 2
    agent = StockAgent(Table(quantiles), ExpectedUtility.lower_tail(), discount=1.0)
    choice = agent.best_first_stock(torch.zeros(1).double(), -quantiles[0, 0], tau=0.35)
    assert choice.stock == -9.0  # the 35 % quantile of 0, 1, 4, 9, ...
    assert choice.value == pytest.approx((0 + 1 + 4 + 0.5 * 9) / 3.5)
    with pytest.raises(ValueError, match="lower_tail"):
        StockAgent(Table(quantiles), ExpectedUtility.target(), discount=1.0).best_first_stock(
            torch.zeros(1), torch.zeros(1), tau=0.5
        )


def test_the_target_network_follows_by_the_rate():
    agent = StockAgent(nn.Linear(2, 2), ExpectedUtility.mean(), discount=1.0)
    before = agent.target_network.weight.clone()
    with torch.no_grad():
        agent.network.weight.add_(1.0)
    agent.update_target(0.25)
    assert torch.allclose(agent.target_network.weight, before + 0.25)
    agent.update_target()
    assert torch.equal(agent.target_network.weight, agent.network.weight)


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_edited_transitions_are_those_of_an_episode_begun_with_another_stock(discount):
    replay = StockReplay(10, discount=discount)
    rewards, stock = [1.0, -2.0, 4.0, 0.5], torch.tensor(-3.0, dtype=torch.float64)
    other, wanted = torch.tensor(1.5, dtype=torch.float64), {}
    for step, reward in enumerate(rewards):
        paid = torch.tensor(reward, dtype=torch.float64)
        replay.add(
            torch.full((2,), float(step), dtype=torch.float64),
            action=step % 2,
            reward=reward,
            next_observation=torch.full((2,), step + 1.0, dtype=torch.float64),
            terminal=step == 3,
            stock=stock.item(),
            first_stock=-3.0,
            step=step,
        )
        wanted[step] = other.item()
        stock, other = (stock_update(each, paid, discount=discount) for each in (stock, other))
    batch = replay.sample(
        50, first_stock=lambda count, _: torch.full((count,), 1.5), generator=torch.Generator().manual_seed(0)
    )
    steps = batch.observation[:, 0].long()
    assert set(steps.tolist()) == set(range(4))
    assert batch.stock.tolist() == pytest.approx([wanted[int(step)] for step in steps])
    assert batch.reward.tolist() == [rewards[int(step)] for step in steps]
    assert torch.equal(batch.next_observation, batch.observation + 1)
    assert torch.equal(batch.terminal, steps == 3)
    assert torch.equal(batch.action, steps % 2)


def test_a_full_replay_keeps_the_latest():
    replay = StockReplay(3, discount=1.0)
    for step in range(8):
        zero = torch.zeros(1)
        replay.add(
            zero,
            action=0,
            reward=float(step),
            next_observation=zero,
            terminal=False,
            stock=0.0,
            first_stock=0.0,
            step=0,
        )
    assert len(replay) == 3
    assert set(replay.sample(100, generator=torch.Generator().manual_seed(0)).reward.tolist()) == {5.0, 6.0, 7.0}


def test_the_environment_of_a_process_follows_its_probabilities_and_ends_at_the_horizon():
    transition = torch.tensor([[[0.2, 0.5, 0.3]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]], dtype=torch.float64)
    reward = torch.arange(9.0, dtype=torch.float64).view(3, 1, 3)
    reward[1] = 0  # state 1 is an end
    environment = MDPEnvironment(StockMDP(transition, reward, discount=1.0), 0, horizon=4)
    environment.reset(seed=0)
    counts = torch.zeros(3)
    for _ in range(2_000):
        environment.reset()
        observation, paid, ended, cut, _ = environment.step(0)
        following = int(observation[:3].argmax())
        counts[following] += 1
        assert observation.tolist() == [*torch.eye(3)[following].tolist(), 0.75]
        assert (paid, ended, cut) == (reward[0, 0, following].item(), following == 1, False)
        if following == 1:
            with pytest.raises(ValueError, match="has ended"):
                environment.step(0)
        else:
            rest = [environment.step(0)[2] for _ in range(3)] if following == 2 else []
            assert rest in ([], [False, False, True])
    assert (counts / 2_000).tolist() == pytest.approx([0.2, 0.5, 0.3], abs=0.04)
    twice = [[environment.reset(seed=5), environment.step(0)][1][1] for _ in range(2)]
    assert twice[0] == twice[1]


def test_the_laws_of_the_optimal_policy_are_found_again_by_evaluating_it():
    mdp, start, stock = gamble(), torch.tensor([0]), torch.tensor([-4.0], dtype=torch.float64)
    best = mdp.value_iteration(ExpectedUtility.target(), start, stock, horizon=2)

    def policy(step, states, stocks):
        return torch.tensor([best.action(step, int(s), float(c)) for s, c in zip(states, stocks, strict=True)])

    again = mdp.evaluate(policy, ExpectedUtility.target(), start, stock, horizon=2)
    assert torch.equal(again.value, best.value)
    assert torch.equal(again.laws[0].atoms, best.laws[0].atoms)
    assert torch.equal(again.laws[0].weights, best.laws[0].weights)
    worst = mdp.evaluate(lambda step, s, c: 0 * s, ExpectedUtility.target(), start, stock, horizon=2)
    assert worst.value.item() == -2.0  # one and one again
    with pytest.raises(ValueError, match="policy must return an action"):
        mdp.evaluate(lambda step, s, c: s + 7, ExpectedUtility.target(), start, stock, horizon=2)


def test_the_trained_agent_is_the_exact_dynamic_programme():
    mdp, start = gamble(), torch.tensor([0])
    environment = MDPEnvironment(mdp, 0, horizon=2)
    agent = agent_for(environment, ExpectedUtility.target())
    training = train_stock_agent(
        agent,
        environment,
        edit_stocks=True,
        first_stock=(-7.0, 0.0),
        num_steps=2_000,
        batch_size=64,
        learning_starts=200,
        update_every=3,
        target_every=25,
    )
    assert torch.isfinite(training.losses).all()

    def policy(step, states, stocks):
        return agent.act(environment.observe(step, states), stocks.float())

    for goal in (2.0, 3.0, 4.0, 6.0):
        stock = torch.tensor([-goal], dtype=torch.float64)
        best = mdp.value_iteration(ExpectedUtility.target(), start, stock, horizon=2)
        ours = mdp.evaluate(policy, ExpectedUtility.target(), start, stock, horizon=2)
        assert ours.value.item() == pytest.approx(best.value.item(), abs=1e-9)
        promised = agent.return_law(environment.observe(0, start)[0], -goal)
        assert promised.mean().item() == pytest.approx(ours.laws[0].mean().item(), abs=0.4)
    # Ablated of its stock, no policy that is blind to it hits both two and six.
    assert training.utilities[-200:].mean() > training.utilities[:200].mean()


class Walk(gymnasium.Env):
    """A step up or down a line, discounted; cut off after eight."""

    observation_space = spaces.Box(-9, 9, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return np.array([0.0]), {}

    def step(self, action):
        paid = 1.0 if action else -1.0
        self.place, self.steps = self.place + paid, self.steps + 1
        return np.array([self.place]), paid, False, self.steps == 8, {}


def test_it_trains_in_an_environment_of_gymnasium_and_repeats_itself():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        network = StockQuantileNetwork(1, 2, num_quantiles=4, hidden=(8,))
        agent = StockAgent(network, ExpectedUtility.lower_tail(), discount=0.9)
        training = train_stock_agent(
            agent, Walk(), first_stock=(-2.0, 2.0), num_steps=203, learning_starts=100, batch_size=8, seed=3
        )
        runs.append((training, agent.state_dict()))
    (first, weights), (second, again) = runs
    assert torch.equal(first.returns, second.returns)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(first.returns) == 203 // 8
    assert len(first.losses) == 25
    assert (first.returns.abs() <= sum(0.9**k for k in range(8)) + 1e-9).all()
    assert torch.equal(first.utilities, (first.first_stocks + first.returns).clamp_max(0))


class Spy:
    """An agent that always goes up, and keeps what it is to learn from."""

    discount, utility = 1.0, ExpectedUtility.mean()

    def __init__(self):
        self.network, self.batches, self.copies = nn.Linear(1, 1), [], 0

    def act(self, observation, stock, *, epsilon=0.0, generator=None):
        return torch.tensor(1)

    def loss(self, batch):
        self.batches.append(batch)
        return self.network(batch.reward[:, None]).sum()

    def update_target(self):
        self.copies += 1


def test_an_episode_that_is_cut_off_has_no_end_and_starts_anew_with_a_stock_of_its_own():
    spy = Spy()
    training = train_stock_agent(
        spy, Walk(), first_stock=(-4.0, -4.0), num_steps=80, learning_starts=0, target_every=5, edit_stocks=False
    )
    assert spy.copies == 4
    assert training.returns.tolist() == [8.0] * 10
    for batch in spy.batches:
        assert not batch.terminal.any()
        assert torch.equal(batch.stock, batch.observation[:, 0] - 4)
        assert torch.equal(batch.next_observation, batch.observation + 1)


def test_an_agent_that_was_saved_acts_and_learns_as_before(tmp_path):
    environment = MDPEnvironment(gamble(), 0, horizon=2)
    agent = agent_for(environment, ExpectedUtility.target(), discount=0.9)
    with torch.no_grad():
        agent.network.body[0].weight.add_(0.1)
    agent.save(tmp_path / "agent")
    assert sorted(path.name for path in (tmp_path / "agent").iterdir()) == ["agent.json", "agent.safetensors"]
    other = StockAgent.load(tmp_path / "agent", ExpectedUtility.target())
    observation, stock = torch.randn(6, 3), torch.randn(6)
    assert torch.equal(other(observation, stock), agent(observation, stock))
    assert torch.equal(other.target_network(observation, stock), agent.target_network(observation, stock))
    assert (other.discount, other.kappa, other.scale) == (agent.discount, agent.kappa, agent.scale)


def test_a_saved_agent_that_does_not_fit_is_refused(tmp_path):
    environment = MDPEnvironment(gamble(), 0, horizon=2)
    agent_for(environment, ExpectedUtility.target()).save(tmp_path)
    with pytest.raises(ValueError, match="utility must be the one trained for, 'target', got 'mean'"):
        StockAgent.load(tmp_path, ExpectedUtility.mean())
    with pytest.raises(ValueError, match="network does not fit"):
        StockAgent.load(tmp_path, ExpectedUtility.target(), network=StockQuantileNetwork(5, 2))
    own = StockAgent(Table(torch.zeros(1, 2, 3)), ExpectedUtility.target(), discount=1.0)
    own.save(tmp_path)
    with pytest.raises(ValueError, match="network must be given"):
        StockAgent.load(tmp_path, ExpectedUtility.target())
    again = StockAgent.load(tmp_path, ExpectedUtility.target(), network=Table(torch.ones(1, 2, 3)))
    assert torch.equal(again.network.quantiles, torch.zeros(1, 2, 3))
    settings_ = json.loads((tmp_path / "agent.json").read_text())
    (tmp_path / "agent.json").write_text(json.dumps({**settings_, "format": 2}))
    with pytest.raises(ValueError, match="format 2, wanted 1"):
        StockAgent.load(tmp_path, ExpectedUtility.target())


@pytest.mark.untyped
def test_bad_input_is_named():
    environment = MDPEnvironment(gamble(), 0, horizon=2)
    network = StockQuantileNetwork(3, 2)
    with pytest.raises(ValueError, match="not indifferent to the discount"):
        StockAgent(network, ExpectedUtility(torch.exp), discount=0.9)
    with pytest.raises(TypeError, match="ExpectedUtility"):
        StockAgent(network, lambda x: x, discount=0.9)
    with pytest.raises(ValueError, match="observation must have 3 entries, got 4"):
        network(torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="stock contains NaN"):
        network(torch.zeros(1, 3), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        StockQuantileNetwork(3, 2, hidden=(0,))
    with pytest.raises(ValueError, match="add transitions first"):
        StockReplay(3, discount=1.0).sample(1)
    with pytest.raises(ValueError, match="capacity"):
        StockReplay(0, discount=1.0)
    with pytest.raises(ValueError, match="first_stock must hold a lowest"):
        train_stock_agent(agent_for(environment, ExpectedUtility.mean()), environment, first_stock=(1, 0), num_steps=9)
    with pytest.raises(ValueError, match="action must lie in"):
        environment.step(2)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        MDPEnvironment(gamble(), 0, horizon=0)
    with pytest.raises(ValueError, match="state must lie in"):
        MDPEnvironment(gamble(), 2, horizon=1)
    with pytest.raises(ValueError, match="input must have shape"):
        quantile_huber_loss(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="kappa"):
        quantile_huber_loss(torch.zeros(2, 3), torch.zeros(2, 3), kappa=-1.0)
