r"""Penalties: prices on violation that need no multiplier.

A penalty is simpler than a :class:`Multiplier` and pays for it: the quadratic one leaves a violation of order
1 / weight, the exact one has a kink at the boundary, and the barrier keeps a distance from it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks


def quadratic_penalty(
    violation: Float[Tensor, "*constraints"], *, weight: float = 1.0, equality: bool = False
) -> Float[Tensor, ""]:
    r"""Compute :math:`\tfrac{w}{2}\sum_j [g_j]_+^2`, or :math:`\tfrac{w}{2}\sum_j g_j^2` for equalities.

    At its minimiser the violation is about the constraint's multiplier over the weight: never exactly zero.

    Args:
        violation: g, positive where an inequality is violated.
        weight: w, above 0.
        equality: Whether the constraints are g = 0 instead of g <= 0.

    Returns:
        The penalty.

    Raises:
        ValueError: If ``violation`` is empty or not finite, or ``weight`` is not above 0.

    Example:
        >>> quadratic_penalty(torch.tensor([2.0, -3.0]))
        tensor(2.)

    Source:
        Courant, "Variational methods", 1943; Nocedal and Wright, "Numerical Optimization", 2006, section 17.1.
    """
    _check(violation, weight, "weight")
    wrong = violation if equality else violation.clamp_min(0)
    return weight / 2 * wrong.square().sum()


def exact_penalty(
    violation: Float[Tensor, "*constraints"], *, weight: float = 1.0, equality: bool = False
) -> Float[Tensor, ""]:
    r"""Compute :math:`w\sum_j [g_j]_+`, or :math:`w\sum_j |g_j|` for equalities.

    Its minimiser is the constrained one itself once the weight exceeds every multiplier, at the price of a kink there.

    Args:
        violation: g, positive where an inequality is violated.
        weight: w, above 0.
        equality: Whether the constraints are g = 0 instead of g <= 0.

    Returns:
        The penalty.

    Raises:
        ValueError: If ``violation`` is empty or not finite, or ``weight`` is not above 0.

    Example:
        >>> exact_penalty(torch.tensor([2.0, -3.0]), weight=0.5)
        tensor(1.)

    Source:
        Zangwill, "Non-linear programming via penalty functions", 1967; Nocedal and Wright 2006, section 17.2.
    """
    _check(violation, weight, "weight")
    return weight * (violation.abs() if equality else violation.clamp_min(0)).sum()


def log_barrier(violation: Float[Tensor, "*constraints"], *, sharpness: float = 10.0) -> Float[Tensor, ""]:
    r"""Compute the log barrier of :math:`g \le 0`, continued along its tangent where the logarithm has no value.

    :math:`-\tfrac1t \log(-g)` up to :math:`g = -1/t^2` and the tangent beyond: finite and with a gradient everywhere,
    so training may start from a point that violates the constraint.

    Args:
        violation: g, positive where violated.
        sharpness: t, above 0. The minimiser of objective plus barrier is off the constrained optimum by at most the
            number of constraints over t (convex problems).

    Returns:
        The barrier, summed over constraints.

    Raises:
        ValueError: If ``violation`` is empty or not finite, or ``sharpness`` is not above 0.

    Example:
        >>> log_barrier(torch.tensor([-1.0]))
        tensor(0.)

    Source:
        Kervadec et al., "Constrained deep networks: Lagrangian optimization via log-barrier extensions", 2019,
        arXiv 1904.04205, equation 4.
    """
    _check(violation, sharpness, "sharpness")
    edge = -1 / sharpness**2
    inside = violation <= edge
    barrier = -torch.log(-torch.where(inside, violation, torch.full_like(violation, -1.0))) / sharpness
    tangent = sharpness * violation + (2 * math.log(sharpness) + 1) / sharpness
    return torch.where(inside, barrier, tangent).sum()


def _check(violation: Tensor, price: float, name: str) -> None:
    checks.floating(violation, "violation")
    checks.not_empty(violation, "violation")
    checks.finite(violation, "violation")
    checks.positive(price, name)
