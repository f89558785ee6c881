r"""Optimise the distribution of the return, not its mean alone: dynamic programming over states with a stock.

The best action for a tail mean or for a target total depends on what has been earned already. The state is therefore
augmented by a *stock* :math:`c`, which starts where the user says and moves by

.. math:: C_{t+1} = (C_t + R_{t+1}) / \gamma, \qquad\text{so that}\qquad C_0 + G_0 = \gamma^t (C_t + G_t)

for the return :math:`G_t = R_{t+1} + \gamma G_{t+1}`: what is left at step t is the first problem, scaled. For an
objective :math:`U`, the law :math:`\eta(s, c)` of the return from each augmented state is improved by

.. math:: \pi_k(s, c) \in \arg\max_a U(\mathrm{law}(c + R + \gamma G')), \qquad
          \eta_{k+1}(s, c) = \mathrm{law}(R + \gamma G'), \qquad G' \sim \eta_k(s', (c + R) / \gamma),

the first with a given action (value iteration), or with :math:`\eta^{\pi_k}` in place of :math:`\eta_k` (policy
iteration). Both reach the optimum from every augmented state at once if U is

(a) indifferent to mixtures: parts of a mixture replaced by better ones make no worse a mixture;
(b) indifferent to the discount: what is better stays better when scaled by :math:`\gamma`;
(c) Lipschitz in the 1-Wasserstein distance, unless the process ends after finitely many steps.

An expected utility :math:`U(\nu) = E_{X \sim \nu} f(X)` has (a); as such utilities are unique up to scale and
origin, it has (b) exactly if :math:`f(\gamma x) = a f(x) + b` with :math:`a > 0`; and (c) if f is Lipschitz. Tail means
and quantiles lack (a), but are optimised by expected utilities from a well-chosen first stock, which
:meth:`StockMDP.best_cvar` and :meth:`StockMDP.best_quantile` search for.

The laws are exact: from given starts, finitely many augmented states can be reached in finitely many steps.

Source: Ávila Pires, Rowland, Borsa, Guo, Khetarpal, Barreto, Abel, Munos and Dabney, "Optimizing Return Distributions
with Distributional Dynamic Programming", JMLR 2025, arXiv 2501.13028; Rockafellar and Uryasev 2000 for the tail mean as
a maximum over the first stock. The exact search for that stock and the bounds on its error are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop
from .expected_utility import ExpectedUtility, check_discount
from .return_law import ReturnLaw, rounding_slack
from .stock_tree import Edges, NodeLaws, StockTree, greedy


@dataclasses.dataclass(frozen=True)
class StockLayer:
    """The augmented states that can be reached at one step.

    Args:
        state: ``(nodes,)``.
        stock: ``(nodes,)``, or ``(nodes, rewards)``.
        action: What the policy does there, ``(nodes,)``; 0 where the process has ended.
        value: The objective there, ``(nodes,)``.
    """

    state: Tensor
    stock: Tensor
    action: Tensor
    value: Tensor


@dataclasses.dataclass(frozen=True)
class StockSolution:
    """What value or policy iteration found.

    Args:
        value: The objective from each start, ``(starts,)``.
        laws: The law of the return from each start.
        layers: The policy at each step, over what can be reached from the starts.
        error_bound: How far ``value`` is from the optimum at most, rounding aside; infinity if not known.
        iterations: Sweeps, or improvements of the policy.
        status: Why it stopped. Short of ``CONVERGED``, laws and policy are those of the last iterate.
        discount: Of the process.
        resolution: Totals closer than this are one.
    """

    value: Tensor
    laws: tuple[ReturnLaw, ...]
    layers: tuple[StockLayer, ...]
    error_bound: float
    iterations: int
    status: Stop
    discount: float
    resolution: float

    def action(self, step: int, state: int, stock: Float[Tensor, "*rewards"] | float) -> int:
        """Return what the policy does.

        Args:
            step: Steps taken since the start.
            state: The present state.
            stock: The present stock.

        Raises:
            ValueError: If this state and stock are not reached at this step.
        """
        if not 0 <= step < len(self.layers):
            raise ValueError(f"step must lie in [0, {len(self.layers) - 1}], got {step}")
        layer = self.layers[step]
        # In units of the first step: the stock itself grows with the step, and its rounding with it.
        away = (layer.stock - torch.as_tensor(stock).to(layer.stock)).abs() * self.discount**step
        away = away.reshape(len(away), -1).amax(1).masked_fill(layer.state != state, math.inf)
        nearest = int(away.argmin())
        if not float(away[nearest]) <= 4 * self.resolution:
            raise ValueError(
                f"state {state} with stock {stock} is not reached at step {step} from the starts solved for"
            )
        return int(layer.action[nearest])


@dataclasses.dataclass(frozen=True)
class FirstStock:
    """What a search for the first stock found.

    Args:
        value: The tail mean or quantile of the policy's return.
        stock: The first stock to act from. It is never chosen anew within an episode.
        solution: The policy, solved for from this stock.
        gap: How far ``value`` is from the optimum at most, rounding aside.
        iterations: Rounds of the search.
        evaluations: First stocks solved for.
        status: Why it stopped.
    """

    value: float
    stock: float
    solution: StockSolution
    gap: float
    iterations: int
    evaluations: int
    status: Stop


class StockMDP:
    r"""A finite Markov decision process whose states carry a stock, known in full.

    A state that stays where it is without reward under every action is an end.

    Args:
        transition: Probabilities of the next state, ``(states, actions, states)``.
        reward: Of each transition, ``(states, actions, states)``; vectors are ``(states, actions, states, rewards)``.
        discount: :math:`\gamma`, in (0, 1].
        max_nodes: Most augmented states at any one step: beyond, a solver raises rather than fill the memory. Rewards
            on a grid, such as integers with discount 1, keep them few.

    Raises:
        TypeError: If a tensor is not of a floating-point dtype.
        ValueError: If shapes do not fit, rows are no probabilities, a reward is not finite, or the discount lies
            outside (0, 1].

    Example:
        >>> # From state 0, one unit for sure, or three or nothing; then the same again; then the end.
        >>> transition = torch.zeros(5, 2, 5)
        >>> reward = torch.zeros(5, 2, 5)
        >>> for first, sure, lucky in ((0, 1, 2), (1, 3, 4), (2, 3, 4)):
        ...     transition[first, 0, sure], reward[first, 0, sure] = 1.0, 1.0
        ...     transition[first, 1, sure], transition[first, 1, lucky], reward[first, 1, lucky] = 0.5, 0.5, 3.0
        >>> transition[3:, :, 3:] = torch.eye(2)[:, None]
        >>> mdp = StockMDP(transition, reward, discount=1.0)
        >>> best = mdp.value_iteration(ExpectedUtility.target(), torch.tensor([0]), torch.tensor([-4.0]))
        >>> best.value, best.status  # gamble, then take one unit if it was won, else gamble again
        (tensor([-1.2500]), <Stop.CONVERGED: 'converged'>)
        >>> best.action(0, 0, -4.0), best.action(1, 2, -1.0), best.action(1, 1, -4.0)
        (1, 0, 1)
        >>> mdp.best_cvar(0, tau=0.5).value
        2.0

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028, sections 3 to 5.
    """

    def __init__(
        self,
        transition: Float[Tensor, "states actions states"],
        reward: Float[Tensor, "states actions states *rewards"],
        *,
        discount: float,
        max_nodes: int = 1_000_000,
    ) -> None:
        for value, name in ((transition, "transition"), (reward, "reward")):
            checks.floating(value, name)
            checks.not_empty(value, name)
            checks.finite(value, name)
        if transition.dim() != 3 or transition.shape[0] != transition.shape[2]:
            raise ValueError(f"transition must have shape (states, actions, states), got {tuple(transition.shape)}")
        if reward.shape[:3] != transition.shape or reward.dim() > 4:
            raise ValueError(
                f"reward must have shape {tuple(transition.shape)}, or with the entries of a vector behind, "
                f"got {tuple(reward.shape)}"
            )
        check_discount(discount)
        checks.positive(max_nodes, "max_nodes")
        slack = rounding_slack(transition)
        checks.require(
            (transition >= 0).all() & ((transition.sum(-1) - 1).abs() <= slack).all(),
            lambda: "transition must hold probabilities that add up to 1 over the next states",
        )
        self.transition = transition.detach()
        self.reward = reward.detach().to(transition)
        self.discount = float(discount)
        self.max_nodes = int(max_nodes)
        self.num_rewards = reward.shape[3] if reward.dim() == 4 else None
        entries = self.reward.reshape(*transition.shape, -1)
        states = torch.arange(len(transition), device=transition.device)
        possible = transition > 0
        unpaid = ~(possible[..., None] & (entries != 0)).flatten(1).any(1)
        stays = (transition[states, :, states] > 0).all(1) & (possible.sum(-1) == 1).all(1)
        self.ends = stays & unpaid
        self._edges = Edges.of(self.transition, entries)
        self._largest = float(torch.linalg.vector_norm(self._edges.reward, dim=1).max())

    def value_iteration(
        self,
        utility: ExpectedUtility,
        state: Int[Tensor, " starts"],
        stock: Float[Tensor, "starts *rewards"],
        *,
        horizon: int | None = None,
        tolerance: float = 1e-6,
        max_iter: int = 10_000,
        max_seconds: float | None = None,
    ) -> StockSolution:
        r"""Sweep :math:`\eta_{k+1} = T_{\pi_k} \eta_k` with greedy :math:`\pi_k`, from the law that pays nothing.

        As many sweeps as there are steps are exact. After fewer, k, the value is the optimum of the first k steps, so
        it errs by no more than :math:`L R_{\max} (\gamma^k + \gamma^{k+1} + \dots)`.

        Args:
            utility: The objective of the stock plus the return.
            state: First states.
            stock: First stocks.
            horizon: Steps until the process is stopped; None to go on to its end, or, if it has none, until what is
                still to come is worth no more than ``tolerance``.
            tolerance: See ``horizon``; it plays no other part.
            max_iter: Most sweeps.
            max_seconds: Most seconds; None for no limit.

        Returns:
            Values, laws, policy, and why the sweeps stopped.

        Raises:
            ValueError: If the objective is one that dynamic programming does not optimise here, with the reason.
        """
        budget = Budget(max_iter, max_seconds)
        tree, tail = self._unroll(utility, state, stock, horizon, tolerance)
        sweeps = 0
        laws = [NodeLaws.nothing(layer) for layer in tree.layers]
        actions = [torch.zeros_like(layer.state) for layer in tree.layers]
        status = None
        while sweeps < tree.steps and (status := budget.spent(sweeps)) is None:
            # Upwards in place: each law is made of one of the sweep before. The last layers are final already.
            for step in range(tree.steps - sweeps):
                outlook = tree.outlook(step, laws[step + 1], utility)
                actions[step] = greedy(outlook.quality)
                laws[step] = tree.follow(step, outlook, actions[step])
            sweeps += 1
        missing = sum(self.discount**step for step in range(sweeps, tree.steps)) * self._largest
        bound = tail + (utility.lipschitz * missing if missing else 0.0)
        return _solution(tree, utility, laws, actions, bound, sweeps, status or Stop.CONVERGED)

    def policy_iteration(
        self,
        utility: ExpectedUtility,
        state: Int[Tensor, " starts"],
        stock: Float[Tensor, "starts *rewards"],
        *,
        horizon: int | None = None,
        tolerance: float = 1e-6,
        max_iter: int = 10_000,
        max_seconds: float | None = None,
    ) -> StockSolution:
        """Evaluate the policy exactly, make it greedy, and so on until no action is better than its own.

        The first policy takes action 0. Each improvement makes one more step from the end optimal, so there are no more
        improvements than steps, and usually far fewer.

        Args:
            utility: The objective of the stock plus the return.
            state: First states.
            stock: First stocks.
            horizon: As in :meth:`value_iteration`.
            tolerance: As in :meth:`value_iteration`.
            max_iter: Most improvements.
            max_seconds: Most seconds; None for no limit.

        Returns:
            Values, laws, policy, and why the improvements stopped. Short of convergence the policy is the last one, its
            laws are its own, and its distance from the optimum is not known.

        Raises:
            ValueError: If the objective is one that dynamic programming does not optimise here, with the reason.
        """
        budget = Budget(max_iter, max_seconds)
        tree, tail = self._unroll(utility, state, stock, horizon, tolerance)
        actions = [torch.zeros_like(layer.state) for layer in tree.layers]
        improvements = 0
        while (status := budget.spent(improvements)) is None:
            laws, better = _evaluate(tree, utility, actions)
            if all(torch.equal(old, new) for old, new in zip(actions, better, strict=True)):
                status = Stop.CONVERGED
                break
            actions = better
            improvements += 1
        if status is not Stop.CONVERGED:
            laws, _ = _evaluate(tree, utility, actions)
        bound = tail if status is Stop.CONVERGED else math.inf
        return _solution(tree, utility, laws, actions, bound, improvements, status)

    def solve(
        self,
        utility: ExpectedUtility,
        state: Int[Tensor, " starts"],
        stock: Float[Tensor, "starts *rewards"],
        *,
        horizon: int | None = None,
        tolerance: float = 1e-6,
    ) -> StockSolution:
        """Go once from the last step to the first: the fixed point of both iterations, at the cost of one evaluation.

        Args:
            utility: The objective of the stock plus the return.
            state: First states.
            stock: First stocks.
            horizon: As in :meth:`value_iteration`.
            tolerance: As in :meth:`value_iteration`.

        Returns:
            Values, laws and policy.

        Raises:
            ValueError: If the objective is one that dynamic programming does not optimise here, with the reason.
        """
        tree, tail = self._unroll(utility, state, stock, horizon, tolerance)
        return _backward(tree, utility, tail)

    def evaluate(
        self,
        policy: Callable[[int, Tensor, Tensor], Tensor],
        utility: ExpectedUtility,
        state: Int[Tensor, " starts"],
        stock: Float[Tensor, "starts *rewards"],
        *,
        horizon: int | None = None,
        tolerance: float = 1e-6,
    ) -> StockSolution:
        """Compute the exact laws of the return under a policy, such as a trained agent.

        Args:
            policy: ``(step, states, stocks) -> actions`` for ``(nodes,)`` states at that step, with their stocks.
            utility: What is reported as the value.
            state: First states.
            stock: First stocks.
            horizon: As in :meth:`value_iteration`.
            tolerance: As in :meth:`value_iteration`.

        Returns:
            Values, laws and the policy as layers; how far it is from the optimum is not known.

        Raises:
            ValueError: If the policy's actions are none, or the objective is refused as in :meth:`value_iteration`.
        """
        tree, _ = self._unroll(utility, state, stock, horizon, tolerance)
        actions = []
        for step, layer in enumerate(tree.layers):
            action = torch.zeros_like(layer.state)
            if not bool(layer.stopped.all()):
                action = policy(step, layer.state, tree.shown(layer.stock)).to(layer.state)
            if action.shape != layer.state.shape or not bool(((action >= 0) & (action < tree.num_actions)).all()):
                raise ValueError(
                    f"policy must return an action in [0, {tree.num_actions - 1}] for each of {len(layer.state)} "
                    f"states at step {step}, got shape {tuple(action.shape)}"
                )
            actions.append(action)
        laws, _ = _evaluate(tree, utility, actions)
        return _solution(tree, utility, laws, actions, math.inf, 1, Stop.CONVERGED)

    def best_cvar(
        self,
        state: int,
        *,
        tau: float,
        horizon: int | None = None,
        tolerance: float = 1e-6,
        max_iter: int = 10_000,
        max_seconds: float | None = None,
    ) -> FirstStock:
        r"""Find the policy whose return has the highest mean over its worst share, by a search for the first stock.

        .. math:: \max_\pi \mathrm{CVaR}_\tau(G^\pi) = \max_b\; h(b), \qquad
                  h(b) = b + \tfrac{1}{\tau} \max_\pi E \min(G^\pi - b, 0),

        where the stock starts at -b. Between two returns that are possible h is convex, as a maximum of linear
        functions, so its maximum is at a possible return. It rises by at most 1 and falls by at most
        :math:`1/\tau - 1` a unit: ranges that this shows to hold nothing better are left out, the others halved.

        Args:
            state: The first state.
            tau: The share, in (0, 1]; 1 is the mean.
            horizon: As in :meth:`value_iteration`.
            tolerance: The error allowed in the value.
            max_iter: Most rounds of halving.
            max_seconds: Most seconds; None for no limit.

        Returns:
            The tail mean, the stock to start with, and the policy from there.

        Raises:
            ValueError: If tau lies outside (0, 1], rewards are vectors, or the process neither ends nor discounts.
        """
        checks.between(tau, "tau", 0, 1, low_open=True)
        checks.non_negative(tolerance, "tolerance")
        budget = Budget(max_iter, max_seconds)
        utility, start = ExpectedUtility.lower_tail(), self._start(state)
        # Half of the tolerance is for what comes after the last step looked at, half for the search.
        tree, tail = self._unroll(utility, start, self._zero(), horizon, tolerance * tau / 2)
        levels = tree.totals()
        # Stocks shift the tree of one start and leave its size: so many can be solved for together.
        together = max(self.max_nodes // tree.widest, 1)

        def heights(places: Tensor) -> Tensor:
            solved = [self._shifted(utility, start, -levels[some], tree, 0.0).value for some in places.split(together)]
            return levels[places] + torch.cat(solved) / tau

        left, right = torch.zeros(1, dtype=torch.long, device=levels.device), torch.tensor([len(levels) - 1]).to(start)
        low, high = heights(left), heights(right)
        place, best = (left[0], low[0]) if low[0] >= high[0] else (right[0], high[0])
        evaluations, rounds, fall = 2, 0, 1 / tau - 1
        left_out = best
        while True:
            ceiling = low + (high - low + fall * (levels[right] - levels[left])) / (1 + fall)
            live = (right - left > 1) & (ceiling > best + tolerance / 2)
            left_out = torch.cat([left_out[None], ceiling[~live & (right - left > 1)]]).max()
            if not bool(live.any()):
                status = Stop.CONVERGED
                break
            if (spent := budget.spent(rounds)) is not None:
                status = spent
                left_out = left_out.maximum(ceiling[live].max())
                break
            left, right, low, high = left[live], right[live], low[live], high[live]
            middle = (left + right) // 2
            height = heights(middle)
            if height.max() > best:
                place, best = middle[height.argmax()], height.max()
            left, right = torch.cat([left, middle]), torch.cat([middle, right])
            low, high = torch.cat([low, height]), torch.cat([height, high])
            evaluations, rounds = evaluations + len(middle), rounds + 1
        solution = self._shifted(utility, start, -levels[place][None], tree, tail)
        return FirstStock(
            value=float(solution.laws[0].cvar(tau)),
            stock=-float(levels[place]),
            solution=solution,
            gap=max(float(left_out - best), 0.0) + tail / tau,
            iterations=rounds,
            evaluations=evaluations,
            status=status,
        )

    def best_quantile(
        self,
        state: int,
        *,
        tau: float,
        horizon: int | None = None,
        max_iter: int = 10_000,
        max_seconds: float | None = None,
    ) -> FirstStock:
        r"""Find the policy whose return has the highest quantile, by bisection over the first stock.

        The highest upper quantile is the largest g with :math:`\max_\pi P(G^\pi \ge g) \ge 1 - \tau`, and that maximum
        falls with g.

        Args:
            state: The first state.
            tau: The level, in [0, 1); 0 is the worst case.
            horizon: Steps until the process is stopped; None to go on to its end.
            max_iter: Most bisections.
            max_seconds: Most seconds; None for no limit.

        Returns:
            The quantile, the stock to start with, and the policy from there.

        Raises:
            ValueError: If tau lies outside [0, 1), rewards are vectors, or the process does not end and has no horizon.
        """
        checks.between(tau, "tau", 0, 1, high_open=True)
        budget = Budget(max_iter, max_seconds)
        utility, start = ExpectedUtility.at_least(), self._start(state)
        tree, _ = self._unroll(utility, start, self._zero(), horizon, 0.0)
        levels = tree.totals()
        # Thresholds between two possible returns ask the same of them and leave room for rounding.
        thresholds = torch.cat([levels[:1] - 1, (levels[1:] + levels[:-1]) / 2])
        low, high, rounds = 0, len(levels), 0
        status = None
        while high - low > 1 and (status := budget.spent(rounds)) is None:
            middle = (low + high) // 2
            reached = self._shifted(utility, start, -thresholds[middle][None], tree, 0.0).value[0]
            if reached >= 1 - tau - rounding_slack(reached):
                low = middle
            else:
                high = middle
            rounds += 1
        solution = self._shifted(utility, start, -thresholds[low][None], tree, 0.0)
        value = float(solution.laws[0].quantile(tau))
        return FirstStock(
            value=value,
            stock=-float(thresholds[low]),
            solution=solution,
            gap=float(levels[high - 1] - levels[low]),
            iterations=rounds,
            evaluations=rounds + 1,
            status=status or Stop.CONVERGED,
        )

    def _start(self, state: int) -> Tensor:
        if self.num_rewards is not None:
            raise ValueError(f"tails are of returns that are numbers, got rewards of {self.num_rewards} entries")
        return torch.tensor([state], device=self.transition.device)

    def _zero(self) -> Tensor:
        return self.transition.new_zeros(1)

    def _steps_to_the_end(self, state: Tensor) -> int | None:
        """Return the most steps from these states to an end, or None if there are runs without end."""
        follows = (self.transition > 0).any(1)
        running = torch.zeros_like(self.ends)
        running[state] = True
        for step in range(len(running) + 1):
            running = running & ~self.ends
            if not bool(running.any()):
                return step
            running = follows[running].any(0)
        return None

    def _unroll(
        self, utility: ExpectedUtility, state: Tensor, stock: Tensor, horizon: int | None, tolerance: float
    ) -> tuple[StockTree, float]:
        """Check starts and objective, then list the augmented states of every step, and bound what comes after."""
        if not isinstance(utility, ExpectedUtility):
            raise TypeError(
                "utility must be an ExpectedUtility: other objectives, such as a variance, a quantile or a tail mean "
                "taken as it is, are not indifferent to mixtures, so that a greedy step on them need not improve them, "
                f"got {type(utility).__name__}"
            )
        checks.floating(stock, "stock")
        checks.finite(stock, "stock")
        checks.tensor(state, "state")
        checks.non_negative(tolerance, "tolerance")
        entries = () if self.num_rewards is None else (self.num_rewards,)
        if state.dim() != 1 or not len(state) or state.is_floating_point():
            raise ValueError(
                f"state must hold the indices of first states, got shape {tuple(state.shape)}, {state.dtype}"
            )
        if tuple(stock.shape) != (len(state), *entries):
            raise ValueError(
                f"stock must have shape {(len(state), *entries)}, that of rewards, got {tuple(stock.shape)}"
            )
        checks.require(
            (state >= 0) & (state < len(self.transition)),
            lambda: f"state must lie in [0, {len(self.transition) - 1}], got {state.tolist()}",
        )
        if horizon is not None and (isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 0):
            raise ValueError(f"horizon must be an integer of at least 0 or None, got {horizon!r}")
        steps, tail = self._steps(utility, state, horizon, tolerance)
        stock = stock.to(self.transition).reshape(len(state), -1)
        paid = self._largest * sum(self.discount**step for step in range(steps))
        scale = float(torch.linalg.vector_norm(stock, dim=1).max()) + paid
        # What is left at the last step is scaled by the discount as often as there were steps.
        reason = utility.refusal(
            discount=self.discount, scale=(scale or 1.0) * self.discount**-steps, rewards=self.num_rewards
        )
        if reason is not None:
            raise ValueError(f"utility cannot be optimised here: {reason}")
        return self._grow(state, stock, steps, scale), tail

    def _steps(
        self, utility: ExpectedUtility, state: Tensor, horizon: int | None, tolerance: float
    ) -> tuple[int, float]:
        """Return how many steps to look at, and what those after may be worth."""
        natural = self._steps_to_the_end(state)
        if natural is not None:
            return (natural if horizon is None else min(natural, horizon)), 0.0
        if horizon is not None:
            return horizon, 0.0
        if self.discount == 1:
            raise ValueError("horizon must be given: the process does not end, and discount is 1")
        if not math.isfinite(utility.lipschitz):
            raise ValueError(
                f"utility cannot be optimised here: {utility.name} has no Lipschitz constant and the process does not "
                "end, so that no finite number of steps comes close; give a horizon, or a Lipschitz utility"
            )
        rest = utility.lipschitz * self._largest / (1 - self.discount)
        checks.positive(tolerance, "tolerance of a process that does not end")
        steps = max(math.ceil(math.log(tolerance / rest) / math.log(self.discount)), 0) if rest else 0
        return steps, rest * self.discount**steps

    def _grow(self, state: Tensor, stock: Tensor, steps: int, scale: float) -> StockTree:
        return StockTree.grow(
            self._edges,
            self.ends,
            state,
            stock,
            steps=steps,
            discount=self.discount,
            resolution=1024 * torch.finfo(stock.dtype).eps * (scale or 1.0),
            max_nodes=self.max_nodes,
            vectors=self.num_rewards is not None,
        )

    def _shifted(
        self, utility: ExpectedUtility, state: Tensor, stock: Tensor, tree: StockTree, tail: float
    ) -> StockSolution:
        """Solve from other first stocks, with as many steps as a tree that was checked."""
        scale = float(stock.abs().max()) + self._largest * sum(self.discount**step for step in range(tree.steps))
        return _backward(self._grow(state.expand(len(stock)), stock[:, None], tree.steps, scale), utility, tail)


def _backward(tree: StockTree, utility: ExpectedUtility, tail: float) -> StockSolution:
    laws, actions = [NodeLaws.nothing(tree.layers[-1])], [torch.zeros_like(tree.layers[-1].state)]
    for step in reversed(range(tree.steps)):
        outlook = tree.outlook(step, laws[0], utility)
        actions.insert(0, greedy(outlook.quality))
        laws.insert(0, tree.follow(step, outlook, actions[0]))
    return _solution(tree, utility, laws, actions, tail, 1, Stop.CONVERGED)


def _evaluate(tree: StockTree, utility: ExpectedUtility, actions: list[Tensor]) -> tuple[list[NodeLaws], list[Tensor]]:
    """Compute a policy's laws, and the policy that is greedy on them but keeps to actions that are as good."""
    laws, better = [NodeLaws.nothing(tree.layers[-1])], [actions[-1]]
    for step in reversed(range(tree.steps)):
        outlook = tree.outlook(step, laws[0], utility)
        better.insert(0, greedy(outlook.quality, actions[step]))
        laws.insert(0, tree.follow(step, outlook, actions[step]))
    return laws, better


def _solution(
    tree: StockTree,
    utility: ExpectedUtility,
    laws: list[NodeLaws],
    actions: list[Tensor],
    bound: float,
    iterations: int,
    status: Stop,
) -> StockSolution:
    layers = tuple(
        StockLayer(layer.state, tree.shown(layer.stock), action, tree.value(step, law, utility))
        for step, (layer, law, action) in enumerate(zip(tree.layers, laws, actions, strict=True))
    )
    counts = laws[0].counts.tolist()
    atoms, weights = tree.shown(laws[0].atoms).split(counts), laws[0].weights.split(counts)
    return StockSolution(
        value=layers[0].value[tree.starts],
        laws=tuple(ReturnLaw(atoms[node], weights[node]) for node in tree.starts.tolist()),
        layers=layers,
        error_bound=bound,
        iterations=iterations,
        status=status,
        discount=tree.discount,
        resolution=tree.resolution,
    )
