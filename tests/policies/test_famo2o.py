"""FamO2O: the family's equations, the balance model, what offline and online differ in, and its limits."""

import math

import pytest
import torch
from torch import nn

from minimand.policies import IQL, BatchStream, FamO2O, Pendulum, ScaledLog, fine_tune, load_policy, train_offline
from minimand.policies.balance_model import BalanceModel, encode_balance
from minimand.policies.stacked_networks import member_generators


@pytest.fixture(scope="module")
def log():
    pendulum = Pendulum()
    return ScaledLog.of(pendulum.log("medium", episodes=4, seed=3), low=pendulum.low, high=pendulum.high)


def first_batch(log, learner, seeds=(0,), size=16):
    return next(BatchStream(log, seeds=seeds, batch_size=size, noise_width=learner.noise_width))


def test_the_encoding_is_a_transformers_of_width_six():
    balance = torch.tensor([[0.0], [1.5], [14.0]], dtype=torch.float64)
    encoded = encode_balance(balance)
    for row, beta in zip(encoded, (0.0, 1.5, 14.0), strict=True):
        expected = [f(beta / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64))
    assert encoded.abs().max() <= 1


def test_the_balance_stays_in_its_range_and_its_middle_is_the_middle():
    model = BalanceModel(3, low=2.0, high=6.0, hidden=(4,), generators=member_generators((0, 1)))
    seen = 10 * torch.randn(2, 500, 3)
    balance, _ = model.draw(seen, 3 * torch.randn(2, 500, 1))
    assert balance.min() >= 2
    assert balance.max() <= 6
    assert float(model.spread(torch.zeros(1))) == 4
    uniform = model.uniform(torch.randn(1, 100_000, 1))
    assert abs(float(uniform.mean()) - 4) < 0.02
    assert abs(float(uniform.std()) - 4 / math.sqrt(12)) < 0.02


def test_the_log_density_of_the_balance_is_torchs_and_integrates_to_one():
    model = BalanceModel(3, low=2.0, high=6.0, hidden=(4,), generators=member_generators((0,)))
    seen, noise = torch.randn(1, 7, 3), torch.randn(1, 7, 1)
    balance, log_prob = model.draw(seen, noise)
    place = (balance - 2) / 2 - 1
    law = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(model.network.head(seen), model.log_std.exp()),
        torch.distributions.transforms.TanhTransform(),
    )
    torch.testing.assert_close(log_prob, law.log_prob(place).squeeze(-1), atol=1e-4, rtol=1e-4)
    # The density along places y = tanh(m + sigma * xi), from the same formula, as a function of xi.
    xi = torch.linspace(-9, 9, 40_001)[None, :, None]
    state = seen[:, :1].expand(1, 40_001, 3)
    balance, log_prob = model.draw(state, xi)
    place = ((balance - 2) / 2 - 1)[0, :, 0].double()
    assert abs(float(torch.trapezoid(log_prob[0].double().exp(), place)) - 1) < 1e-4


@pytest.mark.parametrize("online", [False, True])
def test_the_familys_loss_is_its_equation_written_out(log, online):
    learner = FamO2O(3, 1, hidden=(8,), balance=(1.0, 9.0))
    if online:
        learner.go_online()
    batch = first_batch(log, learner)
    noise = batch.noise[..., 2:3]
    drawn = learner.balance.draw(batch.observation, noise)[0] if online else 5 + 4 * torch.erf(noise / math.sqrt(2))
    input = torch.cat([batch.observation, encode_balance(drawn)], -1)
    value = learner.slow_critic(batch.observation, batch.action).amin(1)
    advantage = value - learner.state_value.head(batch.observation)[..., 0]
    weight = torch.exp(drawn[..., 0] * advantage).clamp_max(100).detach()
    expected = -(weight * learner.actor.log_prob(input, batch.action)).mean(1)
    torch.testing.assert_close(learner.actor_loss(batch), expected)


