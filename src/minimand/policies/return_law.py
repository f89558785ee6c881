"""Laws of returns with finitely many atoms, and what is read off them.

Source: Rockafellar and Uryasev 2000 for the tail mean.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks


@dataclasses.dataclass(frozen=True)
class ReturnLaw:
    """A law of returns with finitely many atoms.

    Args:
        atoms: The returns, ``(atoms,)``, or ``(atoms, rewards)`` where rewards are vectors.
        weights: Their probabilities, ``(atoms,)``.

    Raises:
        ValueError: If shapes do not fit, an atom is not finite, or the weights are no probabilities.

    Example:
        >>> law = ReturnLaw(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.25, 0.25, 0.5]))
        >>> law.mean(), law.cvar(0.5), law.quantile(0.25)
        (tensor(2.2500), tensor(0.5000), tensor(1.))

    Source:
        Rockafellar and Uryasev 2000, "Optimization of conditional value-at-risk".
    """

    atoms: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for value, name in ((self.atoms, "atoms"), (self.weights, "weights")):
            checks.floating(value, name)
            checks.not_empty(value, name)
            checks.finite(value, name)
        if self.atoms.dim() not in (1, 2) or self.weights.shape != self.atoms.shape[:1]:
            raise ValueError(
                "atoms must have shape (atoms,) or (atoms, rewards) and weights (atoms,), "
                f"got {tuple(self.atoms.shape)} and {tuple(self.weights.shape)}"
            )
        checks.require(
            (self.weights >= 0).all() & ((self.weights.sum() - 1).abs() <= rounding_slack(self.weights)),
            lambda: f"weights must hold probabilities that add up to 1, got a sum of {float(self.weights.sum())}",
        )

    def mean(self) -> Float[Tensor, "*rewards"]:
        """Return the mean."""
        return self.weights @ self.atoms

    def cvar(self, tau: float) -> Float[Tensor, ""]:
        """Return the mean of the worst share of the law, the atom on the border split.

        Args:
            tau: The share, in (0, 1].

        Raises:
            ValueError: If tau lies outside (0, 1], or the returns are vectors.
        """
        checks.between(tau, "tau", 0, 1, low_open=True)
        atoms, weights = self._sorted()
        before = weights.cumsum(0) - weights
        return (weights.minimum((tau - before).clamp_min(0)) * atoms).sum() / tau

    def quantile(self, tau: float) -> Float[Tensor, ""]:
        """Return the largest g below which the law has no more than tau of its mass: the upper quantile.

        Args:
            tau: The level, in [0, 1).

        Raises:
            ValueError: If tau lies outside [0, 1), or the returns are vectors.
        """
        checks.between(tau, "tau", 0, 1, high_open=True)
        atoms, weights = self._sorted()
        # A level that sums of weights should meet exactly must not be missed by their rounding.
        below = weights.cumsum(0) - weights <= tau + rounding_slack(weights)
        return atoms[below.sum() - 1]

    def _sorted(self) -> tuple[Tensor, Tensor]:
        if self.atoms.dim() != 1:
            raise ValueError(f"a tail is of returns that are numbers, got vectors of shape {tuple(self.atoms.shape)}")
        atoms, order = self.atoms.sort()
        return atoms, self.weights[order]


def rounding_slack(weights: Tensor) -> float:
    """Return by how much sums of probabilities may differ through rounding."""
    return 1024 * torch.finfo(weights.dtype).eps
