"""The advantage-guided target, the gated autoencoder and A2PR's losses: limits, equations, gradients, improvement."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimand.policies import (
    A2PR,
    TD3BC,
    AdvantageGatedVAE,
    BatchStream,
    Pendulum,
    ScaledLog,
    advantage_guided_target,
)
from minimand.policies.stacked_networks import member_generators

SMALL = {"hidden": (8,), "vae_hidden": (8,)}


@pytest.fixture(scope="module")
def log():
    pendulum = Pendulum()
    return ScaledLog.of(pendulum.log("mixed", episodes=4, seed=3), low=pendulum.low, high=pendulum.high)


def first_batch(log, learner, seeds=(0,), size=16):
    return next(BatchStream(log, seeds=seeds, batch_size=size, noise_width=learner.noise_width))


def opinionated(log, **options):
    """A learner whose critics have moved away from their slow copies, and whose gates are open for half of a batch."""
    learner = A2PR(3, 1, **SMALL, **options)
    batch = first_batch(log, learner, size=64)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in [*learner.nets.critic.parameters(), *learner.vae.parameters()]:
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
        advantage = learner.value(batch.observation, batch.action) - learner.state_value.head(batch.observation)[..., 0]
        learner.state_value.biases[-1] += advantage.median()
    return learner, batch


def in_double_precision(learner, batch):
    return learner.double(), type(batch)(*(part.double() if part.is_floating_point() else part for part in batch))


def test_with_no_weight_on_the_mask_the_loss_is_td3s(log):
    learner, batch = opinionated(log, alpha=1.3, mask_weight=0.0)
    value = learner.value(batch.observation, learner.act(batch.observation))
    torch.testing.assert_close(learner.actor_loss(batch), -1.3 * value.mean(1) / value.abs().mean(1), rtol=1e-6, atol=0)


def test_with_logged_candidates_and_an_open_mask_the_loss_is_td3_bcs(log):
    learner, batch = opinionated(log, candidates="logged", mask_threshold=-math.inf)
    plain = TD3BC(3, 1, hidden=(8,))
    plain.nets.load_state_dict(learner.nets.state_dict())
    torch.testing.assert_close(learner.actor_loss(batch), plain.actor_loss(batch), rtol=1e-6, atol=0)


def test_a2pr_is_its_equations_written_out(log):
    learner, batch = opinionated(log, alpha=1.7, mask_weight=0.6)
    actor, critic = learner.network(0), learner.nets.critic.networks.member(0)
    encoder, decoder = learner.vae.encoder.member(0), learner.vae.decoder.member(0)
    state, action = batch.observation[0], batch.action[0]
    q = lambda a: critic(torch.cat([state, a], 1))[:, 0]  # noqa: E731
    v = learner.state_value.member(0)(state)[:, 0]
    mean, log_std = encoder(torch.cat([state, action], 1)).chunk(2, 1)
    log_std = log_std.clamp(-4, 2)
    remembered = torch.tanh(decoder(torch.cat([state, mean + log_std.exp() * batch.noise[0, :, 1:3]], 1)))
    gate = (q(action) - v > 0).float()[:, None]
    assert 0 < gate.mean() < 1
    law, prior = (torch.distributions.Normal(m, s) for m, s in ((mean, log_std.exp()), (0 * mean, 0 * mean + 1)))
    divergence = torch.distributions.kl_divergence(law, prior).mean()
    expected = (gate * (remembered - action) ** 2).mean() + 0.5 * divergence
    torch.testing.assert_close(learner.vae_loss(batch)[0], expected)
    chosen = torch.tanh(actor(state))
    mean, log_std = encoder(torch.cat([state, chosen], 1)).chunk(2, 1)
    proposal = torch.tanh(decoder(torch.cat([state, mean + log_std.clamp(-4, 2).exp() * batch.noise[0, :, 3:5]], 1)))
    better = (q(proposal) - v) >= (q(action) - v)
    target = torch.where(better[:, None], proposal, action)
    mask = (((q(proposal) - v) >= 0) | ((q(action) - v) > 0)).float()[:, None]
    assert 0 < better.float().mean() < 1
    expected = -1.7 / q(chosen).abs().mean() * q(chosen).mean() + (0.6 * mask * (chosen - target) ** 2).mean()
    torch.testing.assert_close(learner.actor_loss(batch)[0], expected)


def test_the_value_of_states_regresses_the_lesser_of_two_targets(log):
    learner, batch = opinionated(log)
    actor = learner.nets.slow_actor.member(0)
    following = torch.tanh(actor(batch.next_observation[0])) + (0.2 * batch.noise[0, :, :1]).clamp(-0.5, 0.5)
    pair = torch.cat([batch.next_observation[0], following.clamp(-1, 1)], 1)
    targets = []
    for critic in (learner.nets.slow_critic, learner.nets.critic):
        least = torch.minimum(*(critic.networks.member(0, head=head)(pair)[:, 0] for head in (0, 1)))
        targets.append(batch.reward[0] + 0.99 * batch.continues[0] * least)
    torch.testing.assert_close(learner.nets.target(batch)[0], targets[0])
    cautious = learner.cautious_target(batch, learner.nets.target(batch))[0]
    torch.testing.assert_close(cautious, torch.minimum(*targets))
    assert (cautious < targets[0]).any()
    ours = learner.nets.target(batch)
    before = learner.state_value.head(batch.observation)[..., 0]
    reported = learner.update(batch)["value"]
    torch.testing.assert_close(reported, (before - learner.cautious_target(batch, ours)).square().mean(1))


def test_an_open_gate_makes_the_autoencoder_bcqs_and_its_divergence_that_of_torch():
    vae = AdvantageGatedVAE(3, 2, hidden=(8,), generators=member_generators((0, 1))).double()
    draw = torch.Generator().manual_seed(0)
    state, action, noise = (torch.randn(2, 6, width, generator=draw, dtype=torch.float64) for width in (3, 2, 4))
    action = action.tanh()
    loss = vae.loss(state, action, gate=torch.ones(2, 6, dtype=torch.bool), noise=noise)
    mean, log_std = vae.encode(state, action)
    law = torch.distributions.Normal(mean, log_std.exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = torch.distributions.kl_divergence(law, prior).mean((1, 2))
    errors = nn.functional.mse_loss(vae(state, action, noise), action, reduction="none").mean((1, 2))
    torch.testing.assert_close(loss, errors + 0.5 * divergence, rtol=1e-6, atol=0)
    # With an eye on nothing, nothing but the divergence is left, which no gate closes.
    shut = vae.loss(state, action, gate=torch.zeros(2, 6), noise=noise, weight=3.0)
    torch.testing.assert_close(shut, 0.5 * divergence, rtol=1e-6, atol=0)


def test_an_autoencoder_without_noise_and_with_a_perfect_decoder_remembers_exactly():
    vae = AdvantageGatedVAE(1, 1, latent_dim=1, hidden=(), generators=member_generators((0,))).double()
    with torch.no_grad():  # encoder (s, a) -> (a, -4); decoder (s, z) -> tanh(z)
        for network, weight, bias in (
            (vae.encoder, [[0.0, 0.0], [1.0, 0.0]], [0.0, -4.0]),
            (vae.decoder, [[0.0], [1.0]], [0.0]),
        ):
            network.weights[0].copy_(torch.tensor([weight]))
            network.biases[0].copy_(torch.tensor([[bias]]))
    latent = torch.linspace(-1, 1, 5, dtype=torch.float64).view(1, 5, 1)
    nothing = torch.zeros(1, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(vae(nothing, latent, nothing), latent.tanh())
    # The action 0 is remembered without error: what is left is the divergence of N(0, e^-8), here the narrowest there is.
    loss = vae.loss(nothing, nothing, gate=torch.ones(1, 5), noise=nothing)
    expected = 0.5 * 0.5 * (math.exp(-8) - 1 + 8)
    torch.testing.assert_close(loss[0], torch.tensor(expected, dtype=torch.float64))


def test_a_wide_posterior_overflows_nothing():
    vae = AdvantageGatedVAE(3, 1, hidden=(8,), generators=member_generators((0,)))
    with torch.no_grad():
        vae.encoder.biases[-1].fill_(1e4)
    state, action = torch.randn(1, 4, 3), torch.rand(1, 4, 1)
    loss = vae.loss(state, action, gate=torch.ones(1, 4), noise=torch.zeros(1, 4, 2))
    assert torch.isfinite(loss).all()
    assert vae.encode(state, action)[1].max() == 2


def test_candidates_of_the_prior_stay_where_the_decoder_was_trained():
    vae = AdvantageGatedVAE(3, 1, hidden=(8,), generators=member_generators((0, 1)))
    state, noise = torch.randn(2, 5, 3), torch.randn(2, 5, 7, 2)
    proposed = vae.propose(state, noise=noise)
    for candidate in range(7):
        alone = vae.decode(state, noise[:, :, candidate].clamp(-0.5, 0.5))
        torch.testing.assert_close(proposed[:, :, candidate], alone)


def test_a_gated_autoencoder_remembers_only_the_good_actions():
    # Four fifths of the actions are near -0.7 and worth 0, one fifth near 0.7 and worth 1; V is the mean, 0.2.
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(1, 2000, 1, generator=generator)
    good = torch.rand(1, 2000, generator=generator) < 0.2
    action = torch.where(good, 0.7, -0.7).unsqueeze(-1) + 0.05 * torch.randn(1, 2000, 1, generator=generator)
    gate = good.float() - 0.2 > 0
    shares = []
    for opened in (gate, torch.ones_like(gate)):
        vae = AdvantageGatedVAE(1, 1, hidden=(16,), generators=member_generators((0,)))
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
        for _ in range(400):
            rows = torch.randint(2000, (128,), generator=generator)
            noise = torch.randn(1, 128, 2, generator=generator)
            # Weighed as in a likelihood of that noise: with less the latent says nothing and means are remembered.
            loss = vae.loss(state[:, rows], action[:, rows], gate=opened[:, rows], noise=noise, weight=20.0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        noise = 0.5 * torch.randn(1, 1000, 1, 2, generator=generator)
        with torch.no_grad():
            shares.append((vae.propose(state[:, :1000], noise=noise) > 0.5).float().mean().item())
    assert shares[0] >= 0.95
    assert shares[1] <= 0.5


@given(seed=st.integers(0, 999), threshold=st.sampled_from([-math.inf, -0.5, 0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_the_target_has_the_larger_advantage_and_the_mask_says_whether_it_is_followed(seed, threshold):
    draw = torch.Generator().manual_seed(seed)
    logged, proposal = (torch.randn(7, 2, generator=draw) for _ in range(2))
    q_logged, q_proposal, v = (torch.randn(7, generator=draw) for _ in range(3))
    values = {"logged_value": q_logged, "proposal_value": q_proposal, "state_value": v}
    target = advantage_guided_target(logged, proposal, **values, threshold=threshold)
    advantage = torch.where(target.proposed, q_proposal, q_logged) - v
    assert torch.equal(advantage, torch.maximum(q_proposal - v, q_logged - v))
    assert torch.equal(target.action, torch.where(target.proposed[:, None], proposal, logged))
    assert torch.equal(target.mask, (q_proposal - v >= threshold) | (q_logged - v > threshold))
    # Adding the same to all values changes nothing (a power of two, so that no rounding does either).
    moved = {name: (64 * value).round() / 64 for name, value in values.items()}
    before = advantage_guided_target(logged, proposal, **moved, threshold=threshold)
    after = advantage_guided_target(
        logged, proposal, **{name: value + 8 for name, value in moved.items()}, threshold=threshold
    )
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_at_the_threshold_a_proposal_is_followed_and_a_logged_action_is_not():
    zero, one = torch.zeros(1), torch.ones(1)
    action = torch.zeros(1, 1)

    def mask(logged, proposal):
        return advantage_guided_target(
            action, action, logged_value=logged, proposal_value=proposal, state_value=zero
        ).mask.item()

    assert mask(-one, zero)
    assert not mask(zero, -one)
    assert mask(one, -one)
    assert not mask(-one, -one)


def test_following_actions_of_positive_advantage_is_nowhere_worse_in_an_exact_process():
    draw = torch.Generator().manual_seed(0)
    states, actions, discount = 20, 5, 0.9

    def law(*shape):
        return torch.rand(*shape, generator=draw, dtype=torch.float64).softmax(-1)

    moves, reward = law(states, actions, states) ** 4, torch.randn(states, actions, generator=draw, dtype=torch.float64)
    moves = moves / moves.sum(-1, keepdim=True)
    for _ in range(10):
        behaviour, proposer = law(states, actions), law(states, actions)

        def value(policy):
            system = torch.eye(states, dtype=torch.float64) - discount * torch.einsum("sa,sat->st", policy, moves)
            return torch.linalg.solve(system, (policy * reward).sum(1))

        v = value(behaviour)
        q = reward + discount * moves @ v
        logged = torch.arange(actions, dtype=torch.float64).view(1, -1, 1, 1).expand(states, -1, actions, 1)
        proposal = logged.transpose(1, 2)
        target = advantage_guided_target(
            logged,
            proposal,
            logged_value=q[:, :, None].expand(-1, -1, actions),
            proposal_value=q[:, None, :].expand(-1, actions, -1),
            state_value=v[:, None, None].expand(-1, actions, actions),
        )
        weight = behaviour[:, :, None] * proposer[:, None, :]
        chosen = nn.functional.one_hot(target.action[..., 0].long(), actions)
        guided = torch.einsum("sij,sija->sa", weight, chosen.double())
        torch.testing.assert_close(guided.sum(1), torch.ones(states, dtype=torch.float64))
        assert (value(guided) >= v - 1e-10).all()
        masked = torch.einsum("sij,sija->sa", weight * target.mask, chosen.double())
        masked = masked / masked.sum(1, keepdim=True)
        assert (value(masked) >= v - 1e-10).all()


def test_rows_outside_the_mask_pull_nowhere_and_the_order_of_rows_is_nothing(log):
    learner, batch = opinionated(log)
    learner, batch = in_double_precision(learner, batch)
    action = learner.act(batch.observation).detach().requires_grad_()
    target = learner.guided_target(batch, action)
    assert 0 < target.mask.double().mean() < 1
    (gradient,) = torch.autograd.grad((target.mask.unsqueeze(-1) * (action - target.action).square()).mean(), action)
    assert torch.equal(gradient[~target.mask], torch.zeros_like(gradient[~target.mask]))
    assert (gradient[target.mask] != 0).all()
    order = torch.randperm(64)
    shuffled = type(batch)(*(part[:, order] for part in batch))
    torch.testing.assert_close(learner.actor_loss(shuffled), learner.actor_loss(batch))
    torch.testing.assert_close(learner.vae_loss(shuffled), learner.vae_loss(batch))


def actor_gradient(learner, batch):
    """The gradient of the loss in the policy's actions."""
    action = learner.nets.act(batch.observation).detach().requires_grad_()
    learner.nets.act = lambda observation: action
    try:
        (gradient,) = torch.autograd.grad(learner.actor_loss(batch).sum(), action)
    finally:
        del learner.nets.act
    return action, gradient


