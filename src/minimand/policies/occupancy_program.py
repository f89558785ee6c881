"""The linear program behind constrained decision problems in a table."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from ..stopping import Budget

Array = NDArray[np.float64]


class OccupancyProgram:
    r"""The program :math:`\max_{\mu \ge 0} \langle\mu, r\rangle` over the occupancies of allowed pairs, by HiGHS.

    Args:
        transition: ``(states, actions, states)``.
        initial: ``(states,)``.
        cost: ``(costs, states, actions)``.
        discount: In (0, 1].
        allowed: Pairs that occupancies may use, ``(states, actions)``.
    """

    def __init__(
        self, transition: Array, initial: Array, cost: Array, *, discount: float, allowed: NDArray[np.bool_]
    ) -> None:
        states = len(allowed)
        self.allowed = allowed
        source, action = allowed.nonzero()
        moves = transition[source, action]
        leave = scipy.sparse.csr_array((np.ones(len(source)), (source, np.arange(len(source)))), (states, len(source)))
        self.flow = leave - discount * scipy.sparse.csr_array(moves.T)
        self.initial = initial
        self.costs = cost[:, allowed]

    def maximize(self, reward: Array, costs: Array, limits: Array, budget: Budget) -> scipy.optimize.OptimizeResult:
        """Maximise rewards ``(states, actions)`` with costs ``(limits, pairs)`` of at most their limits."""
        return self._run(-reward[self.allowed], costs, limits, self.flow, budget)

    def minimize(self, cost: Array, budget: Budget) -> float:
        """Return the least of a cost ``(pairs,)``, or NaN if the program was not solved."""
        found = self._run(cost, self.costs[:0], np.zeros(0), self.flow, budget)
        return float(found.fun) if found.status == 0 else math.nan

    def least_excess(self, limits: Array, budget: Budget) -> float:
        """Minimise t subject to costs of at most budgets plus t: one more variable, at the end."""
        bounded = np.isfinite(limits)
        costs = np.column_stack([self.costs[bounded], -np.ones(int(bounded.sum()))])
        flow = scipy.sparse.hstack([self.flow, scipy.sparse.csr_array((len(self.initial), 1))])
        objective = np.zeros(costs.shape[1])
        objective[-1] = 1
        found = self._run(objective, costs, limits[bounded], flow, budget)
        return float(found.fun) if found.status == 0 else math.nan

    def table(self, occupancy: Array) -> Array:
        """Return the occupancy of pairs as a table ``(states, actions)``."""
        table = np.zeros(self.allowed.shape)
        table[self.allowed] = np.maximum(occupancy, 0)
        return table

    def _run(
        self, objective: Array, costs: Array, limits: Array, flow: scipy.sparse.sparray, budget: Budget
    ) -> scipy.optimize.OptimizeResult:
        options: dict[str, float] = {"maxiter": budget.max_iter}
        if math.isfinite(budget.max_seconds):
            options["time_limit"] = max(budget.max_seconds - budget.seconds, 0.0)
        return scipy.optimize.linprog(
            objective, A_ub=costs, b_ub=limits, A_eq=flow, b_eq=self.initial, method="highs", options=options
        )
