"""Actors that draw: a Gaussian around tanh of a network, or squashed by tanh after the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .stacked_networks import StackedMLP

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class GaussianActor(nn.Module):
    r"""Draw actions from :math:`N(\tanh f(s), \sigma^2)`, the deviation one a coordinate whatever the state.

    Args:
        inputs: Width of what the network reads.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        generators: One a member.
        least_log_std: Where the log deviation is cut off below; above it is 2.
    """

    def __init__(
        self,
        inputs: int,
        action_dim: int,
        *,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
        least_log_std: float = -5.0,
    ) -> None:
        super().__init__()
        self.least_log_std = least_log_std
        self.network = StackedMLP((inputs, *hidden, action_dim), generators=generators)
        self.log_std = nn.Parameter(torch.zeros(len(generators), 1, action_dim))

    def forward(self, input: Float[Tensor, "members batch inputs"]) -> Float[Tensor, "members batch m"]:
        """Return the mean action, in [-1, 1]."""
        return torch.tanh(self.network.head(input))

    def log_prob(
        self, input: Float[Tensor, "members batch inputs"], action: Float[Tensor, "members batch m"]
    ) -> Float[Tensor, "members batch"]:
        """Return the log density of actions."""
        log_std = self.log_std.clamp(self.least_log_std, 2)
        scaled = (action - self(input)) * torch.exp(-log_std)
        return -(0.5 * scaled.square() + log_std + _HALF_LOG_TWO_PI).sum(-1)

    def draw(
        self, input: Float[Tensor, "members batch inputs"], noise: Float[Tensor, "members batch m"]
    ) -> Float[Tensor, "members batch m"]:
        """Return actions drawn with given standard normal numbers; the gradient passes through them."""
        return self(input) + torch.exp(self.log_std.clamp(self.least_log_std, 2)) * noise


class SquashedActor(nn.Module):
    r"""Draw actions :math:`\tanh(\mu(s) + \sigma(s)\xi)`.

    Args:
        inputs: Width of what the network reads.
        action_dim: Width of an action.
        hidden: Widths of the hidden layers.
        generators: One a member.
    """

    def __init__(
        self, inputs: int, action_dim: int, *, hidden: Sequence[int], generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        self.network = StackedMLP((inputs, *hidden, 2 * action_dim), generators=generators)

    def forward(self, input: Float[Tensor, "members batch inputs"]) -> Float[Tensor, "members batch m"]:
        """Return the action of the mean, in [-1, 1]."""
        return torch.tanh(self.network.head(input).chunk(2, -1)[0])

    def draw(
        self, input: Float[Tensor, "members batch inputs"], noise: Float[Tensor, "members batch *draws m"]
    ) -> tuple[Float[Tensor, "members batch *draws m"], Float[Tensor, "members batch *draws"]]:
        r"""Return actions drawn with given standard normal numbers, and their log densities.

        With :math:`u = \mu + \sigma\xi`, :math:`\log\pi = \log N(u) - \sum_j \log(1 - \tanh^2 u_j)`, the last as
        :math:`2(\log 2 - u - \operatorname{softplus}(-2u))`, which does not lose digits for large :math:`u`.

        Args:
            input: What the network reads.
            noise: Shape ``(S, B, m)``, or ``(S, B, k, m)`` for ``k`` draws a row.
        """
        mean, log_std = self.network.head(input).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        if noise.ndim > mean.ndim:
            mean, log_std = mean.unsqueeze(-2), log_std.unsqueeze(-2)
        before = mean + torch.exp(log_std) * noise
        log_slope = 2 * (math.log(2) - before - functional.softplus(-2 * before))
        log_prob = -(0.5 * noise.square() + log_std + _HALF_LOG_TWO_PI + log_slope).sum(-1)
        return torch.tanh(before), log_prob
