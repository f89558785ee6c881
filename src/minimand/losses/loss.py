"""What every loss keeps."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from ..reduction import Reduction, check_reduction


class Loss(nn.Module, abc.ABC):
    """A loss maps ``(input, target)`` to one number per example; ``reduction`` makes it a scalar.

    Leaves are called like torch.nn's losses: ``loss(input, target)``. One that must know more about the
    batch says so in ``needs``, and a training loop passes it by keyword:

    - ``"index"``: ``(batch,)`` positions of the examples in the training set (per-example state);
    - ``"inputs"``: the batch that the model saw.

    A loop that knows only ``loss(input, target)`` can train with every loss whose ``needs`` is empty.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"none"``, or a risk: a callable from losses ``(batch,)`` to a scalar.
    """

    needs: tuple[str, ...] = ()

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    @abc.abstractmethod
    def forward(self, input: Tensor, target: Tensor, **context: Tensor) -> Tensor:
        """Compute the loss of a batch."""

    def link(self, input: Tensor) -> Tensor:
        """Turn scores ``(batch, classes)`` into the class probabilities that this loss fits.

        The softmax, unless the loss models another link. A loss that fits no probabilities says in its page
        what this returns.
        """
        return torch.softmax(input, dim=-1)

    def start(self, model: nn.Module, num_samples: int) -> None:
        """Size the state for a training set and note the model; called once, before the first step."""

    def start_epoch(self, epoch: int) -> None:
        """Note that epoch ``epoch`` (from 0) begins."""

    def after_step(self, model: nn.Module) -> None:
        """Follow the model after an optimizer step."""
