"""Objectives that distributional dynamic programming optimises, and why it refuses others.

Source: Ávila Pires et al. 2025, arXiv 2501.13028: the conditions on an objective.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks

_PROBES = 256


@dataclasses.dataclass(frozen=True)
class ExpectedUtility:
    r"""The objective :math:`U(\nu) = E_{X \sim \nu} f(X)` of the stock plus the return, :math:`X = c + G`.

    Args:
        function: f, from ``(*batch,)`` to ``(*batch,)``, or from ``(*batch, rewards)`` where rewards are vectors.
        lipschitz: A number L with :math:`|f(x) - f(y)| \le L \|x - y\|_2`; infinity if there is none. Needed for
            processes that do not end.
        name: For messages.

    Example:
        >>> utility = ExpectedUtility(lambda total: total.clamp_max(0.0), lipschitz=1.0)
        >>> utility.refusal(discount=0.9) is None
        True
        >>> print(ExpectedUtility(torch.exp, name="exp").refusal(discount=0.9))  # doctest: +ELLIPSIS
        exp is not indifferent to the discount: ...

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028, sections 4 and 5.
    """

    function: Callable[[Tensor], Tensor]
    lipschitz: float = math.inf
    name: str = "the utility"

    @classmethod
    def mean(cls) -> ExpectedUtility:
        """Make :math:`f(x) = x`: ordinary reinforcement learning."""
        return cls(lambda total: total, 1.0, "mean")

    @classmethod
    def lower_tail(cls) -> ExpectedUtility:
        r"""Make :math:`f(x) = \min(x, 0)`: what totals fall short of zero, which serves the tail mean."""
        return cls(lambda total: total.clamp_max(0), 1.0, "lower tail")

    @classmethod
    def upper_tail(cls) -> ExpectedUtility:
        r"""Make :math:`f(x) = \max(x, 0)`: by what totals exceed zero."""
        return cls(lambda total: total.clamp_min(0), 1.0, "upper tail")

    @classmethod
    def target(cls) -> ExpectedUtility:
        """Make :math:`f(x) = -|x|`: from the first stock -g, how close the return comes to g."""
        return cls(lambda total: -total.abs(), 1.0, "target")

    @classmethod
    def homeostasis(cls) -> ExpectedUtility:
        r"""Make :math:`f(x) = -\|x\|_2` for vectors of rewards: how close every resource comes to its set point."""
        return cls(lambda total: -torch.linalg.vector_norm(total, dim=-1), 1.0, "homeostasis")

    @classmethod
    def at_least(cls) -> ExpectedUtility:
        """Make :math:`f(x) = 1` if x is at least 0, else 0: from the first stock -g, how surely the return reaches g.

        It jumps, so it is no objective for processes that do not end; and where totals are not exact in floating point,
        put g between two of them.
        """
        return cls(lambda total: (total >= 0).to(total.dtype), math.inf, "at least")

    @classmethod
    def shortfall(cls, weight: float) -> ExpectedUtility:
        r"""Make :math:`f(x) = x - w \max(-x, 0)`: the mean, with a price on what the total lacks.

        Args:
            weight: w, at least 0.
        """
        checks.non_negative(weight, "weight")
        return cls(lambda total: total - weight * (-total).clamp_min(0), 1.0 + weight, "shortfall")

    def refusal(self, *, discount: float, scale: float = 1.0, rewards: int | None = None) -> str | None:
        """Say why dynamic programming is wrong for this objective under the discount, or None if it is right.

        Condition (b) is tested at points of all sizes up to ``scale``: it may be met there though not farther out.

        Args:
            discount: In (0, 1].
            scale: How large totals get.
            rewards: Entries of a reward; None where it is a number.

        Returns:
            The condition that fails and where, or None.
        """
        check_discount(discount)
        checks.positive(scale, "scale")
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(_PROBES, rewards or 1, generator=generator, dtype=torch.float64)
        size = torch.logspace(-6, 0, _PROBES // 4, dtype=torch.float64).repeat(4)[:, None]
        points = scale * size * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        points = torch.cat([points, torch.zeros_like(points[:1])])
        values, scaled = (self(each.squeeze(1) if rewards is None else each) for each in (points, discount * points))
        if not bool(torch.isfinite(values).all() and torch.isfinite(scaled).all()):
            return f"{self.name} is not finite at all totals of size up to {scale:.4g}"
        if discount < 1:
            centred, spread = values - values.mean(), float(values.max() - values.min())
            slope = float((centred @ (scaled - scaled.mean())) / (centred @ centred)) if spread else 1.0
            misfit = (scaled - scaled.mean() - slope * centred).abs()
            if slope <= 0 or float(misfit.max()) > 1e-12 * max(spread, float(scaled.max() - scaled.min())):
                where = points[int(misfit.argmax())].tolist()
                return (
                    f"{self.name} is not indifferent to the discount: f({discount} x) is no increasing affine function "
                    f"of f(x), as seen at x = {where}; take discount 1, or an f such as min(x, 0), |x| or x^2"
                )
        if math.isfinite(self.lipschitz):
            steps = torch.linalg.vector_norm(points[1:] - points[:-1], dim=1)
            steepest = float(((values[1:] - values[:-1]).abs() / steps).max())
            if steepest > self.lipschitz * (1 + 1e-6):
                return f"{self.name} is said to have Lipschitz constant {self.lipschitz}, but rises by {steepest:.6g}"
        return None

    def __call__(self, total: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return f of totals."""
        return self.function(total)


def check_discount(discount: float) -> None:
    """Raise unless the discount lies in (0, 1]."""
    checks.between(discount, "discount", 0, 1, low_open=True)
