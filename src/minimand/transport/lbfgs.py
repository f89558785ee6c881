r"""L-BFGS for a batch of independent problems: each with its own curvature, line search and end, one call for all.

Every pass evaluates each unfinished problem once. A problem whose trial point meets the weak Wolfe conditions steps
there and draws a new direction; the others narrow their brackets. Nobody waits for another problem's line search, and
problems that are done leave the batch.

The direction :math:`-H g` comes from the compact form of the inverse Hessian: with the latest differences of points
and gradients as rows of :math:`S` and :math:`Y`, :math:`R` the upper triangle (in the order of time) of
:math:`S Y^\top`, :math:`D` its diagonal and :math:`\theta = s^\top y / y^\top y` of the latest pair,

.. math:: v = R^{-1} S g, \qquad
          H g = \theta g + S^\top R^{-\top} \bigl((D + \theta Y Y^\top) v - \theta Y g\bigr) - \theta Y^\top v,

which is what the two-loop recursion computes, in a handful of batched products rather than a loop over the history.

Source: Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989; Byrd, Nocedal and
Schnabel, "Representations of quasi-Newton matrices and their use in limited memory methods", 1994, equation 2.17;
Lewis and Overton, "Nonsmooth optimization via quasi-Newton methods", 2013, for the weak Wolfe bracketing, which also
works on convex functions with kinks; Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an
efficient line search", 2005, equation 4.1, for the sufficient decrease near a minimum, where values agree to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..stopping import Budget, Stop

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Sufficient decrease and curvature of the Wolfe conditions, as Nocedal and Wright (2006) advise for quasi-Newton steps.
DECREASE, CURVATURE = 1e-4, 0.9
MOST_TRIALS = 40  # of one line search: enough to bracket a step over the whole range of float32
STRETCH = 10  # so many steps are looked at together to tell a standstill


@dataclasses.dataclass(frozen=True)
class Minima:
    """Where a batch of minimisations ended.

    Args:
        points: The lowest point found of each problem.
        values: The objective there.
        gradients: And its gradient.
        iterations: Evaluations of the objective that each problem took, but for the first.
        converged: Whether the gradient met the tolerance.
        stalled: Whether no step improved any more, short of the tolerance.
        status: The worst end of any problem.
    """

    points: Float[Tensor, "batch variables"]
    values: Float[Tensor, " batch"]
    gradients: Float[Tensor, "batch variables"]
    iterations: Int[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]
    stalled: Bool[Tensor, " batch"]
    status: Stop


def minimize_lbfgs(
    function: Objective,
    start: Float[Tensor, "batch variables"],
    *,
    max_iter: int,
    max_seconds: float | None = None,
    tolerance: float | Float[Tensor, " batch"] = 1e-6,
    least_gain: float = 0.0,
    history: int = 10,
) -> Minima:
    """Minimise a batch of functions, smooth or convex with kinks.

    Args:
        function: ``function(points, rows)`` returns the values ``(rows,)`` and gradients ``(rows, variables)`` of
            the problems whose numbers in the batch are ``rows``. These only ever become fewer.
        start: Where each problem begins.
        max_iter: Most evaluations of each problem after the first, at least 0.
        max_seconds: Most seconds of wall clock, or None.
        tolerance: A problem has converged when the absolute entries of its gradient add up to no more than this: one
            number, or one a problem.
        least_gain: A problem stalls when ten steps in a row lower its value by less than this share of it, beyond
            rounding.
        history: How many pairs of differences the direction remembers.

    Returns:
        The points, and why each problem stopped.
    """
    budget = Budget(max_iter, max_seconds)
    everyone = torch.arange(len(start), device=start.device)
    limit = torch.as_tensor(tolerance, dtype=start.dtype, device=start.device).expand(len(start))
    values, gradients = function(start, everyone)
    best = Minima(
        points=start.clone(),
        values=values.clone(),
        gradients=gradients.clone(),
        iterations=torch.zeros_like(everyone),
        converged=gradients.abs().sum(1) <= limit,
        stalled=torch.zeros(len(start), dtype=torch.bool, device=start.device),
        status=Stop.CONVERGED,
    )
    search = _Search(everyone, start.clone(), values, gradients, limit, least_gain, history)
    finished, spent = best.converged.clone(), None
    iteration = 0
    while not bool(finished.all()):
        spent = budget.spent(iteration)
        if spent is not None:
            break
        # Dropping finished problems copies the rest, so it waits until half of them can go.
        if 2 * int(finished.sum()) >= len(finished):
            search.keep(~finished)
            finished = finished[~finished]
        iteration += 1
        search.advance(function)
        # Finished problems may still be along, but what counts is where they finished.
        rows = search.rows[~finished]
        best.iterations[rows] += 1
        for target, source in (
            (best.points, search.points),
            (best.values, search.values),
            (best.gradients, search.gradients),
        ):
            target[rows] = source[~finished]
        done = ~finished & (search.gradients.abs().sum(1) <= search.limit)
        stuck = ~finished & ~done & search.stuck()
        best.converged[search.rows] |= done
        best.stalled[search.rows] |= stuck
        finished = finished | done | stuck
    status = spent or (Stop.STALLED if bool(best.stalled.any()) else Stop.CONVERGED)
    return dataclasses.replace(best, status=status)


class _Search:
    """Where each unfinished problem is: its point, its direction and its bracket on that line."""

    def __init__(
        self,
        rows: Tensor,
        points: Tensor,
        values: Tensor,
        gradients: Tensor,
        limit: Tensor,
        least_gain: float,
        history: int,
    ) -> None:
        self.rows, self.points, self.values, self.gradients, self.limit = rows, points, values, gradients, limit
        self.memory = _Memory(points, history)
        self.direction = -gradients
        self.slope = -gradients.square().sum(1)
        self.step = 1 / gradients.norm(dim=1).clamp_min(torch.finfo(points.dtype).tiny)
        self.low, self.low_slope = torch.zeros_like(values), self.slope.clone()
        self.high, self.high_slope = torch.full_like(values, torch.inf), torch.zeros_like(values)
        self.trials = torch.zeros_like(rows)
        self.least_gain = least_gain
        self.steps, self.landmark = torch.zeros_like(rows), values.clone()
        self.flat = torch.zeros_like(values, dtype=torch.bool)

    def keep(self, rows: Tensor) -> None:
        """Drop the other problems."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])
        self.memory.keep(rows)

    def stuck(self) -> Tensor:
        """Tell which problems find no lower point any more."""
        return (self.trials >= MOST_TRIALS) | self.flat

    def advance(self, function: Objective) -> None:
        """Evaluate one trial point of each problem: step there, or narrow the bracket."""
        trial = torch.addcmul(self.points, self.step[:, None], self.direction)
        values, gradients = function(trial, self.rows)
        slope = torch.linalg.vecdot(gradients, self.direction)
        rounding = 8 * torch.finfo(values.dtype).eps * self.values.abs()
        decreased = values <= self.values + DECREASE * self.step * self.slope
        # Where the values agree to rounding, only the slope still tells a decrease.
        decreased |= (values <= self.values + rounding) & (slope <= (2 * DECREASE - 1) * self.slope)
        flatter = slope >= CURVATURE * self.slope
        accepted = decreased & flatter
        self._narrow(decreased, slope)
        if not bool(accepted.any()):
            return
        everyone = bool(accepted.all())
        moved = accepted[:, None]
        self.memory.store(accepted, trial - self.points, gradients - self.gradients)
        self.steps += accepted
        stretched = accepted & (self.steps % STRETCH == 0)
        self.flat = stretched & (self.landmark - values <= rounding + self.least_gain * values.abs())
        self.landmark = torch.where(stretched, values, self.landmark)
        self.points = trial if everyone else torch.where(moved, trial, self.points)
        self.values = torch.where(accepted, values, self.values)
        self.gradients = gradients if everyone else torch.where(moved, gradients, self.gradients)
        direction = -self.memory.times(self.gradients)
        slope = torch.linalg.vecdot(self.gradients, direction)
        uphill = ~(slope < 0)
        direction = torch.where(uphill[:, None], -self.gradients, direction)
        slope = torch.where(uphill, -self.gradients.square().sum(1), slope)
        self.direction = direction if everyone else torch.where(moved, direction, self.direction)
        self.slope = torch.where(accepted, slope, self.slope)
        self.step = torch.where(accepted, 1.0, self.step)
        self.low = torch.where(accepted, 0.0, self.low)
        self.low_slope = torch.where(accepted, slope, self.low_slope)
        self.high = torch.where(accepted, torch.inf, self.high)
        self.trials = torch.where(accepted, 0, self.trials)

    def _narrow(self, decreased: Tensor, slope: Tensor) -> None:
        """Take the trial into the bracket and draw the next one where a straight line through the slopes crosses 0."""
        self.trials = self.trials + 1
        self.high = torch.where(decreased, self.high, self.step)
        self.high_slope = torch.where(decreased, self.high_slope, slope)
        bracketed = torch.isfinite(self.high)
        # While there is no upper end, the line goes through the last two lower ends.
        first_slope, first = self.low_slope, self.low
        self.low = torch.where(decreased, self.step, self.low)
        self.low_slope = torch.where(decreased, slope, self.low_slope)
        inside = self.low_slope / (self.low_slope - self.high_slope)
        inside = torch.where(torch.isfinite(inside), inside, 0.5).clamp(0.1, 0.9)
        beyond = (self.low - first) * self.low_slope / (first_slope - self.low_slope)
        beyond = torch.where(beyond > 0, beyond, torch.inf)
        farther = self.low + torch.minimum(torch.maximum(beyond, self.low), 9 * self.low)
        self.step = torch.where(bracketed, self.low + inside * (self.high - self.low), farther)


