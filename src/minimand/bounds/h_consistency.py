r"""H-consistency bounds: what a comp-sum loss promises about the zero-one error.

For scores over all of :math:`R^n`, any classifier h and the comp-sum loss with :math:`\tau \ge 0`,

.. math:: R_{01}(h) - R_{01}^* + M_{01} \le \Gamma_\tau\big(R_\tau(h) - R_\tau^* + M_\tau\big),
          \qquad \Gamma_\tau = T_\tau^{-1},

where M is the minimizability gap, 0 for the set of all measurable functions. The transform :math:`T_\tau` is, with
:math:`A(b) = \frac12 ((1+b)^{1/(2-\tau)} + (1-b)^{1/(2-\tau)})`,

- :math:`\frac{2^{1-\tau}}{1-\tau} (1 - A(b)^{2-\tau})` for :math:`0 \le \tau < 1`;
- :math:`\frac{1+b}{2} \log(1+b) + \frac{1-b}{2} \log(1-b)` for :math:`\tau = 1`;
- :math:`\frac{1}{(\tau-1) n^{\tau-1}} (A(b)^{2-\tau} - 1)` for :math:`1 < \tau < 2`;
- :math:`\frac{b}{(\tau-1) n^{\tau-1}}` for :math:`\tau \ge 2`.

Only from :math:`\tau > 1` on does the number n of classes enter, and weaken the promise.

Source: Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
arXiv 2304.07288, H-consistency bounds of comp-sum losses and their minimizability gaps.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..numerics import comp_sum


def comp_sum_transform(
    zero_one_regret: Float[Tensor, "*shape"], *, tau: float, num_classes: int
) -> Float[Tensor, "*shape"]:
    """Compute T_tau: the least comp-sum regret that goes with a zero-one regret.

    Args:
        zero_one_regret: The paper's beta, in [0, 1].
        tau: Of the comp-sum loss, at least 0.
        num_classes: The paper's n, at least 2.

    Returns:
        The transform, in the shape and dtype of ``zero_one_regret``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> comp_sum_transform(torch.tensor([0.0, 1.0]), tau=1.0, num_classes=10)
        tensor([0.0000, 0.6931])

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288.
    """
    _check(tau, num_classes)
    checks.floating(zero_one_regret, "zero_one_regret")
    checks.require(
        (zero_one_regret >= 0) & (zero_one_regret <= 1), lambda: "zero_one_regret must lie in [0, 1] everywhere"
    )
    b = zero_one_regret
    if tau >= 2:
        return b / ((tau - 1) * num_classes ** (tau - 1))
    if tau == 1:
        return (torch.special.xlog1py(1 + b, b) + torch.special.xlog1py(1 - b, -b)) / 2
    power = 1 / (2 - tau)
    # log A, not A: the powers overflow as tau nears 2.
    log_mean = torch.logaddexp(power * torch.log1p(b), power * torch.log1p(-b)) - math.log(2)
    scale = 2 ** (1 - tau) if tau < 1 else num_classes ** (1 - tau)
    return scale * torch.expm1((2 - tau) * log_mean) / (tau - 1)


def comp_sum_bound(
    surrogate_regret: Float[Tensor, "*shape"], *, tau: float, num_classes: int
) -> Float[Tensor, "*shape"]:
    """Compute Gamma_tau, the inverse of :func:`comp_sum_transform`: the most zero-one regret for a comp-sum regret.

    Args:
        surrogate_regret: Regret of the comp-sum loss plus its minimizability gap, at least 0.
        tau: Of the comp-sum loss, at least 0.
        num_classes: At least 2.

    Returns:
        The bound, in [0, 1]; 1, which says nothing, where the regret is too large to promise more.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> comp_sum_bound(torch.tensor([0.02, 9.0]), tau=1.0, num_classes=10)
        tensor([0.1993, 1.0000])

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288.
    """
    _check(tau, num_classes)
    checks.floating(surrogate_regret, "surrogate_regret")
    checks.require(surrogate_regret >= 0, lambda: "surrogate_regret must be at least 0 everywhere")
    regret = surrogate_regret.to(torch.float64)
    low, high = torch.zeros_like(regret), torch.ones_like(regret)
    for _ in range(60):
        middle = (low + high) / 2
        below = comp_sum_transform(middle, tau=tau, num_classes=num_classes) <= regret
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # The upper end: a bound may only err upwards.
    return high.to(surrogate_regret.dtype)


def conditional_regret(
    probabilities: Float[Tensor, "*batch classes"], scores: Float[Tensor, "*batch classes"], *, tau: float
) -> Float[Tensor, "*batch"]:
    r"""Compute how much more than the best scores' the expected comp-sum loss at a point is.

    :math:`\sum_y p_y L_\tau(s, y) - C^*(p)` with :math:`C^* = ((\sum_y p_y^{1/(2-\tau)})^{2-\tau} - 1)/(1-\tau)` for
    :math:`\tau < 2` (Shannon's entropy at 1) and :math:`(1 - \max p)/(\tau-1)` from 2 on.

    Args:
        probabilities: Of the classes at each point.
        scores: Given to the classes.
        tau: Of the comp-sum loss, at least 0.

    Returns:
        One regret a point, at least 0 up to rounding.

    Raises:
        ValueError: If ``probabilities`` are none, or shapes differ.

    Example:
        >>> conditional_regret(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), tau=1.0)
        tensor(0.6931)

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288.
    """
    return _conditional_loss(probabilities, scores, tau) - _least_conditional_loss(probabilities, tau)


def minimizability_gap(
    probabilities: Float[Tensor, "points classes"], scores: Float[Tensor, "hypotheses points classes"], *, tau: float
) -> Float[Tensor, ""]:
    r"""Compute the minimizability gap of a finite hypothesis set on equally likely points.

    :math:`M = \min_h E_x C(h, x) - E_x \min_h C(h, x)`: how much worse the best single hypothesis is than choosing
    the best one at each point. It is what stands between an H-consistency bound and the estimation error.

    Args:
        probabilities: Of the classes at each point.
        scores: Of each hypothesis at each point.
        tau: Of the comp-sum loss, at least 0.

    Returns:
        The gap, at least 0.

    Raises:
        ValueError: If ``probabilities`` are none, or shapes differ.

    Example:
        >>> always_one_class = torch.tensor([[[3.0, 0.0], [3.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]])
        >>> minimizability_gap(torch.eye(2), always_one_class, tau=1.0)
        tensor(1.5000)

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288.
    """
    if scores.dim() != 3 or scores.shape[1:] != probabilities.shape:
        raise ValueError(
            f"scores must have shape (hypotheses, {', '.join(map(str, probabilities.shape))}), "
            f"got {tuple(scores.shape)}"
        )
    checks.not_empty(scores, "scores")
    losses = _conditional_loss(probabilities.expand_as(scores), scores, tau)
    return losses.mean(1).amin() - losses.amin(0).mean()


def _conditional_loss(probabilities: Tensor, scores: Tensor, tau: float) -> Tensor:
    checks.non_negative(tau, "tau")
    checks.floating(scores, "scores")
    checks.floating(probabilities, "probabilities")
    if scores.shape != probabilities.shape:
        raise ValueError(
            f"scores must have the shape of probabilities {tuple(probabilities.shape)}, got {tuple(scores.shape)}"
        )
    checks.finite(scores, "scores")
    total = probabilities.sum(-1, keepdim=True)
    checks.require(
        (probabilities >= 0) & ((total - 1).abs() < 1e-4), lambda: "probabilities must be at least 0 and sum to 1"
    )
    each = comp_sum(torch.log_softmax(scores, dim=-1), tau)
    return (probabilities * each).sum(-1)


def _least_conditional_loss(probabilities: Tensor, tau: float) -> Tensor:
    if tau >= 2:
        return (1 - probabilities.amax(-1)) / (tau - 1)
    if tau == 1:
        return torch.special.entr(probabilities).sum(-1)
    log_sum = torch.logsumexp(probabilities.log() / (2 - tau), dim=-1)
    return torch.expm1((2 - tau) * log_sum) / (1 - tau)


def _check(tau: float, num_classes: int) -> None:
    checks.non_negative(tau, "tau")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
