r"""Search for thresholds by asking and telling: Nelder and Mead's simplex, while one training run goes on.

What is maximised is an evaluation :math:`f(\theta)` that costs training and has no gradient. The simplex holds
:math:`N + 1` vertices; with the worst one :math:`w`, the centroid :math:`c` of the others and
:math:`x(t) = c + t\,(c - w)`, each iteration tries

.. math:: x(1)\ \text{(reflection)}, \quad x(2)\ \text{(expansion)}, \quad
          x(\tfrac12)\ \text{or}\ x(-\tfrac12)\ \text{(contraction outside or inside)},

and if none of them improves on the worst, moves every vertex half the way to the best. All points are clipped to a
box. A point that lies close to one already evaluated takes over its evaluation.

Source: Nelder and Mead, "A Simplex Method for Function Minimization", The Computer Journal 7 (1965); Lagarias et al.,
SIAM J. Optimization 9 (1998), for the order of the cases; Moskovitz et al., ICLR 2024, arXiv 2310.04373, for the
search of reward thresholds within one run, and its cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop

Vector = NDArray[np.float64]

_DRAWS = 16


@dataclasses.dataclass(frozen=True)
class ThresholdResult:
    """What a search for thresholds found.

    Args:
        thresholds: The best thresholds that were evaluated.
        evaluation: Their evaluation; minus infinity if none was.
        status: Why the search stopped.
        iterations: Queries, those answered from the cache included.
        evaluations: Queries that were answered by an evaluation.
        spread: Standard deviation of the evaluations on the last simplex; infinity if it was not complete.
    """

    thresholds: Float[Tensor, " rewards"]
    evaluation: float
    status: Stop
    iterations: int
    evaluations: int
    spread: float


class ThresholdSearch:
    """Find the thresholds of highest evaluation by Nelder and Mead's simplex, one question at a time.

    ``ask`` for thresholds, train towards them, ``tell`` how good the outcome is, and so on until ``status`` says why
    the search is over; from then on ``ask`` returns the best. The policy need not start anew for each question: that
    is the search within one run. Evaluations kept in the cache then are of an earlier policy, as are those on the
    simplex, so the objective drifts a little: a search that has converged may be worth a second, smaller one.

    Args:
        bounds: Lowest and highest threshold of each reward. The paper's lowest are the values before training.
        initial: The first simplex, ``(rewards + 1, rewards)``, inside the bounds; None to draw its vertices uniformly
            between the bounds, as in the paper, 16 times, and take the least flat: a flat simplex collapses early.
        generator: Draws them; None for the global one.
        tolerance: Converged once the standard deviation of the simplex's evaluations is below; 0.01 is the released
            code's, for evaluations of around 1. With 0 only the size of the simplex ends the search.
        cache_tolerance: An evaluation is reused within this share of the bounds' width in every coordinate, and a
            simplex as small as that has converged. The released code has 5e-3, in units of the thresholds.
        max_iter: Most queries, those answered from the cache included.
        max_seconds: Most seconds since the search was built, training in between included; None for no limit.

    Attributes:
        status: Why the search stopped; None while it goes on.
        iterations: Queries so far, those answered from the cache included.
        evaluations: Queries that were told so far.

    Example:
        >>> search = ThresholdSearch(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), generator=torch.Generator().manual_seed(0))
        >>> while search.status is None:
        ...     theta = search.ask()
        ...     search.tell(1 - 4 * (theta - torch.tensor([0.7, 0.6])).square().sum().item())
        >>> search.status, round(search.result.evaluation, 1)
        (<Stop.CONVERGED: 'converged'>, 1.0)

    Source:
        Nelder and Mead 1965; Moskovitz et al. 2024, arXiv 2310.04373.
    """

    status: Stop | None

    def __init__(
        self,
        bounds: Float[Tensor, "rewards 2"],
        *,
        initial: Float[Tensor, "vertices rewards"] | None = None,
        generator: torch.Generator | None = None,
        tolerance: float = 0.01,
        cache_tolerance: float = 5e-3,
        max_iter: int = 200,
        max_seconds: float | None = None,
    ) -> None:
        checks.floating(bounds, "bounds")
        checks.finite(bounds, "bounds")
        checks.non_negative(tolerance, "tolerance")
        checks.non_negative(cache_tolerance, "cache_tolerance")
        if bounds.dim() != 2 or bounds.shape[0] < 1 or bounds.shape[1] != 2:
            raise ValueError(f"bounds must have shape (rewards, 2), got {tuple(bounds.shape)}")
        low, high = bounds.detach().unbind(1)
        checks.require(low < high, lambda: f"bounds must rise from low to high, got {bounds.tolist()}")
        if initial is None:
            initial = low + (high - low) * _draw_simplex(bounds, generator)
        else:
            _check_simplex(initial, low, high)
        self._bounds = bounds.detach().clone()
        self._low, self._high = _vector(low), _vector(high)
        self._initial = _vector(initial)
        self._tolerance, self._cache_tolerance = tolerance, cache_tolerance
        self._budget = Budget(max_iter, max_seconds)
        self._start()

    def ask(self) -> Float[Tensor, " rewards"]:
        """Return the thresholds to train towards next; the same ones until told, and the best once the search is over.

        They are of the dtype and on the device of ``bounds``.
        """
        return self._tensor(self._pending) if self.status is None else self.best

    def tell(self, evaluation: float) -> None:
        """Say how good the policy trained towards the thresholds asked is.

        Args:
            evaluation: Higher is better.

        Raises:
            ValueError: If it is not finite.
            RuntimeError: If the search is over.
        """
        if not math.isfinite(evaluation):
            raise ValueError(f"evaluation must be a finite number, got {evaluation}")
        if self.status is not None:
            raise RuntimeError(f"the search is over ({self.status}): there is nothing to tell")
        self._told.append(float(evaluation))
        self._points.append(self._pending)
        self._go_on(-float(evaluation), self._budget)

    def run(self, evaluate: Callable[[Float[Tensor, " rewards"]], float]) -> ThresholdResult:
        """Ask and tell until the search is over.

        Args:
            evaluate: Trains towards given thresholds and returns the evaluation of the outcome.

        Returns:
            What was found.
        """
        while self.status is None:
            self.tell(float(evaluate(self.ask())))
        return self.result

    @property
    def best(self) -> Float[Tensor, " rewards"]:
        """The best thresholds that were told so far; the first vertex before any was."""
        return self._tensor(self._best()[0])

    @property
    def evaluations(self) -> int:
        """Queries that were told so far."""
        return len(self._told)

    @property
    def result(self) -> ThresholdResult:
        """What was found.

        Raises:
            RuntimeError: If the search goes on.
        """
        if self.status is None:
            raise RuntimeError("the search goes on: tell it an evaluation, or look at status")
        point, evaluation = self._best()
        return ThresholdResult(
            thresholds=self._tensor(point),
            evaluation=evaluation,
            status=self.status,
            iterations=self.iterations,
            evaluations=self.evaluations,
            spread=self._spread,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the search was told, from which it can be repeated."""
        return {"initial": torch.from_numpy(self._initial.copy()), "told": list(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a search where it was saved.

        Args:
            state: Of a search with the same bounds and tolerances.

        Raises:
            ValueError: If it is of a search over another number of rewards, or of one that ended earlier.
        """
        initial = _vector(state["initial"])
        if initial.shape != self._initial.shape:
            raise ValueError(f"state must hold a simplex of shape {self._initial.shape}, got {initial.shape}")
        self._initial = initial
        # The moves follow from the evaluations, so that telling them again is all there is to restore.
        self._start(Budget(self._budget.max_iter))
        for evaluation in state["told"]:
            if self.status is not None:
                raise ValueError("state must be of a search with the same bounds and tolerances: this one ends earlier")
            self._told.append(evaluation)
            self._points.append(self._pending)
            self._go_on(-evaluation, Budget(self._budget.max_iter))

    def _start(self, budget: Budget | None = None) -> None:
        self.status, self.iterations = None, 0
        self._told: list[float] = []
        self._points: list[Vector] = []
        self._spread = math.inf
        self._pending = self._initial[0]
        self._moves = self._simplex_moves()
        self._go_on(None, self._budget if budget is None else budget)

    def _go_on(self, value: float | None, budget: Budget) -> None:
        """Hand the value asked for to the simplex and answer its questions as long as the cache can."""
        while True:
            try:
                point = next(self._moves) if value is None else self._moves.send(value)
            except StopIteration as end:
                self.status = end.value
                return
            self.status = budget.spent(self.iterations)
            if self.status is not None:
                return
            self.iterations += 1
            value = self._cached(point)
            if value is None:
                self._pending = point
                return

    def _cached(self, point: Vector) -> float | None:
        if not self._points:
            return None
        distances = self._distance(np.stack(self._points), point)
        nearest = int(distances.argmin())
        return -self._told[nearest] if distances[nearest] <= self._cache_tolerance else None

    def _distance(self, points: Vector, point: Vector) -> Vector:
        """Return the largest difference of a coordinate, in shares of the bounds' width."""
        return (np.abs(points - point) / (self._high - self._low)).max(-1)

    def _simplex_moves(self) -> Generator[Vector, float, Stop]:
        """Yield the points whose value, lower is better, is sent back."""
        simplex, values = self._initial.copy(), np.empty(len(self._initial))
        for row, vertex in enumerate(simplex):
            values[row] = yield vertex.copy()
        while True:
            order = np.argsort(values, kind="stable")
            simplex, values = simplex[order], values[order]
            self._spread = float(values.std(ddof=1))
            small = self._distance(simplex[1:], simplex[0]).max() <= self._cache_tolerance
            if self._spread < self._tolerance or small:
                return Stop.CONVERGED
            centroid = simplex[:-1].mean(0)
            away = centroid - simplex[-1]

            point = self._clip(centroid + away)
            value = yield point
            if value < values[0]:
                further = self._clip(centroid + 2 * away)
                value_further = yield further
                if value_further < value:
                    point, value = further, value_further
            elif value >= values[-2]:
                outside = bool(value < values[-1])
                reflected = value
                point = self._clip(centroid + (0.5 if outside else -0.5) * away)
                value = yield point
                if not (value <= reflected if outside else value < values[-1]):
                    simplex[1:] = simplex[0] + 0.5 * (simplex[1:] - simplex[0])
                    for row in range(1, len(simplex)):
                        values[row] = yield simplex[row].copy()
                    continue
            simplex[-1], values[-1] = point, value

    def _clip(self, point: Vector) -> Vector:
        return np.clip(point, self._low, self._high)

    def _best(self) -> tuple[Vector, float]:
        if not self._told:
            return self._pending, -math.inf
        place = int(np.argmax(self._told))
        return self._points[place], self._told[place]

    def _tensor(self, point: Vector) -> Tensor:
        return torch.tensor(point, dtype=self._bounds.dtype, device=self._bounds.device)


def _vector(values: Tensor) -> Vector:
    return values.detach().cpu().double().numpy().copy()


def _draw_simplex(bounds: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a simplex in the unit cube: of several, the one that is the least flat."""
    count = len(bounds)
    device = bounds.device if generator is None else generator.device
    drawn = torch.rand(_DRAWS, count + 1, count, generator=generator, dtype=torch.float64, device=device)
    widths = torch.linalg.svdvals(drawn[:, 1:] - drawn[:, :1])
    # In one dimension all are as flat, and the widest is taken.
    flatness = widths[:, -1] / widths[:, 0] if count > 1 else widths[:, 0]
    return drawn[flatness.argmax()].to(bounds)


def _check_simplex(initial: Tensor, low: Tensor, high: Tensor) -> None:
    checks.floating(initial, "initial")
    checks.finite(initial, "initial")
    count = len(low)
    if tuple(initial.shape) != (count + 1, count):
        raise ValueError(f"initial must have shape ({count + 1}, {count}), got {tuple(initial.shape)}")
    checks.require((initial >= low) & (initial <= high), lambda: "initial must lie inside the bounds")
    edges = (initial[1:] - initial[0]) / (high - low)
    if int(torch.linalg.matrix_rank(edges)) < count:
        raise ValueError("initial must be a simplex with a volume, got vertices in a plane of fewer dimensions")
