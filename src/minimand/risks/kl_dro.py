r"""Distributionally robust optimisation over a Kullback-Leibler ball.

The worst expected loss over reweightings :math:`q` of the batch near the uniform :math:`u`,

.. math:: \max \Big\{ \sum_i q_i l_i : KL(q \| u) \le \rho \Big\}
          = \min_{\eta > 0}\; \eta \log \frac1n \sum_i e^{l_i / \eta} + \eta \rho,

is attained by :math:`q_i \propto e^{l_i / \eta}` with the :math:`\eta` that puts :math:`q` on the ball's surface, or
by the uniform distribution on the :math:`m` largest losses when :math:`\rho \ge \log(n / m)`. No gradient flows through
:math:`\eta` (Danskin): the gradient with respect to the losses is :math:`q`.

Source: Ben-Tal, den Hertog, De Waegenaere, Melenberg and Rennen, "Robust Solutions of Optimization Problems Affected
by Uncertain Probabilities", Management Science 59(2), 2013, Theorem 1 and Table 4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .risk import Risk, check_losses, solver_dtype

# Bisection alone narrows the bracket of 120 powers of two to 1e-10 in so many steps; Newton mostly needs six.
_ITERATIONS = 44
_TOLERANCE = 1e-13


def kl_dro_weights(losses: Float[Tensor, " batch"], *, radius: float) -> Float[Tensor, " batch"]:
    r"""Compute the worst-case weights over a Kullback-Leibler ball around the uniform ones.

    With the losses scaled to :math:`x \in [-1, 0]` and :math:`\beta` their inverse temperature, :math:`KL(\beta)`
    rises from 0 with slope :math:`\beta\,Var_q(x)`. Newton's method runs on :math:`\sqrt{KL} = \sqrt\rho`, which is
    a straight line for normal losses, inside a bracket that it may not leave.

    Args:
        losses: One loss an example.
        radius: The ball's rho, at least 0, in nats.

    Returns:
        Non-negative weights that add up to one, without gradient.

    Raises:
        ValueError: If ``radius`` is negative, or the losses are malformed.

    Example:
        >>> kl_dro_weights(torch.tensor([0.0, 1.0, 2.0]), radius=0.2)
        tensor([0.1151, 0.2667, 0.6182])

    Source:
        Ben-Tal et al. 2013, Theorem 1.
    """
    check_losses(losses)
    checks.non_negative(radius, "radius")
    if radius == 0:
        return torch.full_like(losses.detach(), 1 / len(losses))
    x = losses.detach().to(solver_dtype(losses))
    top = x.amax()
    spread = top - x.amin()
    x = (x - top) / torch.where(spread > 0, spread, torch.ones_like(spread))
    at_top = (x == 0).to(x.dtype)
    saturated = radius >= math.log(len(losses)) - at_top.sum().log()
    # Hoeffding: the variance of x is at most 1/4, so KL(beta) <= beta^2 / 8.
    low = torch.full_like(top, math.sqrt(8 * radius))
    high = torch.clamp(low, min=1.0) * 2.0**80
    beta = (2 * radius / x.var(correction=0).clamp_min(1e-300)).sqrt().clamp(low, high)
    goal, square = math.sqrt(radius), x.square()
    for _ in range(_ITERATIONS):
        # The largest x is 0, so this is a softmax that cannot overflow.
        unscaled = (beta * x).exp()
        total = unscaled.sum()
        mean = (unscaled @ x) / total
        variance = (unscaled @ square) / total - mean.square()
        kl = (beta * mean - (total / len(losses)).log()).clamp_min(0)
        low, high = torch.where(kl < radius, beta, low), torch.where(kl < radius, high, beta)
        root = kl.sqrt()
        newton = beta - (root - goal) * 2 * root / (beta * variance)
        trusted = (newton > low) & (newton < high)
        previous, beta = beta, torch.where(trusted, newton, (low * high).sqrt())
        # Only eager code on a CPU may look at the value without a stall; elsewhere the steps are few anyhow.
        if _settled(beta, previous, saturated):
            break
    worst = torch.where(saturated, at_top / at_top.sum(), torch.softmax(beta * x, dim=-1))
    return worst.to(losses.dtype)


class KLDRO(Risk):
    """The worst expected loss over a Kullback-Leibler ball around the batch's uniform weights.

    Args:
        radius: The paper's rho, at least 0, in nats: 0 is the mean, log(batch size) or more the maximum.

    Example:
        >>> KLDRO(radius=0.2)(torch.tensor([0.0, 1.0, 2.0]))
        tensor(1.5031)

    Source:
        Ben-Tal et al. 2013, Theorem 1.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        checks.non_negative(radius, "radius")
        self.radius = radius

    def forward(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, ""]:  # type: ignore[override]
        """Weigh the losses ``(batch,)`` by the worst distribution of the ball."""
        check_losses(losses)
        exact = losses.to(torch.promote_types(losses.dtype, torch.float32))
        return (kl_dro_weights(exact, radius=self.radius) * exact).sum().to(losses.dtype)


def _settled(value: Tensor, previous: Tensor, saturated: Tensor) -> bool:
    if not checks.values_readable(value) or value.device.type != "cpu":
        return False
    return bool(saturated | ((value - previous).abs() <= _TOLERANCE * value))
