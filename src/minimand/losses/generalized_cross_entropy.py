r"""Generalized cross-entropy and the mean absolute error: comp-sum losses of tau 1 to 2 under their known names.

.. math:: L_q = (1 - p_y^q) / q, \qquad MAE = \|e_y - p\|_1 = 2 (1 - p_y) = 2 L_1.

Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
NeurIPS 2018, arXiv 1805.07836, equation 6; Ghosh, Kumar and Sastry, "Robust Loss Functions under Label Noise for Deep
Neural Networks", AAAI 2017, arXiv 1712.09482.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..numerics import comp_sum
from ..reduction import Reduction, class_rows, reduce
from .comp_sum import comp_sum_loss
from .loss import Loss


class GeneralizedCrossEntropyLoss(Loss):
    """Generalized cross-entropy (1 - p_y^q) / q: comp-sum with tau = 1 + q.

    Args:
        q: In [0, 1]: 0 is cross-entropy, 1 half the mean absolute error. 0.7 as in the paper's experiments.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = GeneralizedCrossEntropyLoss(0.5)
        >>> loss(torch.zeros(1, 4), torch.tensor([0]))  # (1 - 4 ** -0.5) / 0.5
        tensor(1.)

    Source:
        Zhang and Sabuncu 2018, arXiv 1805.07836, equation 6 (without its truncation).
    """

    weight: Tensor | None

    def __init__(
        self,
        q: float = 0.7,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.between(q, "q", 0.0, 1.0)
        self.q = q
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return comp_sum_loss(
            input,
            target,
            tau=1 + self.q,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def link(self, input: Tensor) -> Tensor:
        """Return softmax((1 - q) scores), which at the population minimiser is the class probabilities.

        At ``q = 1`` the minimiser keeps only the likeliest class; softmax(scores) is returned.
        """
        return torch.softmax((1 - self.q if self.q < 1 else 1.0) * input, dim=-1)


class MeanAbsoluteErrorLoss(Loss):
    """Mean absolute error 2 (1 - p_y): the L1 distance of the probabilities to the one-hot label.

    Its sum over all labels is constant, so under uniform label noise the noisy and the clean minimiser agree. The
    same bounded gradient makes it slow to train, and with many classes it may not train at all.

    Args:
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = MeanAbsoluteErrorLoss()
        >>> loss(torch.zeros(1, 4), torch.tensor([0]))
        tensor(1.5000)

    Source:
        Ghosh, Kumar and Sastry 2017, arXiv 1712.09482.
    """

    weight: Tensor | None

    def __init__(
        self, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        losses = 2 * comp_sum(-F.cross_entropy(rows, labels, reduction="none"), 2.0)
        return reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)
