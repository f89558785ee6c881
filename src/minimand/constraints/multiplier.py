r"""Hold what must hold while minimising: a Lagrange multiplier that updates itself.

For constraints :math:`g(x) \le 0` or :math:`g(x) = 0` the term added to the objective is the augmented Lagrangian's,

.. math:: \tfrac{1}{2c}\sum_j \big([\lambda_j + c\, g_j]_+^2 - \lambda_j^2\big)
          \qquad\text{or}\qquad \sum_j \lambda_j g_j + \tfrac{c}{2} g_j^2 ,

whose gradient is that of :math:`\sum_j [\lambda_j + c\,g_j]_+\, g_j` with the bracket held fixed, and after each call
the multiplier climbs along what it saw, :math:`\lambda \leftarrow [\lambda + \eta\, g]_+`. So :math:`\eta` integrates
the violation and :math:`c`, the damping, answers to it at once: a PI controller. With :math:`c = 0` this is plain
gradient descent and ascent, which circles around the solution of a problem that is not strongly convex.

A squashed multiplier is a bounded function of the number that climbs, :math:`\sigma(\lambda) \in (0, 1)` for
inequalities and :math:`\tanh(\lambda) \in (-1, 1)` for equalities, and climbs by the chain rule:
:math:`\lambda \leftarrow \lambda + \eta\,\mathrm{squash}'(\lambda)\,g`.

Source: Arrow, Hurwicz and Uzawa, 1958; Platt and Barr, "Constrained Differential Optimization", NIPS 1987 (damping);
Rockafellar, 1973 (inequalities); Sohrabi et al., ICML 2024, arXiv 2406.04558 (as a PI controller); Moskovitz et al.,
ICLR 2024, arXiv 2310.04373 (squashed).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks


def augmented_lagrangian(
    violation: Float[Tensor, "*constraints"],
    multiplier: Float[Tensor, "*constraints"],
    *,
    damping: float = 0.0,
    equality: bool = False,
) -> Float[Tensor, "*constraints"]:
    r"""Compute each constraint's term of the augmented Lagrangian.

    :math:`([\lambda + c\,g]_+^2 - \lambda^2) / 2c` for :math:`g \le 0`, and :math:`\lambda g + c g^2 / 2` for
    :math:`g = 0`; both are :math:`\lambda g` at :math:`c = 0`.

    Args:
        violation: g, positive where an inequality is violated.
        multiplier: The multipliers, of the same shape; at least 0 for inequalities.
        damping: c, at least 0.
        equality: Whether the constraints are equalities.

    Returns:
        The terms, one a constraint.

    Raises:
        ValueError: If ``violation`` is not finite or ``damping`` is negative.

    Example:
        >>> augmented_lagrangian(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0]), damping=2.0)
        tensor([0.7500, -0.0000])

    Source:
        Rockafellar, "The multiplier method of Hestenes and Powell applied to convex programming", 1973, equation 1.5.
    """
    checks.floating(violation, "violation")
    checks.finite(violation, "violation")
    checks.non_negative(damping, "damping")
    if equality:
        return multiplier * violation + damping / 2 * violation.square()
    # Where the bracket is positive the quotient is written out: no difference of squares, and no division by zero.
    active = multiplier + damping * violation > 0
    inside = multiplier * violation + damping / 2 * violation.square()
    outside = torch.zeros_like(violation) if damping == 0 else -multiplier.square() / (2 * damping)
    return torch.where(active, inside, outside.to(inside.dtype))


class Multiplier(nn.Module):
    r"""A Lagrange multiplier: add ``multiplier(violation)`` to what you minimise.

    In training mode each call also moves the multipliers by the violation it saw, after having used them; in
    evaluation mode they stay. They are a buffer: checkpoints, devices and copies work as for any module, and no second
    optimizer is needed. Under data parallelism hand in a violation that is averaged over the processes.

    Args:
        lr: The dual step eta, above 0: how fast the multipliers grow, per call and unit of violation.
        num_constraints: How many constraints; a scalar violation is one.
        equality: Whether the constraint is g = 0 instead of g <= 0.
        damping: c, at least 0. Ten times ``lr`` damps the oscillation of most problems; 0 is plain descent-ascent.
        initial: The multipliers' starting value; at least 0 for inequalities, and inside their range if squashed. None
            for 0, and for the middle of the range if squashed: 1/2 for inequalities.
        ceiling: The largest magnitude a multiplier may reach; None for no bound. A multiplier at its ceiling says that
            the constraint cannot be met, or not that fast.
        squash: Whether the multipliers are squashed into (0, 1), or (-1, 1) for equalities. They slow down towards the
            ends of the range, where a ceiling stops them.
        momentum: Share of the last dual step that is taken again, in [0, 1); as in ``torch.optim.SGD``.
        max_norm: The largest norm of the slope along which the multipliers climb, all constraints together; None for
            no bound.

    Attributes:
        dual: The numbers that climb, ``(num_constraints,)``.
        value: The multipliers, ``(num_constraints,)``: ``dual``, squashed or not.

    Example:
        >>> multiplier = Multiplier(0.1, damping=1.0)
        >>> x = torch.tensor(0.0, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x], lr=0.1)
        >>> for _ in range(300):  # minimise (x - 2)^2 subject to x <= 1
        ...     optimizer.zero_grad()
        ...     ((x - 2).square() + multiplier(x - 1)).backward()
        ...     optimizer.step()
        >>> round(x.item(), 3), round(multiplier.value.item(), 2)
        (1.0, 2.0)

    Source:
        Platt and Barr, NIPS 1987; Sohrabi et al. 2024, arXiv 2406.04558; Rockafellar 1973.
    """

    dual: Tensor
    velocity: Tensor | None

    def __init__(
        self,
        lr: float,
        *,
        num_constraints: int = 1,
        equality: bool = False,
        damping: float = 0.0,
        initial: float | None = None,
        ceiling: float | None = None,
        squash: bool = False,
        momentum: float = 0.0,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        checks.positive(lr, "lr")
        checks.non_negative(damping, "damping")
        checks.between(momentum, "momentum", 0.0, 1.0, high_open=True)
        if num_constraints < 1:
            raise ValueError(f"num_constraints must be at least 1, got {num_constraints}")
        if ceiling is not None:
            checks.positive(ceiling, "ceiling")
            if squash:
                raise ValueError(f"ceiling must be None if squash is True, which bounds by 1 already, got {ceiling}")
        if max_norm is not None:
            checks.positive(max_norm, "max_norm")
        if initial is None:
            initial = 0.5 if squash and not equality else 0.0
        if squash:
            checks.between(initial, "initial", -1.0 if equality else 0.0, 1.0, low_open=True, high_open=True)
            start = math.atanh(initial) if equality else math.log(initial / (1 - initial))
        else:
            if initial < 0 and not equality:
                raise ValueError(f"initial must be at least 0 for an inequality, got {initial}")
            start = float(initial)
        self.lr, self.equality, self.damping = lr, equality, damping
        self.squash, self.momentum, self.max_norm = squash, momentum, max_norm
        highest = math.inf if ceiling is None else ceiling
        self._bounds = (-highest if equality or squash else 0.0, highest)
        self.register_buffer("dual", torch.full((num_constraints,), start))
        self.register_buffer("velocity", torch.zeros(num_constraints) if momentum > 0 else None)

    @property
    def value(self) -> Float[Tensor, " constraints"]:
        """The multipliers."""
        if not self.squash:
            return self.dual
        return self.dual.tanh() if self.equality else self.dual.sigmoid()

    def forward(self, violation: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """Return the term to add to the objective and, in training mode, move the multipliers.

        Args:
            violation: g, a scalar or ``(num_constraints,)``; positive where an inequality is violated.

        Raises:
            ValueError: If its shape is another, or it is not finite (the multipliers are then left as they were).
        """
        seen = self._row(violation)
        # A copy, because the update below changes the buffer in place before backward has read it.
        multiplier = self.value.to(violation.dtype, copy=True)
        term = augmented_lagrangian(seen, multiplier, damping=self.damping, equality=self.equality).sum()
        if self.training:
            self._climb(seen.detach())
        return term

    def update(self, violation: Float[Tensor, "..."]) -> None:
        """Move the multipliers, in any mode, where no term of theirs is added to an objective.

        Args:
            violation: g, as of :meth:`forward`.

        Raises:
            ValueError: As :meth:`forward`.
        """
        seen = self._row(violation.detach())
        checks.finite(seen, "violation")
        self._climb(seen)

    def extra_repr(self) -> str:
        """Describe the settings."""
        kind = "= 0" if self.equality else "<= 0"
        squashed = ", squashed" if self.squash else ""
        return f"{self.dual.numel()} constraint(s) {kind}, lr={self.lr}, damping={self.damping}{squashed}"

    def _row(self, violation: Tensor) -> Tensor:
        if violation.numel() != self.dual.numel() or violation.dim() > 1:
            raise ValueError(
                f"violation must be a scalar or have shape ({self.dual.numel()},), got {tuple(violation.shape)}"
            )
        return violation.reshape(-1)

    @torch.no_grad()
    def _climb(self, violation: Tensor) -> None:
        slope = violation.to(self.dual.dtype)
        if self.squash:
            # Both derivatives as products of sigmoids: from the value, 1 - tanh^2 would round to 0 and stay there.
            inner = 2 * self.dual if self.equality else self.dual
            slope = slope * inner.sigmoid() * (-inner).sigmoid() * (4 if self.equality else 1)
        if self.max_norm is not None:
            slope = slope * (self.max_norm / slope.norm()).clamp_max(1.0)
        if self.velocity is not None:
            slope = self.velocity.mul_(self.momentum).add_(slope)
        self.dual.add_(slope, alpha=self.lr)
        self.dual.clamp_(*self._bounds)
