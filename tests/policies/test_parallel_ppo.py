"""Many policies in one pass learn as each would alone, and returns are what they should be."""

import copy

import pytest
import torch
from torch import nn

from minimand.policies import PPOSettings, VectorActorCritic, VectorStep
from minimand.policies.constrained_extension import standardize, weighted_loss
from minimand.policies.parallel_ppo import Experience, Moments, ParallelPPO, VectorPolicy, evaluate_policies
from minimand.policies.vector_actor_critic import ActionLaw
from minimand.ppo import clipped_policy_loss, generalized_advantages


class Corridor:
    """Episodes of some steps that end or are cut off; rewards are known."""

    observation_size, num_objectives, action_size = 2, 2, 3

    def __init__(self, num_episodes, seed=0, *, length=3, cut=False, discrete=True):
        self.num_episodes, self.length, self.cut, self.discrete = num_episodes, length, cut, discrete

    def reset(self):
        self.time = torch.zeros(self.num_episodes)
        return self.seen()

    def seen(self):
        return torch.stack([self.time, self.time**2 / 4], 1)

    def step(self, action):
        self.time = self.time + 1
        last, over = self.seen(), self.time == self.length
        number = action.float() if self.discrete else action.sum(-1)
        rewards = torch.stack([torch.ones_like(self.time), number], 1)
        self.time = torch.where(over, 0, self.time)
        no = torch.zeros_like(over)
        return VectorStep(self.seen(), rewards, no if self.cut else over, over if self.cut else no, last)


def fresh(count, seed=0, *, discrete=True):
    torch.manual_seed(seed)
    networks = [VectorActorCritic(2, 3, 2, discrete=discrete, hidden=(8,)) for _ in range(count)]
    return [
        VectorPolicy(each, dict(each.named_parameters()), Moments.none(1, 2), Moments.none(1, 2), discrete)
        for each in networks
    ]


def trainer(policies, *, make=Corridor, **changes):
    settings = PPOSettings(**({"num_envs": 2, "num_steps": 7, "epochs": 2, "num_minibatches": 3} | changes))
    return ParallelPPO(make, policies, settings, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("discrete", [True, False])
def test_policies_side_by_side_learn_as_each_would_alone_by_plain_ppo(discrete):
    policies = fresh(3, discrete=discrete)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    together = trainer(policies, make=lambda n, seed: Corridor(n, discrete=discrete), entropy_weight=0.01, lr=0.01)
    data = together.collect()
    before = together.generator.get_state()
    together.improve(data, weighted_loss(weights))
    for index, weight in enumerate(weights):
        module = VectorActorCritic(2, 3, 2, discrete=discrete, hidden=(8,))
        module.load_state_dict({name: value.detach() for name, value in policies[index].parameters.items()})
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01, eps=1e-5)
        generator = torch.Generator()
        generator.set_state(before)
        for _ in range(2):
            for rows in torch.randperm(14, generator=generator).chunk(3):
                parameters, values = module(data.observations[index, rows])
                law = ActionLaw(parameters, discrete)
                mixed = (data.advantages[index, rows] * weight / data.scales[index]).sum(-1)
                mixed = (mixed - mixed.mean()) / (mixed.std(correction=0) + 1e-8)
                acted = clipped_policy_loss(
                    law.log_probability(data.actions[index, rows]), data.logp[index, rows], mixed
                ).mean()
                valued = nn.functional.mse_loss(values, data.targets[index, rows]) * 2
                loss = acted + 0.5 * valued - 0.01 * law.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
        for name, value in module.named_parameters():
            torch.testing.assert_close(together.parameters[name][index], value, atol=1e-5, rtol=1e-3)


def test_one_objective_is_plain_ppo_whatever_its_weight():
    rows = torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(0))
    logp, old = torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(1))
    empty = torch.empty(0)
    data = Experience(empty, empty, empty, old, rows, empty, empty, empty, empty, torch.full((2, 1), 3.0))
    plain = clipped_policy_loss(logp, old, standardize(rows.squeeze(-1))).mean(1)
    torch.testing.assert_close(weighted_loss(torch.full((2, 1), 0.7))(logp, data), plain, atol=1e-6, rtol=1e-5)


def test_advantages_across_ends_are_those_of_each_episode_on_its_own():
    rewards, values, then = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = torch.zeros(2, 9, dtype=torch.bool)
    ends[:, [2, 6]] = True
    settings = {"gamma": 0.9, "lam": 0.8}
    following = torch.where(ends, then, torch.cat([values[:, 1:], then[:, -1:]], 1))
    found = generalized_advantages(rewards, values, next_values=following, ends=ends, **settings)
    for begin, end in ((0, 3), (3, 7), (7, 9)):
        alone = generalized_advantages(
            rewards[:, begin:end], values[:, begin:end], bootstrap=following[:, end - 1], **settings
        )
        torch.testing.assert_close(found[:, begin:end], alone)


