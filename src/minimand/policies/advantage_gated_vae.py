"""A variational autoencoder of logged actions that learns only from those that were better than expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .stacked_networks import StackedMLP

# The authors' code allows 15, whose variance exp(30) swamps float32; e^2 is wider than any posterior here need be.
_LOG_STD = (-4.0, 2.0)
# Latents of proposals stay where the decoder was trained (BCQ's bound).
_LARGEST_LATENT = 0.5


class AdvantageGatedVAE(nn.Module):
    r"""Model the actions logged in a state by a conditional autoencoder whose errors count only where a gate is open.

    With :math:`\hat a = \tanh G(s, \mu + \sigma\xi)` and :math:`(\mu, \log\sigma) = E(s, a)`:

    .. math:: L = w\,\overline{g\,(\hat a - a)^2} + \tfrac12\,\overline{\mathrm{KL}(N(\mu, \sigma^2)\,\|\,N(0, 1))}

    Means run over batch and coordinates; the divergence is not gated. With ``gate`` 1 everywhere it is BCQ's model.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action; actions lie in [-1, 1].
        latent_dim: Width of the latent; None takes two an action coordinate.
        hidden: Widths of the hidden layers of encoder and decoder; 750 twice in the authors' code.
        generators: One a member.

    Example:
        >>> vae = AdvantageGatedVAE(3, 1, hidden=(8,), generators=[torch.Generator().manual_seed(0)])
        >>> vae.propose(torch.zeros(1, 5, 3), noise=torch.zeros(1, 5, 4, 2)).shape  # four candidates a state
        torch.Size([1, 5, 4, 1])

    Source: T. Liu, Y. Li, Y. Lan, H. Gao, W. Pan and X. Xu, "Adaptive advantage-guided policy regularization for
    offline reinforcement learning" (2024, arXiv 2405.19909), the augmented behaviour policy; the autoencoder is that
    of S. Fujimoto, D. Meger and D. Precup (BCQ, 2019, arXiv 1812.02900), section 4.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        latent_dim: int | None = None,
        hidden: Sequence[int] = (750, 750),
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.latent_dim = 2 * action_dim if latent_dim is None else latent_dim
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        sizes = (observation_dim + action_dim, *hidden, 2 * self.latent_dim)
        self.encoder = StackedMLP(sizes, generators=generators)
        self.decoder = StackedMLP((observation_dim + self.latent_dim, *hidden, action_dim), generators=generators)

    def encode(
        self, observation: Float[Tensor, "members batch n"], action: Float[Tensor, "members batch m"]
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log deviation of the latent, each of shape ``(S, B, latent_dim)``."""
        mean, log_std = self.encoder.head(torch.cat([observation, action], -1)).chunk(2, -1)
        return mean, log_std.clamp(*_LOG_STD)

    def decode(
        self, observation: Float[Tensor, "members batch n"], latent: Float[Tensor, "members batch latent"]
    ) -> Float[Tensor, "members batch m"]:
        """Return the actions of latents, in [-1, 1]."""
        return torch.tanh(self.decoder.head(torch.cat([observation, latent], -1)))

    def forward(
        self,
        observation: Float[Tensor, "members batch n"],
        action: Float[Tensor, "members batch m"],
        noise: Float[Tensor, "members batch latent"],
    ) -> Float[Tensor, "members batch m"]:
        """Return actions as the autoencoder remembers them."""
        mean, log_std = self.encode(observation, action)
        return self.decode(observation, torch.addcmul(mean, log_std.exp(), noise))

    def loss(
        self,
        observation: Float[Tensor, "members batch n"],
        action: Float[Tensor, "members batch m"],
        *,
        gate: Tensor,
        noise: Float[Tensor, "members batch latent"],
        weight: float = 1.0,
        validate: bool = True,
    ) -> Float[Tensor, "members"]:
        """Compute each member's loss.

        Args:
            observation: Scaled, shape ``(S, B, n)``.
            action: In [-1, 1], shape ``(S, B, m)``.
            gate: Whether an action is worth remembering, shape ``(S, B)``, boolean or a weight.
            noise: Standard normal, shape ``(S, B, latent_dim)``.
            weight: Of remembering against the divergence.
            validate: Whether to look for numbers that are not finite, which would stall an accelerator at every step.

        Raises:
            ValueError: If ``gate`` has another shape, or a number is not finite.
        """
        checks.non_negative(weight, "weight")
        if gate.shape != action.shape[:-1]:
            raise ValueError(f"gate must have shape {tuple(action.shape[:-1])}, got {tuple(gate.shape)}")
        if validate:
            checks.finite(observation, "observation")
            checks.finite(action, "action")
        mean, log_std = self.encode(observation, action)
        remembered = self.decode(observation, torch.addcmul(mean, log_std.exp(), noise))
        errors = gate.unsqueeze(-1) * (remembered - action).square()
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
        return weight * errors.mean((1, 2)) + 0.5 * divergence.mean((1, 2))

    def propose(
        self, observation: Float[Tensor, "members batch n"], *, noise: Float[Tensor, "members batch count latent"]
    ) -> Float[Tensor, "members batch count m"]:
        """Return candidate actions from the prior, cut off at 0.5, for states.

        Args:
            observation: Scaled, shape ``(S, B, n)``.
            noise: Standard normal, shape ``(S, B, K, latent_dim)`` for ``K`` candidates a state.
        """
        members, batch, count, _ = noise.shape
        latent = noise.clamp(-_LARGEST_LATENT, _LARGEST_LATENT).flatten(1, 2)
        repeated = observation.unsqueeze(2).expand(-1, -1, count, -1).flatten(1, 2)
        return self.decode(repeated, latent).view(members, batch, count, -1)
