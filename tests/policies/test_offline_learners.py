"""The offline baselines and what all learners share: equations, stacking, scaling, saving, going on."""

import copy
import math

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from minimand.policies import (
    A2PR,
    CQL,
    IQL,
    PRDC,
    TD3BC,
    BatchStream,
    BehaviourCloning,
    FamO2O,
    Pendulum,
    Policy,
    ScaledLog,
    load_policy,
    train_offline,
)
from minimand.policies.gaussian_actor import GaussianActor, SquashedActor
from minimand.policies.iql import expectile_loss
from minimand.policies.offline_batches import Scaling
from minimand.policies.stacked_networks import StackedMLP, member_generators

LEARNERS = {
    "FamO2O": FamO2O,
    "FamO2O on CQL": lambda *args, **settings: FamO2O(*args, base="cql", num_actions=2, **settings),
    "BehaviourCloning": BehaviourCloning,
    "TD3BC": TD3BC,
    "IQL": IQL,
    "CQL": lambda *args, **settings: CQL(*args, num_actions=2, **settings),
    "A2PR": lambda *args, **settings: A2PR(*args, vae_hidden=(8,), **settings),
    "PRDC": lambda *_, **settings: PRDC(ScaledLog.of(Pendulum().log("medium", episodes=4, seed=3)), **settings),
}


@pytest.fixture(scope="module")
def log():
    pendulum = Pendulum()
    return ScaledLog.of(pendulum.log("medium", episodes=4, seed=3), low=pendulum.low, high=pendulum.high)


def first_batch(log, learner, seeds=(0,), size=16):
    return next(BatchStream(log, seeds=seeds, batch_size=size, noise_width=learner.noise_width))


def test_the_pendulum_is_gymnasiums_step_for_step():
    theirs, ours = gymnasium.make("Pendulum-v1"), Pendulum()
    ours.reset(1, seed=5)
    theirs.reset(seed=0)
    theirs.unwrapped.state = np.array([float(ours.angle), float(ours.speed)])
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        action = 6 * torch.rand((1, 1), generator=generator) - 3
        seen, reward, terminated, truncated, _ = theirs.step(action[0].numpy())
        observation, gain = ours.step(action)
        np.testing.assert_allclose(observation[0], seen, atol=2e-3)
        np.testing.assert_allclose(float(gain), reward, atol=2e-2)
        assert (terminated, truncated) == (False, step == 199)


def test_the_controller_is_an_expert_and_chance_is_not():
    pendulum = Pendulum()
    good = pendulum.returns(pendulum.controller, episodes=200).mean()
    poor = pendulum.log("random", episodes=50).episode_returns().mean()
    assert -250 < good < -100
    assert poor < -1000
    mixed = pendulum.log("mixed", episodes=100).episode_returns()
    assert mixed[:5].mean() > -400 > mixed[5:].mean()


