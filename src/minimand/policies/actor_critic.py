"""What TD3 and its offline kin share: an actor, twin critics, their slow copies, and how they move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .offline_batches import Batch
from .stacked_networks import StackedMLP, adam, descend, follow


class TwinCritic(nn.Module):
    r"""Estimate the value of state and action twice, by two networks a member; their minimum errs less upwards.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        generators: One a member.

    Example:
        >>> critic = TwinCritic(3, 1, hidden=(8,), generators=[torch.Generator().manual_seed(0)])
        >>> critic(torch.zeros(1, 5, 3), torch.zeros(1, 5, 1)).shape
        torch.Size([1, 2, 5])

    Source: S. Fujimoto, H. van Hoof and D. Meger, "Addressing function approximation error in actor-critic methods"
    (2018, arXiv 1802.09477), section 4.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.networks = StackedMLP((observation_dim + action_dim, *hidden, 1), generators=generators, heads=2)

    def forward(
        self, observation: Float[Tensor, "members batch n"], action: Float[Tensor, "members batch m"]
    ) -> Float[Tensor, "members 2 batch"]:
        """Return both estimates."""
        return self.networks(torch.cat([observation, action], -1)).squeeze(-1)

    def first(
        self, observation: Float[Tensor, "members batch n"], action: Float[Tensor, "members batch m"]
    ) -> Float[Tensor, "members batch"]:
        """Return the first estimate alone, at half the cost."""
        return self.networks.head(torch.cat([observation, action], -1)).squeeze(-1)

    def least(
        self, observation: Float[Tensor, "members batch n"], action: Float[Tensor, "members batch m"]
    ) -> Float[Tensor, "members batch"]:
        """Return the smaller estimate."""
        return self(observation, action).amin(1)


class TD3ActorCritic(nn.Module):
    r"""Move an actor and twin critics as TD3 does; what the actor is told besides is its user's affair.

    With :math:`\tilde a = \operatorname{clip}(\pi'(s') + \operatorname{clip}(\sigma\xi, -c, c), -1, 1)` both critics
    regress :math:`y = r + \gamma (1-d) \min_i Q_i'(s', \tilde a)`.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions lie in [-1, 1].
        discount: :math:`\gamma`.
        target_rate: :math:`\tau`, how far slow copies move a step.
        target_noise: :math:`\sigma`, of the smoothed target action.
        noise_clip: :math:`c`.
        policy_delay: Critic steps an actor step.
        lr: Learning rate of Adam.
        hidden: Widths of the hidden layers of actor and critics.
        generators: One a member.

    Example:
        >>> nets = TD3ActorCritic(3, 1, hidden=(8,), generators=[torch.Generator().manual_seed(0)])
        >>> nets.act(torch.zeros(1, 5, 3)).shape
        torch.Size([1, 5, 1])

    Source: S. Fujimoto, H. van Hoof and D. Meger, "Addressing function approximation error in actor-critic methods"
    (2018, arXiv 1802.09477), algorithm 1; defaults from its table 3 and, for ``lr``, from its authors' TD3+BC.
    """

    updates: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        discount: float = 0.99,
        target_rate: float = 0.005,
        target_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        checks.between(discount, "discount", 0, 1)
        checks.between(target_rate, "target_rate", 0, 1)
        checks.non_negative(target_noise, "target_noise")
        checks.non_negative(noise_clip, "noise_clip")
        if policy_delay < 1:
            raise ValueError(f"policy_delay must be at least 1, got {policy_delay}")
        self.action_dim, self.discount, self.target_rate = action_dim, discount, target_rate
        self.target_noise, self.noise_clip, self.policy_delay = target_noise, noise_clip, policy_delay
        self.actor = StackedMLP((observation_dim, *hidden, action_dim), generators=generators)
        self.critic = TwinCritic(observation_dim, action_dim, hidden=hidden, generators=generators)
        self.slow_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer, self.critic_optimizer = adam(self.actor, lr), adam(self.critic, lr)
        # Listed once: walking modules at every step would cost as much as a layer.
        self._slow: list[Tensor] = [*self.slow_actor.parameters(), *self.slow_critic.parameters()]
        self._online: list[Tensor] = [*self.actor.parameters(), *self.critic.parameters()]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # Counted on the host too: reading a number of an accelerator at every step would stall it.
        self._updates = 0

    @property
    def members(self) -> int:
        """How many learners are side by side."""
        return self.actor.members

    def act(self, observation: Float[Tensor, "members batch n"]) -> Float[Tensor, "members batch m"]:
        """Return the actors' actions, in [-1, 1]."""
        return torch.tanh(self.actor.head(observation))

    @torch.no_grad()
    def smoothed_action(self, batch: Batch) -> Float[Tensor, "members batch m"]:
        """Return the slow actors' next actions with noise, which reads the first ``m`` numbers of the batch's."""
        noise = (batch.noise[..., : self.action_dim] * self.target_noise).clamp(-self.noise_clip, self.noise_clip)
        return (torch.tanh(self.slow_actor.head(batch.next_observation)) + noise).clamp(-1, 1)

    @torch.no_grad()
    def target(self, batch: Batch) -> Float[Tensor, "members batch"]:
        """Return the value that both critics regress."""
        following = self.slow_critic.least(batch.next_observation, self.smoothed_action(batch))
        return torch.addcmul(batch.reward, batch.continues, following, value=self.discount)

    def improve_critic(self, batch: Batch, target: Float[Tensor, "members batch"]) -> Float[Tensor, "members"]:
        """Take one step of both critics towards a target, and return the loss before it."""
        loss = (self.critic(batch.observation, batch.action) - target.unsqueeze(1)).square().mean(-1).sum(1)
        descend(self.critic_optimizer, loss)
        self._updates += 1
        self.updates.fill_(self._updates)
        return loss.detach()

    @property
    def actor_is_due(self) -> bool:
        """Whether the actor moves after this critic step."""
        return self._updates % self.policy_delay == 0

    def improve_actor(self, loss: Float[Tensor, "members"]) -> None:
        """Take one step of the actor down a loss, and let the slow copies follow."""
        descend(self.actor_optimizer, loss)
        follow(self._slow, self._online, self.target_rate)

    def improve_due_actor(
        self, batch: Batch, actor_loss: Callable[[Batch], Float[Tensor, "members"]]
    ) -> dict[str, Tensor]:
        """Take a step of the actor if this critic step calls for one, and return its loss under its name."""
        if not self.actor_is_due:
            return {}
        loss = actor_loss(batch)
        self.improve_actor(loss)
        return {"actor": loss.detach()}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._updates = int(self.updates)


def normalized_value(
    value: Float[Tensor, "members batch"], alpha: Float[Tensor, "members"]
) -> Float[Tensor, "members"]:
    r"""Compute the actor's share of value, free of the value's scale: :math:`-\alpha\,\bar Q / \overline{|Q|}`.

    Args:
        value: :math:`Q(s, \pi(s))` of each member's batch, shape ``(S, B)``.
        alpha: Weight of the value against what else the actor is told, shape ``(S,)``.

    Returns:
        A loss a member, shape ``(S,)``; the divisor takes no gradient.

    Example:
        >>> normalized_value(torch.tensor([[1.0, 3.0]]), torch.tensor([2.5]))
        tensor([-2.5000])

    Source: S. Fujimoto and S. S. Gu, "A minimalist approach to offline reinforcement learning" (2021,
    arXiv 2106.06860), equation 5.
    """
    # Untrained critics may be all but zero.
    scale = value.detach().abs().mean(-1).clamp_min(1e-8)
    return -alpha * value.mean(-1) / scale
