"""The mean: empirical risk minimisation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .risk import Risk, check_losses


class Mean(Risk):
    """The average loss: plain empirical risk minimisation.

    Example:
        >>> import torch
        >>> Mean()(torch.tensor([1.0, 3.0]))
        tensor(2.)
    """

    def forward(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, ""]:  # type: ignore[override]
        """Average losses ``(batch,)``."""
        check_losses(losses)
        return losses.mean()