def test_a_stacked_network_is_each_of_its_networks():
    stack = StackedMLP((3, 5, 2), generators=member_generators((0, 7)), heads=2)
    input = torch.randn(2, 4, 3)
    out = stack(input)
    for member in range(2):
        for head in range(2):
            torch.testing.assert_close(stack.member(member, head=head)(input[member]), out[member, head])
            torch.testing.assert_close(stack.head(input, head)[member], out[member, head])
    alone = StackedMLP((3, 5, 2), generators=member_generators((7,)), heads=2)
    torch.testing.assert_close(alone(input[1:])[0], out[1])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_member_of_a_stack_learns_what_it_learns_alone(name, log):
    together = LEARNERS[name](3, 1, hidden=(8,), seeds=(0, 4)).double()
    alone = LEARNERS[name](3, 1, hidden=(8,), seeds=(4,)).double()
    wide = ScaledLog(*(part.double() for part in list(vars(log).values())[:5]), log.scaling)
    many = train_offline(together, wide, seeds=(0, 4), steps=30, batch_size=16, report_every=10)
    one = train_offline(alone, wide, seeds=(4,), steps=30, batch_size=16, report_every=10)
    probe = log.observation[:50].double()
    torch.testing.assert_close(together.act(probe.expand(2, -1, -1))[1], alone.act(probe[None])[0])
    for key, curve in one.losses.items():
        torch.testing.assert_close(many.losses[key][:, 1], curve[:, 0])
    assert not torch.equal(many.losses["actor"][:, 0], many.losses["actor"][:, 1])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_that_was_cut_off_ends_where_it_would_have_ended(name, log, tmp_path):
    settings = {"seeds": (1,), "batch_size": 16, "report_every": 10}

    def measure(learner, step):
        return [step, learner.act(log.observation[None, :3]).sum().item()]

    whole = train_offline(LEARNERS[name](3, 1, hidden=(8,), seeds=(1,)), log, steps=100, measure=measure, **settings)
    file = tmp_path / "run.safetensors"
    for steps in (30, 55, 100):  # 55 lies between two reports: the steps since the last are taken again
        learner = LEARNERS[name](3, 1, hidden=(8,), seeds=(1,))
        parts = train_offline(learner, log, steps=steps, measure=measure, checkpoint=file, **settings)
    assert parts.measured == whole.measured
    for key, value in whole.policies[0].state_dict().items():
        assert torch.equal(value, parts.policies[0].state_dict()[key])
    assert all(torch.equal(curve, parts.losses[key]) for key, curve in whole.losses.items())
    with pytest.raises(ValueError, match="another run: its batch_size differs"):
        train_offline(
            LEARNERS[name](3, 1, hidden=(8,), seeds=(1,)), log, steps=100, checkpoint=file, seeds=(1,), report_every=10
        )


def test_td3_bc_is_its_equations_written_out(log):
    learner = TD3BC(3, 1, hidden=(8,), alpha=1.7)
    batch = first_batch(log, learner)
    actor, (first, second) = learner.network(0), (learner.nets.critic.networks.member(0, head=h) for h in (0, 1))
    state, action = batch.observation[0], batch.action[0]
    chosen = torch.tanh(actor(state))
    value = first(torch.cat([state, chosen], 1))
    expected = -1.7 / value.abs().mean() * value.mean() + ((chosen - action) ** 2).mean()
    torch.testing.assert_close(learner.actor_loss(batch)[0], expected)
    following = torch.tanh(actor(batch.next_observation[0])) + (0.2 * batch.noise[0]).clamp(-0.5, 0.5)
    pair = torch.cat([batch.next_observation[0], following.clamp(-1, 1)], 1)
    target = batch.reward[0] + 0.99 * batch.continues[0] * torch.minimum(first(pair), second(pair))[:, 0]
    torch.testing.assert_close(learner.nets.target(batch)[0], target)
    loss = sum((net(torch.cat([state, action], 1))[:, 0] - target).square().mean() for net in (first, second))
    torch.testing.assert_close(learner.update(batch)["critic"][0], loss)


def test_slow_copies_move_with_the_actor_by_their_rate(log):
    learner = TD3BC(3, 1, hidden=(8,), target_rate=0.25)
    before = copy.deepcopy(learner.nets.slow_critic.state_dict())
    stream = BatchStream(log, seeds=(0,), batch_size=8, noise_width=1)
    learner.update(next(stream))
    assert all(torch.equal(value, before[key]) for key, value in learner.nets.slow_critic.state_dict().items())
    learner.update(next(stream))
    for key, value in learner.nets.slow_critic.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.25 * (learner.nets.critic.state_dict()[key] - before[key]))


def test_after_the_end_of_the_process_nothing_is_worth_anything(log):
    learner = TD3BC(3, 1, hidden=(8,))
    batch = first_batch(log, learner)._replace(continues=torch.zeros(1, 16))
    assert torch.equal(learner.nets.target(batch), batch.reward)