@pytest.mark.parametrize("candidates", ["policy", "prior"])
def test_a_target_taken_as_given_pulls_by_twice_the_difference(log, candidates):
    learner, batch = opinionated(log, alpha=1.5, mask_weight=0.7, candidates=candidates)
    action, gradient = actor_gradient(learner, batch)
    target = learner.guided_target(batch, action)
    assert not target.action.requires_grad
    value = learner.value(batch.observation, action)
    (slope,) = torch.autograd.grad(value.sum(), action)
    pull = 2 * 0.7 * target.mask.unsqueeze(-1) * (action - target.action)
    expected = (-1.5 / value.abs().mean() * slope + pull) / 64
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-5, atol=1e-7)


def test_a_target_that_moves_with_the_policy_pulls_by_what_is_left_of_the_difference(log):
    learner, batch = opinionated(log, alpha=0.0, detach_target=False)
    learner, batch = in_double_precision(learner, batch)
    action, gradient = actor_gradient(learner, batch)
    target = learner.guided_target(batch, action)
    (moved,) = torch.autograd.grad(target.action.sum(), action)
    assert (moved[target.proposed] != 0).all()
    assert (moved[~target.proposed] == 0).all()
    expected = 2 * target.mask.unsqueeze(-1) * (action - target.action) * (1 - moved) / 64
    torch.testing.assert_close(gradient, expected.detach())


