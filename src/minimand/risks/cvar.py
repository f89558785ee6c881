r"""The conditional value at risk: the mean of the worst losses.

At level :math:`\alpha`, the mean over the worst :math:`(1 - \alpha) n` of :math:`n` losses; where that is no whole
number, the loss on the boundary counts by the fraction that is left. The same number by Rockafellar and Uryasev:

.. math:: CVaR_\alpha(l) = \min_t\; t + \frac{1}{(1 - \alpha) n} \sum_i (l_i - t)_+
          = \max \Big\{ \sum_i q_i l_i : 0 \le q_i \le \frac{1}{(1 - \alpha) n},\ \sum_i q_i = 1 \Big\}.

Source: Rockafellar and Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2, 2000, Theorem 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .risk import Risk, check_losses


class CVaR(Risk):
    """The mean of the worst ``1 - level`` of the losses.

    Args:
        level: The quantile above which losses count, in [0, 1): 0 is the mean, 0.9 the mean of the worst tenth.
            Below one example's share of the batch it is the maximum.

    Example:
        >>> CVaR(0.5)(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        tensor(4.5000)

    Source:
        Rockafellar and Uryasev 2000.
    """

    def __init__(self, level: float = 0.9) -> None:
        super().__init__()
        checks.between(level, "level", 0.0, 1.0, high_open=True)
        self.level = level

    def forward(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, ""]:  # type: ignore[override]
        """Average the worst of the losses ``(batch,)``."""
        check_losses(losses)
        # Less than one example's share of the batch is all on the worst one.
        share = max((1 - self.level) * len(losses), 1.0)
        counted = min(math.ceil(share), len(losses))
        exact = losses.to(torch.promote_types(losses.dtype, torch.float32))
        worst = exact.topk(counted, sorted=False).values if counted < len(losses) else exact
        return ((worst.sum() - (counted - share) * worst.amin()) / share).to(losses.dtype)