def test_an_expectile_of_a_half_is_half_the_squared_error_and_a_high_one_is_near_the_largest():
    error = torch.randn(2, 50)
    torch.testing.assert_close(expectile_loss(error, torch.full((2,), 0.5)), error.square().mean(1) / 2)
    sample = torch.rand(1, 400, dtype=torch.float64)
    for expectile, low, high in ((0.5, 0.45, 0.55), (0.999, 0.9, 1.0)):
        value = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        steps = torch.optim.LBFGS([value], max_iter=200, tolerance_grad=1e-12)

        def closure(value=value, expectile=expectile, steps=steps):
            steps.zero_grad()
            loss = expectile_loss(sample - value, torch.tensor([expectile], dtype=torch.float64)).sum()
            loss.backward()
            return loss

        steps.step(closure)
        assert low < float(value.detach()) < high


def test_iqls_actor_imitates_where_the_advantage_is_nought_and_weighs_by_its_exponential(log):
    learner = IQL(3, 1, hidden=(8,), beta=0.0)
    batch = first_batch(log, learner)
    log_prob = learner.actor.log_prob(batch.observation, batch.action)
    torch.testing.assert_close(learner.actor_loss(batch), -log_prob.mean(1))
    eager = IQL(3, 1, hidden=(8,), beta=2.0)
    advantage = (
        eager.slow_critic.least(batch.observation, batch.action) - eager.state_value.head(batch.observation)[..., 0]
    )
    torch.testing.assert_close(eager.actor_loss(batch), -(torch.exp(2 * advantage) * log_prob).mean(1))


def test_gaussian_densities_are_those_of_torch_distributions():
    inputs, noise = torch.randn(2, 6, 3), torch.randn(2, 6, 2)
    actor = GaussianActor(3, 2, hidden=(4,), generators=member_generators((0, 1)))
    with torch.no_grad():
        actor.log_std += torch.randn(2, 1, 2) / 3
    action = actor.draw(inputs, noise)
    law = torch.distributions.Normal(actor(inputs), actor.log_std.exp().expand(2, 6, 2))
    torch.testing.assert_close(actor.log_prob(inputs, action), law.log_prob(action).sum(-1))
    squashed = SquashedActor(3, 2, hidden=(4,), generators=member_generators((0, 1)))
    action, log_prob = squashed.draw(inputs, noise)
    mean, log_std = squashed.network.head(inputs).chunk(2, -1)
    law = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.transforms.TanhTransform()
    )
    torch.testing.assert_close(log_prob, law.log_prob(action).sum(-1), atol=1e-4, rtol=1e-4)


def test_cqls_excess_estimates_the_log_integral_of_exp_q(log):
    learner = CQL(3, 1, hidden=(8,), num_actions=2000)
    batch = first_batch(log, learner, size=2)
    grid = torch.linspace(-1, 1, 4001)
    state = batch.observation[0].repeat_interleave(len(grid), 0)
    values = learner.critic(state[None], grid.repeat(2)[None, :, None])[0].view(2, 2, -1)
    integral = torch.trapezoid(values.exp(), grid, dim=-1).log()
    expected = integral.mean(-1) - learner.critic(batch.observation, batch.action)[0].mean(-1)
    torch.testing.assert_close(learner.excess(batch)[0], expected, atol=0.05, rtol=0)


def test_cql_that_is_not_conservative_is_soft_actor_critic(log):
    learner = CQL(3, 1, hidden=(8,), conservatism=[0.0, 3.0], num_actions=2, seeds=(0, 0))
    batch = first_batch(log, learner, seeds=(0, 0))
    plain, conservative = learner.critic_loss(batch)
    torch.testing.assert_close(conservative - plain, 3 * learner.excess(batch)[1].sum())


@pytest.mark.parametrize(("log_std", "rises"), [(0.0, False), (-6.0, True)])
def test_cqls_temperature_rises_while_the_policy_is_too_sure(log, log_std, rises):
    learner = CQL(3, 1, hidden=(8,), num_actions=2)
    with torch.no_grad():
        learner.actor.network.biases[-1][..., 1] = log_std
    learner.update(first_batch(log, learner))
    assert (float(learner.log_temperature.detach()) > 0) == rises


