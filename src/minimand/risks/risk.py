"""What every risk keeps."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn

from .. import checks


class Risk(nn.Module, abc.ABC):
    """A risk maps per-example losses ``(batch,)`` to a scalar.

    Pass one as any loss's ``reduction``, or call it on losses of your own. One that must know more about
    the batch says so in ``needs`` (see :class:`minimand.losses.Loss`); used as a ``reduction`` it cannot be
    told more, so such a risk is called on unreduced losses.
    """

    needs: tuple[str, ...] = ()

    @abc.abstractmethod
    def forward(self, losses: Tensor, **context: Tensor) -> Tensor:
        """Compute the risk of a batch of losses."""


def check_losses(losses: Tensor) -> None:
    """Raise unless ``losses`` is a non-empty one-dimensional floating-point tensor of finite numbers."""
    checks.floating(losses, "losses")
    if losses.dim() != 1:
        raise ValueError(f"losses must have shape (batch,), got {tuple(losses.shape)}")
    checks.not_empty(losses, "losses")
    values = losses.detach()
    # A finite sum proves every loss finite, at a fraction of the cost; an overflowing one proves nothing.
    if values.device.type == "cpu" and checks.values_readable(values) and math.isfinite(values.sum().item()):
        return
    checks.finite(values, "losses")


def solver_dtype(losses: Tensor) -> torch.dtype:
    """Return the precision in which worst-case weights are solved for: double, where the device has it."""
    return torch.float32 if losses.device.type == "mps" else torch.float64
