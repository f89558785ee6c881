"""A pendulum's log of which one episode in twenty is good: data, training and measures of several studies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bench import Metric, Outcome, Run
from ..policies import (
    A2PR,
    IQL,
    PRDC,
    TD3BC,
    BehaviourCloning,
    DatasetConstraint,
    Pendulum,
    Policy,
    ScaledLog,
    train_offline,
)

RETURN = Metric("return")
EXCESS = Metric("value overestimated by", "lower is better")
APART = Metric("distance to the log", "lower is better")
METRICS = (RETURN, EXCESS, APART)

# Fewer steps than the papers take, each at three times their learning rate: a study is for everyone to rerun.
STEPS, BATCH, REPORTS = 3_200, 128, 8
LR, TARGET_RATE, DISCOUNT, HIDDEN = 1e-3, 0.01, 0.99, (64, 64)
EPISODES, PROBES, HORIZON = 100, 200, 500


@functools.cache
def log() -> ScaledLog:
    """Return the log: 95 episodes of random torques and 5 of a controller, 200 steps each."""
    pendulum = Pendulum()
    return ScaledLog.of(pendulum.log("mixed"), low=pendulum.low, high=pendulum.high)


def problem(source: object, seed: int) -> ScaledLog:
    """Return the same log for every seed: what differs is chance in training and testing."""
    return log()


def imitate(data: ScaledLog, **settings: Any) -> BehaviourCloning:
    """Build behaviour cloning."""
    return BehaviourCloning(data.observation_dim, data.action_dim, lr=LR, hidden=HIDDEN, **settings)


def td3_bc(data: ScaledLog, **settings: Any) -> TD3BC:
    """Build TD3+BC."""
    return TD3BC(data.observation_dim, data.action_dim, lr=LR, target_rate=TARGET_RATE, hidden=HIDDEN, **settings)


def iql(data: ScaledLog, **settings: Any) -> IQL:
    """Build implicit Q-learning."""
    return IQL(data.observation_dim, data.action_dim, lr=LR, target_rate=TARGET_RATE, hidden=HIDDEN, **settings)


def prdc(data: ScaledLog, **settings: Any) -> PRDC:
    """Build PRDC."""
    return PRDC(data, lr=LR, target_rate=TARGET_RATE, hidden=HIDDEN, **settings)


def a2pr(data: ScaledLog, **settings: Any) -> A2PR:
    """Build A2PR; its autoencoder learns at the same rate as its other networks."""
    return A2PR(
        data.observation_dim,
        data.action_dim,
        lr=LR,
        vae_lr=LR,
        target_rate=TARGET_RATE,
        hidden=HIDDEN,
        vae_hidden=HIDDEN,
        **settings,
    )


@dataclasses.dataclass(frozen=True)
class Learn:
    """A contender: learners of all cells and settings trained side by side, the best setting kept by validation.

    Args:
        build: ``(log, seeds=..., **settings)`` to a learner.
        settings: What every member is built with.
        choices: Name and values of the setting to choose, on episodes that the test does not see.
    """

    build: Callable[..., Any]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[str, tuple[float, ...]] = ("", ())

    def __call__(self, data: ScaledLog, run: Run) -> Outcome:
        """Train and measure one cell."""
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[ScaledLog], runs: Sequence[Run]) -> list[Outcome]:
        """Train and measure several cells together."""
        name, values = self.choices
        choices = len(values) or 1
        seeds = [run.stream("training") % 2**31 for run in runs for _ in range(choices)]
        varied = {name: list(values) * len(runs)} if values else {}
        learner = self.build(datas[0], seeds=seeds, **self.settings, **varied)
        starts = [run.stream("validation") % 2**31 for run in runs for _ in range(choices)]

        def measure(learner: Any, step: int) -> list[float]:
            return returns(learner, datas[0], starts)

        every = STEPS // REPORTS
        training = train_offline(
            learner, datas[0], seeds=seeds, steps=STEPS, batch_size=BATCH, report_every=every, measure=measure
        )
        curves = torch.tensor(training.measured).T.view(len(runs), choices, -1)
        # The last two reports: one alone is chance.
        best = curves[..., -2:].mean(-1).argmax(1)
        members = [cell * choices + int(one) for cell, one in enumerate(best)]
        tests = [run.stream("test") % 2**31 for run in runs for _ in range(choices)]
        found = {RETURN.name: returns(learner, datas[0], tests), APART.name: distances(learner, datas[0])}
        if hasattr(learner, "value"):
            found[EXCESS.name] = overestimation(learner, datas[0])
        return [
            Outcome(
                {metric: numbers[member] for metric, numbers in found.items()},
                {"return": curves[cell, int(best[cell])].tolist()},
                details={name: varied[name][member]} if varied else {},
            )
            for cell, member in enumerate(members)
        ]


def returns(learner: Any, data: ScaledLog, seeds: Sequence[int]) -> list[float]:
    """Return each member's mean return over episodes whose starts follow from its seed."""
    pendulum = Pendulum()
    policies = [Policy(learner.network(member), data.scaling).eval() for member in range(len(seeds))]
    return [
        float(pendulum.returns(policy, episodes=EPISODES, seed=seed).mean())
        for policy, seed in zip(policies, seeds, strict=True)
    ]


def _probes(learner: Any, data: ScaledLog) -> Tensor:
    """Some logged states, scaled, once for each member."""
    members = next(iter(learner.parameters())).shape[0]
    return data.observation[:: max(len(data) // PROBES, 1)].expand(members, -1, -1)


@torch.no_grad()
def overestimation(learner: Any, data: ScaledLog) -> list[float]:
    r"""Return how much more :math:`Q_1(s, \pi(s))` says than the policy then gains, mean over logged states."""
    seen = _probes(learner, data)
    told = learner.value(seen, learner.act(seen))
    gained = torch.zeros_like(told)
    pendulum, place = Pendulum(), (seen * (data.scaling.deviation + 1e-3) + data.scaling.mean).flatten(0, 1)
    pendulum.angle, pendulum.speed = torch.atan2(place[:, 1], place[:, 0]), place[:, 2]
    for step in range(HORIZON):
        action = data.scaling.action_out(learner.act(seen))
        following, reward = pendulum.step(action.flatten(0, 1))
        gained += DISCOUNT**step * reward.view_as(gained)
        seen = data.scaling.observation_in(following).view_as(seen)
    return (told - gained).mean(1).tolist()


@torch.no_grad()
def distances(learner: Any, data: ScaledLog) -> list[float]:
    """Return how far states with the actions chosen there are from the nearest logged pair (beta 2), in the mean."""
    seen = _probes(learner, data)
    found = DatasetConstraint(data.observation, data.action, beta=2.0).nearest(seen, learner.act(seen))
    return found.distance.mean(1).tolist()
