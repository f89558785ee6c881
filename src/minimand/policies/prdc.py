"""PRDC: value, and staying near the nearest logged state and action, wherever in the log it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .actor_critic import TD3ActorCritic, normalized_value
from .dataset_constraint import DatasetConstraint
from .offline_batches import Batch, ScaledLog
from .stacked_networks import member_generators, per_member


class PRDC(nn.Module):
    r"""Learn from a log by TD3 whose actor is held near the closest logged pair of state and action.

    The actor minimises :math:`-\alpha\,\bar Q_1(s, \pi(s)) / \overline{|Q_1|} + \frac1m \|\pi(s) - \hat a\|^2`, where
    :math:`\hat a` is the action of the logged pair nearest to :math:`(s, \pi(s))` with states weighed by
    :math:`\beta` (:class:`DatasetConstraint`), searched anew at every step. Where TD3+BC holds to the action logged at
    :math:`s`, PRDC may borrow a better one logged nearby; with a large :math:`\beta` it is TD3+BC.

    Args:
        log: What it learns from: the pairs that are searched, scaled as the networks see them.
        alpha: Weight of the value; one number, or one a member. 2.5, or 40 for fast-running tasks in the paper.
        beta: Weight of states against actions in the search; one number, or one a member. 2 in the paper.
        backend: How to search; see :class:`DatasetConstraint`.
        probes: Cells that the approximate search looks at.
        discount: Of later rewards.
        target_rate: How far slow copies move a step.
        target_noise: Of the smoothed target action.
        noise_clip: Where that noise is cut off.
        policy_delay: Critic steps an actor step.
        lr: Learning rate of Adam.
        hidden: Widths of the hidden layers.
        seeds: One a member: learners of different seeds (or ``alpha``, ``beta``) train side by side.

    Raises:
        ValueError: If a setting is out of range, or none of one number and one a member.

    Example:
        >>> from minimand.policies import Pendulum
        >>> log = ScaledLog.of(Pendulum().log("mixed", episodes=2))
        >>> PRDC(log, hidden=(8,), beta=[0.5, 2.0], seeds=(0, 0)).act(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1])

    Source: Y. Ran, Y.-C. Li, F. Zhang, Z. Zhang and Y. Yu, "Policy regularization with dataset constraint for offline
    reinforcement learning" (2023, arXiv 2306.06569), its objective and algorithm; defaults from its authors' code.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        log: ScaledLog,
        *,
        alpha: float | Sequence[float] = 2.5,
        beta: float | Sequence[float] = 2.0,
        backend: str = "auto",
        probes: int = 8,
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
        self.noise_width = log.action_dim
        self.register_buffer("alpha", per_member(alpha, len(seeds), "alpha"))
        self.register_buffer("beta", per_member(beta, len(seeds), "beta"))
        self.nets = TD3ActorCritic(
            log.observation_dim,
            log.action_dim,
            discount=discount,
            target_rate=target_rate,
            target_noise=target_noise,
            noise_clip=noise_clip,
            policy_delay=policy_delay,
            lr=lr,
            hidden=hidden,
            generators=member_generators(seeds),
        )
        # One search serves all members of one beta.
        self.constraints = nn.ModuleList()
        for number, value in enumerate(self.beta.unique().tolist()):
            self.constraints.append(
                DatasetConstraint(log.observation, log.action, beta=value, backend=backend, probes=probes)
            )
            self.register_buffer(f"members_{number}", (self.beta == value).nonzero()[:, 0], persistent=False)

    def nearest_action(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the actions logged nearest to scaled states and actions, by each member's beta, ``(S, B, m)``."""
        found = torch.empty_like(action)
        for number, constraint in enumerate(self.constraints):
            assert isinstance(constraint, DatasetConstraint)
            if len(self.constraints) == 1:
                return constraint.actions(observation, action)
            members = self.get_buffer(f"members_{number}")
            found[members] = constraint.actions(observation[members], action[members])
        return found

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each actor minimises on a batch, shape ``(S,)``."""
        action = self.nets.act(batch.observation)
        value = self.nets.critic.first(batch.observation, action)
        nearest = self.nearest_action(batch.observation, action.detach())
        return normalized_value(value, self.alpha) + (action - nearest).square().mean((1, 2))

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
