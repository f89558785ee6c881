"""C-MORL: its barrier, its constraints, and that it reaches what weighted sums do not."""

import dataclasses

import pytest
import torch

from minimand.policies import (
    PPOSettings,
    VectorStep,
    extension_thresholds,
    interior_point_barrier,
    train_c_morl,
    weight_grid,
)
from minimand.policies.c_morl import _first_policies
from minimand.policies.constrained_extension import Extension, standardize
from minimand.policies.parallel_ppo import ParallelPPO
from minimand.policies.vector_actor_critic import ActionLaw, evaluate_stacked
from minimand.ppo import clipped_policy_loss
from minimand.stopping import Stop


class Line:
    """One step: an action on a line is paid by how near it is to -1 and to 1, a concave front."""

    observation_size, num_objectives, action_size, discrete = 1, 2, 1, False

    def __init__(self, num_episodes, seed=0, *, sign=1.0):
        self.num_episodes, self.sign = num_episodes, sign

    def reset(self):
        return torch.zeros(self.num_episodes, 1)

    def step(self, action):
        distances = torch.cat([action - 1, action + 1], 1).square()
        rewards = (-distances).exp() if self.sign > 0 else -distances
        over = torch.ones(self.num_episodes, dtype=torch.bool)
        return VectorStep(self.reset(), rewards, over, ~over, self.reset())


SHORT = PPOSettings(num_envs=64, num_steps=2, epochs=4, num_minibatches=2, lr=1e-2)


def extension(*, solver="ipo", make=Line, beta=0.9, sharpness=20.0, goals=(0, 1), settings=SHORT):
    generator = torch.Generator().manual_seed(0)
    policies = _first_policies(make, None, len(goals), 2, generator)
    trainer = ParallelPPO(make, policies, settings, generator=generator)
    return Extension(
        trainer, torch.tensor(goals), solver=solver, beta=beta, sharpness=sharpness, max_kl=0.01
    ), trainer.collect()


def loss_and_gradient(extend, data, loss):
    parameters = extend.trainer.parameters
    law = ActionLaw(evaluate_stacked(extend.trainer.network, parameters, data.observations)[0], False)
    logp = law.log_probability(data.actions)
    return torch.autograd.grad(loss(logp).sum(), list(parameters.values())[:6], allow_unused=True)


def vector(gradients):
    return torch.cat([each.flatten() for each in gradients if each is not None])


def plain(extend, data):
    own = data.advantages.gather(-1, extend.goals.view(-1, 1, 1).expand(*data.logp.shape, 1)).squeeze(-1)
    return lambda logp: clipped_policy_loss(logp, data.logp, standardize(own)).mean(1)


def prepared(**settings):
    extend, data = extension(**settings)
    extend.thresholds = extension_thresholds(data.returns, beta=extend.beta)
    extend.units = data.returns.abs()
    return extend, data


def test_the_barriers_gradient_is_that_of_the_returns_over_the_slack():
    extend, data = prepared()
    whole = vector(loss_and_gradient(extend, data, lambda logp: extend.loss(logp, data)))
    objective = vector(loss_and_gradient(extend, data, plain(extend, data)))

    def held(logp):
        returns = data.nearby_returns((logp - data.logp).exp())
        slack = (data.returns - extend.thresholds).detach()  # at the policy that acted
        return -(returns / slack).gather(1, 1 - extend.goals[:, None]).squeeze(1) / 20.0

    torch.testing.assert_close(whole - objective, vector(loss_and_gradient(extend, data, held)), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"sharpness": 1e12}, {"beta": -1e12}])
def test_without_barrier_or_threshold_the_extension_is_ppo_on_its_own_objective(settings):
    extend, data = prepared(**settings)
    whole = vector(loss_and_gradient(extend, data, lambda logp: extend.loss(logp, data)))
    torch.testing.assert_close(whole, vector(loss_and_gradient(extend, data, plain(extend, data))))


