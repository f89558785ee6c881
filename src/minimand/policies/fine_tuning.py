"""From a log into the environment: go on learning from what the learner itself lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .environments import Environment
from .offline_batches import BatchStream, ScaledLog
from .saved_policy import Policy
from .transitions import Transitions


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """What learning online came to.

    Args:
        returns: Mean return of each member's evaluation episodes before the first round and after each, shape
            ``(rounds + 1, S)``.
        lived: Return of the episodes that were lived to learn from, shape ``(rounds, S)``.
        policies: One a member, as they are at the end.
    """

    returns: Tensor
    lived: Tensor
    policies: list[Policy]


def fine_tune(
    learner: Any,
    log: Transitions,
    environment: Environment,
    *,
    scaled: ScaledLog,
    reward_scale: float = 1.0,
    seeds: Sequence[int] = (0,),
    rounds: int = 20,
    episodes_per_round: int = 2,
    updates_per_transition: float = 0.5,
    exploration: float = 0.1,
    batch_size: int = 256,
    evaluation_episodes: int = 10,
    pools: Sequence[Tensor] | None = None,
) -> FineTuning:
    """Let trained members live episodes, and learn from them together with the log.

    Each member keeps to its own episodes. A learner that has ``go_online`` is told.

    Args:
        learner: As it came out of :func:`train_offline`.
        log: What it was trained on; batches are drawn from it and the new episodes alike.
        environment: Where to act.
        scaled: The log as the learner saw it, whose scaling the new episodes share.
        reward_scale: Factor of the rewards, as it was offline.
        seeds: One a member.
        rounds: How often to live and learn.
        episodes_per_round: Episodes a member lives a round.
        updates_per_transition: Steps for each transition that a member lived.
        exploration: Deviation of the noise on actions, in half ranges.
        batch_size: Transitions a member and step.
        evaluation_episodes: Episodes without noise a member and round.
        pools: Rows of the log that each member draws from, int64; None lets all draw from all.

    Returns:
        Returns over the rounds, and the policies.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from minimand.policies import IQL, Pendulum
        >>> world = Pendulum(episode_steps=20)
        >>> log = world.log("mixed", episodes=3)
        >>> tuned = fine_tune(IQL(3, 1, hidden=(8,)), log, world, scaled=ScaledLog.of(log), rounds=2, batch_size=8)
        >>> tuned.returns.shape
        torch.Size([3, 1])

    Source: The protocol of I. Kostrikov, A. Nair and S. Levine (2021, arXiv 2110.06169), section 5.3, by whole
    episodes.
    """
    if rounds < 1 or episodes_per_round < 1:
        raise ValueError(f"rounds and episodes_per_round must be at least 1, got {rounds} and {episodes_per_round}")
    checks.positive(updates_per_transition, "updates_per_transition")
    checks.non_negative(exploration, "exploration")
    if hasattr(learner, "go_online"):
        learner.go_online()
    scaling, members = scaled.scaling, len(seeds)
    half = (environment.high - environment.low) / 2
    generators = [torch.Generator().manual_seed(seed + 0xF1) for seed in seeds]
    own: list[list[Transitions]] = [[] for _ in seeds]
    kept, lived = [_evaluate(learner, scaling, environment, seeds, evaluation_episodes)], []
    for round_ in range(rounds):
        new = []
        for member, generator in enumerate(generators):
            policy = Policy(learner.network(member), scaling).eval()

            def explore(seen: Tensor, policy: Policy = policy, generator: torch.Generator = generator) -> Tensor:
                noise = torch.randn((len(seen), len(half)), generator=generator).to(half)
                return (policy(seen) + exploration * noise * half).clamp(environment.low, environment.high)

            with torch.no_grad():
                episodes = environment.record(
                    explore, episodes=episodes_per_round, seed=seeds[member] % 100_003 + 101 * round_
                )
            own[member].append(episodes)
            new.append(episodes)
        lived.append(torch.stack([episodes.episode_returns().mean() for episodes in new]))
        everything = [log, *(part for parts in own for part in parts)]
        sizes = torch.tensor([len(part) for part in everything])
        begins = (sizes.cumsum(0) - sizes).tolist()
        shared = torch.arange(len(log))
        drawn_from = []
        for member in range(members):
            first = 1 + member * (round_ + 1)
            mine = torch.arange(begins[first], begins[first] + sum(len(part) for part in own[member]))
            drawn_from.append(torch.cat([shared if pools is None else pools[member], mine]))
        data = ScaledLog.of(Transitions.join(everything), scaling=scaling, reward_scale=reward_scale)
        stream = BatchStream(
            data,
            seeds=[seed + 7919 * (round_ + 1) for seed in seeds],
            batch_size=batch_size,
            noise_width=learner.noise_width,
            pools=drawn_from,
        )
        for _ in range(max(1, round(updates_per_transition * max(map(len, new))))):
            learner.update(next(stream))
        kept.append(_evaluate(learner, scaling, environment, seeds, evaluation_episodes))
    policies = [Policy(learner.network(member), scaling).eval() for member in range(members)]
    return FineTuning(torch.stack(kept), torch.stack(lived), policies)


@torch.no_grad()
def _evaluate(learner: Any, scaling: Any, environment: Environment, seeds: Sequence[int], episodes: int) -> Tensor:
    """Mean return of each member without noise, always from the same starts."""
    found = []
    for member, seed in enumerate(seeds):
        policy = Policy(learner.network(member), scaling).eval()
        scored = environment.record(policy, episodes=episodes, seed=seed % 100_003 + 50_021)
        found.append(scored.episode_returns().mean())
    return torch.stack(found)
