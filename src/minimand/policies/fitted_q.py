"""What a policy is worth where it cannot be tried: fitted-Q evaluation on the log, with an interval."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from .offline_batches import BatchStream, ScaledLog
from .stacked_networks import StackedMLP, adam, descend, follow, member_generators
from .transitions import Transitions

# Two-sided 95 % point of the normal distribution.
_NORMAL_95 = 1.959964


@dataclasses.dataclass(frozen=True)
class FittedValue:
    """An estimate of a policy's discounted return from the log's starts.

    Args:
        mean: Mean over the resamples.
        low: Lower end of the 95 % interval.
        high: Upper end.
        members: The estimate of each resample, shape ``(R,)``.
    """

    mean: float
    low: float
    high: float
    members: Tensor


def fitted_q_evaluation(
    log: Transitions,
    policies: Sequence[Callable[[Tensor], Tensor]],
    *,
    discount: float = 0.99,
    steps: int = 4_000,
    batch_size: int = 256,
    lr: float = 1e-3,
    target_rate: float = 0.05,
    hidden: Sequence[int] = (64, 64),
    resamples: int = 5,
    low: Tensor | None = None,
    high: Tensor | None = None,
    seed: int = 0,
) -> list[FittedValue]:
    r"""Estimate what policies are worth from a log alone.

    For each policy and each resample of the log's episodes a critic regresses
    :math:`r + \gamma(1-d)\,Q'(s', \pi(s'))`; the estimate is the mean of :math:`Q(s_0, \pi(s_0))` over the first
    observations of the resampled episodes. All critics train side by side. The interval is the bootstrap's normal one.
    It covers the chance in the log, not what the log never saw.

    Args:
        log: Transitions with continuous actions.
        policies: From observations ``(B, n)`` to actions ``(B, m)``, as logged.
        discount: :math:`\gamma`, below 1.
        steps: Gradient steps.
        batch_size: Transitions a critic and step.
        lr: Learning rate of Adam.
        target_rate: How far slow critics move a step.
        hidden: Widths of the hidden layers.
        resamples: Resamples of episodes a policy.
        low: Least action; None for the least in the log.
        high: Largest action; None for the largest in the log.
        seed: Of resamples, batches and first weights.

    Returns:
        An estimate a policy.

    Raises:
        TypeError: If actions are choices.
        ValueError: If the log has fewer than two episodes, or a setting is out of range.

    Example:
        >>> from minimand.policies import Pendulum
        >>> log = Pendulum(episode_steps=20).log("medium", episodes=4)
        >>> value, = fitted_q_evaluation(log, [Pendulum.controller], steps=20, hidden=(8,))
        >>> value.low < value.mean < value.high
        True

    Source: H. M. Le, C. Voloshin and Y. Yue, "Batch policy learning under constraints" (2019, arXiv 1903.08738),
    algorithm 3; the bootstrap over episodes follows B. Hao et al., "Bootstrapping fitted Q-evaluation for off-policy
    inference" (2021, arXiv 2102.03607).
    """
    checks.between(discount, "discount", 0, 1, high_open=True)
    checks.between(target_rate, "target_rate", 0, 1, low_open=True)
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    if log.num_episodes < 2:
        raise ValueError(
            "the log holds one trajectory: an interval needs at least two, and one cannot be resampled by episodes"
        )
    data = ScaledLog.of(log, low=low, high=high)
    # A critic of about unit size learns at any unit of reward; over a long horizon values are rewards times that.
    horizon = min(1 / (1 - discount), float(log.episode_lengths().double().mean()))
    unit = max(float(log.reward.std()), float(log.reward.abs().mean()), 1e-8) * math.sqrt(horizon)
    with torch.no_grad():
        chosen = torch.stack([data.scaling.action_in(policy(log.next_observation)) for policy in policies])
    episode = log.episode_index()
    begins = torch.cat([episode.new_zeros(1), 1 + log.episode_ends.nonzero()[:-1, 0]])
    with torch.no_grad():
        first = torch.stack([data.scaling.action_in(policy(log.observation[begins])) for policy in policies])
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(log.num_episodes, (log.num_episodes,), generator=generator) for _ in range(resamples)]
    pools = [_rows_of(picked, log) for picked in drawn]
    seeds = [seed * 10_007 + place for place in range(resamples)] * len(policies)
    stream = BatchStream(data, seeds=seeds, batch_size=batch_size, pools=pools * len(policies))
    width = data.observation_dim + data.action_dim
    critic = StackedMLP((width, *hidden, 1), generators=member_generators(seeds)).to(data.reward)
    slow = copy.deepcopy(critic).requires_grad_(False)
    optimizer = adam(critic, lr)
    which = torch.arange(len(policies), device=data.reward.device).repeat_interleave(resamples)[:, None]
    for _ in range(steps):
        batch = next(stream)
        with torch.no_grad():
            following = slow.head(torch.cat([batch.next_observation, chosen[which, batch.rows]], -1)).squeeze(-1)
            target = batch.reward / unit + discount * batch.continues * following
        value = critic.head(torch.cat([batch.observation, batch.action], -1)).squeeze(-1)
        descend(optimizer, (value - target).square().mean(-1))
        follow(list(slow.parameters()), list(critic.parameters()), target_rate)
    with torch.no_grad():
        start = data.observation[begins].expand(len(seeds), -1, -1)
        begun = slow.head(torch.cat([start, first[which[:, 0]]], -1)).squeeze(-1) * unit
        picked = torch.stack(drawn * len(policies)).to(begun.device)
        members = begun.gather(1, picked).mean(1).view(len(policies), resamples)
    if not bool(torch.isfinite(members).all()):
        raise ValueError("fitted-Q evaluation diverged: the policies leave what the log covers")
    return [_interval(row) for row in members]


def _rows_of(picked: Tensor, log: Transitions) -> Tensor:
    """Rows of the picked episodes, each as often as its episode was picked."""
    order = torch.argsort(log.episode_index(), stable=True)
    by_episode = order.split(log.episode_lengths().tolist())
    return torch.cat([by_episode[place] for place in picked.tolist()])


def _interval(members: Tensor) -> FittedValue:
    mean, spread = float(members.mean()), float(members.std())
    return FittedValue(mean, mean - _NORMAL_95 * spread, mean + _NORMAL_95 * spread, members)
