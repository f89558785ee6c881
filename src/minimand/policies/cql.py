"""Conservative Q-learning: a critic that is pushed down where the log has no data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks
from .actor_critic import TwinCritic
from .gaussian_actor import SquashedActor
from .offline_batches import Batch
from .stacked_networks import adam, descend, follow, member_generators, per_member


def conservative_excess(
    critic: TwinCritic, batch: Batch, uniform: Tensor, drawn: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    r"""Compute :math:`\widehat{\log\int e^{Q}} - Q(s, a)` of each critic, mean over the batch, shape ``(S, 2)``.

    Args:
        critic: Both critics of each member.
        batch: Where they are evaluated.
        uniform: Standard normal numbers that become uniform actions, shape ``(S, B, k, m)``.
        drawn: Other actions, shape ``(S, B, k', m)``, with their log densities, shape ``(S, B, k')``.
    """
    density = torch.full_like(uniform[..., 0], -uniform.shape[-1] * math.log(2))
    sources = [(torch.erf(uniform / math.sqrt(2)), density), *drawn]
    actions = torch.cat([action for action, _ in sources], -2)
    log_probs = torch.cat([log_prob for _, log_prob in sources], -1)
    count = log_probs.shape[-1]
    observation = batch.observation.unsqueeze(-2).expand(-1, -1, count, -1)
    values = critic(observation.flatten(1, 2), actions.flatten(1, 2)).unflatten(-1, (-1, count))
    log_integral = torch.logsumexp(values - log_probs.unsqueeze(1), -1) - math.log(count)
    return (log_integral - critic(batch.observation, batch.action)).mean(-1)


class CQL(nn.Module):
    r"""Learn from a log by soft actor-critic whose critics are conservative (the CQL(H) form).

    To the squared errors of both critics :math:`\alpha\,[\log\int e^{Q(s,a)}\,da - Q(s, a_\text{logged})]` is added,
    the integral estimated by importance sampling from uniform actions and from the policy at :math:`s` and :math:`s'`.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions are scaled to [-1, 1].
        conservatism: :math:`\alpha`; 5 in the paper's Gym tasks. One number, or one a member.
        num_actions: Actions drawn from each of the three sources; 10 in the paper.
        discount: Of later rewards.
        target_rate: How far slow critics move a step.
        actor_lr: Learning rate of Adam for the actor and the entropy's weight.
        critic_lr: Learning rate of Adam for the critics.
        hidden: Widths of the hidden layers.
        seeds: One a member: learners of different seeds (or ``conservatism``) train side by side.

    Example:
        >>> CQL(3, 1, hidden=(8,)).act(torch.zeros(1, 5, 3)).shape
        torch.Size([1, 5, 1])

    Source: A. Kumar, A. Zhou, G. Tucker and S. Levine, "Conservative Q-learning for offline reinforcement learning"
    (2020, arXiv 2006.04779), equation 4 and appendix F; soft actor-critic of T. Haarnoja et al. (2018,
    arXiv 1812.05905).
    """

    conservatism: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        conservatism: float | Sequence[float] = 5.0,
        num_actions: int = 10,
        discount: float = 0.99,
        target_rate: float = 0.005,
        actor_lr: float = 1e-4,
        critic_lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        checks.between(discount, "discount", 0, 1)
        checks.between(target_rate, "target_rate", 0, 1)
        if num_actions < 1:
            raise ValueError(f"num_actions must be at least 1, got {num_actions}")
        self.action_dim, self.num_actions = action_dim, num_actions
        # One draw for the actor, one for the target, and three sources of num_actions each.
        self.noise_width = action_dim * (2 + 3 * num_actions)
        self.discount, self.target_rate = discount, target_rate
        self.register_buffer("conservatism", per_member(conservatism, len(seeds), "conservatism"))
        generators = member_generators(seeds)
        self.actor = SquashedActor(observation_dim, action_dim, hidden=hidden, generators=generators)
        self.critic = TwinCritic(observation_dim, action_dim, hidden=hidden, generators=generators)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(len(seeds)))
        self.actor_optimizer, self.critic_optimizer = adam(self.actor, actor_lr), adam(self.critic, critic_lr)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=actor_lr)

    def _noise(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        m, k = self.action_dim, self.num_actions
        first, second, rest = batch.noise.split((m, m, 3 * k * m), -1)
        return first, second, rest.unflatten(-1, (3 * k, m))

    def _soft_actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        action, log_prob = self.actor.draw(batch.observation, self._noise(batch)[0])
        value = self.critic.least(batch.observation, action)
        temperature = self.log_temperature.detach().exp().unsqueeze(-1)
        return (temperature * log_prob - value).mean(-1), log_prob.detach()

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each actor minimises on a batch, shape ``(S,)``."""
        return self._soft_actor_loss(batch)[0]

    def excess(self, batch: Batch) -> Tensor:
        r"""Return :math:`\widehat{\log\int e^{Q}} - Q(s, a)` of each critic, mean over the batch, shape ``(S, 2)``.

        Samples carry the log density they were drawn with; a uniform action's is :math:`-m\log 2`.
        """
        uniform, here, there = self._noise(batch)[2].split(self.num_actions, -2)
        with torch.no_grad():
            drawn = [self.actor.draw(batch.observation, here), self.actor.draw(batch.next_observation, there)]
        return conservative_excess(self.critic, batch, uniform, drawn)

    def critic_loss(self, batch: Batch) -> Tensor:
        """Return what each member's critics minimise on a batch, shape ``(S,)``."""
        with torch.no_grad():
            action, _ = self.actor.draw(batch.next_observation, self._noise(batch)[1])
            following = self.slow_critic.least(batch.next_observation, action)
            target = batch.reward + self.discount * batch.continues * following
        error = (self.critic(batch.observation, batch.action) - target.unsqueeze(1)).square().mean(-1)
        return (error + self.conservatism.unsqueeze(-1) * self.excess(batch)).sum(1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        actor_loss, log_prob = self._soft_actor_loss(batch)
        descend(self.actor_optimizer, actor_loss)
        # The entropy aimed at is -m, as in soft actor-critic.
        entropy_gap = (log_prob - self.action_dim).mean(-1)
        descend(self.temperature_optimizer, -self.log_temperature.exp() * entropy_gap)
        critic_loss = self.critic_loss(batch)
        descend(self.critic_optimizer, critic_loss)
        follow(list(self.slow_critic.parameters()), list(self.critic.parameters()), self.target_rate)
        return {"actor": actor_loss.detach(), "critic": critic_loss.detach()}

    def act(self, observation: Tensor) -> Tensor:
        """Return the mean's actions for scaled observations, shapes ``(S, B, n)`` to ``(S, B, m)``."""
        return self.actor(observation)

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the critics' first estimate of scaled observations and actions, shape ``(S, B)``."""
        return self.critic.first(observation, action)

    def network(self, member: int) -> nn.Sequential:
        """Return a copy of one member's actor, before its tanh."""
        return self.actor.network.member(member, outputs=self.action_dim)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return {
            "actor": self.actor_optimizer,
            "critic": self.critic_optimizer,
            "temperature": self.temperature_optimizer,
        }
