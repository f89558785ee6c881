"""The search of a log, and PRDC's step, against scikit-learn's neighbours, d3rlpy and CORL's way of training."""

import copy

import numpy as np
import torch
from d3rlpy.algos.qlearning.torch.prdc_impl import PRDCImpl
from d3rlpy.models.torch import ActionOutput
from sklearn.neighbors import NearestNeighbors
from torch import nn

from benchmarks.timing import paired_ratio
from minimand.policies import PRDC, BatchStream, DatasetConstraint, Pendulum, ScaledLog

PENDULUM = Pendulum()
LOG = ScaledLog.of(PENDULUM.log("mixed"), low=PENDULUM.low, high=PENDULUM.high)


def walk(rows, n, m):
    """States that wander as those of a walking body do, near a plane of three dimensions, and actions of any kind."""
    draw = torch.Generator().manual_seed(0)
    place = torch.randn(rows, 3, generator=draw).view(-1, 100, 3).cumsum(1).flatten(0, 1) / 10
    state = torch.tanh(place @ torch.randn(3, n, generator=draw)) + 0.1 * torch.randn(rows, n, generator=draw)
    return state, 2 * torch.rand(rows, m, generator=draw) - 1


def searched(state, action, backend, batch):
    """Our search and scikit-learn's, as d3rlpy asks it, for states of the log with other actions."""
    constraint = DatasetConstraint(state, action, backend=backend)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(len(state), (batch,), generator=draw)
    query = state[rows], 2 * torch.rand(batch, action.shape[1], generator=draw) - 1
    keys = torch.cat([2 * state, action], 1).numpy()
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="auto", n_jobs=1).fit(keys)

    def peer():
        key = torch.cat([2 * query[0], query[1]], 1).numpy()
        found = neighbours.kneighbors(key, n_neighbors=1, return_distance=False)
        return torch.tensor(neighbours._fit_X[found][:, 0, -action.shape[1] :])

    if backend != "cells":
        torch.testing.assert_close(constraint.actions(*query), peer())
    return lambda: constraint.actions(*query), peer, constraint, query


def test_search_of_a_small_log(record):
    """20,000 pairs of four numbers, 640 queries: five learners of batch 128 in one call."""
    ours, peer, _, _ = searched(LOG.observation, LOG.action, "auto", 640)
    ratio = paired_ratio(ours, peer, rounds=11)
    record("search, N=20,000, 4 dimensions, against scikit-learn", ratio.median, unit="x", target="<= 1")
    assert ratio.median <= 1


def test_search_of_a_large_log(record):
    """100,000 pairs of 14 numbers, as of a walking robot, 256 queries."""
    state, action = walk(100_000, 11, 3)
    for backend in ("tree", "scan", "cells"):
        ours, peer, constraint, query = searched(state, action, backend, 256)
        ratio = paired_ratio(ours, peer, rounds=3, warmup=1)
        target = "<= 1" if backend == constraint.method else ""
        record(f"{backend}, N=100,000, 14 dimensions, against scikit-learn", ratio.median, unit="x", target=target)
        record(f"{backend}, N=100,000, 14 dimensions, 1,000 searches", 1000 * ratio.ours_seconds, unit="s")
        if backend == "cells":
            exact = DatasetConstraint(state, action, backend="scan").nearest(*query)
            found = constraint.nearest(*query)
            record("cells, right rows of 256", (found.row == exact.row).float().mean().item(), target=">= 0.8")
            record("cells, excess distance", (found.distance / exact.distance.clamp_min(1e-9)).mean().item() - 1)


class Plain(nn.Module):
    """PRDC as d3rlpy and CORL-like scripts run it: one learner of ordinary modules, its loss d3rlpy's own."""

    compute_actor_loss = PRDCImpl.compute_actor_loss

    def __init__(self, log):
        super().__init__()
        self._alpha, self._beta, self.action_size, self._action_size, self.device = 2.5, 2.0, 1, 1, "cpu"
        self._q_func_forwarder = self
        self._nbsr = NearestNeighbors(n_neighbors=1, algorithm="auto", n_jobs=1).fit(
            torch.cat([2 * log.observation, log.action], 1).numpy()
        )

        def network(inputs):
            return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

        self.actor, self.critics = network(3), nn.ModuleList([network(4), network(4)])
        self.slow_actor, self.slow_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=3e-4)
        self.log, self.steps, self.draw = log, 0, np.random.default_rng(0)

    def compute_expected_q(self, x, action, reduction):
        """Values of the first critic."""
        return self.critics[0](torch.cat([x, action], 1)).unsqueeze(0)

    def update(self):
        """One step, on a batch drawn by NumPy."""
        rows = torch.from_numpy(self.draw.integers(len(self.log), size=128))
        self.observations = self.log.observation[rows]
        action, reward = self.log.action[rows], self.log.reward[rows]
        following, continues = self.log.next_observation[rows], self.log.continues[rows]
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            after = (torch.tanh(self.slow_actor(following)) + noise).clamp(-1, 1)
            values = [critic(torch.cat([following, after], 1))[:, 0] for critic in self.slow_critics]
            target = reward + 0.99 * continues * torch.minimum(*values)
        pair = torch.cat([self.observations, action], 1)
        loss = sum(nn.functional.mse_loss(critic(pair)[:, 0], target) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            chosen = torch.tanh(self.actor(self.observations))
            actor_loss = self.compute_actor_loss(self, ActionOutput(chosen, chosen, None)).actor_loss
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            for slow, fast in ((self.slow_actor, self.actor), (self.slow_critics, self.critics)):
                for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                    old.data.copy_(0.995 * old.data + 0.005 * new.data)


def test_steps_of_one_learner_and_of_five(record):
    """Gradient steps against a plain loop around d3rlpy's loss: one learner, and five seeds in one stack."""
    plain = Plain(LOG)
    for members, target in ((1, 1.0), (5, 0.5)):
        learner = PRDC(LOG, hidden=(64, 64), seeds=range(members))
        stream = BatchStream(LOG, seeds=range(members), batch_size=128, noise_width=learner.noise_width)
        ratio = paired_ratio(lambda: learner.update(next(stream)), plain.update, rounds=9, inner=40)  # noqa: B023
        share = ratio.median / members
        record(f"step of {members} in a stack, each, against a plain loop", share, unit="x", target=f"<= {target}")
        record(f"gradient steps a second, {members} in a stack", members / ratio.ours_seconds)
        assert share <= target