def test_scaling_maps_to_unit_deviation_and_the_bounds_to_one_and_back():
    log = Pendulum().log("random", episodes=3)
    scaling = Scaling.of(log, low=torch.tensor([-2.0]), high=torch.tensor([2.0]))
    seen = scaling.observation_in(log.observation)
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.ones(3), atol=5e-3, rtol=0)
    assert scaling.action_in(torch.tensor([[-2.0], [2.0]])).flatten().tolist() == [-1, 1]
    torch.testing.assert_close(scaling.action_out(scaling.action_in(log.action)), log.action)


def test_a_policy_comes_back_from_its_file_and_acts_alike(log, tmp_path):
    policy = train_offline(TD3BC(3, 1, hidden=(8,)), log, steps=5, batch_size=8).policies[0]
    policy.save(tmp_path / "policy.safetensors")
    same = load_policy(tmp_path / "policy.safetensors")
    seen = torch.randn(7, 3)
    assert torch.equal(policy.act(seen), same.act(seen))
    assert policy.act(seen.numpy()).shape == (7, 1)
    assert policy.act(seen[0].tolist()).shape == (1,)
    assert (policy.act(100 * seen).abs() <= 2 + 1e-6).all()


def test_an_exported_policy_acts_alike_in_onnx_runtime(log, tmp_path):
    policy = train_offline(IQL(3, 1, hidden=(8,)), log, steps=5, batch_size=8).policies[0]
    policy.export_onnx(tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    for rows in (1, 7):
        seen = torch.randn(rows, 3)
        (action,) = session.run(["action"], {"observation": seen.numpy()})
        np.testing.assert_allclose(action, policy.act(seen), atol=1e-5)


@pytest.mark.untyped
def test_wrong_input_is_refused_at_once(log, tmp_path):
    policy = Policy(nn.Sequential(nn.Linear(3, 1)), log.scaling)
    with pytest.raises(ValueError, match=r"observation must have shape \(3,\)"):
        policy.act([1.0, 2.0])
    with pytest.raises(ValueError, match="observation contains NaN"):
        policy.act([1.0, math.nan, 2.0])
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_policy(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_policy(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="alpha must be one number or 2"):
        TD3BC(3, 1, alpha=[1.0, 2.0, 3.0], seeds=(0, 1))
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        TD3BC(3, 1, alpha=-1.0)
    with pytest.raises(ValueError, match="seeds must name"):
        TD3BC(3, 1, seeds=())
    discrete = Pendulum().log("random", episodes=1)
    discrete = type(discrete)(**discrete.tensors() | {"action": torch.zeros(200, dtype=torch.int64)})
    with pytest.raises(TypeError, match="wants continuous actions"):
        ScaledLog.of(discrete)
    with pytest.raises(ValueError, match="actions lie in"):
        ScaledLog.of(Pendulum().log("random", episodes=1), low=torch.tensor([-1.0]), high=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="loss is no longer finite"):
        train_offline(TD3BC(3, 1, hidden=(8,), lr=1e30), log, steps=20, batch_size=8, report_every=5)


def test_the_actor_moves_no_critic_and_the_critic_no_actor(log):
    learner = TD3BC(3, 1, hidden=(8,), policy_delay=1000)
    before = copy.deepcopy(learner.nets.actor.state_dict())
    stream = BatchStream(log, seeds=(0,), batch_size=8, noise_width=1)
    learner.update(next(stream))
    assert all(torch.equal(value, before[key]) for key, value in learner.nets.actor.state_dict().items())
    critic = copy.deepcopy(learner.nets.critic.state_dict())
    learner.nets.improve_actor(learner.actor_loss(next(stream)))
    assert all(torch.equal(value, critic[key]) for key, value in learner.nets.critic.state_dict().items())
    assert not torch.equal(next(learner.nets.actor.parameters()), before["weights.0"])
