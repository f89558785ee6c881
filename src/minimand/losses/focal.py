r"""Focal loss: cross-entropy in which examples already classified well count for less.

.. math:: L = -(1 - p_y)^\gamma \log p_y.

Source: Lin, Goyal, Girshick, He and Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002,
equation 4; the link: Charoenphakdee, Vongkulbhisal, Chairatanakul and Sugiyama, "On Focal Loss for Class-Posterior
Probability Estimation: A Theoretical Perspective", CVPR 2021, arXiv 2011.09172.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss


class FocalLoss(Loss):
    """Focal loss -(1 - p_y)^gamma log p_y.

    Args:
        gamma: At least 0; 0 is cross-entropy. 2 as in the paper.
        weight: One weight a class, or None: the paper's alpha.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = FocalLoss(2.0)
        >>> loss(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 4
        tensor(0.1733)

    Source:
        Lin et al. 2017, arXiv 1708.02002, equation 4.
    """

    weight: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(gamma, "gamma")
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        rows, labels, row_weight = class_rows(input, target, weight=self.weight, ignore_index=self.ignore_index)
        cross_entropy = F.cross_entropy(rows, labels, reduction="none")
        losses = _one_minus(-cross_entropy) ** self.gamma * cross_entropy
        return reduce(losses, self.reduction, row_weight=row_weight, shape=target.shape)

    def link(self, input: Tensor) -> Tensor:
        r"""Return the class probabilities that the population minimiser stands for.

        Each class counts in proportion to :math:`p / ((1-p)^\gamma - \gamma (1-p)^{\gamma-1} p \log p)`, with p the
        softmax: less sure than the softmax where that is sure.
        """
        log_p = torch.log_softmax(input, dim=-1)
        rest = _one_minus(log_p)
        slope = rest - self.gamma * log_p.exp() * log_p
        return torch.softmax(log_p - (self.gamma - 1) * rest.log() - slope.log(), dim=-1)


def _one_minus(log_p: Tensor) -> Tensor:
    """Return 1 - p without cancellation, above zero so that its powers have a finite slope."""
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
