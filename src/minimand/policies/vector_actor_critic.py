r"""An actor, and a critic that values every objective.

Many policies of one architecture are a dictionary of stacked parameters, and act and learn in one pass.

Source: Schulman et al. 2017, arXiv 1707.06347, for the networks' sizes; the critic of several objectives: Xu et al.,
ICML 2020.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks


class ActionLaw(NamedTuple):
    """How actions are drawn: indices by logits, or Gaussian numbers by means beside log-deviations.

    Attributes:
        parameters: Logits ``(*batch, actions)``, or means and log-deviations ``(*batch, 2 * action)``.
        discrete: Which of the two.
    """

    parameters: Tensor
    discrete: bool

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw an action each."""
        where = self.parameters.device if generator is None else generator.device
        if self.discrete:
            # The largest of logits with Gumbel noise is a draw from the softmax.
            uniform = torch.rand(self.parameters.shape, generator=generator, device=where).to(self.parameters)
            noise = -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).clamp_min(1e-20).log()
            return (self.parameters + noise).argmax(-1)
        mean, log_deviation = self.parameters.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, device=where).to(mean)
        return mean + log_deviation.exp() * noise

    def mode(self) -> Tensor:
        """Return the likeliest action each."""
        return self.parameters.argmax(-1) if self.discrete else self.parameters.chunk(2, -1)[0]

    def log_probability(self, action: Tensor) -> Tensor:
        """Compute the log-probability, or its density, of an action each."""
        if self.discrete:
            return self.parameters.log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)
        mean, log_deviation = self.parameters.chunk(2, -1)
        squares = ((action - mean) * (-log_deviation).exp()).square()
        return -(squares / 2 + log_deviation + math.log(2 * math.pi) / 2).sum(-1)

    def entropy(self) -> Tensor:
        """Compute the entropy of each law."""
        if self.discrete:
            logp = self.parameters.log_softmax(-1)
            return -(logp.exp() * logp).sum(-1)
        return (self.parameters.chunk(2, -1)[1] + (1 + math.log(2 * math.pi)) / 2).sum(-1)

    def divergence(self, other: ActionLaw) -> Tensor:
        """Compute each KL divergence from this law to another."""
        if self.discrete:
            logp = self.parameters.log_softmax(-1)
            return (logp.exp() * (logp - other.parameters.log_softmax(-1))).sum(-1)
        (mean, log_deviation), (mean2, log_deviation2) = self.parameters.chunk(2, -1), other.parameters.chunk(2, -1)
        spread = (2 * (log_deviation - log_deviation2)).exp() + ((mean - mean2) * (-log_deviation2).exp()).square()
        return (log_deviation2 - log_deviation + (spread - 1) / 2).sum(-1)


class VectorActorCritic(nn.Module):
    r"""Two networks of tanh units: one for the law of the actions, one for the value of every objective.

    Args:
        observation_size: Features of an observation.
        action_size: Number of discrete actions, or entries of an action.
        num_objectives: n.
        discrete: Whether actions are indices.
        hidden: Units of each hidden layer; two of 64 are the paper's.
        log_deviation: That of Gaussian actions at the start, learned.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> law, values = VectorActorCritic(4, 2, 3, discrete=True)(torch.zeros(5, 4))
        >>> law.shape, values.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))

    Source:
        Liu et al. 2025, arXiv 2410.02236, appendix; Schulman et al. 2017, arXiv 1707.06347.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        num_objectives: int,
        *,
        discrete: bool,
        hidden: Sequence[int] = (64, 64),
        log_deviation: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "observation_size": observation_size,
            "action_size": action_size,
            "num_objectives": num_objectives,
            "hidden": min(hidden, default=1),
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.discrete = discrete
        self.actor = _network([observation_size, *hidden, action_size], last=0.01)
        self.critic = _network([observation_size, *hidden, num_objectives], last=1.0)
        if not discrete:
            self.log_deviation = nn.Parameter(torch.full((action_size,), log_deviation))

    def forward(
        self, observation: Float[Tensor, "*batch features"]
    ) -> tuple[Float[Tensor, "*batch parameters"], Float[Tensor, "*batch objectives"]]:
        """Compute the parameters of :class:`ActionLaw` and the values.

        Args:
            observation: What was seen.
        """
        checks.finite(observation, "observation")
        law = self.actor(observation)
        if not self.discrete:
            law = torch.cat([law, self.log_deviation.expand_as(law)], -1)
        return law, self.critic(observation)

    def extra_repr(self) -> str:
        """Show the kind of action."""
        return f"discrete={self.discrete}"


def _network(sizes: Sequence[int], *, last: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(before, after)
        # Orthogonal weights, and a small last layer of the actor, are the custom of PPO.
        nn.init.orthogonal_(layer.weight, math.sqrt(2) if index < len(sizes) - 2 else last)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def evaluate_stacked(
    policy: nn.Module, parameters: dict[str, Tensor], observation: Float[Tensor, "policies batch features"]
) -> tuple[Tensor, Tensor]:
    """Run policies of one architecture, each on its own batch.

    Args:
        policy: The architecture.
        parameters: Stacked, one leading entry a policy.
        observation: A batch for each policy.
    """

    def one(own: dict[str, Tensor], seen: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(policy, own, (seen,))

    return torch.func.vmap(one)(parameters, observation)


def stack_parameters(policies: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the parameters of several policies."""
    return {name: torch.stack([each[name] for each in policies]) for name in policies[0]}
