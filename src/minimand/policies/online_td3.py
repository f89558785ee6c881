"""TD3 in an environment: how behaviour policies of graded quality are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from .actor_critic import TD3ActorCritic, normalized_value
from .environments import Environment
from .offline_batches import BatchStream, ScaledLog, Scaling
from .saved_policy import Policy
from .stacked_networks import member_generators
from .transitions import Transitions


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A policy as it was during training.

    Args:
        policy: What acted.
        score: Mean return of its evaluation episodes.
        seen: Transitions lived until then.
    """

    policy: Policy
    score: float
    seen: int


@dataclasses.dataclass(frozen=True)
class OnlineRun:
    """What training in an environment left.

    Args:
        snapshots: Policies over training, first to last.
        replay: Everything that was lived, in that order, exploration included.
        random_score: Mean return of uniform actions.
    """

    snapshots: list[Snapshot]
    replay: Transitions
    random_score: float

    @property
    def best(self) -> Snapshot:
        """The snapshot with the highest score."""
        return max(self.snapshots, key=lambda snapshot: snapshot.score)

    @property
    def medium(self) -> Snapshot:
        """The snapshot whose score is nearest to halfway between chance and the best."""
        middle = (self.random_score + self.best.score) / 2
        return min(self.snapshots, key=lambda snapshot: abs(snapshot.score - middle))


def train_online(
    environment: Environment,
    *,
    rounds: int = 40,
    episodes_per_round: int = 2,
    updates_per_transition: float = 1.0,
    exploration: float = 0.2,
    warmup_rounds: int = 4,
    batch_size: int = 128,
    hidden: Sequence[int] = (64, 64),
    lr: float = 1e-3,
    discount: float = 0.99,
    evaluation_episodes: int = 10,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> OnlineRun:
    """Train TD3 by whole episodes: live some, then take a step for each transition that was lived.

    Args:
        environment: Where to act.
        rounds: How often to live and learn.
        episodes_per_round: Episodes lived a round.
        updates_per_transition: Gradient steps for each transition lived.
        exploration: Deviation of the noise on actions, in units of half their range.
        warmup_rounds: Rounds of uniform actions first.
        batch_size: Transitions a step.
        hidden: Widths of the hidden layers.
        lr: Learning rate of Adam.
        discount: Of later rewards.
        evaluation_episodes: Episodes without noise that score a snapshot, one a round.
        seed: Every random number follows from it.
        progress: Told rounds done and rounds in all.

    Returns:
        Snapshots and everything that was lived.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from minimand.policies import Pendulum
        >>> run = train_online(Pendulum(episode_steps=20), rounds=2, warmup_rounds=1, hidden=(8,), batch_size=8)
        >>> len(run.snapshots), len(run.replay)
        (1, 80)

    Source: S. Fujimoto, H. van Hoof and D. Meger, "Addressing function approximation error in actor-critic methods"
    (2018, arXiv 1802.09477), algorithm 1.
    """
    if not 1 <= warmup_rounds < rounds:
        raise ValueError(f"warmup_rounds must be at least 1 and below rounds {rounds}, got {warmup_rounds}")
    checks.positive(updates_per_transition, "updates_per_transition")
    checks.non_negative(exploration, "exploration")
    low, high = environment.low, environment.high
    generator = torch.Generator().manual_seed(seed)

    def chance(observation: Tensor) -> Tensor:
        drawn = torch.rand((len(observation), len(low)), generator=generator).to(low)
        return low + (high - low) * drawn

    first = environment.record(chance, episodes=episodes_per_round * warmup_rounds, seed=seed)
    random_score = float(first.episode_returns().mean())
    # Rewards of about one a step suit the learning rate, whatever the environment's unit.
    reward_scale = 1 / max(float(first.reward.abs().mean()), 1e-6)
    replay, scaling = first, Scaling.of(first, low=low, high=high)
    nets = TD3ActorCritic(
        environment.observation_dim,
        environment.action_dim,
        lr=lr,
        hidden=hidden,
        discount=discount,
        generators=member_generators((seed,)),
    )
    weight = torch.ones(1)
    snapshots: list[Snapshot] = []
    for round_ in range(warmup_rounds, rounds):
        log = ScaledLog.of(replay, scaling=scaling, reward_scale=reward_scale)
        batches = BatchStream(
            log, seeds=(seed + 1000 * round_,), batch_size=batch_size, noise_width=environment.action_dim
        )
        lived = len(first) if round_ == warmup_rounds else len(replay) - snapshots[-1].seen
        for _ in range(max(1, round(updates_per_transition * lived))):
            batch = next(batches)
            nets.improve_critic(batch, nets.target(batch))
            if nets.actor_is_due:
                value = nets.critic.first(batch.observation, nets.act(batch.observation))
                nets.improve_actor(normalized_value(value, weight))
        policy = Policy(nets.actor.member(0), scaling).eval()
        scored = environment.record(policy, episodes=evaluation_episodes, seed=seed + 10_007)
        snapshots.append(Snapshot(policy, float(scored.episode_returns().mean()), len(replay)))

        def explore(observation: Tensor, policy: Policy = policy) -> Tensor:
            noise = torch.randn((len(observation), len(low)), generator=generator).to(low)
            return (policy(observation) + exploration * noise * (high - low) / 2).clamp(low, high)

        new = environment.record(explore, episodes=episodes_per_round, seed=seed + 101 * round_)
        replay = Transitions.join([replay, new])
        if progress is not None:
            progress(round_ + 1, rounds)
    return OnlineRun(snapshots, replay, random_score)
