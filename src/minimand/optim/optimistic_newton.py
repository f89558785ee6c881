r"""Optimistic mirror descent for exp-concave losses: a quadratic map that grows with the gradients seen.

.. math:: R_t(x) = \tfrac12 \|x\|_{H_t}^2, \qquad
          H_t = \Big(s + \frac{\beta G^2}2\Big) I + \frac\beta2 \sum_{r < t} g_r g_r^T.

Steps are those of an online Newton method with the last gradient as a hint. With :math:`\|g_t\| \le G`,

.. math:: \sum_{t \le T} \Big(\langle g_t, x_t - u \rangle - \frac\beta2 \langle g_t, x_t - u \rangle^2\Big) \le
          \frac{D^2}2 \Big(s + \frac{\beta G^2}2\Big) + \frac32 \sum_{t \le T} \|g_t - g_{t-1}\|_{H_t^{-1}}^2,

and the last term is at most :math:`\frac{12 d}\beta \ln(1 + \frac{\beta V_T}{8 s d})`, with
:math:`V_T = \sum_t \|g_t - g_{t-1}\|^2`.

Source: Chen et al., JMLR 25 (2024), arXiv 2302.04552, algorithm 3; the metric: Chiang et al., COLT 2012. The bound is
re-derived, with 3/2 for 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..projections import Ball, Projection
from .adaptive_step import check_round

LARGEST_METRIC = 2000

# Newton's method needs five or so; metrics as bad as 1 to 1e12 take twelve.
_NEWTON_STEPS = 20


class NewtonState(NamedTuple):
    r"""Where learners with a growing quadratic map stand between two rounds; ``(*batch, dim)``, squared for matrices.

    Attributes:
        point: The point x to play next.
        anchor: The second sequence, :math:`\hat x`.
        hint: The last gradient.
        metric: H of the next round.
        inverse: Of ``metric``.
        variation: V_t.
        start: How much the first metric weighs, :math:`s + \beta G^2 / 2`.
        stability: The sum of :math:`\frac32 \|g_t - g_{t-1}\|_{H_t^{-1}}^2`; infinite once a promise was broken.
        rounds: How many rounds were played.
    """

    point: Tensor
    anchor: Tensor
    hint: Tensor
    metric: Tensor
    inverse: Tensor
    variation: Tensor
    start: Tensor
    stability: Tensor
    rounds: int

    @classmethod
    def at(
        cls, point: Float[Tensor, "*batch dim"], *, grad_bound: float, curvature: float, scale: float = 1.0
    ) -> NewtonState:
        """Begin at a point of the domain.

        Args:
            point: x_1.
            grad_bound: G, which no gradient's norm exceeds.
            curvature: The paper's beta; see :func:`optimistic_newton_step`.
            scale: s, the weight of the identity in the first metric; 1 in the paper.
        """
        checks.floating(point, "point")
        checks.finite(point, "point")
        for value, name in ((grad_bound, "grad_bound"), (curvature, "curvature"), (scale, "scale")):
            checks.positive(value, name)
        dim = point.shape[-1]
        if dim > LARGEST_METRIC:
            raise ValueError(f"point must have at most {LARGEST_METRIC} entries, as H is dense, got {dim}")
        start = scale + curvature * grad_bound**2 / 2
        eye = torch.eye(dim, dtype=point.dtype, device=point.device).expand(*point.shape[:-1], dim, dim)
        zero = point.new_zeros(point.shape[:-1])
        return cls(
            point=point,
            anchor=point,
            hint=torch.zeros_like(point),
            metric=start * eye,
            inverse=eye / start,
            variation=zero,
            start=torch.full_like(zero, start),
            stability=zero,
            rounds=0,
        )

    def regret_bound(self, *, diameter: float) -> Float[Tensor, "*batch"]:
        """Return what the regret of the rounds played cannot exceed; infinite if ``grad_bound`` was."""
        return diameter**2 / 2 * self.start + self.stability


def optimistic_newton_step(
    state: NewtonState,
    gradient: Float[Tensor, "*batch dim"],
    *,
    grad_bound: float,
    curvature: float,
    domain: Ball | None = None,
    lr: float = 1.0,
) -> NewtonState:
    r"""Compute the next point of optimistic mirror descent for exp-concave losses, for many streams at once.

    .. math:: \hat x_{t+1} = P^{H_t}(\hat x_t - H_t^{-1} g_t), \qquad
              x_{t+1} = P^{H_{t+1}}(\hat x_{t+1} - H_{t+1}^{-1} g_t), \qquad
              H_{t+1} = H_t + \tfrac\beta2 g_t g_t^T.

    Inside the ball a round costs :math:`O(d^2)`; where it has to project, an eigendecomposition, :math:`O(d^3)`.

    Args:
        state: From :meth:`NewtonState.at` or the last round.
        gradient: Of the losses at ``state.point``.
        grad_bound: G, as given to :meth:`NewtonState.at`. A larger gradient makes the regret bound infinite.
        curvature: The paper's beta: the losses must have :math:`f(u) \ge f(x) + \langle g, u-x \rangle + \frac\beta2
            \langle g, u-x \rangle^2`, as alpha-exp-concave ones with :math:`\beta = \frac12 \min(1 / 4GD, \alpha)`.
        domain: A ball, or None.
        lr: Multiplies the steps; 1 in the paper. Any other makes the regret bound infinite.

    Returns:
        The state of the next round, whose ``point`` is to be played.

    Raises:
        ValueError: If a gradient is not finite or a setting out of range.
        TypeError: If the domain is not a ball.

    Example:
        >>> state = NewtonState.at(torch.zeros(2), grad_bound=5.0, curvature=0.08)
        >>> optimistic_newton_step(state, torch.tensor([3.0, 4.0]), grad_bound=5.0, curvature=0.08).point
        tensor([-2.5000, -3.3333])

    Source:
        Chen et al. 2024, arXiv 2302.04552, algorithm 3; the metric: Chiang et al., COLT 2012.
    """
    check_round(gradient, state.point, grad_bound, lr, 1.0)
    checks.positive(curvature, "curvature")
    check_ball(domain)
    difference = gradient - state.hint
    moved = torch.linalg.vecdot(difference, difference)
    checks.require(moved < torch.inf, lambda: "gradient contains NaN or infinity, or its square overflows")
    paid = 1.5 * torch.linalg.vecdot(difference, _times(state.inverse, difference))
    # A norm that equals the bound may come out a rounding error above it.
    kept = torch.linalg.vector_norm(gradient, dim=-1) <= grad_bound * (1 + 1e-5)
    paid = torch.where(kept, paid, torch.inf) if lr == 1 else torch.full_like(paid, torch.inf)
    anchor = _newton(state.anchor, state.inverse, state.metric, gradient, domain, lr)
    metric = state.metric + curvature / 2 * (gradient[..., :, None] * gradient[..., None, :])
    solved = _times(state.inverse, gradient)
    shrink = curvature / 2 / (1 + curvature / 2 * torch.linalg.vecdot(gradient, solved))
    inverse = state.inverse - shrink[..., None, None] * (solved[..., :, None] * solved[..., None, :])
    return NewtonState(
        point=_newton(anchor, inverse, metric, gradient, domain, lr),
        anchor=anchor,
        hint=gradient,
        metric=metric,
        inverse=inverse,
        variation=state.variation + moved,
        start=state.start,
        stability=state.stability + paid,
        rounds=state.rounds + 1,
    )


def project_ball_in_metric(
    point: Float[Tensor, "*batch dim"], metric: Float[Tensor, "*batch dim dim"], *, radius: float = 1.0
) -> Float[Tensor, "*batch dim"]:
    r"""Return the nearest point of the ball in the norm of a metric.

    It minimises :math:`\|x - y\|_H` over :math:`\|x\|_2 \le r`. Outside the ball :math:`H (y - x) = \mu x` with the
    one :math:`\mu > 0` that brings x to the sphere. Newton's method on :math:`1 / \|x(\mu)\| - 1 / r`, which is concave
    and rises, climbs to it from 0 and never steps beyond.

    Args:
        point: y.
        metric: H, symmetric and positive definite.
        radius: r, above 0.

    Returns:
        The projections; points inside the ball as they are.

    Raises:
        ValueError: If the shapes disagree, an argument is not finite, or the metric not positive definite.

    Example:
        >>> project_ball_in_metric(torch.tensor([3.0, 4.0]), torch.eye(2))
        tensor([0.6000, 0.8000])

    Source:
        Moré and Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4 (1983).
    """
    checks.floating(point, "point")
    checks.floating(metric, "metric")
    if metric.shape != (*point.shape, point.shape[-1]):
        raise ValueError(f"metric must have shape {(*point.shape, point.shape[-1])}, got {tuple(metric.shape)}")
    checks.finite(point, "point")
    checks.finite(metric, "metric")
    checks.positive(radius, "radius")
    outside = torch.linalg.vector_norm(point, dim=-1, keepdim=True) > radius
    if not bool(outside.any()):
        return point
    values, vectors = torch.linalg.eigh(metric)
    checks.require(values > 0, lambda: f"metric must be positive definite, got the eigenvalue {float(values.min())}")
    pulled = values * _times(vectors.mT, point)
    multiplier = torch.zeros_like(values[..., :1])
    for _ in range(_NEWTON_STEPS):
        found = pulled / (values + multiplier)
        norm = torch.linalg.vector_norm(found, dim=-1, keepdim=True).clamp_min(torch.finfo(point.dtype).tiny)
        slope = (found.square() / (values + multiplier)).sum(-1, keepdim=True)
        # Inside, the first step goes below 0 and is taken back, so that nothing moves.
        ahead = torch.where(outside, (norm - radius) * norm.square() / (radius * slope), 0)
        multiplier = (multiplier + ahead).clamp_min(0)
    found = _times(vectors, pulled / (values + multiplier))
    length = torch.linalg.vector_norm(found, dim=-1, keepdim=True)
    return torch.where(outside, found * (radius / length).clamp_max(1), point)


def check_ball(domain: Projection | None) -> None:
    """Raise ``TypeError`` unless the domain is one that can be projected to in any metric."""
    if not (domain is None or isinstance(domain, Ball)):
        raise TypeError(f"domain must be a Ball or None for exp-concave losses, got {domain!r}")


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _newton(
    anchor: Tensor, inverse: Tensor, metric: Tensor, gradient: Tensor, domain: Ball | None, lr: float
) -> Tensor:
    moved = anchor - lr * _times(inverse, gradient)
    return moved if domain is None else project_ball_in_metric(moved, metric, radius=domain.radius)
