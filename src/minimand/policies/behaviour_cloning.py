"""Behaviour cloning: do what was done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .offline_batches import Batch
from .stacked_networks import StackedMLP, adam, descend, member_generators


class BehaviourCloning(nn.Module):
    r"""Learn from a log to do what was done: :math:`\min_\pi \frac1m \|\pi(s) - a\|^2`.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions are scaled to [-1, 1].
        lr: Learning rate of Adam.
        hidden: Widths of the hidden layers.
        seeds: One a member: learners of different seeds train side by side.

    Example:
        >>> BehaviourCloning(3, 1, hidden=(8,)).act(torch.zeros(1, 5, 3)).shape
        torch.Size([1, 5, 1])

    Source: D. A. Pomerleau, "ALVINN: an autonomous land vehicle in a neural network" (1988).
    """

    noise_width = 0

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.actor = StackedMLP((observation_dim, *hidden, action_dim), generators=member_generators(seeds))
        self.optimizer = adam(self.actor, lr)

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return what each actor minimises on a batch, shape ``(S,)``."""
        return (self.act(batch.observation) - batch.action).square().mean((1, 2))

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every member, and return its losses, each of shape ``(S,)``."""
        loss = self.actor_loss(batch)
        descend(self.optimizer, loss)
        return {"actor": loss.detach()}

    def act(self, observation: Tensor) -> Tensor:
        """Return actions for scaled observations, shapes ``(S, B, n)`` to ``(S, B, m)``."""
        return torch.tanh(self.actor.head(observation))

    def network(self, member: int) -> nn.Sequential:
        """Return a copy of one member's actor, before its tanh."""
        return self.actor.member(member)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name, for saving."""
        return {"actor": self.optimizer}
