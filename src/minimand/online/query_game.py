"""The game of choosing queries, exactly: every state of the answers in a table, and its minimax solution.

See :mod:`minimand.online.learning_to_actively_learn` for the mathematics.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor, nn

from .. import checks
from ..stopping import Budget, Stop
from .answer_counts import TIE, Policy, check_budget, check_probabilities, guess, rank
from .instance_classes import InstanceClasses, Instances
from .problem_complexity import check_hypotheses

_REFRESH = 5
_IMPOSSIBLE = 1e-16


@dataclasses.dataclass(frozen=True)
class GameSolution:
    """What :meth:`QueryGame.solve` found.

    Args:
        table: The minimax policy: the probability of each query in each state, ``(states, queries)``.
        value: Its largest loss less offset over the instances, an upper bound on the value of the game.
        lower: A lower bound on the value, which the weights prove.
        weights: The least favourable mixture of the instances, ``(instances,)``.
        residual: The duality gap, ``value - lower``.
        iterations: Best answers computed.
        status: Why it stopped; ``STALLED`` where rounding allows no improvement.
    """

    table: Tensor
    value: float
    lower: float
    weights: Tensor
    residual: float
    iterations: int
    status: Stop


class QueryGame:
    r"""The game of identifying a hypothesis by a budget of noisy answers of plus and minus one, in a table.

    A policy is a callable ``(counts, sums) -> probabilities`` of the queries, all of shape ``(states, queries)``, or
    what it gives in every state where a query is still to be made: its :meth:`table`.

    Args:
        hypotheses: Rows z, all different, with at most two values a column: labels in plus and minus one for binary
            classes, indicators in 0 and 1 for best arms and best sets.
        budget: T, queries in all.
        loss: ``"error"`` is 1 for a wrong guess; ``"regret"`` is :math:`\langle z^* - z, \theta \rangle`.
        max_states: More states than this are refused, before anything is allocated.

    Attributes:
        classes: The :class:`InstanceClasses` of the game.
        counts: Answers to each query, in every state where one is to be made, ``(states, queries)``.
        sums: Their sums.

    Raises:
        ValueError: If a hypothesis comes twice, a column has more than two values, or there are too many states.

    Example:
        >>> from minimand.online import thresholds
        >>> game = QueryGame(thresholds(2), budget=3)  # where do labels turn: before, between or behind two points?
        >>> instances = game.classes.draw(10, radius=5.0, generator=torch.Generator().manual_seed(0))
        >>> solution = game.solve(instances.theta)
        >>> abs(game.loss(solution.table, instances.theta).max().item() - solution.value) < 1e-6
        True

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; the table is ours.
    """

    def __init__(
        self,
        hypotheses: Float[Tensor, "hypotheses queries"],
        *,
        budget: int,
        loss: Literal["error", "regret"] = "error",
        max_states: int = 2_000_000,
    ) -> None:
        check_hypotheses(hypotheses)
        check_budget(budget)
        checks.one_of(loss, "loss", ("error", "regret"))
        values = hypotheses.detach().double()
        high, low = values.amax(0), values.amin(0)
        if not bool(((values == high) | (values == low)).all()):
            raise ValueError("hypotheses must have at most two values in a column")
        self.num_queries, self.budget, self.objective = hypotheses.shape[1], budget, loss
        states = math.comb(budget + 2 * self.num_queries, 2 * self.num_queries)
        if states > max_states:
            raise ValueError(f"the game must have at most max_states = {max_states} states, got {states}")
        self.hypotheses = values
        self.classes = InstanceClasses(values)
        self._grow()

    def table(self, policy: Policy) -> Float[Tensor, "states queries"]:
        """Return what a policy does in every state; gradients flow to its parameters.

        Args:
            policy: ``(counts, sums) -> probabilities``.

        Raises:
            ValueError: If it does not return probabilities of the queries.
        """
        probabilities = policy(self.counts, self.sums)
        check_probabilities(probabilities, "what the policy returns", self.counts.shape)
        return probabilities

    def loss(
        self, table: Float[Tensor, "states queries"], theta: Float[Tensor, "instances queries"]
    ) -> Float[Tensor, " instances"]:
        r"""Return :math:`\ell(\pi, \theta)`, exactly; differentiable in both.

        Args:
            table: The policy: probabilities of the queries in every state.
            theta: Mean answers, in [-1, 1].
        """
        self._check_table(table)
        self._check_theta(theta)
        return self._losses(theta) @ self._reach(table)[-1]

    def state_probabilities(
        self, table: Float[Tensor, "states queries"], theta: Float[Tensor, "instances queries"]
    ) -> list[Float[Tensor, "instances level"]]:
        """Return the distribution of the state after 0, 1, ... T answers.

        Args:
            table: The policy.
            theta: Mean answers, in [-1, 1].
        """
        self._check_table(table)
        self._check_theta(theta)
        pairs = zip(self._reach(table), self._levels, strict=True)
        return [reach * _likelihood(counts, theta.double()) for reach, counts in pairs]

    def best_response(
        self, weights: Float[Tensor, " instances"], theta: Float[Tensor, "instances queries"]
    ) -> Float[Tensor, "states queries"]:
        r"""Return the policy of least :math:`\sum_i p_i \ell(\pi, \theta_i)`: the Bayes policy, by dynamic programming.

        Args:
            weights: p, at least 0, of the instances.
            theta: Mean answers, in [-1, 1].
        """
        self._check_theta(theta)
        _check_weights(weights, len(theta))
        return self._indicators(self._best_queries(weights.double() @ self._losses(theta))[0])

    def solve(
        self,
        theta: Float[Tensor, "instances queries"],
        *,
        offset: Float[Tensor, " instances"] | None = None,
        tolerance: float = 1e-7,
        max_iter: int = 2000,
        max_seconds: float | None = None,
    ) -> GameSolution:
        r"""Solve :math:`\min_\pi \max_i \ell(\pi, \theta_i) - V_i` over all policies, by column generation.

        The best mixture of the policies found so far and the mixture of instances that is hardest for it solve a linear
        program; the Bayes policy against these instances proves a lower bound, and joins in.

        Args:
            theta: The instances, mean answers in [-1, 1].
            offset: V, taken off the loss of each instance: the value of its class; None for 0.
            tolerance: Largest duality gap.
            max_iter: Most best answers.
            max_seconds: Most seconds; None for no limit.

        Returns:
            A :class:`GameSolution`; before the first best answer its policy asks at random.
        """
        self._check_theta(theta)
        checks.positive(tolerance, "tolerance")
        losses = self._losses(theta.detach())
        shift = torch.zeros_like(losses[:, 0])
        if offset is not None:
            checks.floating(offset, "offset")
            checks.finite(offset, "offset")
            if offset.shape != shift.shape:
                raise ValueError(f"offset must have shape {tuple(shift.shape)}, got {tuple(offset.shape)}")
            shift = offset.detach().to(shift)
        budget = Budget(max_iter, max_seconds)
        weights = torch.full_like(shift, 1 / len(shift))
        queries: list[Tensor] = []
        columns: list[Tensor] = []
        lower, upper, iteration = -math.inf, math.inf, 0
        mixture = shift.new_ones(0)
        hardest = weights
        while True:
            found, value = self._best_queries(weights @ losses)
            bound = float(value - weights @ shift)
            if bound > lower:
                lower, hardest = bound, weights
            stop = Stop.CONVERGED if upper - lower <= tolerance else budget.spent(iteration)
            if stop is None and any(torch.equal(found, old) for old in queries):
                stop = Stop.STALLED
            if stop is not None:
                table = self._mix(queries, mixture)
                if not columns:
                    upper = float((losses @ self._reach(table)[-1] - shift).max())
                return GameSolution(table, upper, lower, hardest, upper - lower, iteration, stop)
            queries.append(found)
            columns.append(losses @ self._reach(self._indicators(found))[-1] - shift)
            mixture, weights = _solve_matrix_game(torch.stack(columns, 1))
            upper = float((torch.stack(columns, 1) @ mixture).max())
            iteration += 1

    def worst_instances(
        self,
        table: Float[Tensor, "states queries"],
        *,
        radius: float,
        restarts: int = 256,
        num_steps: int = 150,
        lr: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> tuple[Instances, Float[Tensor, " restarts"]]:
        r"""Search :math:`\Theta_r` for instances of large loss: from drawn ones, by normalised gradient ascent.

        What it finds bounds the worst loss over the class from below.

        Args:
            table: The policy.
            radius: r.
            restarts: Instances that climb.
            num_steps: Steps of each.
            lr: Length of the first step; it shrinks to a tenth.
            generator: Draws where they start; torch's default if None.

        Returns:
            The best point on the way of each, and its loss.
        """
        self._check_table(table)
        found = self.classes.draw(restarts, radius=radius, generator=generator)
        reach = self._reach(table.detach())[-1]
        theta, highest = found.theta, self._losses(found.theta) @ reach
        point = theta
        for step in range(num_steps):
            if step % _REFRESH == 0:
                measure = self.classes.measure(point, found.best)
            uphill = lr * 0.1 ** (step / max(num_steps - 1, 1)) * self._uphill(point, reach)
            point = self.classes.move(point, found.best, uphill, radius=radius, measure=measure)
            value = self._losses(point) @ reach
            theta = torch.where((value > highest)[:, None], point, theta)
            highest = torch.maximum(value, highest)
        return Instances(theta, found.best), highest

    def _grow(self) -> None:
        """Lay out the states, level by level, and where each query and answer leads."""
        parts = 2 * self.num_queries
        device = self.hypotheses.device
        steps = torch.eye(parts, dtype=torch.long, device=device)
        self._levels = [torch.zeros(1, parts, dtype=torch.long, device=device)]
        self._children: list[Tensor] = []
        for level in range(self.budget):
            children = self._levels[-1][:, None, :] + steps
            places = rank(children)
            following = torch.empty(math.comb(level + parts, parts - 1), parts, dtype=torch.long, device=device)
            following[places.flatten()] = children.flatten(0, 1)
            self._children.append(places.view(-1, 2, self.num_queries))
            self._levels.append(following)
        self.counts, self.sums = self._answers(torch.cat(self._levels[:-1]))
        self._sizes = [len(level) for level in self._levels[:-1]]
        self._guesses = guess(*self._answers(self._levels[-1]), self.hypotheses)

    def _answers(self, level: Tensor) -> tuple[Tensor, Tensor]:
        positives, negatives = level.to(self.hypotheses).split(self.num_queries, -1)
        return positives + negatives, positives - negatives

    def _reach(self, table: Tensor) -> list[Tensor]:
        """Return w for the states of every level."""
        levels = [torch.ones(1, dtype=torch.float64, device=table.device)]
        for probabilities, children in zip(table.double().split(self._sizes), self._children, strict=True):
            flow = (levels[-1][:, None] * probabilities)[:, None, :].expand(children.shape)
            size = len(self._levels[len(levels)])
            levels.append(flow.new_zeros(size).index_add(0, children.flatten(), flow.flatten()))
        return levels

    def _losses(self, theta: Tensor) -> Tensor:
        """Return P(s) L(s) of every instance and final state."""
        theta = theta.double()
        values = theta @ self.hypotheses.mT
        gaps = values.amax(-1, keepdim=True) - values
        costs = gaps if self.objective == "regret" else (gaps > TIE).to(gaps)
        return _likelihood(self._levels[-1], theta) * (costs @ self._guesses.mT)

    def _best_queries(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best query in every state and the least loss, given the losses of the final states."""
        queries, values = [], final
        for children in reversed(self._children):
            values, query = values[children].sum(1).min(-1)
            queries.append(query)
        return torch.cat(queries[::-1]), values[0]

    def _indicators(self, queries: Tensor) -> Tensor:
        return nn.functional.one_hot(queries, self.num_queries).to(self.hypotheses)

    def _mix(self, queries: list[Tensor], mixture: Tensor) -> Tensor:
        """Return the policy that plays like a mixture drawn at the start: policies weigh as often as they come by."""
        total = torch.zeros_like(self.counts)
        for share, each in zip(mixture.tolist(), queries, strict=True):
            if share > 0:
                table = self._indicators(each)
                total += share * torch.cat(self._reach(table)[:-1])[:, None] * table
        visits = total.sum(-1, keepdim=True)
        return torch.where(visits > 0, total / visits.clamp_min(1e-300), 1 / self.num_queries)

    def _uphill(self, theta: Tensor, reach: Tensor) -> Tensor:
        """Return the direction in which each loss grows, of length 1."""
        with torch.enable_grad():
            point = theta.detach().requires_grad_()
            (slope,) = torch.autograd.grad((self._losses(point) @ reach).sum(), point)
        return slope / torch.linalg.vector_norm(slope, dim=-1, keepdim=True).clamp_min(1e-12)

    def _check_table(self, table: Tensor) -> None:
        check_probabilities(table, "table", self.counts.shape)

    def _check_theta(self, theta: Tensor) -> None:
        checks.floating(theta, "theta")
        if theta.dim() != 2 or not len(theta) or theta.shape[1] != self.num_queries:
            raise ValueError(f"theta must have shape (instances, {self.num_queries}), got {tuple(theta.shape)}")
        checks.finite(theta, "theta")
        checks.require(theta.detach().abs() <= 1, lambda: "theta must lie in [-1, 1]: it is the mean of an answer")

    def __repr__(self) -> str:
        shape = tuple(self.hypotheses.shape)
        return f"QueryGame(hypotheses={shape}, budget={self.budget}, loss={self.objective!r})"


