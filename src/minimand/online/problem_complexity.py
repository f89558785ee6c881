r"""How hard a problem of identification is: how many queries, up to a logarithm, its answer takes.

Queries are rows :math:`x` of a matrix, hypotheses rows :math:`z`, and an instance :math:`\theta` answers query
:math:`x` by :math:`\langle x, \theta \rangle` plus noise of variance 1. With :math:`z^* = \arg\max_z \langle z, \theta
\rangle`, an allocation :math:`\lambda` of the queries and :math:`A(\lambda) = \sum_x \lambda_x x x^\top`,

.. math:: C(\theta) = \min_{\lambda \in \Delta} \max_{z \ne z^*} f_z(\lambda), \qquad
          f_z(\lambda) = \frac{\|z^* - z\|^2_{A(\lambda)^{-1}}}{\langle z^* - z, \theta \rangle^2}.

As :math:`f_z(c \lambda) = f_z(\lambda) / c`, it is also the least :math:`\sum_x \lambda_x` with :math:`f_z(\lambda) \le
1` and :math:`\lambda \ge 0`, a convex program, which Newton's method solves along its central path. The weights
:math:`p_z \propto 1 / (1 - f_z)` on the path give, with :math:`v_z = (z^* - z) / \langle z^* - z, \theta \rangle` and
:math:`M = \sum_z p_z v_z v_z^\top`, the lower bound

.. math:: C(\theta) \ge \frac{\mathrm{tr}(A^{-1} M)^2}{\max_x x^\top A^{-1} M A^{-1} x},

so that every iterate says by how much it can be wrong.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (instances grouped by this quantity); Fiez et al., NeurIPS 2019,
arXiv 1906.08399, theorem 1 (the lower bound on the number of queries). The solver and its certificate are ours.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop

_SHARPEN = 10.0
_SHORTEST = 2.0**-30
_CENTRED = 1e-12


@dataclasses.dataclass(frozen=True)
class ComplexitySolution:
    """What :func:`complexity` found.

    Args:
        value: The complexity of each instance, ``(*instances,)``: what the allocation attains, an upper bound.
        allocation: The share of each query, ``(*instances, queries)``.
        weights: How much each hypothesis counts as an alternative, ``(*instances, hypotheses)``: the dual solution.
        lower: The lower bound that the weights and the allocation prove, ``(*instances,)``.
        residual: The largest relative duality gap, ``value / lower - 1``.
        iterations: Newton steps.
        status: Why it stopped; ``STALLED`` where rounding allows no further step.
    """

    value: Tensor
    allocation: Tensor
    weights: Tensor
    lower: Tensor
    residual: float
    iterations: int
    status: Stop


def complexity(
    theta: Float[Tensor, "*instances dim"],
    hypotheses: Float[Tensor, "hypotheses dim"],
    *,
    queries: Float[Tensor, "queries dim"] | None = None,
    tolerance: float = 1e-8,
    max_iter: int = 500,
    max_seconds: float | None = None,
) -> ComplexitySolution:
    r"""Return how hard it is to tell the best hypothesis of an instance from the others, and how to share out queries.

    .. math:: C(\theta) = \min_\lambda \max_{z \ne z^*}
              \frac{\|z^* - z\|^2_{A(\lambda)^{-1}}}{\langle z^* - z, \theta \rangle^2}

    It is :math:`c^{-2} C(\theta)` for :math:`c\,\theta`. Instances are solved together, in float64; the gradient of the
    solution is not tracked. A step costs :math:`O(queries^2 (hypotheses + dim))` an instance.

    Args:
        theta: The instances.
        hypotheses: The rows z, all different.
        queries: The rows x; None for the unit vectors, where an answer is an entry of theta and noise.
        tolerance: Largest relative duality gap.
        max_iter: Most Newton steps.
        max_seconds: Most seconds; None for no limit.

    Returns:
        A :class:`ComplexitySolution`, in the dtype of ``theta``. That of a single hypothesis is 0.

    Raises:
        ValueError: If a best hypothesis is not unique, or the queries cannot tell two hypotheses apart: the complexity
            is infinite.

    Example:
        >>> solution = complexity(torch.tensor([0.75, 0.25]), torch.eye(2))  # two arms with a gap of 0.5: 4 / 0.5^2
        >>> solution.value, solution.allocation
        (tensor(16.), tensor([0.5000, 0.5000]))

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; Fiez et al. 2019, arXiv 1906.08399, theorem 1.
    """
    checks.positive(tolerance, "tolerance")
    _check(theta, hypotheses, queries)
    budget = Budget(max_iter, max_seconds)
    shape, flat = theta.shape[:-1], theta.detach().reshape(-1, theta.shape[-1]).double()
    table = hypotheses.detach().to(flat)
    directions, scale, others = _directions(flat, table)
    rows, directions = _coordinates(directions, queries)
    solved = _CentralPath(rows, directions, others).solve(tolerance, budget)
    allocation, weights, upper, lower, iterations, status = solved
    gap = (upper / lower.clamp_min(torch.finfo(lower.dtype).tiny) - 1) * (upper > 0)
    unit = scale.square()
    return ComplexitySolution(
        value=(upper * unit).to(theta).view(shape),
        allocation=allocation.to(theta).view(*shape, -1),
        weights=weights.to(theta).view(*shape, -1),
        lower=(lower * unit).to(theta).view(shape),
        residual=float(gap.max()),
        iterations=iterations,
        status=status,
    )


class _CentralPath:
    r"""Newton's method on :math:`t \sum_x \lambda_x - \sum_z \log(1 - f_z(\lambda)) - \sum_x \log \lambda_x`.

    Instances go in a batch; each has a sharpness :math:`t` of its own, which rises once Newton's steps are small.
    """

    def __init__(self, rows: Tensor, directions: Tensor, others: Tensor) -> None:
        self.rows, self.directions, self.others = rows, directions, others
        count = len(rows)
        even = directions.new_ones(len(directions), count)
        self.allocation = even * 2 * self._costs(even).amax(-1, keepdim=True).clamp_min(0.5)
        self.sharpness = self._ambition()
        self.best = (self.allocation, others, even[:, 0] * torch.inf, even[:, 0] * 0)

    def solve(self, tolerance: float, budget: Budget) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Stop]:
        """Go on until the duality gap of every instance is within the tolerance."""
        iteration = 0
        while True:
            inverse = torch.linalg.inv(self._information(self.allocation))
            seen = self.rows @ inverse @ self.directions.mT
            costs = (self.directions * (self.directions @ inverse)).sum(-1)
            slack = 1 - costs
            step, decrement = self._newton_step(inverse, seen, slack)
            shares, weights, upper, lower = self._remember(*self._certificate(seen, costs, slack, step))
            open_ = upper - lower > tolerance * lower
            status = Stop.CONVERGED if not bool(open_.any()) else budget.spent(iteration)
            if status is None and not bool(self._move(step, decrement, open_, tolerance)):
                status = Stop.STALLED
            if status is not None:
                return shares, weights, upper, lower, iteration, status
            iteration += 1

    def _information(self, allocation: Tensor) -> Tensor:
        return (self.rows.mT * allocation[:, None, :]) @ self.rows

    def _costs(self, allocation: Tensor) -> Tensor:
        return (self.directions * torch.linalg.solve(self._information(allocation), self.directions.mT).mT).sum(-1)

    def _certificate(self, seen: Tensor, costs: Tensor, slack: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # To first order the weights are those after the step: that takes out what rounding did to the slack.
        change = (seen.square() * step[..., None]).sum(-2) / slack
        weights = (self.others * (1 - change) / slack).clamp_min(0)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        upper = self.allocation.sum(-1) * costs.amax(-1)
        pull = (seen.square() * weights[:, None, :]).sum(-1).amax(-1)
        lower = (weights * costs).sum(-1).square() / pull.clamp_min(torch.finfo(pull.dtype).tiny)
        return weights, upper, torch.minimum(lower, upper)

    def _remember(self, weights: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep the best of either side: far along the path rounding spoils the weights before it spoils the shares."""
        shares, old_weights, old_upper, old_lower = self.best
        better, higher = upper < old_upper, lower > old_lower
        self.best = (
            torch.where(better[:, None], self.allocation / self.allocation.sum(-1, keepdim=True), shares),
            torch.where(higher[:, None], weights, old_weights),
            torch.where(better, upper, old_upper),
            torch.where(higher, lower, old_lower),
        )
        return self.best

    def _ambition(self) -> Tensor:
        """Return the sharpness at which the duality gap on the path is about the value itself."""
        return (len(self.rows) + self.others.sum(-1)) / self.allocation.sum(-1)

    def _barrier(self, allocation: Tensor) -> Tensor:
        """Return the function that is minimised; infinite outside of its domain."""
        inside = (allocation > 0).all(-1)
        safe = torch.where(inside[:, None], allocation, self.allocation)
        slack = 1 - self._costs(safe)
        inside = inside & (slack > 0).all(-1)
        value = self.sharpness * safe.sum(-1) - slack.clamp_min(1e-300).log().sum(-1) - safe.log().sum(-1)
        return torch.where(inside, value, torch.inf)

    def _newton_step(self, inverse: Tensor, seen: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
        squares = seen.square() / slack[:, None, :]
        gradient = self.sharpness[:, None] - squares.sum(-1) - 1 / self.allocation
        mutual = self.rows @ inverse @ self.rows.mT
        hessian = 2 * mutual * ((seen / slack[:, None, :]) @ seen.mT) + squares @ squares.mT
        hessian = hessian + torch.diag_embed(self.allocation.pow(-2))
        # In units of the allocation the matrix is well conditioned although shares may vanish.
        size = self.allocation
        step = -size * torch.linalg.solve(hessian * size[:, :, None] * size[:, None, :], gradient * size)
        return step, -(gradient * step).sum(-1)

    def _move(self, step: Tensor, decrement: Tensor, open_: Tensor, tolerance: float) -> Tensor:
        """Take the step for the open instances; tell whether any of them got nearer or rose on its path."""
        before, length = self._barrier(self.allocation), torch.ones_like(decrement)
        while True:
            candidate = self.allocation + length[:, None] * step
            good = open_ & (self._barrier(candidate) <= before - 1e-4 * length * decrement)
            if bool((good | ~open_ | (length < _SHORTEST)).all()):
                break
            length = torch.where(good, length, length / 2)
        self.allocation = torch.where(good[:, None], candidate, self.allocation)
        # A step that rounding refuses is as centred as it gets.
        further = self.sharpness * 0.1 * tolerance < self._ambition()
        rising = open_ & ((decrement < 0.05) | ~good) & further
        self.sharpness = torch.where(rising, self.sharpness * _SHARPEN, self.sharpness)
        return ((good & (decrement > _CENTRED)) | rising).any()


def _directions(theta: Tensor, hypotheses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z* - z) / gap in units of the longest, these units, and which hypotheses are not the best."""
    scores = theta @ hypotheses.mT
    best = scores.argmax(-1)
    others = torch.ones_like(scores).scatter(-1, best[:, None], 0.0)
    gaps = scores.amax(-1, keepdim=True) - scores
    noise = 1e-13 * scores.abs().amax(-1, keepdim=True)
    checks.require(
        (gaps > noise) | (others == 0),
        lambda: "theta must have a unique best hypothesis: at a tie the complexity is infinite",
    )
    differences = hypotheses[best][:, None, :] - hypotheses
    directions = others[..., None] * differences / torch.where(others > 0, gaps, 1.0)[..., None]
    scale = torch.linalg.vector_norm(directions, dim=-1).amax(-1)
    return directions / torch.where(scale > 0, scale, 1.0)[:, None, None], scale, others


def _coordinates(directions: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return queries and directions in an orthonormal basis of the queries' span."""
    if queries is None:
        return torch.eye(directions.shape[-1], dtype=directions.dtype, device=directions.device), directions
    rows = queries.detach().to(directions)
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[values > 1e-10 * values[0]]
    inside = directions @ basis.mT
    checks.require(
        (inside @ basis - directions).abs() < 1e-8,
        lambda: "queries must tell all hypotheses apart: a difference of two lies outside of their span",
    )
    return rows @ basis.mT, inside


def _check(theta: Tensor, hypotheses: Tensor, queries: Tensor | None) -> None:
    checks.floating(theta, "theta")
    checks.not_empty(theta, "theta")
    checks.finite(theta, "theta")
    check_hypotheses(hypotheses)
    dim = theta.shape[-1] if theta.dim() else 0
    if hypotheses.shape[1] != dim:
        raise ValueError(f"hypotheses must have shape (rows, {dim}) to go with theta, got {tuple(hypotheses.shape)}")
    check_queries(queries, dim)


def check_hypotheses(hypotheses: Tensor) -> None:
    """Raise unless ``hypotheses`` is a finite matrix of rows that all differ."""
    checks.floating(hypotheses, "hypotheses")
    if hypotheses.dim() != 2 or not hypotheses.numel():
        raise ValueError(f"hypotheses must have shape (hypotheses, queries), got {tuple(hypotheses.shape)}")
    checks.finite(hypotheses, "hypotheses")
    if len(torch.unique(hypotheses, dim=0)) < len(hypotheses):
        raise ValueError("hypotheses must all be different, got one twice")


def check_queries(queries: Tensor | None, dim: int) -> None:
    """Raise unless ``queries`` is None or a finite matrix of rows of length ``dim``."""
    if queries is None:
        return
    checks.floating(queries, "queries")
    if queries.dim() != 2 or queries.shape[1] != dim or not len(queries):
        raise ValueError(f"queries must have shape (queries, {dim}), got {tuple(queries.shape)}")
    checks.finite(queries, "queries")
