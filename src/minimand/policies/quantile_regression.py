"""Quantile regression of one sample of returns on another: the loss of distributional agents.

Source: Dabney, Rowland, Bellemare and Munos 2018, "Distributional Reinforcement Learning with Quantile Regression",
AAAI 2018, arXiv 1710.10044.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..reduction import Reduction, reduce


def quantile_huber_loss(
    input: Float[Tensor, "batch quantiles"],
    target: Float[Tensor, "batch samples"],
    *,
    kappa: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute how far quantiles are from those of samples.

    .. math:: \sum_i \frac{1}{M} \sum_j |\tau_i - 1\{y_j < q_i\}| \; \frac{L_\kappa(y_j - q_i)}{\kappa},
              \qquad \tau_i = \frac{2 i + 1}{2 N},

    for Huber's :math:`L_\kappa`, which is :math:`u^2 / 2` up to :math:`|u| = \kappa` and goes on as a line.

    Args:
        input: Predicted quantiles q at the N midpoints, in this order; they need not be sorted.
        target: Samples y of the return, or quantiles of it.
        kappa: :math:`\kappa`, at least 0; where 0, :math:`L_\kappa / \kappa` is the absolute value, whose minima are
            exact quantiles. 1 in the paper; in units of the return.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch, or a risk.

    Returns:
        A scalar, or a loss for each example.

    Raises:
        ValueError: If shapes do not fit, kappa is negative, or a number is not finite.

    Example:
        >>> quantile_huber_loss(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 4.0]]), kappa=0.0)
        tensor(1.)

    Source:
        Dabney et al. 2018, arXiv 1710.10044, equations 9 and 10.
    """
    for value, name in ((input, "input"), (target, "target")):
        checks.floating(value, name)
        checks.not_empty(value, name)
    if input.dim() != 2 or target.dim() != 2 or len(input) != len(target):
        raise ValueError(
            "input must have shape (batch, quantiles) and target (batch, samples), "
            f"got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    checks.non_negative(kappa, "kappa")
    losses, _, _ = _QuantileHuber.apply(input, target, float(kappa))
    return reduce(losses, reduction)


class _QuantileHuber(torch.autograd.Function):
    """Losses of examples; the gradient is known where the loss is, so that no table of pairs is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
        apart = target[:, None, :] - input[:, :, None]
        clipped = apart.clamp(-kappa, kappa) / kappa if kappa else apart.sign()
        tilt = midpoints(input.shape[1], like=input)[:, None] - 0.5
        # tau c where c > 0, (1 - tau) c where c < 0
        pull = torch.addcmul(clipped / 2, clipped.abs(), tilt) / target.shape[1]
        losses = (pull * (apart - (kappa / 2) * clipped)).sum((1, 2))
        return losses, -pull.sum(2), pull.sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, towards_input, towards_target = output
        ctx.mark_non_differentiable(towards_input, towards_target)
        ctx.save_for_backward(towards_input, towards_target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
        towards_input, towards_target = ctx.saved_tensors
        return gradient[:, None] * towards_input, gradient[:, None] * towards_target, None


def midpoints(count: int, *, like: Tensor) -> Tensor:
    """Return the levels (2i + 1) / 2N of N quantiles that stand for equal shares of a law."""
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count
