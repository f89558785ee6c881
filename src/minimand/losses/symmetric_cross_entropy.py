r"""Symmetric cross-entropy: cross-entropy plus the cross-entropy with label and prediction exchanged.

.. math:: L = -\alpha \log p_y - \beta \sum_k p_k \log e_{y,k} = -\alpha \log p_y - \beta A (1 - p_y),

where :math:`\log 0` is taken to be the constant :math:`A < 0`.

Source: Wang, Ma, Chen, Luo, Yi and Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels",
ICCV 2019, arXiv 1908.06112.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..numerics import comp_sum
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss


class SymmetricCrossEntropyLoss(Loss):
    """Symmetric cross-entropy: alpha times cross-entropy plus beta times reverse cross-entropy.

    Args:
        alpha: Weight of cross-entropy, at least 0. 0.1 as in the paper's CIFAR-10 runs.
        beta: Weight of reverse cross-entropy, at least 0. 1 as there.
        log_zero: The paper's A, below 0: what stands for log 0. -4 as there.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = SymmetricCrossEntropyLoss(1.0, beta=1.0)
        >>> loss(torch.zeros(1, 4), torch.tensor([0]))  # log 4 + 4 * 3/4
        tensor(4.3863)

    Source:
        Wang et al. 2019, arXiv 1908.06112.
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        beta: float = 1.0,
        log_zero: float = -4.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(alpha, "alpha")
        checks.non_negative(beta, "beta")
        checks.between(log_zero, "log_zero", -math.inf, 0.0, low_open=True, high_open=True)
        self.alpha = alpha
        self.beta = beta
        self.log_zero = log_zero
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        cross_entropy = F.cross_entropy(rows, labels, reduction="none")
        losses = self.alpha * cross_entropy - self.beta * self.log_zero * comp_sum(-cross_entropy, 2.0)
        return reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)

    def link(self, input: Tensor) -> Tensor:
        """Return p / (alpha - beta A p), normalised, with p the softmax: the probabilities at the minimiser.

        With ``alpha = 0`` the minimiser keeps only the likeliest class; the softmax is returned.
        """
        p = torch.softmax(input, dim=-1)
        if self.alpha == 0:
            return p
        return F.normalize(p / (self.alpha - self.beta * self.log_zero * p), p=1, dim=-1)
