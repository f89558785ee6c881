r"""Nearest points of convex sets: the simplex, balls and boxes.

A projection is a callable object ``set(point) -> nearest point``: a domain for an online learner, a constraint on a
weight after each optimizer step (:func:`minimand.constraints.constrain`), or a layer, as all of them are
differentiable almost everywhere.
"""

from __future__ import annotations

import abc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks


def project_simplex(
    point: Float[Tensor, "*shape"], *, total: float | Tensor = 1.0, dim: int = -1
) -> Float[Tensor, "*shape"]:
    r"""Return the nearest point of the simplex :math:`\{p \ge 0, \sum_i p_i = z\}` along one dimension.

    It is :math:`p_i = \max(v_i - \mu, 0)` with the one :math:`\mu` that makes the sum right. With :math:`u` the entries
    sorted down, :math:`\mu` is the average of the :math:`r` largest less :math:`z / r`, for the largest :math:`r` whose
    :math:`u_r` exceeds that.

    Args:
        point: Any shape.
        total: The sum z, above 0: a number, or a tensor that broadcasts against ``point`` with ``dim`` of size 1.
        dim: Along which the sum is taken.

    Returns:
        The projection, of the shape, dtype and device of ``point``; differentiable where no entry sits on the edge.

    Raises:
        ValueError: If ``point`` is empty or not finite, or ``total`` is not above 0.

    Example:
        >>> project_simplex(torch.tensor([0.5, 1.5, -1.0]))
        tensor([0., 1., 0.])

    Source:
        Held, Wolfe and Crowder, "Validation of subgradient optimization", 1974; Duchi et al., ICML 2008, figure 1.
    """
    checks.floating(point, "point")
    checks.not_empty(point, "point")
    checks.finite(point, "point")
    if isinstance(total, Tensor):
        checks.require(total > 0, lambda: "total must be above 0")
    else:
        checks.positive(total, "total")
    descending = point.sort(dim=dim, descending=True).values
    shape = [1] * point.dim()
    shape[dim] = point.shape[dim]
    ranks = torch.arange(1, point.shape[dim] + 1, device=point.device, dtype=point.dtype).view(shape)
    thresholds = (descending.cumsum(dim) - total) / ranks
    support = (descending > thresholds).sum(dim, keepdim=True).clamp_min(1)
    threshold = thresholds.gather(dim, support - 1)
    return (point - threshold).clamp_min(0)


def project_ball(
    point: Float[Tensor, "*shape"], *, radius: float = 1.0, dim: int | tuple[int, ...] | None = None
) -> Float[Tensor, "*shape"]:
    r"""Return the nearest point of the Euclidean ball: :math:`v \min(1, r / \|v\|_2)`.

    Args:
        point: Any shape.
        radius: Of the ball, above 0.
        dim: Dimensions the norm is taken over; None for all of them.

    Returns:
        The projection, of the shape, dtype and device of ``point``.

    Raises:
        ValueError: If ``point`` is empty or not finite, or ``radius`` is not above 0.

    Example:
        >>> project_ball(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])

    Source:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.1.
    """
    checks.floating(point, "point")
    checks.not_empty(point, "point")
    checks.finite(point, "point")
    checks.positive(radius, "radius")
    norm = torch.linalg.vector_norm(point, dim=dim, keepdim=True)
    # Where the point is inside, its norm has no part: at zero the norm has no gradient.
    return torch.where(norm > radius, point * (radius / norm.clamp_min(radius)), point)


class Projection(abc.ABC):
    """A closed set with a way back into it: ``projection(point)`` returns a point of the set.

    Subclasses that depend on the step that was just taken (:class:`minimand.constraints.SpectralSoftCap`) read ``lr``
    and ``weight_decay``; the others ignore them.
    """

    @abc.abstractmethod
    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return a point of the set, of the shape, dtype and device of ``point``, which is left as it is.

        Args:
            point: Any point.
            lr: Learning rate of the optimizer step that led to ``point``.
            weight_decay: Weight decay of that step.
        """

    @property
    def diameter(self) -> float:
        """The largest distance between two of its points; infinite where there is no bound or it depends on shape."""
        return math.inf


class Ball(Projection):
    r"""The Euclidean ball of a radius around zero, :math:`\|v\|_2 \le r`, all entries taken together.

    Args:
        radius: r, above 0.

    Example:
        >>> Ball(1.0)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])

    Source:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.1.
    """

    def __init__(self, radius: float = 1.0) -> None:
        checks.positive(radius, "radius")
        self.radius = radius

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the nearest point of the ball."""
        return project_ball(point, radius=self.radius)

    @property
    def diameter(self) -> float:
        """Twice the radius."""
        return 2 * self.radius

    def __repr__(self) -> str:
        return f"Ball(radius={self.radius})"


class Box(Projection):
    r"""The box :math:`l \le v_i \le h` for every entry.

    Args:
        low: l; minus infinity for none.
        high: h, at least ``low``; infinity for none.

    Example:
        >>> Box(0.0, 1.0)(torch.tensor([-1.0, 0.5, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])

    Source:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.2.4.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not low <= high:
            raise ValueError(f"low must be at most high, got {low} and {high}")
        self.low, self.high = low, high

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the nearest point of the box."""
        checks.floating(point, "point")
        checks.finite(point, "point")
        return point.clamp(self.low, self.high)

    def __repr__(self) -> str:
        return f"Box(low={self.low}, high={self.high})"


class Simplex(Projection):
    r"""The simplex :math:`v \ge 0, \sum_i v_i = z` along the last dimension.

    Args:
        total: z, above 0.

    Example:
        >>> Simplex()(torch.tensor([0.5, 1.5, -1.0]))
        tensor([0., 1., 0.])

    Source:
        Held, Wolfe and Crowder, "Validation of subgradient optimization", 1974; Duchi et al., ICML 2008.
    """

    def __init__(self, total: float = 1.0) -> None:
        checks.positive(total, "total")
        self.total = total

    def __call__(self, point: Tensor, *, lr: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        """Return the nearest point of the simplex, row by row."""
        return project_simplex(point, total=self.total)

    @property
    def diameter(self) -> float:
        """The distance between two corners (of one vector)."""
        return math.sqrt(2) * self.total

    def __repr__(self) -> str:
        return f"Simplex(total={self.total})"