def _likelihood(counts: Tensor, theta: Tensor) -> Tensor:
    """Return the probability of one order of the answers of every state, ``(instances, states)``."""
    chances = torch.cat([1 + theta, 1 - theta], -1) / 2
    # The smallest number keeps powers of an impossible answer right: one to the power 0, slope 1 to the power 1.
    return ((chances + _IMPOSSIBLE).log() @ counts.to(chances).mT).exp()


def _solve_matrix_game(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mixture of columns of least largest row, and the mixture of rows that proves it."""
    table = losses.cpu().numpy()
    rows, columns = table.shape
    result = linprog(
        np.append(np.zeros(columns), 1.0),
        A_ub=np.hstack([table, -np.ones((rows, 1))]),
        b_ub=np.zeros(rows),
        A_eq=np.append(np.ones(columns), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * columns + [(None, None)],
        method="highs",
    )
    if result.x is None:
        raise ArithmeticError(f"the linear program of {rows} instances and {columns} policies failed: {result.message}")
    mixture = torch.from_numpy(np.maximum(result.x[:-1], 0)).to(losses)
    weights = torch.from_numpy(np.maximum(-result.ineqlin.marginals, 0)).to(losses)
    return mixture / mixture.sum(), weights / weights.sum()


def _check_weights(weights: Tensor, count: int) -> None:
    checks.floating(weights, "weights")
    if tuple(weights.shape) != (count,):
        raise ValueError(f"weights must have shape ({count},), got {tuple(weights.shape)}")
    checks.finite(weights, "weights")
    checks.require(weights >= 0, lambda: "weights must be at least 0")