class _Memory:
    """The latest differences of points and gradients of each problem, in a ring, and their inner products."""

    def __init__(self, points: Tensor, size: int) -> None:
        batch, variables = points.shape
        self.size = size
        self.moves = points.new_zeros(batch, size, variables)
        self.turns = torch.zeros_like(self.moves)
        # Unused places hold zero vectors; a one on the diagonal keeps their triangle invertible.
        self.mixed = torch.eye(size, dtype=points.dtype, device=points.device).repeat(batch, 1, 1)
        self.squared = torch.zeros_like(self.mixed)
        self.scale = torch.ones_like(points[:, 0])
        self.place = torch.zeros(batch, dtype=torch.long, device=points.device)

    def keep(self, rows: Tensor) -> None:
        """Drop the other problems."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])

    def store(self, rows: Tensor, moves: Tensor, turns: Tensor) -> None:
        """Remember the latest difference of points and of gradients where ``rows`` says so and the curvature is up."""
        curvature = torch.linalg.vecdot(moves, turns)
        turn_squared = turns.square().sum(1)
        rows = rows & (curvature > torch.finfo(moves.dtype).eps * turn_squared)
        row = rows.nonzero()[:, 0]
        place = self.place[row]
        self.moves[row, place], self.turns[row, place] = moves[row], turns[row]
        # Products for all problems, as picking those of some from the memory would copy it.
        self.mixed[row, :, place] = torch.bmm(self.moves, turns[..., None])[row, :, 0]
        self.mixed[row, place, :] = torch.bmm(self.turns, moves[..., None])[row, :, 0]
        self.squared[row, :, place] = self.squared[row, place, :] = torch.bmm(self.turns, turns[..., None])[row, :, 0]
        self.scale[row] = (curvature / turn_squared)[row]
        self.place[row] = (place + 1) % self.size

    def times(self, gradients: Tensor) -> Tensor:
        """Multiply by the inverse Hessian."""
        order = (self.place[:, None] + torch.arange(self.size, device=gradients.device)) % self.size
        scale = self.scale[:, None]
        along_moves = torch.bmm(self.moves, gradients[..., None])[..., 0].gather(1, order)
        along_turns = torch.bmm(self.turns, gradients[..., None])[..., 0].gather(1, order)
        problem = torch.arange(len(order), device=order.device)[:, None, None]
        mixed = self.mixed[problem, order[:, :, None], order[:, None, :]].triu()
        squared = self.squared[problem, order[:, :, None], order[:, None, :]]
        diagonal = mixed.diagonal(dim1=1, dim2=2)
        first = torch.linalg.solve_triangular(mixed, along_moves[..., None], upper=True)
        middle = diagonal[..., None] * first + scale[..., None] * (torch.bmm(squared, first) - along_turns[..., None])
        second = torch.linalg.solve_triangular(mixed.mT, middle, upper=False)
        weights = torch.zeros_like(along_moves).scatter(1, order, second[..., 0])
        turn_weights = torch.zeros_like(along_turns).scatter(1, order, -scale * first[..., 0])
        result = scale * gradients
        result += torch.bmm(weights[:, None], self.moves)[:, 0]
        result += torch.bmm(turn_weights[:, None], self.turns)[:, 0]
        return result
