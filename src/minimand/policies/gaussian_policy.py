"""A Gaussian policy for bounded actions: a network for the mean, one deviation an action."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from .. import checks


class GaussianPolicy(nn.Module):
    r"""A network with tanh layers for the mean of a Gaussian whose deviations do not depend on the state.

    ``policy(observation)`` is the distribution that trust regions work on, over all numbers; what is done is held to
    the range of actions. In use, ``policy.act(observation)`` is the mean, held to the range.

    Args:
        observation_size: Numbers of an observation.
        action_size: Numbers of an action.
        low: Least action.
        high: Greatest action, above ``low``. The mean of an untrained policy is near the middle.
        hidden: Widths of the hidden layers; two of 128 in the paper's code.
        log_std: Logarithm of the first deviations, in halves of the range; -0.5 in the paper's code.

    Example:
        >>> policy = GaussianPolicy(2, 1, low=0.0, high=1.0)
        >>> policy(torch.zeros(5, 2)).log_prob(torch.zeros(5, 1)).shape, policy.act(torch.zeros(5, 2)).shape
        (torch.Size([5]), torch.Size([5, 1]))

    Source:
        Schulman et al. 2015, arXiv 1502.05477, appendix D; sizes of Yan et al. 2025, arXiv 2505.16242 (code).
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        low: float,
        high: float,
        hidden: Sequence[int] = (128, 128),
        log_std: float = -0.5,
    ) -> None:
        super().__init__()
        for size, name in ((observation_size, "observation_size"), (action_size, "action_size")):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        self.low, self.high = float(low), float(high)
        widths = [observation_size, *hidden]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
        last = nn.Linear(widths[-1], action_size)
        with torch.no_grad():  # so that the first policy hardly depends on the state
            last.weight.mul_(0.01)
            last.bias.zero_()
        self.body = nn.Sequential(*layers, last)
        self.log_std = nn.Parameter(torch.full((action_size,), float(log_std)))

    def forward(self, observation: Float[Tensor, "batch n"]) -> Independent:
        """Return the distribution of actions at observations ``(batch, n)``."""
        checks.floating(observation, "observation")
        checks.finite(observation, "observation")
        half = (self.high - self.low) / 2
        mean = self.low + half + half * self.body(observation)
        return Independent(Normal(mean, (half * self.log_std.exp()).expand_as(mean), validate_args=False), 1)

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "batch n"]) -> Float[Tensor, "batch m"]:
        """Return what to do in use: the mean, held to the range.

        Args:
            observation: Of the states.
        """
        return self(observation).mean.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"low={self.low}, high={self.high}"
