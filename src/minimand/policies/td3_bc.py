"""TD3+BC: value, and staying near the logged action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .actor_critic import TD3ActorCritic, normalized_value
from .offline_batches import Batch
from .stacked_networks import member_generators, per_member


class TD3BC(nn.Module):
    r"""Learn from a log by TD3 whose actor also imitates: the minimalist baseline of offline learning.

    The actor minimises :math:`-\alpha\,\bar Q_1(s, \pi(s)) / \overline{|Q_1|} + \frac1m \|\pi(s) - a\|^2`.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions are scaled to [-1, 1].
        alpha: Weight of the value; one number, or one a member. 2.5 in the paper.
        discount: Of later rewards.
        target_rate: How far slow copies move a step.
        target_noise: Of the smoothed target action.
        noise_clip: Where that noise is cut off.
        policy_delay: Critic steps an actor step.
        lr: Learning rate of Adam.
        hidden: Widths of the hidden layers.
        seeds: One a member: learners of different seeds (or ``alpha``) train side by side.

    Example:
        >>> learner = TD3BC(3, 1, hidden=(8,), seeds=(0, 1))
        >>> learner.act(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1])

    Source: S. Fujimoto and S. S. Gu, "A minimalist approach to offline reinforcement learning" (2021,
    arXiv 2106.06860), equations 3 to 5 and table 3.
    """

    alpha: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        alpha: float | Sequence[float] = 2.5,
        discount: float = 0.99,
        target_rate: float = 0.005,
        target_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.noise_width = action_dim
        self.register_buffer("alpha", per_member(alpha, len(seeds), "alpha"))
        self.nets = TD3ActorCritic(
            observation_dim,
            action_dim,
            discount=discount,
            target_rate=target_rate,
            target_noise=target_noise,
            noise_clip=noise_clip,
            policy_delay=policy_delay,
            lr=lr,
            hidden=hidden,
            generators=member_generators(seeds),
        )

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each actor minimises on a batch, shape ``(S,)``."""
        action = self.nets.act(batch.observation)
        value = self.nets.critic.first(batch.observation, action)
        return normalized_value(value, self.alpha) + (action - batch.action).square().mean((1, 2))

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        critic_loss = self.nets.improve_critic(batch, self.nets.target(batch))
        return {"critic": critic_loss, **self.nets.improve_due_actor(batch, self.actor_loss)}

    def act(self, observation: Tensor) -> Tensor:
        """Return actions for scaled observations, shapes ``(S, B, n)`` to ``(S, B, m)``."""
        return self.nets.act(observation)

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the critics' first estimate of scaled observations and actions, shape ``(S, B)``."""
        return self.nets.critic.first(observation, action)

    def network(self, member: int) -> nn.Sequential:
        """Return a copy of one member's actor, before its tanh."""
        return self.nets.actor.member(member)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return self.nets.optimizers()
