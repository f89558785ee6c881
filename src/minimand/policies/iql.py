"""Implicit Q-learning: never ask the critic about an action that the log does not hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .actor_critic import TwinCritic
from .gaussian_actor import GaussianActor
from .offline_batches import Batch
from .stacked_networks import StackedMLP, adam, descend, follow, member_generators, per_member


def expectile_loss(
    error: Float[Tensor, "members batch"], expectile: Float[Tensor, "members"]
) -> Float[Tensor, "members"]:
    r"""Compute :math:`\frac1B\sum |\tau - 1\{u < 0\}|\, u^2` a member; at ``expectile`` 0.5 half the squared error."""
    weight = torch.where(error < 0, 1 - expectile.unsqueeze(-1), expectile.unsqueeze(-1))
    return (weight * error.square()).mean(-1)


class IQL(nn.Module):
    r"""Learn from a log by expectile values and advantage-weighted imitation.

    :math:`V` regresses the upper expectile of :math:`\min_i Q_i'(s, a)` over logged actions; the critics regress
    :math:`r + \gamma(1-d)V(s')`; the actor maximises
    :math:`\min(e^{\beta(\min_i Q_i' - V)}, w_{\max}) \log \pi(a|s)`.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions are scaled to [-1, 1].
        expectile: :math:`\tau`; 0.7 for locomotion, 0.9 for mazes. One number, or one a member.
        beta: Inverse temperature :math:`\beta`; 3 and 10. One number, or one a member.
        largest_weight: :math:`w_{\max}`.
        discount: :math:`\gamma`.
        target_rate: How far the slow critics move a step.
        lr: Learning rate of Adam.
        hidden: Widths of the hidden layers.
        seeds: One a member: learners of different seeds (or settings) train side by side.

    Example:
        >>> IQL(3, 1, hidden=(8,), expectile=[0.7, 0.9], seeds=(0, 0)).act(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1])

    Source: I. Kostrikov, A. Nair and S. Levine, "Offline reinforcement learning with implicit Q-learning" (2021,
    arXiv 2110.06169), equations 5 to 7 and appendix B.
    """

    noise_width = 0
    expectile: Tensor
    beta: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        expectile: float | Sequence[float] = 0.7,
        beta: float | Sequence[float] = 3.0,
        largest_weight: float = 100.0,
        discount: float = 0.99,
        target_rate: float = 0.005,
        lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        checks.positive(largest_weight, "largest_weight")
        checks.between(discount, "discount", 0, 1)
        checks.between(target_rate, "target_rate", 0, 1)
        self.register_buffer("expectile", per_member(expectile, len(seeds), "expectile"))
        self.register_buffer("beta", per_member(beta, len(seeds), "beta"))
        checks.require(self.expectile < 1, lambda: f"expectile must lie below 1, got {self.expectile.tolist()}")
        self.largest_log_weight, self.discount, self.target_rate = math.log(largest_weight), discount, target_rate
        generators = member_generators(seeds)
        self.actor = GaussianActor(observation_dim, action_dim, hidden=hidden, generators=generators)
        self.critic = TwinCritic(observation_dim, action_dim, hidden=hidden, generators=generators)
        self.state_value = StackedMLP((observation_dim, *hidden, 1), generators=generators)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer, self.critic_optimizer = adam(self.actor, lr), adam(self.critic, lr)
        self.value_optimizer = adam(self.state_value, lr)

    def _advantage(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            value = self.slow_critic.least(batch.observation, batch.action)
        return value - self.state_value.head(batch.observation).squeeze(-1)

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each actor minimises on a batch, shape ``(S,)``."""
        with torch.no_grad():
            exponent = self.beta.unsqueeze(-1) * self._advantage(batch)
            weight = torch.exp(exponent.clamp_max(self.largest_log_weight))
        return -(weight * self.actor.log_prob(batch.observation, batch.action)).mean(-1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        value_loss = expectile_loss(self._advantage(batch), self.expectile)
        descend(self.value_optimizer, value_loss)
        actor_loss = self.actor_loss(batch)
        descend(self.actor_optimizer, actor_loss)
        with torch.no_grad():
            following = self.state_value.head(batch.next_observation).squeeze(-1)
            target = batch.reward + self.discount * batch.continues * following
        error = self.critic(batch.observation, batch.action) - target.unsqueeze(1)
        critic_loss = error.square().mean(-1).sum(1)
        descend(self.critic_optimizer, critic_loss)
        follow(list(self.slow_critic.parameters()), list(self.critic.parameters()), self.target_rate)
        return {"value": value_loss.detach(), "actor": actor_loss.detach(), "critic": critic_loss.detach()}

    def act(self, observation: Tensor) -> Tensor:
        """Return mean actions for scaled observations, shapes ``(S, B, n)`` to ``(S, B, m)``."""
        return self.actor(observation)

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the critics' first estimate of scaled observations and actions, shape ``(S, B)``."""
        return self.critic.first(observation, action)

    def network(self, member: int) -> nn.Sequential:
        """Return a copy of one member's actor, before its tanh."""
        return self.actor.network.member(member)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return {"actor": self.actor_optimizer, "critic": self.critic_optimizer, "value": self.value_optimizer}