def test_the_barrier_is_the_logarithm_above_its_floor_and_its_tangent_below():
    slack = torch.tensor([1e-4, 1e-3, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    barrier = interior_point_barrier(slack, sharpness=4.0, floor=1e-3)
    slope = torch.autograd.grad(barrier.sum(), slack)[0]
    assert float(barrier.detach()[2]) == pytest.approx(-float(slack.detach()[2].log()) / 4)
    torch.testing.assert_close(slope, torch.tensor([-250.0, -250.0, -0.5, -250.0], dtype=torch.float64))
    assert float(barrier.detach()[3]) == pytest.approx(float(barrier.detach()[1]) + 250 * 2.001)


def test_thresholds_ask_for_a_share_of_gains_and_leave_room_for_costs():
    returns = torch.tensor([10.0, -10.0, 0.0])
    torch.testing.assert_close(extension_thresholds(returns, beta=0.8), torch.tensor([8.0, -12.0, 0.0]))
    torch.testing.assert_close(extension_thresholds(returns, beta=1.0), returns)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("solver", ["ipo", "cpo"])
def test_an_extended_policy_gains_in_its_objective_and_keeps_the_other(solver, sign):
    many = dataclasses.replace(SHORT, num_envs=1024)  # so that returns are known to a hundredth
    extend, data = extension(solver=solver, make=lambda n, seed: Line(n, sign=sign), settings=many)
    start = data.returns
    for _ in range(15):
        extend.update(data)
        data = extend.trainer.collect()
    for policy, goal in enumerate((0, 1)):
        gained = data.returns[policy, goal] - start[policy, goal]
        kept = data.returns[policy, 1 - goal] - extend.thresholds[policy, 1 - goal]
        unit = extend.units[policy, 1 - goal]
        assert gained > 0.03 * unit
        assert kept > -0.05 * unit


def test_a_trust_region_step_keeps_the_divergence_and_improves_the_surrogate():
    extend, data = extension(solver="cpo")
    trainer = extend.trainer
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    extend.thresholds = extension_thresholds(data.returns, beta=0.9)
    extend.units = data.returns.abs()
    extend._trust_region(data)
    law = ActionLaw(evaluate_stacked(trainer.network, trainer.parameters, data.observations)[0], False)
    divergence = ActionLaw(data.law, False).divergence(law).mean(1)
    assert (divergence > 1e-3).all()
    assert (divergence <= 0.015 + 1e-6).all()
    own = data.advantages.gather(-1, extend.goals.view(2, 1, 1).expand(2, 128, 1)).squeeze(-1)
    ratio = (law.log_probability(data.actions) - data.logp).exp()
    assert ((ratio * standardize(own)).mean(1) > 0).all()
    assert (extend.slack(ratio, data).gather(1, 1 - extend.goals[:, None]) >= -1e-5).all()
    assert any(not torch.equal(before[name], value) for name, value in trainer.parameters.items())


def grown(**settings):
    return train_c_morl(
        Line, reference=torch.zeros(2), settings=SHORT, evaluate_every=2, evaluation_gamma=1.0, seed=3, **settings
    )


def test_constrained_extension_finds_more_of_a_concave_front_than_weighted_sums_of_as_many_steps():
    ours = grown(initial_updates=24, extension_updates=8, max_iter=48)
    weighted = grown(weights=weight_grid(2, divisions=15), initial_updates=24, max_iter=24)
    assert weighted.steps >= 0.95 * ours.steps
    assert ours.archive.hypervolume() > weighted.archive.hypervolume() + 0.02
    assert ours.archive.hypervolume() < 0.3396  # the volume of the whole front
    assert ours.hypervolumes == tuple(sorted(ours.hypervolumes))
    chosen = ours.archive.assign(torch.tensor([1.0, 0.0]))
    action = chosen.payload.act(torch.zeros(1, 1))
    torch.testing.assert_close(chosen.returns[0], (-(action[0, 0] - 1).square()).exp().double(), atol=1e-5, rtol=1e-4)


def test_one_seed_gives_one_front_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (grown(initial_updates=2, extension_updates=2, max_iter=4) for _ in range(2))
    assert torch.equal(first.archive.returns, second.archive.returns)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_ends_when_every_policy_on_the_front_was_extended():
    result = grown(initial_updates=1, extension_updates=1, max_iter=10_000, capacity=1, num_select=1)
    assert result.status is Stop.CONVERGED


def test_it_learns_deep_sea_treasure_of_mo_gymnasium():
    from minimand.policies import GymEpisodes

    result = train_c_morl(
        lambda count, seed: GymEpisodes("deep-sea-treasure-concave-v0", num_episodes=count, seed=seed),
        reference=torch.tensor([0.0, -50.0]),
        settings=PPOSettings(num_envs=2, num_steps=32, epochs=2, num_minibatches=2, lr=3e-3, gamma=0.99),
        initial_updates=6,
        extension_updates=2,
        evaluate_every=2,
        evaluation_episodes=1,
        evaluation_steps=40,
        max_iter=8,
    )
    assert result.archive.hypervolume() > 0
    treasure, time = result.archive.returns[0].tolist()
    assert treasure > 0
    assert -50 < time < 0


@pytest.mark.untyped
def test_errors_name_the_argument():
    good = {"reference": torch.zeros(2), "settings": SHORT, "max_iter": 1}
    with pytest.raises(ValueError, match="beta"):
        train_c_morl(Line, **good, beta=1.1)
    with pytest.raises(ValueError, match="solver"):
        train_c_morl(Line, **good, solver="sqp")
    with pytest.raises(ValueError, match="weights"):
        train_c_morl(Line, **good, weights=torch.ones(2, 3))
    with pytest.raises(ValueError, match="num_select"):
        train_c_morl(Line, **good, num_select=0)
    with pytest.raises(ValueError, match="reference must have one number"):
        train_c_morl(Line, **(good | {"reference": torch.zeros(3)}))
