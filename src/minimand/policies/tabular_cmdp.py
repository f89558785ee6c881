r"""Constrained decision problems in a table, solved exactly by one linear program over occupancies.

With discount :math:`\gamma`, first states :math:`d`, transitions :math:`P(s'|s,a)` whose rows may add up to less than 1
(the rest ends the episode), rewards :math:`r` and costs :math:`c_k` with budgets :math:`b_k`, the occupancy
:math:`\mu(s,a)`, the discounted number of times that a policy takes :math:`a` in :math:`s`, solves

.. math:: \max_{\mu \ge 0} \langle\mu, r\rangle \quad\text{s.t.}\quad
          \sum_a \mu(s', a) - \gamma \sum_{s, a} P(s'|s,a)\,\mu(s,a) = d(s'), \qquad \langle\mu, c_k\rangle \le b_k,

and :math:`\pi(a|s) \propto \mu(s, a)` is an optimal policy. Where it is random, it is so in at most one state a budget.
A guardian enters as pairs that :math:`\mu` must not use, as one more cost with a budget, or by
:meth:`TabularCMDP.guarded`: pairs outside lead to a state that is never left and pays a penalty at every step.

Source: Altman, "Constrained Markov Decision Processes", 1999, chapters 2 to 4; Yan, Shen, Wachi, Gros, Zhao and Hu
2025, arXiv 2505.16242 (the guardian). The exact solver for the guarded problem is ours.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop
from .occupancy_program import OccupancyProgram
from .transitions import Transitions


class InfeasibleBudgetsError(ValueError):
    """That no policy keeps the budgets, with the least cost that one can have.

    Args:
        message: What to say.
        minimal_costs: The least of each cost, all others aside, ``(costs,)``.
        excess: By how much all budgets together must be raised for some policy to keep them.
    """

    def __init__(self, message: str, minimal_costs: Tensor, excess: float) -> None:
        super().__init__(message)
        self.minimal_costs, self.excess = minimal_costs, excess


@dataclasses.dataclass(frozen=True)
class PolicyEvaluation:
    """What a policy is worth, exactly.

    Args:
        value: Expected discounted sum of rewards, ``()``.
        costs: Expected discounted sums of costs, ``(costs,)``.
        occupancy: Discounted number of times each pair is used, ``(states, actions)``.
    """

    value: Tensor
    costs: Tensor
    occupancy: Tensor


@dataclasses.dataclass(frozen=True)
class CMDPSolution:
    """What :meth:`TabularCMDP.solve` found.

    Args:
        policy: Probabilities of actions, ``(states, actions)``; where the policy never comes, even over those allowed.
        value: Of the policy, exactly.
        costs: Of the policy, exactly, ``(costs,)``.
        occupancy: Of the policy, ``(states, actions)``.
        multipliers: What one more unit of each budget would be worth, ``(costs,)``; NaN if stopped short.
        iterations: Of the linear program.
        residual: How far the program's value is from that of the policy.
        status: Why it stopped. Short of ``CONVERGED`` the policy is even over the allowed actions.
    """

    policy: Tensor
    value: Tensor
    costs: Tensor
    occupancy: Tensor
    multipliers: Tensor
    iterations: int
    residual: float
    status: Stop


class TabularCMDP:
    r"""A decision problem with costs, as a table.

    Args:
        transition: :math:`P(s'|s,a)`, ``(states, actions, states)``; a row that adds up to less than 1 ends the
            episode with the rest.
        reward: Expected :math:`r(s,a)`, ``(states, actions)``.
        initial: Probabilities of first states, ``(states,)``.
        discount: :math:`\gamma` in (0, 1]; at 1 every policy must end.
        cost: Expected :math:`c_k(s,a)`, ``(costs, states, actions)``; None for no costs.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, a number is not finite, or probabilities are negative or exceed 1 in sum.

    Example:
        >>> stay = torch.ones(1, 2, 1, dtype=torch.float64)
        >>> reward, cost = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[[0.0, 1.0]]]).double()
        >>> problem = TabularCMDP(stay, reward, torch.ones(1, dtype=torch.float64), discount=0.5, cost=cost)
        >>> solution = problem.solve(torch.tensor([0.5]))  # a quarter of the two steps that there are
        >>> solution.policy[0].tolist(), solution.value.item(), solution.multipliers.item()
        ([0.75, 0.25], 3.0, 2.0)

    Source:
        Altman, "Constrained Markov Decision Processes", 1999.
    """

    def __init__(
        self,
        transition: Float[Tensor, "states actions states"],
        reward: Float[Tensor, "states actions"],
        initial: Float[Tensor, " states"],
        *,
        discount: float,
        cost: Float[Tensor, "costs states actions"] | None = None,
    ) -> None:
        checks.floating(transition, "transition")
        checks.not_empty(transition, "transition")
        if transition.dim() != 3 or transition.shape[0] != transition.shape[2]:
            raise ValueError(f"transition must have shape (states, actions, states), got {tuple(transition.shape)}")
        states, actions = transition.shape[:2]
        if cost is None:
            cost = transition.new_zeros(0, states, actions)
        costs = cost.shape[0] if cost.dim() == 3 else 1
        for value, name, shape in (
            (reward, "reward", (states, actions)),
            (initial, "initial", (states,)),
            (cost, "cost", (costs, states, actions)),
        ):
            checks.floating(value, name)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            checks.finite(value, name)
        checks.finite(transition, "transition")
        checks.between(discount, "discount", 0.0, 1.0, low_open=True)
        checks.require(
            (transition >= 0).all(-1) & (transition.sum(-1) <= 1 + 1e-5),
            lambda: "transition must hold probabilities that add up to at most 1 along the last dimension",
        )
        checks.require(
            (initial >= 0) & ((initial.sum() - 1).abs() <= 1e-5),
            lambda: "initial must hold probabilities that add up to 1",
        )
        self.transition, self.discount = transition, discount
        self.reward, self.initial, self.cost = reward.to(transition), initial.to(transition), cost.to(transition)

    @classmethod
    def from_transitions(
        cls, transitions: Transitions, *, num_states: int, num_actions: int, discount: float
    ) -> TabularCMDP:
        """Estimate the problem from a log by frequencies: means of rewards and costs, shares of next states.

        Pairs that were never logged end the episode and give nothing: guard against them.

        Args:
            transitions: The log, its observations numbers of states ``(N, 1)`` and its actions choices.
            num_states: How many states there are.
            num_actions: How many choices there are.
            discount: Of the problem.

        Raises:
            ValueError: If an observation or action is no such number.
        """
        states = transitions.observation, transitions.next_observation
        if transitions.continuous or transitions.observation.shape[1] != 1:
            raise ValueError("transitions must have states (N, 1) as observations and choices as actions")
        state, following = (each.squeeze(1).long() for each in states)
        action = transitions.action
        for number, name, count in (
            (state, "observation", num_states),
            (following, "next_observation", num_states),
            (action, "action", num_actions),
        ):
            checks.require(
                (number >= 0) & (number < count),
                lambda name=name, count=count: f"{name} must lie in [0, {count - 1}]",  # type: ignore[misc]
            )
        checks.require(states[0] == states[0].round(), lambda: "observation must hold numbers of states")
        pair = state * num_actions + action
        moves = transitions.reward.new_zeros(num_states * num_actions, num_states)
        moves.index_put_((pair, following), (~transitions.terminated).to(moves), accumulate=True)
        counts = torch.bincount(pair, minlength=len(moves)).to(moves).clamp_min(1)[:, None]
        costs = moves.new_zeros(len(pair), 0) if transitions.cost is None else transitions.cost
        paid = torch.cat([transitions.reward[:, None], costs], 1)
        means = moves.new_zeros(len(moves), paid.shape[1]).index_add_(0, pair, paid) / counts
        shape = (num_states, num_actions)
        ends = transitions.episode_ends
        starts = torch.bincount(state[torch.cat([ends.new_ones(1), ends[:-1]])], minlength=num_states).to(moves)
        return cls(
            (moves / counts).view(*shape, num_states),
            means[:, 0].view(shape),
            starts / starts.sum(),
            discount=discount,
            cost=means[:, 1:].mT.reshape(-1, *shape),
        )

    def evaluate(self, policy: Float[Tensor, "states actions"]) -> PolicyEvaluation:
        r"""Evaluate a policy by solving :math:`(I - \gamma P_\pi^\top)\, m = d` for its state occupancy m.

        Args:
            policy: Probabilities of actions in each state.

        Raises:
            ValueError: If it holds no probabilities, or the discount is 1 and it need not end.
        """
        checks.floating(policy, "policy")
        if policy.shape != self.reward.shape:
            raise ValueError(f"policy must have shape {tuple(self.reward.shape)}, got {tuple(policy.shape)}")
        checks.finite(policy, "policy")
        checks.require(
            (policy >= 0).all(-1) & ((policy.sum(-1) - 1).abs() <= 1e-5),
            lambda: "policy must hold probabilities that add up to 1 along the last dimension",
        )
        policy = policy.to(self.transition)
        moves = torch.einsum("sa,sat->st", policy, self.transition)
        system = torch.eye(len(moves), dtype=moves.dtype, device=moves.device) - self.discount * moves.mT
        visits, failed = torch.linalg.solve_ex(system, self.initial)
        # Without an end the system is singular but for rounding, and the visits are rounding's inverse.
        endless = not bool(visits.abs().max() < 0.1 / torch.finfo(visits.dtype).eps)
        if bool(failed) or endless or float(visits.min()) < -1e-3:
            raise ValueError("policy must end with probability 1 where the discount is 1: its occupancy is not finite")
        occupancy = visits.clamp_min(0)[:, None] * policy
        return PolicyEvaluation((occupancy * self.reward).sum(), (self.cost * occupancy).sum((1, 2)), occupancy)

    def guarded(self, inside: Bool[Tensor, "states actions"], *, penalty: float) -> TabularCMDP:
        r"""Return the problem in which pairs outside lead to a state that is never left.

        A pair outside pays the penalty in place of its reward, no cost, and so does every step after it:
        :math:`\text{penalty} / (1 - \gamma)` in all, or once where the discount is 1. One more cost, the last, counts
        these steps. The state is the last one.

        Args:
            inside: Which pairs are.
            penalty: Reward of a step outside; -25 in the paper's code, where no reward is below -12.5.
        """
        self._check_pairs(inside, "inside")
        checks.finite(torch.tensor(float(penalty)), "penalty")
        states, actions = self.reward.shape
        outside = torch.cat([~inside, inside.new_ones(1, actions)])
        transition = self.transition.new_zeros(states + 1, actions, states + 1)
        transition[:states, :, :states] = self.transition
        transition[outside] = 0
        if self.discount < 1:
            transition[..., states] += outside.to(transition)
            paid = outside
        else:
            paid = torch.cat([~inside, inside.new_zeros(1, actions)])
        empty = self.cost.new_zeros(len(self.cost), 1, actions)
        cost = torch.cat([self.cost, empty], 1).masked_fill(outside, 0.0)
        reward = torch.cat([self.reward, self.reward.new_zeros(1, actions)]).masked_fill(outside, 0.0)
        return TabularCMDP(
            transition,
            reward.masked_fill(paid, float(penalty)),
            torch.cat([self.initial, self.initial.new_zeros(1)]),
            discount=self.discount,
            cost=torch.cat([cost, paid.to(cost)[None]]),
        )

    def solve(
        self,
        budgets: Float[Tensor, " costs"] | None = None,
        *,
        allowed: Bool[Tensor, "states actions"] | None = None,
        max_iter: int = 1_000_000,
        max_seconds: float | None = None,
    ) -> CMDPSolution:
        """Find a policy of highest value within budgets, on the CPU, by SciPy's HiGHS in double precision.

        Args:
            budgets: The most of each cost; infinity for no limit, None for none at all.
            allowed: Pairs that the policy may use, at least one a state; None for all.
            max_iter: Most iterations of the linear program.
            max_seconds: Most seconds; None for no limit.

        Returns:
            A :class:`CMDPSolution`.

        Raises:
            InfeasibleBudgetsError: If no policy keeps the budgets; it tells the least costs there are.
            ValueError: If an argument is out of range, or the value is unbounded since episodes need not end.
        """
        limits = self._budgets(budgets)
        allowed = torch.ones_like(self.reward, dtype=torch.bool) if allowed is None else allowed
        self._check_pairs(allowed, "allowed")
        checks.require(allowed.any(1), lambda: "allowed must leave at least one action in every state")
        budget = Budget(max_iter, max_seconds)
        program = OccupancyProgram(
            _array(self.transition),
            _array(self.initial),
            _array(self.cost),
            discount=self.discount,
            allowed=allowed.cpu().numpy(),
        )
        bounded = np.isfinite(limits)
        found = program.maximize(_array(self.reward), program.costs[bounded], limits[bounded], budget)
        if found.status == 2:
            raise self._infeasible(program, limits, budget)
        if found.status == 3:
            raise ValueError("the value is unbounded: where the discount is 1 every policy must end")
        multipliers = self.cost.new_zeros(len(limits))
        if found.status == 0:
            occupancy = program.table(found.x)
            multipliers[torch.from_numpy(bounded)] = torch.from_numpy(-found.ineqlin.marginals).to(multipliers)
        else:
            occupancy = np.zeros(tuple(self.reward.shape))
            multipliers.fill_(math.nan)
        policy = _policy(torch.from_numpy(occupancy), allowed.cpu()).to(self.transition)
        evaluation = self.evaluate(policy)
        claimed = float((torch.from_numpy(occupancy).to(self.reward) * self.reward).sum())
        return CMDPSolution(
            policy=policy,
            value=evaluation.value,
            costs=evaluation.costs,
            occupancy=evaluation.occupancy,
            multipliers=multipliers,
            iterations=int(found.nit),
            residual=abs(claimed - float(evaluation.value)),
            status=_stop(found.status, budget),
        )

    def _infeasible(self, program: OccupancyProgram, limits: NDArray[np.float64], budget: Budget) -> ValueError:
        if not np.isfinite(limits).any():
            return ValueError("no policy ends: where the discount is 1 one must")
        least = [program.minimize(cost, budget) for cost in program.costs]
        excess = program.least_excess(limits, budget)
        rows = ", ".join(
            f"cost {k} has budget {limit:.6g} and is at least {low:.6g}"
            for k, (limit, low) in enumerate(zip(limits, least, strict=True))
        )
        return InfeasibleBudgetsError(
            f"budgets cannot be kept: {rows}; all of them must be raised by {excess:.6g}",
            self.cost.new_tensor(least),
            excess,
        )

    def _budgets(self, budgets: Tensor | None) -> NDArray[np.float64]:
        count = len(self.cost)
        if budgets is None:
            return np.full(count, math.inf)
        checks.floating(budgets, "budgets")
        if tuple(budgets.shape) != (count,):
            raise ValueError(f"budgets must have shape ({count},), one a cost, got {tuple(budgets.shape)}")
        checks.require(
            ~budgets.isnan() & (budgets != -math.inf),
            lambda: f"budgets must not be NaN or -infinity, got {budgets.tolist()}",
        )
        return budgets.detach().cpu().double().numpy()

    def _check_pairs(self, pairs: Tensor, name: str) -> None:
        checks.tensor(pairs, name)
        if pairs.dtype != torch.bool or pairs.shape != self.reward.shape:
            raise ValueError(
                f"{name} must be boolean of shape {tuple(self.reward.shape)}, got {pairs.dtype}, {tuple(pairs.shape)}"
            )

    def __repr__(self) -> str:
        states, actions = self.reward.shape
        return f"TabularCMDP(states={states}, actions={actions}, costs={len(self.cost)}, discount={self.discount})"


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()


def _policy(occupancy: Tensor, allowed: Tensor) -> Tensor:
    """Return how a policy of that occupancy acts: evenly over the allowed actions where it never comes."""
    visits = occupancy.sum(1, keepdim=True)
    even = allowed / allowed.sum(1, keepdim=True).to(occupancy)
    reached = visits > 1e-12 * occupancy.max().clamp_min(1e-300)
    return torch.where(reached, occupancy / torch.where(reached, visits, torch.ones_like(visits)), even)


def _stop(status: int, budget: Budget) -> Stop:
    if status == 1:  # HiGHS says no more than that a limit was met
        return Stop.TIME_LIMIT if budget.seconds >= budget.max_seconds else Stop.ITERATION_LIMIT
    return Stop.CONVERGED if status == 0 else Stop.STALLED