def test_the_balance_model_learns_through_the_policy_and_nothing_else_moves(log):
    learner = FamO2O(3, 1, hidden=(8,), balance=(1.0, 9.0))
    batch = first_batch(log, learner)
    loss, log_prob = learner.balance_loss(batch)
    chosen, _ = learner.balance.draw(batch.observation, batch.noise[..., :1])
    action = learner.actor.draw(torch.cat([batch.observation, encode_balance(chosen)], -1), batch.noise[..., 1:2])
    expected = (log_prob - learner.slow_critic(batch.observation, action).amin(1)).mean(1)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in learner.balance.parameters())
    before = {name: value.clone() for name, value in learner.actor.state_dict().items()}
    from minimand.policies.stacked_networks import descend

    descend(learner.optimizers()["balance"], learner.balance_loss(batch)[0])
    assert all(torch.equal(value, before[name]) for name, value in learner.actor.state_dict().items())


def test_a_range_that_is_all_but_a_point_is_iql_at_that_balance(log):
    family = FamO2O(3, 1, hidden=(8,), balance=(3.0, 3.0 + 1e-6))
    plain = IQL(3, 1, hidden=(8,), beta=3.0)
    plain.critic.load_state_dict(family.critic.state_dict())
    plain.slow_critic.load_state_dict(family.slow_critic.state_dict())
    plain.state_value.load_state_dict(family.state_value.state_dict())
    batch = first_batch(log, family)
    encoded = encode_balance(torch.tensor([[[3.0]]])).expand(1, 16, 6)
    log_prob = family.actor.log_prob(torch.cat([batch.observation, encoded], -1), batch.action)
    weight = torch.exp(3 * plain._advantage(batch)).clamp_max(100).detach()
    torch.testing.assert_close(family.actor_loss(batch), -(weight * log_prob).mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(family.critic_loss(batch), _critic_loss_of(plain, batch))


def _critic_loss_of(plain, batch):
    with torch.no_grad():
        target = (
            batch.reward + plain.discount * batch.continues * plain.state_value.head(batch.next_observation)[..., 0]
        )
    return (plain.critic(batch.observation, batch.action) - target[:, None]).square().mean(-1).sum(1)


def test_every_member_of_the_family_is_its_own_optimum():
    """In a bandit of known values, the family's mean at each balance is the exponentially weighted mean action."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    action = 2 * torch.rand((6000, 1), generator=generator) - 1
    reward = action[:, 0] * 0.5
    ends = torch.ones(6000, dtype=torch.bool)
    from minimand.policies import Transitions

    seen = torch.zeros(6000, 1)
    log = ScaledLog.of(Transitions(seen, action, reward, seen, ends, ~ends))
    learner = FamO2O(1, 1, hidden=(32, 32), balance=(0.0, 6.0), expectile=0.5, lr=3e-3, seeds=(0,))
    train_offline(learner, log, steps=2500, batch_size=128)
    for beta in (0.5, 3.0, 5.5):
        weight = torch.exp(beta * reward)
        expected = float((weight * action[:, 0]).sum() / weight.sum())
        input = torch.cat([log.observation[:1], encode_balance(torch.tensor([[beta]]))], -1)[None]
        assert abs(float(learner.actor(input).detach()) - expected) < 0.06


def test_on_cql_the_policy_weighs_value_by_its_balance(log):
    learner = FamO2O(3, 1, base="cql", hidden=(8,), balance=(0.5, 1.5), num_actions=2)
    batch = first_batch(log, learner)
    drawn = 1 + 0.5 * torch.erf(batch.noise[..., 2:3] / math.sqrt(2))
    input = torch.cat([batch.observation, encode_balance(drawn)], -1)
    action, log_prob = learner.actor.draw(input, batch.noise[..., 1:2])
    value = learner.critic(batch.observation, action).amin(1)
    torch.testing.assert_close(learner.actor_loss(batch), (log_prob - drawn[..., 0] * value).mean(1))


def test_on_cql_the_target_takes_the_next_states_own_balance(log):
    learner = FamO2O(3, 1, base="cql", hidden=(8,), balance=(0.5, 1.5), num_actions=2, conservatism=0.0)
    learner.go_online()
    batch = first_batch(log, learner)
    chosen, _ = learner.balance.draw(batch.next_observation, batch.noise[..., 3:4])
    there = torch.cat([batch.next_observation, encode_balance(chosen)], -1)
    action, _ = learner.actor.draw(there, batch.noise[..., 4:5])
    following = learner.slow_critic(batch.next_observation, action).amin(1)
    target = (batch.reward + 0.99 * batch.continues * following).detach()
    expected = (learner.critic(batch.observation, batch.action) - target[:, None]).square().mean(-1).sum(1)
    torch.testing.assert_close(learner.critic_loss(batch), expected)


@pytest.mark.parametrize(("aim", "rises"), [(-100.0, False), (100.0, True)])
def test_the_temperature_rises_while_the_balances_entropy_is_below_what_is_aimed_at(log, aim, rises):
    learner = FamO2O(3, 1, hidden=(8,), target_entropy=aim)
    learner.update(first_batch(log, learner))
    assert (float(learner.log_temperature.detach()) > 0) == rises


@pytest.mark.parametrize(("log_std", "rises"), [(0.0, False), (-6.0, True)])
def test_on_cql_the_entropys_weight_rises_while_the_policy_is_too_sure(log, log_std, rises):
    learner = FamO2O(3, 1, base="cql", hidden=(8,), balance=(0.5, 1.5), num_actions=2)
    with torch.no_grad():
        learner.actor.network.biases[-1][..., 1] = log_std
    learner.update(first_batch(log, learner))
    assert (float(learner.log_entropy_weight.detach()) > 0) == rises


def test_a_saved_family_acts_alike(log, tmp_path):
    policy = train_offline(FamO2O(3, 1, hidden=(8,), balance=(1.0, 9.0)), log, steps=5, batch_size=8).policies[0]
    policy.save(tmp_path / "policy.safetensors")
    seen = torch.randn(7, 3)
    assert torch.equal(policy.act(seen), load_policy(tmp_path / "policy.safetensors").act(seen))
    policy.export_onnx(tmp_path / "policy.onnx")


def test_a_policy_is_what_its_learner_does(log):
    learner = FamO2O(3, 1, hidden=(8,), seeds=(0, 1))
    seen = torch.randn(2, 5, 3)
    for member in range(2):
        torch.testing.assert_close(torch.tanh(learner.network(member)(seen[member])), learner.act(seen)[member])


def test_a_global_constraint_is_worth_at_least_one_a_state():
    """The theory's inclusion: one multiplier for the mean divergence never loses to a bound in every state."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    prior = torch.rand(50, 6, generator=generator, dtype=torch.float64).softmax(1)

    def tilted(inverse):
        policy = (prior.log() + inverse * value).softmax(1)
        return (policy * value).sum(1), (policy * (policy / prior).log()).sum(1)

    def solved(bound, mean):
        low, high = torch.zeros(50, 1, dtype=torch.float64), torch.full((50, 1), 200.0, dtype=torch.float64)
        for _ in range(200):
            middle = (low + high) / 2
            divergence = tilted(middle)[1][:, None]
            over = (divergence.mean() if mean else divergence) > bound
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return float(tilted(low)[0].mean())

    for bound in (0.05, 0.2, 0.5):
        assert solved(bound, mean=True) > solved(bound, mean=False)


def test_members_keep_to_their_own_episodes_online():
    world = Pendulum(episode_steps=20)
    log = world.log("medium", episodes=4)
    scaled = ScaledLog.of(log, low=world.low, high=world.high)
    settings = {"rounds": 2, "batch_size": 16, "evaluation_episodes": 2}
    together = fine_tune(FamO2O(3, 1, hidden=(8,), seeds=(0, 4)), log, world, scaled=scaled, seeds=(0, 4), **settings)
    alone = fine_tune(FamO2O(3, 1, hidden=(8,), seeds=(4,)), log, world, scaled=scaled, seeds=(4,), **settings)
    assert torch.isfinite(together.returns).all()
    torch.testing.assert_close(together.lived[0, 1], alone.lived[0, 0])
    assert not torch.equal(together.lived[:, 0], together.lived[:, 1])


@pytest.mark.untyped
def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="0 <= low < high"):
        FamO2O(3, 1, balance=(5.0, 1.0))
    with pytest.raises(ValueError, match="0 <= low < high"):
        FamO2O(3, 1, balance=(-1.0, 1.0))
    with pytest.raises(ValueError, match="base must be one of"):
        FamO2O(3, 1, base="sac")
    with pytest.raises(ValueError, match="expectile must lie below 1"):
        FamO2O(3, 1, expectile=1.0)
    assert isinstance(FamO2O(3, 1, hidden=(4,)), nn.Module)