@pytest.mark.parametrize("cut", [False, True])
def test_an_episode_that_was_cut_off_is_continued_by_the_critic_and_one_that_ended_is_not(cut):
    policies = fresh(1)
    one = trainer(policies, make=lambda n, seed: Corridor(n, cut=cut), lam=0.0, gamma=0.5, num_steps=3)
    data = one.collect()
    _, values = policies[0].network(data.observations[0])
    seen = torch.tensor([[3.0, 2.25]])
    beyond = policies[0].network(seen)[1] if cut else torch.zeros(1, 2)
    rewards = torch.stack([torch.ones(6), data.actions[0].float()], 1)
    last = torch.tensor([False, False, True] * 2)[:, None]
    following = torch.where(last, beyond, values.roll(-1, 0))
    torch.testing.assert_close(data.advantages[0], rewards + 0.5 * following - values)


def test_returns_are_those_of_the_episodes_and_lengths_their_mean():
    one = trainer(fresh(2), gamma=0.5, num_steps=6)
    data = one.collect()
    actions = data.actions.view(2, 2, 2, 3).float()
    torch.testing.assert_close(data.returns[:, 0], torch.full((2,), 1.75))
    torch.testing.assert_close(data.returns[:, 1], (actions * torch.tensor([1.0, 0.5, 0.25])).sum(-1).mean((1, 2)))
    torch.testing.assert_close(data.lengths, torch.full((2,), 3.0))
    torch.testing.assert_close(data.discounts, torch.tensor([1.0, 0.5, 0.25]).repeat(2, 4))


def test_the_estimate_of_a_nearby_return_is_exact_for_one_step_and_every_action_seen_once():
    rewards = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, 5.0]])
    law = torch.tensor([0.2, 0.5, 0.3])
    value, empty = rewards.mean(0), torch.empty(0)
    data = Experience(
        empty, empty, empty, empty, (rewards - value)[None], empty, torch.ones(1, 3), value[None], torch.ones(1), empty
    )
    torch.testing.assert_close(data.nearby_returns((law * 3)[None])[0], law @ rewards)
    torch.testing.assert_close(data.nearby_returns(torch.ones(1, 3)), value[None])


def test_an_evaluation_is_the_discounted_return_of_the_likeliest_actions():
    policies = fresh(2)
    returns = evaluate_policies(Corridor(6), policies, gamma=0.5, max_steps=50)
    for one, found in zip(policies, returns, strict=True):
        actions = torch.stack([one.act(torch.tensor([[t, t * t / 4]]))[0] for t in (0.0, 1.0, 2.0)])
        expected = torch.stack([torch.tensor(1.75), (actions.float() * torch.tensor([1.0, 0.5, 0.25])).sum()])
        torch.testing.assert_close(found, expected)


def test_running_moments_are_those_of_all_rows():
    rows = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    moments = Moments.none(2, 3)
    for part in rows.split([1, 9, 20], 1):
        moments = moments.update(part)
    torch.testing.assert_close(moments.mean, rows.mean(1))
    torch.testing.assert_close(moments.variance, rows.var(1, correction=0))


@pytest.mark.parametrize("discrete", [True, False])
def test_laws_agree_with_torch_distributions(discrete):
    generator = torch.Generator().manual_seed(0)
    parameters, others = torch.randn(2, 5, 4, generator=generator)
    law, other = ActionLaw(parameters, discrete), ActionLaw(others, discrete)

    def peer(numbers):
        if discrete:
            return torch.distributions.Categorical(logits=numbers)
        mean, log_deviation = numbers.chunk(2, -1)
        return torch.distributions.Independent(torch.distributions.Normal(mean, log_deviation.exp()), 1)

    action = law.sample(generator)
    torch.testing.assert_close(law.log_probability(action), peer(parameters).log_prob(action))
    torch.testing.assert_close(law.entropy(), peer(parameters).entropy())
    torch.testing.assert_close(law.divergence(other), torch.distributions.kl_divergence(peer(parameters), peer(others)))
    draws = ActionLaw(parameters.expand(20_000, 5, 4), discrete).sample(generator).double()
    mean = (parameters.softmax(-1) * torch.arange(4)).sum(-1) if discrete else parameters[:, :2]
    torch.testing.assert_close(draws.mean(0), mean.double(), atol=0.15, rtol=0.05)


def test_copies_go_on_with_parameters_and_moments_of_their_own():
    one = trainer(fresh(2))
    one.improve(one.collect(), weighted_loss(torch.eye(2)))
    kept = one.policies()
    frozen = copy.deepcopy(kept[0].parameters)
    again = trainer([kept[0], kept[0], kept[1]])
    again.improve(again.collect(), weighted_loss(torch.tensor([[1.0, 0], [0, 1], [1, 1]])))
    torch.testing.assert_close(kept[0].parameters, frozen)
    assert again.observations.rows[:, 0].tolist() == [28, 28, 28]
    name = "actor.0.weight"
    assert not torch.equal(again.parameters[name][0], again.parameters[name][1])


@pytest.mark.untyped
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_minibatches"):
        PPOSettings(num_envs=1, num_steps=2, num_minibatches=3)
    with pytest.raises(ValueError, match="lr"):
        PPOSettings(lr=0.0)
    with pytest.raises(ValueError, match="hidden"):
        VectorActorCritic(1, 1, 1, discrete=True, hidden=(0,))
    with pytest.raises(ValueError, match="next_values"):
        generalized_advantages(torch.ones(2), torch.ones(2), ends=torch.ones(2, dtype=torch.bool))
