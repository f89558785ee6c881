"""A2PR's step against a plain loop of ordinary modules, as its authors' script and CORL's are written."""

import copy

import numpy as np
import torch
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.policies import A2PR, BatchStream, Pendulum, ScaledLog

PENDULUM = Pendulum()
LOG = ScaledLog.of(PENDULUM.log("mixed"), low=PENDULUM.low, high=PENDULUM.high)


def network(inputs, outputs):
    """Two hidden layers of 64."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


class Plain:
    """One learner, every network a module with an Adam of its own."""

    def __init__(self, log):
        self.log, self.steps, self.draw = log, 0, np.random.default_rng(0)
        self.actor, self.critics = network(3, 1), nn.ModuleList([network(4, 1), network(4, 1)])
        self.slow_actor, self.slow_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.state_value, self.encoder, self.decoder = network(3, 1), network(4, 4), network(5, 1)
        self.optimizers = [
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (
                self.actor.parameters(),
                self.critics.parameters(),
                self.state_value.parameters(),
                [*self.encoder.parameters(), *self.decoder.parameters()],
            )
        ]

    def _descend(self, which, loss):
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()

    def _remember(self, state, action):
        mean, log_std = self.encoder(torch.cat([state, action], 1)).chunk(2, 1)
        std = log_std.clamp(-4, 2).exp()
        latent = mean + std * torch.randn_like(std)
        return torch.tanh(self.decoder(torch.cat([state, latent], 1))), mean, std

    def update(self):
        """One step, on a batch drawn by NumPy."""
        rows = torch.from_numpy(self.draw.integers(len(self.log), size=128))
        state, action, reward = self.log.observation[rows], self.log.action[rows], self.log.reward[rows, None]
        following, continues = self.log.next_observation[rows], self.log.continues[rows, None]
        pair = torch.cat([state, action], 1)
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            after = torch.cat([following, (torch.tanh(self.slow_actor(following)) + noise).clamp(-1, 1)], 1)
            target = reward + 0.99 * continues * torch.minimum(*(critic(after) for critic in self.slow_critics))
        self._descend(1, sum(nn.functional.mse_loss(critic(pair), target) for critic in self.critics))
        with torch.no_grad():
            cautious = reward + 0.99 * continues * torch.minimum(*(critic(after) for critic in self.critics))
        self._descend(2, nn.functional.mse_loss(self.state_value(state), torch.minimum(target, cautious)))
        with torch.no_grad():
            gate = (self.critics[0](pair) > self.state_value(state)).float()
        remembered, mean, std = self._remember(state, action)
        divergence = -0.5 * (1 + std.square().log() - mean.square() - std.square()).mean()
        self._descend(3, (gate * (remembered - action).square()).mean() + 0.5 * divergence)
        self.steps += 1
        if self.steps % 2 == 0:
            chosen = torch.tanh(self.actor(state))
            value = self.critics[0](torch.cat([state, chosen], 1))
            with torch.no_grad():
                proposal, _, _ = self._remember(state, chosen)
                ahead = self.critics[0](torch.cat([state, proposal], 1)) - self.state_value(state)
                logged = self.critics[0](pair) - self.state_value(state)
                better = torch.where(ahead >= logged, proposal, action)
                mask = ((ahead >= 0) | (logged > 0)).float()
            pull = (mask * (chosen - better).square()).mean()
            self._descend(0, -2.5 * value.mean() / value.abs().mean().detach() + pull)
            for slow, fast in ((self.slow_actor, self.actor), (self.slow_critics, self.critics)):
                for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                    old.data.copy_(0.995 * old.data + 0.005 * new.data)


def test_steps_of_one_learner_and_of_five(record):
    """Gradient steps against a plain loop: one learner, and five seeds in one stack."""
    plain = Plain(LOG)
    for members, target in ((1, 1.0), (5, 0.5)):
        learner = A2PR(3, 1, hidden=(64, 64), vae_hidden=(64, 64), seeds=range(members))
        stream = BatchStream(LOG, seeds=range(members), batch_size=128, noise_width=learner.noise_width)
        ratio = paired_ratio(lambda: learner.update(next(stream)), plain.update, rounds=9, inner=30)  # noqa: B023
        share = ratio.median / members
        record(f"step of {members} in a stack, each, against a plain loop", share, unit="x", target=f"<= {target}")
        record(f"gradient steps a second, {members} in a stack", members / ratio.ours_seconds)
        assert share <= target
