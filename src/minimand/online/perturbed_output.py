r"""A network's output perturbed by fixed random signs, which in the mean pull its weights to where they started.

Source: Deb, Ban, Zuo, He and Banerjee, "Contextual Bandits with Online Neural Regression", ICLR 2024,
arXiv 2312.07145, section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks


class PerturbedOutput(nn.Module):
    r"""A network whose output feels the distance from the initial weights, through fixed random signs.

    .. math:: \tilde f(\theta; x, \epsilon^s) = f(\theta; x) + c \sum_j (\theta - \theta_0)_j\, \epsilon^s_j,
              \qquad s = 1 \dots S .

    All parameters that need a gradient when this is built take part, and their values are :math:`\theta_0`, where
    there is no perturbation. The mean over all signs has a closed form, see :meth:`penalty`; ``copies=None`` takes it
    in place of drawn signs, and then the penalty must be added to the loss, as :class:`NeuralCB` does.

    Args:
        network: Any network f; moved to its device and dtype beforehand.
        strength: :math:`c = c_p m^{-1/4}`, at least 0: the paper's constant over the fourth root of the width m. The
            theory asks for a :math:`c_p` with :math:`c_p^2` of the order of the network's curvature.
        copies: How many sign vectors S; the theory asks for the order of log m. They take one byte an entry and
            travel in the state. None for the mean over all.
        seed: Of the signs.

    Raises:
        ValueError: If ``strength`` is negative, ``copies`` below 1, or no parameter needs a gradient.

    Example:
        >>> network = PerturbedOutput(nn.Linear(2, 3), strength=0.1, copies=4)
        >>> network(torch.ones(5, 2)).shape
        torch.Size([4, 5, 3])

    Source:
        Deb et al. 2024, arXiv 2312.07145, section 3; that the signs are kept for all rounds is our reading, the mean
        over signs our derivation.
    """

    initial: Tensor
    signs: Tensor | None

    def __init__(self, network: nn.Module, *, strength: float, copies: int | None = 5, seed: int = 0) -> None:
        super().__init__()
        checks.non_negative(strength, "strength")
        if copies is not None and copies < 1:
            raise ValueError(f"copies must be at least 1, or None for the mean over all signs, got {copies}")
        self.network = network
        self.strength = float(strength)
        self._names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        if not self._names:
            raise ValueError("network must have a parameter that needs a gradient: there is nothing to perturb")
        start = self._weights().detach().clone()
        self.register_buffer("initial", start)
        signs = None
        if copies is not None:
            generator = torch.Generator().manual_seed(seed)
            fair = torch.randint(2, (copies, start.numel()), generator=generator, dtype=torch.int8)
            signs = (2 * fair - 1).to(start.device)
        self.register_buffer("signs", signs)

    def forward(self, contexts: Tensor) -> Tensor:
        """Return the perturbed outputs, ``(copies, *)`` for outputs ``(*)``; one copy, plain, if ``copies`` is None.

        Args:
            contexts: What the network takes.

        Raises:
            ValueError: If the network's output is not finite.
        """
        output: Tensor = self.network(contexts)
        checks.finite(output.detach(), "the network's output")
        if self.signs is None or self.strength == 0:
            return output[None].expand(1 if self.signs is None else len(self.signs), *output.shape)
        offset = self._weights() - self.initial
        shift = self.strength * (self.signs.to(offset) @ offset)
        return output + shift.to(output).view(-1, *[1] * output.dim())

    def penalty(self) -> Float[Tensor, ""]:
        r"""Return :math:`\frac{c^2}{2} \|\theta - \theta_0\|^2`: half of the variance of the perturbation.

        It is, exactly, by how much the perturbation raises the mean of the square loss over all signs; to second order
        in c, times :math:`\sigma'(f)`, by how much it raises that of the KL loss.
        """
        return self.strength**2 / 2 * (self._weights() - self.initial).square().sum()

    def _weights(self) -> Tensor:
        return torch.cat([self.network.get_parameter(name).flatten() for name in self._names])

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"strength={self.strength}, copies={None if self.signs is None else len(self.signs)}"
