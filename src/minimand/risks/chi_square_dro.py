r"""Distributionally robust optimisation over a chi-square ball.

The worst expected loss over reweightings :math:`q` of the batch,

.. math:: \max \Big\{ \sum_i q_i l_i : \frac1n \sum_i (n q_i - 1)^2 \le \rho \Big\},

is attained by :math:`q_i \propto (l_i - \eta)_+`. While no weight is zero it equals
:math:`\bar l + \sqrt{\rho\,Var(l)}`: the mean plus a multiple of the standard deviation. For larger radii the smallest
losses drop out; with :math:`m_k, v_k` the mean and variance of the :math:`k` losses that stay,
:math:`\eta = m_k - \sqrt{v_k / ((1 + \rho) k / n - 1)}`. From :math:`\rho = n / m - 1` on, the :math:`m` largest
losses share all the weight.

Source: Namkoong and Duchi, "Variance-based Regularization with Convex Objectives", NIPS 2017, arXiv 1610.02581; and
Ben-Tal et al., Management Science 59(2), 2013. Namkoong and Duchi measure half the divergence and call its bound
rho / n, so ``radius`` is their 2 rho / n.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .risk import Risk, check_losses, solver_dtype


def chi_square_dro_weights(losses: Float[Tensor, " batch"], *, radius: float) -> Float[Tensor, " batch"]:
    r"""Compute the worst-case weights over a chi-square ball around the uniform ones, exactly, by one sort.

    :math:`E(l - \eta)_+^2 / (E(l - \eta)_+)^2` rises with :math:`\eta` and must be :math:`1 + \rho`. Its value with
    :math:`\eta` at each loss tells which losses lie above the optimal one.

    Args:
        losses: One loss an example.
        radius: The largest chi-square divergence, at least 0.

    Returns:
        Non-negative weights that add up to one, without gradient.

    Raises:
        ValueError: If ``radius`` is negative, or the losses are malformed.

    Example:
        >>> chi_square_dro_weights(torch.tensor([0.0, 1.0, 2.0]), radius=0.5)
        tensor([0.0447, 0.3333, 0.6220])

    Source:
        Namkoong and Duchi 2017, arXiv 1610.02581.
    """
    check_losses(losses)
    checks.non_negative(radius, "radius")
    size = len(losses)
    if radius == 0:
        return torch.full_like(losses.detach(), 1 / size)
    # Sorted before it is made double, since sorting costs most.
    ordered = losses.detach().sort(descending=True).values.to(solver_dtype(losses))
    top, spread = ordered[0], ordered[0] - ordered[-1]
    scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    # Measured from the largest loss, so that the sums keep their digits where the largest ones are close together.
    ordered = (ordered - top) / scale
    x = (losses.detach().to(ordered.dtype) - top) / scale
    at_top = (x == 0).to(x.dtype)
    saturated = (1 + radius) * at_top.sum() >= size
    count = torch.arange(1, size + 1, dtype=x.dtype, device=x.device)
    first, second = ordered.cumsum(0), ordered.square().cumsum(0)
    excess = first - count * ordered
    excess_square = second - 2 * ordered * first + count * ordered.square()
    active = (ordered == 0) | (size * excess_square > (1 + radius) * excess.square())
    kept = active.sum()
    last = kept[None] - 1
    kept = kept.to(x.dtype)
    mean = first.gather(0, last)[0] / kept
    variance = (second.gather(0, last)[0] / kept - mean.square()).clamp_min(0)
    room = ((1 + radius) * kept / size - 1).clamp_min(1e-12)
    above = torch.relu(x - (mean - (variance / room).sqrt()))
    total = above.sum()
    worst = torch.where(saturated, at_top / at_top.sum(), above / torch.where(total > 0, total, torch.ones_like(total)))
    return worst.to(losses.dtype)


class ChiSquareDRO(Risk):
    """The worst expected loss over a chi-square ball around the batch's uniform weights.

    Args:
        radius: The largest chi-square divergence, at least 0: 0 is the mean, ``batch size - 1`` or more the maximum.

    Example:
        >>> ChiSquareDRO(radius=0.5)(torch.tensor([0.0, 1.0, 2.0]))
        tensor(1.5774)

    Source:
        Namkoong and Duchi 2017, arXiv 1610.02581.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        checks.non_negative(radius, "radius")
        self.radius = radius

    def forward(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, ""]:  # type: ignore[override]
        """Weigh the losses ``(batch,)`` by the worst distribution of the ball."""
        check_losses(losses)
        exact = losses.to(torch.promote_types(losses.dtype, torch.float32))
        return (chi_square_dro_weights(exact, radius=self.radius) * exact).sum().to(losses.dtype)