def test_the_prior_proposes_the_best_of_its_samples(log):
    learner, batch = opinionated(log, candidates="prior", num_candidates=6)
    assert learner.noise_width == 1 + 2 + 6 * 2
    action = learner.act(batch.observation)
    chosen = learner.propose(batch, action)
    noise = batch.noise[..., 3:].view(1, 64, 6, 2)
    tried = learner.vae.propose(batch.observation, noise=noise)
    values = torch.stack([learner.value(batch.observation, tried[:, :, each]) for each in range(6)], -1)
    torch.testing.assert_close(learner.value(batch.observation, chosen), values.amax(-1))


def test_thresholds_of_minus_infinity_open_gate_and_mask(log):
    learner, batch = opinionated(log, gate_threshold=-math.inf, mask_threshold=-math.inf)
    assert learner.gate(batch).all()
    assert learner.guided_target(batch, learner.act(batch.observation)).mask.all()
    shut, batch = opinionated(log, gate_threshold=math.inf, mask_threshold=math.inf)
    assert not shut.gate(batch).any()
    assert not shut.guided_target(batch, shut.act(batch.observation)).mask.any()


@pytest.mark.untyped
def test_wrong_input_is_refused_at_once():
    action, value = torch.zeros(4, 1), torch.zeros(4)
    values = {"logged_value": value, "proposal_value": value, "state_value": value}
    with pytest.raises(ValueError, match=r"state_value must have shape \(4,\), got \(4, 1\)"):
        advantage_guided_target(action, action, **{**values, "state_value": value[:, None]})
    with pytest.raises(ValueError, match="proposal_value contains NaN"):
        advantage_guided_target(action, action, **{**values, "proposal_value": value / 0})
    with pytest.raises(ValueError, match=r"proposal must have the shape of logged \(4, 1\), got \(3, 1\)"):
        advantage_guided_target(action, action[:3], **values)
    with pytest.raises(ValueError, match="threshold must be a number"):
        advantage_guided_target(action, action, **values, threshold=math.nan)
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        A2PR(3, 1, alpha=-1.0)
    with pytest.raises(ValueError, match="candidates must be one of"):
        A2PR(3, 1, candidates="both")
    with pytest.raises(ValueError, match="num_candidates must be at least 1"):
        A2PR(3, 1, candidates="prior", num_candidates=0)
    with pytest.raises(ValueError, match="mask_threshold must be a number"):
        A2PR(3, 1, mask_threshold=math.nan)
    vae = AdvantageGatedVAE(3, 1, hidden=(4,), generators=member_generators((0,)))
    with pytest.raises(ValueError, match=r"gate must have shape \(1, 5\), got \(1, 5, 1\)"):
        vae.loss(torch.zeros(1, 5, 3), torch.zeros(1, 5, 1), gate=torch.ones(1, 5, 1), noise=torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        AdvantageGatedVAE(3, 1, latent_dim=0, generators=member_generators((0,)))
