r"""Queries chosen by a policy that is trained against the hardest instances, and the exact game in a table.

A game has hypotheses z, two labels a query, and a budget of T queries. An instance :math:`\theta \in [-1, 1]^d` answers
query x by :math:`y = \pm 1` with mean :math:`\theta_x`; its best hypothesis is :math:`\arg\max_z \langle z, \theta
\rangle`. A policy sees the answers so far and chooses the next query; in the end the guess is the hypothesis that suits
the average answers best. Counts of answers are sufficient, so the states are few: there are :math:`\binom{t + 2d -
1}{2d - 1}` after t answers, and the loss is linear in how often a policy reaches the last ones,

.. math:: \ell(\pi, \theta) = \sum_s w_\pi(s) P_\theta(s) L(s, \theta), \qquad
          w_\pi(s) = \sum_{\text{orders of } s} \prod_t \pi(x_t | s_t), \quad
          P_\theta(s) = \prod_x \Big(\frac{1 + \theta_x}{2}\Big)^{n_x^+} \Big(\frac{1 - \theta_x}{2}\Big)^{n_x^-}.

Classes :math:`\Theta_r = \{\theta: C(\theta) \le r\}` group instances by complexity. With the value of each class,
:math:`V_r = \min_\pi \max_{\theta \in \Theta_r} \ell(\pi, \theta)`, the policy wanted is the one that comes nearest to
the best on every class,

.. math:: \min_\pi \max_\theta\ \ell(\pi, \theta) - V_{r(\theta)}.

Against finitely many instances both problems are solved exactly (:meth:`QueryGame.solve`): the best answer to a mixture
of instances comes from dynamic programming, and mixtures of policies are policies. Against a whole class a policy is
trained by gradients through the exact loss (:func:`train_robust_policy`), with instances that climb inside the class.
For one best hypothesis, :math:`C(\theta)^{-1/2} = \max_\lambda \min_z \langle z^* - z, \theta \rangle / \|z^* -
z\|_{A(\lambda)^{-1}}` is concave, because the norm is convex in :math:`\lambda`. So the part of a class with that best
hypothesis is convex, and an instance that has left it is brought back along the line to the noiseless one.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (classes by complexity, the gap to the best of each, training
by adversarial instances). The exact game, its solver and the way back into a class are ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linprog
from torch import Tensor, nn

from .. import checks
from ..stopping import Budget, Stop
from .problem_complexity import check_hypotheses, complexity

Policy = Callable[[Tensor, Tensor], Tensor]

_TIE = 1e-9
_INSIDE = 1e-4


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


@dataclasses.dataclass(frozen=True)
class Instances:
    """Instances of a class.

    Args:
        theta: Mean answers, ``(instances, queries)``.
        best: The best hypothesis of each, ``(instances,)``.
    """

    theta: Tensor
    best: Tensor

    def __len__(self) -> int:
        return len(self.best)


class QueryGame:
    r"""The game of identifying a hypothesis by a budget of noisy answers of plus and minus one, in a table.

    A policy is a callable ``(positives, negatives) -> probabilities`` of the queries, all of shape ``(states,
    queries)``, or what it gives in every state where a query is still to be made: its :meth:`table`.

    Args:
        hypotheses: Rows z, all different, with at most two values a column: labels in plus and minus one for binary
            classes, indicators in 0 and 1 for best arms and best sets.
        budget: T, queries in all.
        loss: ``"error"`` is 1 for a wrong guess; ``"regret"`` is :math:`\langle z^* - z, \theta \rangle`.
        max_states: More states than this are refused, before anything is allocated.

    Attributes:
        positives: Answers of plus one to each query, in every state where one is to be made, ``(states, queries)``.
        negatives: The same of minus one.

    Raises:
        ValueError: If a hypothesis comes twice, a column has more than two values, or there are too many states.

    Example:
        >>> game = QueryGame(thresholds(2), budget=3)  # where do labels turn: before, between or behind two points?
        >>> instances = game.draw_instances(10, radius=5.0, generator=torch.Generator().manual_seed(0))
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
        _check_budget(budget)
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
        # Where all hypotheses agree an answer tells nothing, whatever the sign.
        self._noiseless = torch.where(values == high, 1.0, -1.0).to(values)
        self._easiest = self._inverse_root(self._noiseless)
        self._grow()

    def table(self, policy: Policy) -> Float[Tensor, "states queries"]:
        """Return what a policy does in every state; gradients flow to its parameters.

        Args:
            policy: ``(positives, negatives) -> probabilities``.

        Raises:
            ValueError: If it does not return probabilities of the queries.
        """
        probabilities = policy(self.positives, self.negatives)
        _check_probabilities(probabilities, "what the policy returns", self.positives.shape)
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

    def feasible(self, radius: float) -> Int[Tensor, " some"]:
        r"""Return the hypotheses that are best for some instance of :math:`\Theta_r` in the box [-1, 1].

        Args:
            radius: r, above 0.
        """
        checks.positive(radius, "radius")
        return (self._easiest >= radius**-0.5).nonzero()[:, 0]

    def retract(
        self, theta: Float[Tensor, "instances queries"], best: Int[Tensor, " instances"], *, radius: float
    ) -> Float[Tensor, "instances queries"]:
        r"""Bring instances into the part of :math:`\Theta_r` in the box [-1, 1] where given hypotheses are best.

        Each goes back towards the noiseless instance of its hypothesis, no further than concavity of
        :math:`C^{-1/2}` asks for; instances that are inside already stay.

        Args:
            theta: Any point; clipped to the box first.
            best: The hypothesis of each.
            radius: r, above 0.

        Raises:
            ValueError: If a hypothesis is best for no instance of the class.
        """
        checks.floating(theta, "theta")
        checks.finite(theta, "theta")
        checks.positive(radius, "radius")
        least = radius**-0.5
        home, easiest = self._noiseless[best], self._easiest[best]
        checks.require(
            easiest >= least,
            lambda: f"radius must be at least {float(easiest.min() ** -2):.4g} for these hypotheses, got {radius}",
        )
        point = theta.detach().to(home).clamp(-1, 1)
        # First into the cone where the hypothesis is best: gaps are linear along the line.
        goal, gaps = self._gaps(home, best), self._gaps(point, best)
        wanted = 1e-3 * goal
        share = torch.where(gaps < wanted, (goal - wanted) / (goal - gaps).clamp_min(1e-300), 1.0).amin(-1)
        point = torch.lerp(home, point, share[:, None].clamp(0, 1))
        reached = self._inverse_root(point)
        share = torch.where(reached < least, (easiest - least) / (easiest - reached).clamp_min(1e-300), 1.0)
        return torch.lerp(home, point, share[:, None].clamp(0, 1)).to(theta)

    def draw_instances(self, count: int, *, radius: float, generator: torch.Generator | None = None) -> Instances:
        r"""Draw instances of :math:`\Theta_r`: a feasible hypothesis, and a point of the box brought into its part.

        Args:
            count: How many, at least 1.
            radius: r; too small a one has no instance.
            generator: Draws them; torch's default if None.

        Raises:
            ValueError: If the class is empty.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        some = self.feasible(radius)
        if not len(some):
            raise ValueError(f"radius must be larger: no instance in the box has a complexity of at most {radius}")
        device = self.hypotheses.device if generator is None else generator.device
        drawn = torch.rand(count, self.num_queries + 1, dtype=torch.float64, generator=generator, device=device)
        drawn = drawn.to(self.hypotheses)
        best = some[(drawn[:, 0] * len(some)).long().clamp_max(len(some) - 1)]
        return Instances(self.retract(2 * drawn[:, 1:] - 1, best, radius=radius), best)

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
        found = self.draw_instances(restarts, radius=radius, generator=generator)
        reach = self._reach(table.detach())[-1]
        theta, highest = found.theta, self._losses(found.theta) @ reach
        point = theta
        for step in range(num_steps):
            length = lr * 0.1 ** (step / max(num_steps - 1, 1))
            point = self.retract(point + length * self._uphill(point, reach), found.best, radius=radius)
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
            places = _rank(children)
            following = torch.empty(math.comb(level + parts, parts - 1), parts, dtype=torch.long, device=device)
            following[places.flatten()] = children.flatten(0, 1)
            self._children.append(places.view(-1, 2, self.num_queries))
            self._levels.append(following)
        counts = torch.cat(self._levels[:-1]).to(self.hypotheses)
        self.positives, self.negatives = counts[:, : self.num_queries], counts[:, self.num_queries :]
        self._sizes = [len(level) for level in self._levels[:-1]]
        final = self._levels[-1].to(self.hypotheses)
        self._guesses = _guess(final[:, : self.num_queries], final[:, self.num_queries :], self.hypotheses)

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
        costs = gaps if self.objective == "regret" else (gaps > _TIE).to(gaps)
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
        total = torch.zeros_like(self.positives)
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

    def _gaps(self, theta: Tensor, best: Tensor) -> Tensor:
        return ((self.hypotheses[best][:, None] - self.hypotheses) @ theta[..., None]).squeeze(-1)

    def _inverse_root(self, theta: Tensor) -> Tensor:
        """Return a tight lower bound on C^(-1/2)."""
        if len(self.hypotheses) == 1:
            return torch.full_like(theta[:, 0], torch.inf)
        return complexity(theta, self.hypotheses, tolerance=_INSIDE).value.rsqrt()

    def _check_table(self, table: Tensor) -> None:
        _check_probabilities(table, "table", self.positives.shape)

    def _check_theta(self, theta: Tensor) -> None:
        checks.floating(theta, "theta")
        if theta.dim() != 2 or not len(theta) or theta.shape[1] != self.num_queries:
            raise ValueError(f"theta must have shape (instances, {self.num_queries}), got {tuple(theta.shape)}")
        checks.finite(theta, "theta")
        checks.require(theta.detach().abs() <= 1, lambda: "theta must lie in [-1, 1]: it is the mean of an answer")

    def __repr__(self) -> str:
        shape = tuple(self.hypotheses.shape)
        return f"QueryGame(hypotheses={shape}, budget={self.budget}, loss={self.objective!r})"


class TabularPolicy:
    """A policy of a :class:`QueryGame` that is looked up in its table.

    Args:
        table: Probabilities of the queries in every state, ``(states, queries)``, in the order of the game.

    Raises:
        ValueError: If a row is no distribution.

    Example:
        >>> game = QueryGame(thresholds(2), budget=3)
        >>> policy = TabularPolicy(game.table(uniform_allocation))
        >>> policy(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))  # the first point was asked about
        tensor([[0., 1.]], dtype=torch.float64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; the table is ours.
    """

    def __init__(self, table: Float[Tensor, "states queries"]) -> None:
        _check_probabilities(table, "table", table.shape)
        self.table = table.detach()

    def __call__(
        self, positives: Float[Tensor, "states queries"], negatives: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            positives: Answers of plus one to each query.
            negatives: Answers of minus one.

        Raises:
            ValueError: If a state has more answers than the table.
        """
        _check_counts(positives, negatives)
        counts = torch.cat([positives, negatives], -1).round().long()
        spent, parts = counts.sum(-1), counts.shape[-1]
        place = _binomials(spent + parts - 1, parts) + _rank(counts)
        checks.require(place < len(self.table), lambda: f"the table ends before {int(spent.max())} answers")
        return self.table[place]


class QueryNetwork(nn.Module):
    r"""A policy as a network: shares of the budget spent, and average answers, to probabilities of the queries.

    Args:
        num_queries: d.
        budget: T, the queries in all, in whose units counts are read.
        hidden: Widths of the hidden layers. The paper's are not known; two of 128 are ours.

    Example:
        >>> QueryNetwork(3, budget=5)(torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; the features are ours.
    """

    def __init__(self, num_queries: int, *, budget: int, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}")
        _check_budget(budget)
        self.budget = budget
        widths = [3 * num_queries + 1, *hidden]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_queries))

    def forward(
        self, positives: Float[Tensor, "states queries"], negatives: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            positives: Answers of plus one to each query.
            negatives: Answers of minus one.
        """
        _check_counts(positives, negatives)
        asked, sums = positives + negatives, positives - negatives
        spent = asked.sum(-1, keepdim=True) / self.budget
        features = torch.cat([asked / self.budget, sums / self.budget, sums / asked.clamp_min(1), spent], -1)
        dtype = next(self.parameters()).dtype
        return self.layers(features.to(dtype)).softmax(-1)


def uniform_allocation(
    positives: Float[Tensor, "states queries"], negatives: Float[Tensor, "states queries"]
) -> Float[Tensor, "states queries"]:
    """Ask the queries asked least so far, whatever the answers: a baseline.

    Args:
        positives: Answers of plus one to each query.
        negatives: Answers of minus one.

    Returns:
        Probabilities of the queries, equal among the least asked.

    Example:
        >>> uniform_allocation(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([[0.0000, 0.5000, 0.5000]])

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (a baseline).
    """
    _check_counts(positives, negatives)
    asked = positives + negatives
    return _even(asked == asked.amin(-1, keepdim=True), asked)


def generalized_binary_search(
    positives: Float[Tensor, "states queries"],
    negatives: Float[Tensor, "states queries"],
    *,
    hypotheses: Float[Tensor, "hypotheses queries"],
    sharpness: float = 0.7,
) -> Float[Tensor, "states queries"]:
    r"""Ask where labels weighed by :math:`w_z \propto \exp(\beta \langle n^+ - n^-, z \rangle)` are split most evenly.

    It is soft generalised binary search; as these weights are the posterior for answers that are wrong with a
    probability of :math:`1 / (1 + e^{2 \beta})`, it is also uncertainty sampling.

    Args:
        positives: Answers of plus one to each query.
        negatives: Answers of minus one.
        hypotheses: Labels in plus and minus one.
        sharpness: beta, above 0. 0.7 is right for one answer in five wrong.

    Returns:
        Probabilities of the queries, equal among those of the most even split.

    Example:
        >>> nothing = torch.zeros(1, 3)
        >>> generalized_binary_search(nothing, nothing, hypotheses=thresholds(3).float())
        tensor([[0., 1., 0.]])

    Source:
        Nowak, "The geometry of generalized binary search", IEEE Transactions on Information Theory 57 (2011),
        section IV.
    """
    _check_counts(positives, negatives)
    check_hypotheses(hypotheses)
    checks.positive(sharpness, "sharpness")
    checks.require(hypotheses.abs() == 1, lambda: "hypotheses must hold labels in -1 and 1")
    if hypotheses.shape[1] != positives.shape[-1]:
        raise ValueError(f"hypotheses must have {positives.shape[-1]} columns, got {hypotheses.shape[1]}")
    labels = hypotheses.to(positives)
    weights = (sharpness * (positives - negatives) @ labels.mT).softmax(-1)
    balance = (weights @ labels).abs()
    tie = 100 * torch.finfo(balance.dtype).eps
    return _even(balance <= balance.amin(-1, keepdim=True) + tie, balance)


def thresholds(num_queries: int) -> Float[Tensor, "hypotheses queries"]:
    """Return the labels of d points in a row that turn from minus to plus at one place, or not at all.

    Args:
        num_queries: d, at least 1.

    Returns:
        ``(num_queries + 1, num_queries)``; row k has k labels of minus one.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> thresholds(2)
        tensor([[ 1.,  1.],
                [-1.,  1.],
                [-1., -1.]], dtype=torch.float64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (one-dimensional thresholds).
    """
    if not num_queries >= 1:
        raise ValueError(f"num_queries must be at least 1, got {num_queries}")
    return 1 - 2 * torch.ones(num_queries + 1, num_queries, dtype=torch.float64).tril(-1)


@dataclasses.dataclass(frozen=True)
class RobustTraining:
    """What :func:`train_robust_policy` reports; the policy itself is trained in place.

    Args:
        instances: Where the adversary's instances ended.
        losses: Of the policy on these, less the values of their classes, ``(instances,)``.
        worst: The largest loss less value that the adversary held, before every step, ``(num_steps,)``.
    """

    instances: Instances
    losses: Tensor
    worst: Tensor


def train_robust_policy(
    policy: nn.Module,
    game: QueryGame,
    *,
    radii: Float[Tensor, " classes"],
    values: Float[Tensor, " classes"] | None = None,
    num_instances: int = 64,
    num_steps: int = 400,
    sharpness: float = 20.0,
    lr: float = 3e-3,
    instance_lr: float = 0.03,
    redraw_every: int = 20,
    generator: torch.Generator | None = None,
) -> RobustTraining:
    r"""Train a policy on :math:`\min_\pi \max_k \max_{\theta \in \Theta_{r_k}} \ell(\pi, \theta) - V_k`, exact losses.

    The instances are shared out among the classes, climb the gradient of their loss and are brought back into their
    class; the policy descends by Adam the loss weighed by :math:`w_i \propto \exp(\beta(\ell_i - V_i))`, at a rate that
    falls to a tenth. One radius and no value is the training for one class, whose worst loss estimates its value; all
    radii and these values are the training for the policy that is near the best on each. Classes are nested, so that an
    instance may also count with the larger values of the classes around its own, which never decide.

    Args:
        policy: ``(positives, negatives) -> probabilities``, such as :class:`QueryNetwork`; trained in place.
        game: Gives the losses.
        radii: r of each class.
        values: V of each class; None for 0.
        num_instances: Of the adversary, at least one a class.
        num_steps: Steps of both players.
        sharpness: beta, of the weights of the instances. 20, and the numbers below, are ours.
        lr: Adam's learning rate.
        instance_lr: Length of the instances' steps.
        redraw_every: After so many steps the quarter of the instances with the least loss is drawn anew.
        generator: Draws instances; torch's default if None.

    Returns:
        A :class:`RobustTraining`.

    Raises:
        ValueError: If a class is empty.
        FloatingPointError: If the loss ceases to be finite.

    Example:
        >>> game = QueryGame(thresholds(2), budget=3)
        >>> policy = QueryNetwork(2, budget=3, hidden=(16,))
        >>> generator = torch.Generator().manual_seed(0)
        >>> report = train_robust_policy(policy, game, radii=torch.tensor([6.0]), num_steps=3, generator=generator)
        >>> report.worst.shape, len(report.instances)
        (torch.Size([3]), 64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382. The paper estimates these gradients from rollouts; exact losses
        and normalised steps are ours.
    """
    checks.floating(radii, "radii")
    if radii.dim() != 1 or not len(radii):
        raise ValueError(f"radii must have shape (classes,), got {tuple(radii.shape)}")
    checks.finite(radii, "radii")
    if values is not None:
        checks.floating(values, "values")
        checks.finite(values, "values")
        if values.shape != radii.shape:
            raise ValueError(f"values must have the shape of radii, {tuple(radii.shape)}, got {tuple(values.shape)}")
    for name, value in (("sharpness", sharpness), ("lr", lr), ("instance_lr", instance_lr)):
        checks.positive(value, name)
    if num_instances < len(radii) or redraw_every < 1 or num_steps < 1:
        raise ValueError(
            f"num_instances must be at least the number of classes, {len(radii)}, num_steps and redraw_every at least "
            f"1, got {num_instances}, {num_steps} and {redraw_every}"
        )
    adversary = _Adversary(game, radii, values, num_instances, generator)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step / num_steps))
    worst = []
    for step in range(num_steps):
        reach = game._reach(game.table(policy))[-1]
        losses = game._losses(adversary.theta) @ reach - adversary.value
        weights = (sharpness * losses.detach()).softmax(0)
        objective = weights @ losses
        if not bool(torch.isfinite(objective)):
            raise FloatingPointError(f"the loss is not finite at step {step}: try a lower lr")
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
        worst.append(losses.detach().max())
        adversary.climb(reach.detach(), instance_lr)
        if (step + 1) % redraw_every == 0:
            adversary.redraw(losses.detach())
    with torch.no_grad():
        losses = game.loss(game.table(policy), adversary.theta) - adversary.value
    return RobustTraining(Instances(adversary.theta, adversary.best), losses, torch.stack(worst))


class _Adversary:
    """Instances that climb inside their classes."""

    def __init__(
        self,
        game: QueryGame,
        radii: Tensor,
        values: Tensor | None,
        count: int,
        generator: torch.Generator | None,
    ) -> None:
        self.game, self.generator = game, generator
        self.radii = radii.tolist()
        shares = [len(range(place, count, len(radii))) for place in range(len(radii))]
        drawn = [
            game.draw_instances(share, radius=radius, generator=generator)
            for share, radius in zip(shares, self.radii, strict=True)
        ]
        self.shares = shares
        self.theta = torch.cat([one.theta for one in drawn])
        self.best = torch.cat([one.best for one in drawn])
        known = torch.zeros_like(radii) if values is None else values
        self.value = known.to(self.theta).repeat_interleave(torch.tensor(shares, device=self.theta.device))

    def climb(self, reach: Tensor, length: float) -> None:
        moved = self.theta + length * self.game._uphill(self.theta, reach)
        parts = zip(moved.split(self.shares), self.best.split(self.shares), self.radii, strict=True)
        self.theta = torch.cat([self.game.retract(theta, best, radius=radius) for theta, best, radius in parts])

    def redraw(self, losses: Tensor) -> None:
        thetas, bests = list(self.theta.split(self.shares)), list(self.best.split(self.shares))
        for place, (share, radius, loss) in enumerate(
            zip(self.shares, self.radii, losses.split(self.shares), strict=True)
        ):
            if share < 4:
                continue
            lowest = loss.argsort()[: share // 4]
            fresh = self.game.draw_instances(len(lowest), radius=radius, generator=self.generator)
            thetas[place] = thetas[place].index_copy(0, lowest, fresh.theta)
            bests[place] = bests[place].index_copy(0, lowest, fresh.best)
        self.theta, self.best = torch.cat(thetas), torch.cat(bests)


class ActiveLearner:
    """Ask which query to make next, tell its answer, and guess the hypothesis once the budget is spent.

    Args:
        hypotheses: Rows z, all different: labels in plus and minus one, say, of the items that may be asked about.
        policy: ``(positives, negatives) -> probabilities`` of the queries, both ``(1, queries)`` here: a trained
            :class:`QueryNetwork`, a :class:`TabularPolicy`, or a baseline.
        budget: Queries in all, at least 1.
        generator: Draws queries, and guesses among ties; torch's default if None.

    Example:
        >>> import functools
        >>> labels = thresholds(3)
        >>> search = functools.partial(generalized_binary_search, hypotheses=labels)
        >>> learner = ActiveLearner(labels, policy=search, budget=9, generator=torch.Generator().manual_seed(0))
        >>> while not learner.finished:
        ...     learner.tell(1 if learner.ask() >= 2 else -1)  # the oracle's labels turn at item 2
        >>> learner.guess()
        2

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
    """

    def __init__(
        self,
        hypotheses: Float[Tensor, "hypotheses queries"],
        *,
        policy: Policy,
        budget: int,
        generator: torch.Generator | None = None,
    ) -> None:
        check_hypotheses(hypotheses)
        _check_budget(budget)
        self.hypotheses, self.policy, self.budget = hypotheses.detach(), policy, budget
        self.positives = torch.zeros_like(self.hypotheses[0])
        self.negatives = torch.zeros_like(self.positives)
        self._generator = generator
        self._pending: int | None = None

    @property
    def num_answers(self) -> int:
        """Answers told so far."""
        return int((self.positives + self.negatives).sum())

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.num_answers >= self.budget

    def ask(self) -> int:
        """Return the query to make next; the same one until its answer is told.

        Raises:
            RuntimeError: If the budget is spent.
        """
        if self.finished:
            raise RuntimeError(f"the budget of {self.budget} queries is spent: take the guess")
        if self._pending is None:
            with torch.no_grad():
                probabilities = self.policy(self.positives[None], self.negatives[None])
            _check_probabilities(probabilities, "what the policy returns", (1, len(self.positives)))
            self._pending = self._draw(probabilities[0])
        return self._pending

    def tell(self, answer: int) -> None:
        """Say what the answer to the query asked was.

        Args:
            answer: 1 or -1.

        Raises:
            ValueError: If it is another number.
            RuntimeError: If no query is open.
        """
        if answer not in (-1, 1):
            raise ValueError(f"answer must be 1 or -1, got {answer!r}")
        if self._pending is None:
            raise RuntimeError("no query is open: ask first")
        counts = self.positives if answer == 1 else self.negatives
        counts[self._pending] += 1
        self._pending = None

    def guess(self) -> int:
        """Return the hypothesis that suits the average answers so far best; drawn among ties."""
        return self._draw(_guess(self.positives[None], self.negatives[None], self.hypotheses)[0])

    def run(self, oracle: Callable[[int], int]) -> int:
        """Ask an oracle until the budget is spent, and guess.

        Args:
            oracle: Takes a query, returns 1 or -1.

        Returns:
            The guess.
        """
        while not self.finished:
            self.tell(oracle(self.ask()))
        return self.guess()

    def state_dict(self) -> dict[str, Any]:
        """Return the answers so far and the query that is open."""
        return {"positives": self.positives.clone(), "negatives": self.negatives.clone(), "pending": self._pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a search where it was saved.

        Args:
            state: Of a learner with as many queries.

        Raises:
            ValueError: If the number of queries differs.
        """
        wanted = tuple(self.positives.shape)
        for name in ("positives", "negatives"):
            if tuple(state[name].shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(state[name].shape)}")
        self.positives = state["positives"].clone().to(self.hypotheses)
        self.negatives = state["negatives"].clone().to(self.hypotheses)
        self._pending = state["pending"]

    def _draw(self, probabilities: Tensor) -> int:
        device = probabilities.device if self._generator is None else self._generator.device
        return int(torch.multinomial(probabilities.to(device), 1, generator=self._generator))


def _guess(positives: Tensor, negatives: Tensor, hypotheses: Tensor) -> Tensor:
    """Return the probability of each guess: the hypotheses of largest product with the average answers, evenly."""
    estimate = (positives - negatives) / (positives + negatives).clamp_min(1)
    values = estimate.double() @ hypotheses.double().mT
    return _even(values >= values.amax(-1, keepdim=True) - _TIE, values)


def _even(chosen: Tensor, like: Tensor) -> Tensor:
    shares = chosen.to(like)
    return shares / shares.sum(-1, keepdim=True)


def _likelihood(counts: Tensor, theta: Tensor) -> Tensor:
    """Return the probability of one order of the answers of every state, ``(instances, states)``."""
    chances = torch.cat([1 + theta, 1 - theta], -1) / 2
    return chances[:, None, :].pow(counts.to(chances)).prod(-1)


def _binomials(top: Tensor, bottom: Tensor | int) -> Tensor:
    """Return binomial coefficients, exactly, of small integers; 0 where ``bottom`` exceeds ``top``."""
    highest = int(top.max()) if top.numel() else 0
    choose = torch.as_tensor(bottom, device=top.device)
    widest = int(choose.max()) + 1
    rows = [[math.comb(n, k) for k in range(widest)] for n in range(highest + 1)]
    return torch.tensor(rows, device=top.device)[top, choose.expand_as(top)]


def _rank(counts: Tensor) -> Tensor:
    """Return the place of counts among all with the same sum, in lexicographic order."""
    parts = counts.shape[-1]
    left = counts.sum(-1, keepdim=True) - counts.cumsum(-1) + counts
    # With m parts to come, those that begin with less than c number C(left + m, m) - C(left - c + m, m).
    behind = torch.arange(parts - 1, -1, -1, device=counts.device)
    return (_binomials(left + behind, behind) - _binomials(left - counts + behind, behind)).sum(-1)


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


def _check_budget(budget: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an integer, got {budget!r}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")


def _check_weights(weights: Tensor, count: int) -> None:
    checks.floating(weights, "weights")
    if tuple(weights.shape) != (count,):
        raise ValueError(f"weights must have shape ({count},), got {tuple(weights.shape)}")
    checks.finite(weights, "weights")
    checks.require(weights >= 0, lambda: "weights must be at least 0")


def _check_probabilities(probabilities: Tensor, name: str, shape: Sequence[int]) -> None:
    checks.floating(probabilities, name)
    if tuple(probabilities.shape) != tuple(shape) or probabilities.dim() != 2:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(probabilities.shape)}")
    checks.finite(probabilities, name)
    rows = probabilities.detach()
    checks.require(
        (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() < 1e-3),
        lambda: f"{name} must hold probabilities that add up to 1 in every row",
    )


def _check_counts(positives: Tensor, negatives: Tensor) -> None:
    for name, counts in (("positives", positives), ("negatives", negatives)):
        checks.floating(counts, name)
        checks.finite(counts, name)
    if positives.shape != negatives.shape or positives.dim() != 2 or not positives.numel():
        raise ValueError(
            f"positives and negatives must have one shape (states, queries), got {tuple(positives.shape)} and "
            f"{tuple(negatives.shape)}"
        )
    checks.require((positives >= 0) & (negatives >= 0), lambda: "positives and negatives must be at least 0")
