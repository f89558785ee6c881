r"""Comp-sum losses: one family from the sum-exponential loss through cross-entropy to the mean absolute error.

For scores :math:`o \in R^K`, label :math:`y` and :math:`p = softmax(o / \rho)`,

.. math:: L_\tau = \Phi^\tau\Big(\sum_{k \ne y} e^{(o_k - o_y) / \rho}\Big) = \frac{p_y^{\tau - 1} - 1}{1 - \tau},
          \qquad \Phi^\tau(u) = \frac{(1 + u)^{1 - \tau} - 1}{1 - \tau}.

:math:`\tau = 0` is the sum-exponential loss; :math:`\tau = 1` cross-entropy; :math:`1 < \tau < 2` generalized
cross-entropy :math:`(1 - p_y^q) / q` with :math:`q = \tau - 1`; :math:`\tau = 2` is :math:`1 - p_y`, half the mean
absolute error. The gradient :math:`p_y^{\tau - 1} (p - e_y) / \rho` says what the choice does: above 1 examples that
look wrong count for less, so wrong labels hurt less; below 1 they count for more.

Source: Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
arXiv 2304.07288.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..numerics import comp_sum
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss


def comp_sum_loss(
    input: Float[Tensor, "batch classes *spatial"],
    target: Int[Tensor, "batch *spatial"],
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the comp-sum loss (p_y^(tau-1) - 1) / (1 - tau).

    Args:
        input: Scores ``(batch, classes)`` or ``(batch, classes, *)``.
        target: Class indices ``(batch,)`` or ``(batch, *)``.
        tau: At least 0. The default 1 is cross-entropy, the paper's best on clean labels together with 1.5.
        rho: Divides the scores: the scale on which a margin counts as large. 1 as in the paper's plain losses.
        weight: One weight a class, or None. An example weighs what its target does.
        ignore_index: Examples with this target count for nothing.
        label_smoothing: In [0, 1): this share of the loss is its mean over all labels.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses in the shape of ``target``.

    Raises:
        ValueError: If a setting is out of range, or the batch is malformed.

    Example:
        >>> comp_sum_loss(torch.zeros(1, 4), torch.tensor([0]), tau=2.0)  # 1 - 1/4
        tensor(0.7500)

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288, the family Phi^tau of comp-sum losses.
    """
    checks.non_negative(tau, "tau")
    checks.positive(rho, "rho")
    checks.between(label_smoothing, "label_smoothing", 0.0, 1.0, high_open=True)
    rows, labels, row_weight = class_rows(input, target, weight=weight, ignore_index=ignore_index)
    losses = _comp_sum_rows(rows if rho == 1 else rows / rho, labels, tau, label_smoothing)
    return reduce(losses, reduction, row_weight=row_weight, shape=target.shape)


class CompSumLoss(Loss):
    """Comp-sum loss: cross-entropy with a knob against wrong labels.

    Args:
        tau: At least 0. 1 is cross-entropy and the default; 1.2 to 1.8 withstand wrong labels; from 2 on training
            is very slow with many classes, below 0.5 gradients on wrong examples grow without bound.
        rho: Divides the scores.
        label_smoothing: In [0, 1): this share of the loss is its mean over all labels.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = CompSumLoss(1.5)
        >>> loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))  # (1 - 3 ** -0.5) / 0.5
        tensor(0.8453)

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288.
    """

    weight: Tensor | None

    def __init__(
        self,
        tau: float = 1.0,
        *,
        rho: float = 1.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(tau, "tau")
        checks.positive(rho, "rho")
        checks.between(label_smoothing, "label_smoothing", 0.0, 1.0, high_open=True)
        self.tau = tau
        self.rho = rho
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return comp_sum_loss(
            input,
            target,
            tau=self.tau,
            rho=self.rho,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def link(self, input: Tensor) -> Tensor:
        """Return softmax((2 - tau) scores / rho), which at the population minimiser is the class probabilities.

        From ``tau = 2`` on the minimiser keeps only the likeliest class; softmax(scores / rho) is returned.
        """
        sharpness = 2 - self.tau if self.tau < 2 else 1.0
        return torch.softmax(sharpness * input / self.rho, dim=-1)


def _comp_sum_rows(
    rows: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], tau: float, label_smoothing: float = 0.0
) -> Float[Tensor, " rows"]:
    if label_smoothing == 0:
        # cross_entropy is log p_y in one fused step.
        return comp_sum(-F.cross_entropy(rows, labels, reduction="none"), tau)
    each = comp_sum(torch.log_softmax(rows, dim=-1), tau)
    own = each.gather(1, labels[:, None])[:, 0]
    return torch.lerp(own, each.mean(1), label_smoothing)
