r"""Clone an expert under a hard bound on the policy's Lipschitz constant, and say what the loop will do.

From states :math:`x_i` and expert controls :math:`u_i` the policy is fitted by

.. math:: \min_v \tfrac1N\sum_i \|v_i - u_i\|^2 \quad\text{subject to}\quad
          \|v_i - v_j\| \le \alpha\,\|x_i - x_j\| \text{ for all pairs},

which has the value of the problem over all :math:`\alpha`-Lipschitz functions (Kirszbraun). With multipliers
:math:`\Lambda_{ij}` and weights :math:`w_{ij} = \Lambda_{ij}/\|x_i - x_j\|^2` the solution is the labels smoothed by a
graph Laplacian where the bound binds, :math:`(I + N\Delta_w)\,v = u`. A primal-dual interior-point method finds it:
every iterate is feasible, and the duality gap certifies how far it is from the best. Between the data the policy is
McShane's midpoint, :math:`\tfrac12[\min_i(v_i + \alpha\|x - x_i\|) + \max_i(v_i - \alpha\|x - x_i\|)]`.

The bound is one knob for smoothing, extrapolation and robustness: a measurement that is wrong by :math:`\delta` moves
the control by at most :math:`\alpha\delta`, and a contracting plant by what :func:`closed_loop_bounds` says.

Source: Al Makdah, Krishnan and Pasqualetti, "Learning Lipschitz Feedback Policies from Expert Demonstrations", 2021,
arXiv 2103.16629; saddle point and Laplacian: Krishnan, Al Makdah and Pasqualetti, NeurIPS 2020, arXiv 2006.03712;
extension: McShane, Bulletin of the AMS 40, 1934. The bounds' constants are derived here; the paper's may differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..stopping import Budget, Stop

_MOST_UNKNOWNS = 5_000
_MOST_PAIRS = 5_000_000
_MOST_HALVINGS = 50


@dataclasses.dataclass(frozen=True)
class LipschitzFit:
    """What :func:`lipschitz_regression` found.

    Args:
        values: v, ``(states, controls)``: feasible for every pair of ``edges``.
        edges: Pairs whose slopes are bounded, ``(2, pairs)``.
        multipliers: Lambda of each pair, ``(pairs,)``; above 0 where the bound binds.
        gap: Certified distance of the mean squared error from its optimum, over the variance of the controls.
        error: The mean squared error of ``values``.
        iterations: Newton steps.
        status: Why it stopped.
    """

    values: Tensor
    edges: Tensor
    multipliers: Tensor
    gap: float
    error: float
    iterations: int
    status: Stop


def lipschitz_regression(
    inputs: Float[Tensor, "states dims"],
    target: Float[Tensor, "states controls"],
    *,
    lipschitz: float,
    neighbors: int | None = None,
    weights: Float[Tensor, "states"] | None = None,
    tolerance: float = 1e-6,
    max_iter: int = 200,
    max_seconds: float | None = None,
) -> LipschitzFit:
    r"""Fit values to states by least squares, no two of them further apart than ``lipschitz`` times their states.

    Args:
        inputs: States, all different.
        target: Controls.
        lipschitz: The paper's alpha, above 0.
        neighbors: Bound the slopes to this many nearest states only: a graph of stretch s certifies s alpha between
            far states. None bounds all pairs, which is exact.
        weights: How often each state was seen; 1 if None.
        tolerance: Stop when the duality gap is below this share of the controls' variance.
        max_iter: Most iterations.
        max_seconds: Most seconds; None for no limit.

    Returns:
        A :class:`LipschitzFit`; its values are feasible whatever its status.

    Raises:
        ValueError: If data are not finite, states coincide, or there are too few or too many.

    Example:
        >>> x, u = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
        >>> fit = lipschitz_regression(x, u, lipschitz=1.0)
        >>> fit.values.flatten(), fit.status
        (tensor([1.0000, 2.0000]), <Stop.CONVERGED: 'converged'>)

    Source:
        Al Makdah et al. 2021, arXiv 2103.16629, the learning problem; Boyd and Vandenberghe, "Convex Optimization",
        2004, section 11.7, and Mehrotra, SIAM Journal on Optimization 2, 1992, for the solver.
    """
    budget = Budget(max_iter, max_seconds)
    checks.positive(lipschitz, "lipschitz")
    checks.positive(tolerance, "tolerance")
    _check_pairs(inputs, target)
    # The slack of a bound that binds is a small difference: single precision would drown it.
    x, u = inputs.double(), target.double()
    share = torch.full_like(x[:, 0], 1 / len(x)) if weights is None else weights.double() / weights.double().sum()
    edges = _edges(x, neighbors)
    first, second = edges
    squared = (x[first] - x[second]).square().sum(1)
    if not bool((squared > 0).all()):
        raise ValueError("inputs holds a state more than once: average its controls, as LipschitzRegressor.fit does")
    reach = lipschitz**2 * squared
    center = share @ u
    spread = float(share @ (u - center).square().sum(1))

    def found(values: Tensor, multipliers: Tensor, gap: float, iteration: int, status: Stop) -> LipschitzFit:
        error = float(share @ (values - u).square().sum(1))
        return LipschitzFit(
            values.to(target.dtype), edges, (multipliers * squared).to(target.dtype),
            gap / spread if spread > 0 else 0.0, error, iteration, status,
        )  # fmt: skip

    def bounds(values: Tensor) -> Tensor:
        return (values[first] - values[second]).square().sum(1) - reach

    if bool((bounds(u) <= 0).all()):
        return found(u, torch.zeros_like(reach), 0.0, 0, Stop.CONVERGED)
    solve = _PrimalDual(u, share, edges, bounds)
    values = center.expand_as(u).clone()  # strictly inside: no two values differ
    multipliers = spread / (len(reach) * reach)
    gap, iteration = math.inf, 0
    while True:
        gap = min(gap, solve.gap(values, multipliers))
        if gap <= tolerance * spread:
            return found(values, multipliers, gap, iteration, Stop.CONVERGED)
        status = budget.spent(iteration)
        if status is not None:
            return found(values, multipliers, gap, iteration, status)
        moved = solve.step(values, multipliers)
        if moved is None:
            return found(values, multipliers, gap, iteration, Stop.STALLED)
        values, multipliers = moved
        iteration += 1


class _PrimalDual:
    r"""Newton steps on the conditions of Karush, Kuhn and Tucker, every pair's slackness eased to a common value t.

    With :math:`g_e = \|v_i - v_j\|^2 - \alpha^2\|x_i - x_j\|^2` and multipliers :math:`\lambda_e`, the step solves
    :math:`H\,dv = -\nabla f - \sum_e \frac{t}{-g_e}\nabla g_e` where H is the Lagrangian's Hessian plus
    :math:`\sum_e \frac{\lambda_e}{-g_e} \nabla g_e \nabla g_e^T`: graph Laplacians with blocks of controls. How far t
    may fall, and the second-order term of each pair, come from Mehrotra's predictor on the same factor.
    """

    def __init__(self, u: Tensor, share: Tensor, edges: Tensor, bounds: Callable[[Tensor], Tensor]) -> None:
        self.u, self.share, self.edges, self.bounds = u, share, edges, bounds
        self.first, self.second = edges

    def gap(self, values: Tensor, multipliers: Tensor) -> float:
        """Return the objective at feasible ``values`` less the least value of the Lagrangian, a bound from below."""
        system = torch.diag(self.share) + _laplacian(self.edges, multipliers, len(self.u))
        pulled = self.share[:, None] * self.u
        smoothed = torch.cholesky_solve(pulled, torch.linalg.cholesky(system))
        bound = self._error(smoothed) + multipliers @ self.bounds(smoothed)
        return float(self._error(values) - bound)

    def step(self, values: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the next values, strictly feasible, and multipliers above 0; None if rounding leaves no step."""
        slack = -self.bounds(values)
        difference = values[self.first] - values[self.second]
        factor, failed = torch.linalg.cholesky_ex(self._hessian(multipliers, slack, difference))
        if int(failed) > 0:
            return None
        slope = 2 * self.share[:, None] * (values - self.u)

        def direction(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return moves that aim at ``multipliers * slack = target``, and the linear fall of the slack."""
            force = self._gathered(2 * (target / slack)[:, None] * difference)
            move = torch.cholesky_solve(-(slope + force).reshape(-1, 1), factor).view_as(values)
            fall = 2 * (difference * (move[self.first] - move[self.second])).sum(1)
            return move, (multipliers * fall + target) / slack - multipliers, fall

        # Mehrotra: a step that ignores the slackness tells how much easing is needed, and the product it neglects.
        average = float(multipliers @ slack) / len(slack)
        move, climb, fall = direction(torch.zeros_like(slack))
        length = self._longest(values, multipliers, move, climb)
        left = float((multipliers + length * climb) @ -self.bounds(values + length * move)) / len(slack)
        ease = average * min(max((left / average) ** 3, 1e-4), 0.5)
        # Should that step help nowhere, a step that eases all slackness alike is safe.
        for target in (ease + climb * fall, torch.full_like(slack, 0.5 * average)):
            move, climb, _ = direction(target)
            length = 0.99 * self._longest(values, multipliers, move, climb)
            residual = self._residual(values, multipliers, ease)
            for _ in range(_MOST_HALVINGS):
                nearer, heavier = values + length * move, multipliers + length * climb
                if (
                    bool((self.bounds(nearer) < 0).all())
                    and self._residual(nearer, heavier, ease) <= (1 - 0.01 * length) * residual
                ):
                    return nearer, heavier
                length /= 2
        return None

    def _hessian(self, multipliers: Tensor, slack: Tensor, difference: Tensor) -> Tensor:
        count, controls = self.u.shape
        eye = torch.eye(controls, dtype=slack.dtype, device=slack.device)
        outer = difference[:, :, None] * difference[:, None, :]
        blocks = 4 * (multipliers / slack)[:, None, None] * outer + 2 * multipliers[:, None, None] * eye
        hessian = torch.zeros(count, controls, count, controls, dtype=slack.dtype, device=slack.device)
        hessian[self.first, :, self.second] = -blocks
        hessian[self.second, :, self.first] = -blocks
        own = torch.arange(count, device=slack.device)
        hessian[own, :, own] = 2 * self.share[:, None, None] * eye - hessian.sum(2)
        return hessian.view(count * controls, count * controls)

    def _longest(self, values: Tensor, multipliers: Tensor, move: Tensor, climb: Tensor) -> float:
        """Return the longest step, at most 1, that keeps every slack and multiplier at least 0."""
        down = torch.where(climb < 0, multipliers / -climb, torch.ones_like(climb)).min()
        # The slack falls as a quadratic: s - b t - a t^2, whose positive root in its stable form is 2 s / (b + root).
        way, difference = move[self.first] - move[self.second], values[self.first] - values[self.second]
        slack, fall, bend = -self.bounds(values), 2 * (way * difference).sum(1), way.square().sum(1)
        reach = 2 * slack / (fall + (fall.square() + 4 * bend * slack).sqrt()).clamp_min(1e-300)
        return min(1.0, float(down), float(reach.min()))

    def _error(self, values: Tensor) -> Tensor:
        return self.share @ (values - self.u).square().sum(1)

    def _gathered(self, flow: Tensor) -> Tensor:
        return torch.zeros_like(self.u).index_add_(0, self.first, flow).index_add_(0, self.second, -flow)

    def _residual(self, values: Tensor, multipliers: Tensor, ease: float) -> float:
        difference = values[self.first] - values[self.second]
        slope = 2 * self.share[:, None] * (values - self.u) + self._gathered(2 * multipliers[:, None] * difference)
        uneven = -multipliers * self.bounds(values) - ease
        return float(slope.square().sum() + uneven.square().sum()) ** 0.5


def mcshane_extension(
    queries: Float[Tensor, "*batch dims"],
    inputs: Float[Tensor, "states dims"],
    values: Float[Tensor, "states controls"],
    *,
    lipschitz: float,
) -> Float[Tensor, "*batch controls"]:
    r"""Extend values from states to anywhere, each component at the same Lipschitz constant.

    :math:`\tfrac12[\min_i(v_i + \alpha\|x - x_i\|) + \max_i(v_i - \alpha\|x - x_i\|)]`. It goes through every value
    that its neighbours allow, and each component is ``lipschitz``-Lipschitz whatever the values are; m components
    together are :math:`\sqrt m` times that.

    Args:
        queries: Where.
        inputs: States.
        values: Their values.
        lipschitz: alpha, above 0.

    Returns:
        The extension; differentiable in ``queries`` almost everywhere.

    Raises:
        ValueError: If something is not finite or the shapes do not match.

    Example:
        >>> x, v = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
        >>> mcshane_extension(torch.tensor([[0.5], [3.0]]), x, v, lipschitz=1.0).flatten()
        tensor([1.5000, 2.0000])

    Source:
        McShane, "Extension of range of functions", 1934; Whitney 1934.
    """
    checks.positive(lipschitz, "lipschitz")
    checks.finite(queries, "queries")
    checks.finite(values, "values")
    if queries.shape[-1] != inputs.shape[1]:
        raise ValueError(f"queries must have {inputs.shape[1]} dimensions, got {queries.shape[-1]}")
    flat = queries.reshape(-1, queries.shape[-1])
    # The matrix-product form of cdist loses half the digits, and interpolation with them.
    cone = lipschitz * torch.cdist(flat, inputs, compute_mode="donot_use_mm_for_euclid_dist")[..., None]
    upper, lower = (values + cone).amin(1), (values - cone).amax(1)
    return ((upper + lower) / 2).reshape(*queries.shape[:-1], values.shape[1])


class LipschitzRegressor(nn.Module):
    r"""A policy fitted under a hard bound on its Lipschitz constant.

    ``fit`` solves the finite problem to a certified gap; calling it evaluates McShane's midpoint. The states and
    values are buffers, so a fitted policy moves, copies and saves like any module.

    Args:
        lipschitz: The paper's alpha, above 0. Near the expert's own constant; much below it the policy is too weak
            for an unstable plant.
        neighbors: See :func:`lipschitz_regression`; None bounds all pairs.
        tolerance: Of the duality gap, over the variance of the controls.
        max_iter: Most iterations of ``fit``.
        max_seconds: Most seconds of ``fit``; None for no limit.

    Example:
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> policy = LipschitzRegressor(2.0).fit(x, torch.sin(3 * x))
        >>> policy(torch.tensor([[0.0], [0.5]])).shape, policy.lipschitz_constant
        (torch.Size([2, 1]), 2.0)

    Source:
        Al Makdah, Krishnan and Pasqualetti 2021, arXiv 2103.16629.
    """

    inputs: Tensor
    values: Tensor

    def __init__(
        self,
        lipschitz: float,
        *,
        neighbors: int | None = None,
        tolerance: float = 1e-6,
        max_iter: int = 200,
        max_seconds: float | None = None,
    ) -> None:
        super().__init__()
        checks.positive(lipschitz, "lipschitz")
        if neighbors is not None and neighbors < 1:
            raise ValueError(f"neighbors must be at least 1 or None, got {neighbors}")
        self.lipschitz, self.neighbors, self.tolerance = lipschitz, neighbors, tolerance
        self.max_iter, self.max_seconds = max_iter, max_seconds
        self.register_buffer("inputs", torch.zeros(0, 0))
        self.register_buffer("values", torch.zeros(0, 0))
        self.result: LipschitzFit | None = None

    def fit(self, inputs: Float[Tensor, "states dims"], target: Float[Tensor, "states controls"]) -> LipschitzRegressor:
        """Fit to demonstrations; the controls of a state that was seen more than once are averaged.

        Args:
            inputs: States.
            target: The expert's controls there.

        Returns:
            Itself; ``result`` holds the :class:`LipschitzFit`.

        Raises:
            ValueError: If data are not finite, or there are fewer than two different states.
        """
        _check_pairs(inputs, target, distinct=False)
        states, place, counts = inputs.unique(dim=0, return_inverse=True, return_counts=True)
        if len(states) < 2:
            raise ValueError("inputs holds fewer than two different states")
        weights = counts.to(target.dtype)
        mean = torch.zeros(len(states), target.shape[1], dtype=target.dtype, device=target.device)
        mean.index_add_(0, place, target).div_(weights[:, None])
        self.result = lipschitz_regression(
            states, mean, lipschitz=self.lipschitz, neighbors=self.neighbors, weights=weights,
            tolerance=self.tolerance, max_iter=self.max_iter, max_seconds=self.max_seconds,
        )  # fmt: skip
        self.inputs, self.values = states, self.result.values
        return self

    @property
    def lipschitz_constant(self) -> float:
        """A bound on the Lipschitz constant of the policy as it is evaluated: alpha times the root of the controls."""
        self._require_fit()
        return self.lipschitz * math.sqrt(self.values.shape[1])

    def forward(self, states: Float[Tensor, "*batch dims"]) -> Float[Tensor, "*batch controls"]:
        """Return the controls at any states."""
        self._require_fit()
        return mcshane_extension(states, self.inputs, self.values, lipschitz=self.lipschitz)

    def _require_fit(self) -> None:
        if self.values.numel() == 0:
            raise RuntimeError("this LipschitzRegressor is not fitted yet: call fit(states, controls) first")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        # The buffers' sizes are the data's: an unfitted policy takes those of the checkpoint.
        for name in ("inputs", "values"):
            if prefix + name in state_dict:
                saved = state_dict[prefix + name]
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def slope_violation(
    output: Float[Tensor, "batch controls"], input: Float[Tensor, "batch dims"], *, lipschitz: float
) -> Float[Tensor, ""]:
    r"""Compute by how much the steepest pair of a batch exceeds a Lipschitz bound, for a network of one's own.

    :math:`\max_{i<j} \|y_i - y_j\| / \|x_i - x_j\| - \alpha`: what a :class:`Multiplier` may hold at zero. It bounds
    the slopes that were seen, not the network's constant: for a certificate constrain the weights.

    Args:
        output: The network's outputs.
        input: Its inputs; pairs that coincide are left out.
        lipschitz: alpha, above 0.

    Returns:
        The violation, at least ``-lipschitz``; differentiable.

    Raises:
        ValueError: If something is not finite or the batch has fewer than two examples.

    Example:
        >>> slope_violation(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [1.0]]), lipschitz=2.0)
        tensor(1.)

    Source:
        Krishnan, Al Makdah and Pasqualetti, NeurIPS 2020, arXiv 2006.03712, the constraint on the edges of a graph.
    """
    checks.positive(lipschitz, "lipschitz")
    checks.finite(output, "output")
    checks.finite(input, "input")
    if len(output) < 2 or len(input) != len(output):
        raise ValueError(
            f"input and output must hold the same examples, at least 2, got {len(input)} and {len(output)}"
        )
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    run = (input[first] - input[second]).square().sum(1)
    rise = (output[first] - output[second]).square().sum(1)
    slope = torch.where(run > 0, rise / run.where(run > 0, torch.ones_like(run)), torch.zeros_like(rise))
    # The root only of the largest: at zero the root has no gradient, and there the maximum is not.
    largest = slope.max()
    return torch.where(largest > 0, largest.clamp_min(torch.finfo(slope.dtype).tiny).sqrt(), largest) - lipschitz


def fill_distance(inputs: Float[Tensor, "states dims"], points: Float[Tensor, "points dims"]) -> Float[Tensor, ""]:
    r"""Compute how far the furthest point is from its nearest state, :math:`\max_x \min_i \|x - x_i\|`.

    Args:
        inputs: States that were seen.
        points: Points that stand for the set, such as a fine grid; half the grid's diagonal is to be added for all.

    Returns:
        The distance.

    Raises:
        ValueError: If something is empty or not finite.

    Example:
        >>> fill_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.2], [0.5]]))
        tensor(0.5000)

    Source:
        Al Makdah et al. 2021, arXiv 2103.16629, the covering argument of the generalization bound.
    """
    for value, name in ((inputs, "inputs"), (points, "points")):
        checks.not_empty(value, name)
        checks.finite(value, name)
    return torch.cdist(points, inputs).amin(1).max()


def policy_error_bound(*, fit_error: float, lipschitz: float, expert_lipschitz: float, covering_radius: float) -> float:
    r"""Compute the largest distance of policy and expert, :math:`\varepsilon = e_N + (\alpha + l^*)\,r`.

    From any state go to the nearest demonstration: the policy changes by at most :math:`\alpha r`, the expert by
    :math:`l^* r`, and there they differ by at most :math:`e_N`.

    Args:
        fit_error: e_N, the largest distance of policy and expert at the demonstrated states.
        lipschitz: alpha, of the policy as it is evaluated.
        expert_lipschitz: l*, of the expert.
        covering_radius: r, the :func:`fill_distance` of the demonstrations in the set of states.

    Returns:
        eps, in units of the control.

    Raises:
        ValueError: If an argument is negative or not finite.

    Example:
        >>> policy_error_bound(fit_error=0.1, lipschitz=2.0, expert_lipschitz=3.0, covering_radius=0.1)
        0.6

    Source:
        Derived here for Al Makdah et al. 2021, arXiv 2103.16629, its generalization bound.
    """
    for value, name in (
        (fit_error, "fit_error"), (lipschitz, "lipschitz"), (expert_lipschitz, "expert_lipschitz"),
        (covering_radius, "covering_radius"),
    ):  # fmt: skip
        checks.non_negative(value, name)
    return fit_error + (lipschitz + expert_lipschitz) * covering_radius


def fill_failure_probability(*, num_samples: int, num_balls: int, ball_probability: float) -> float:
    r"""Compute the most probability that independent samples leave a gap of radius r: :math:`M (1 - p)^N`.

    If the set is covered by M balls of radius r / 2, each of probability at least p, a gap of radius r means that one
    of the balls was never hit.

    Args:
        num_samples: N, independent states. States of one trajectory are not independent.
        num_balls: M.
        ball_probability: p, in [0, 1].

    Returns:
        The bound, at most 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(fill_failure_probability(num_samples=100, num_balls=10, ball_probability=0.1), 5)
        0.00027

    Source:
        Union bound; Al Makdah et al. 2021, arXiv 2103.16629, its finite-sample statement.
    """
    if num_samples < 0 or num_balls < 1:
        raise ValueError(f"num_samples must be at least 0 and num_balls at least 1, got {num_samples} and {num_balls}")
    checks.between(ball_probability, "ball_probability", 0, 1)
    return min(1.0, num_balls * (1 - ball_probability) ** num_samples)


@dataclasses.dataclass(frozen=True)
class ClosedLoopBounds:
    """What :func:`closed_loop_bounds` promises of the loop.

    Args:
        state: Largest distance from the expert's undisturbed trajectory, from the same start.
        regret: Largest difference of the mean stage cost from the expert's.
        deterioration: The part of ``regret`` that the measurement errors cause.
    """

    state: float
    regret: float
    deterioration: float


def closed_loop_bounds(
    *,
    lipschitz: float,
    expert_lipschitz: float,
    input_gain: float,
    contraction: float,
    cost_lipschitz: float,
    policy_error: float,
    measurement_error: float = 0.0,
    horizon: int | None = None,
) -> ClosedLoopBounds:
    r"""Bound what a cloned policy does in closed loop, with every measurement wrong by up to a bound.

    The expert's loop contracts, :math:`\|f(x,\pi^*(x)) - f(y,\pi^*(y))\| \le \rho\|x - y\|`, and the plant answers to
    its input by at most L_u. Then

    .. math:: \|x_t - x_t^*\| \le L_u(\varepsilon + \alpha\delta)\frac{1-\rho^t}{1-\rho},

    and with a stage cost that is L_c-Lipschitz in state and control the mean costs differ by at most
    :math:`L_c[1 + (1 + l^*)L_u/(1-\rho)](\varepsilon + \alpha\delta)`. All norms of states are the one in which the
    loop contracts. The states must stay in the set that ``policy_error`` was computed for.

    Args:
        lipschitz: alpha, of the policy.
        expert_lipschitz: l*, of the expert.
        input_gain: L_u.
        contraction: rho, in [0, 1).
        cost_lipschitz: L_c.
        policy_error: eps, see :func:`policy_error_bound`.
        measurement_error: delta, the norm that a measurement's error may reach.
        horizon: t; None for all times.

    Returns:
        A :class:`ClosedLoopBounds`.

    Raises:
        ValueError: If ``contraction`` is not below 1: then there is no bound; or an argument is negative.

    Example:
        >>> found = closed_loop_bounds(lipschitz=2.0, expert_lipschitz=1.0, input_gain=0.5, contraction=0.5,
        ...     cost_lipschitz=1.0, policy_error=0.1, measurement_error=0.2)
        >>> round(found.state, 3), round(found.regret, 3), round(found.deterioration, 3)
        (0.5, 1.5, 1.2)

    Source:
        Derived here for Al Makdah et al. 2021, arXiv 2103.16629, its closed-loop and robustness statements.
    """
    for value, name in (
        (lipschitz, "lipschitz"), (expert_lipschitz, "expert_lipschitz"), (input_gain, "input_gain"),
        (cost_lipschitz, "cost_lipschitz"), (policy_error, "policy_error"), (measurement_error, "measurement_error"),
    ):  # fmt: skip
        checks.non_negative(value, name)
    checks.between(contraction, "contraction", 0, 1, high_open=True)
    steps = 1 / (1 - contraction) if horizon is None else (1 - contraction**horizon) / (1 - contraction)
    attack = lipschitz * measurement_error
    price = cost_lipschitz * (1 + (1 + expert_lipschitz) * input_gain / (1 - contraction))
    off = policy_error + attack
    return ClosedLoopBounds(input_gain * off * steps, price * off, price * attack)


def measurement_attack(
    policy: Callable[[Tensor], Tensor],
    plant: Callable[[Tensor, Tensor], Tensor],
    state: Float[Tensor, "batch dims"],
    *,
    radius: float,
    value: Callable[[Tensor], Tensor],
    directions: int = 16,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch dims"]:
    r"""Find the measurement error of a given norm that leads to the next state of most ``value``.

    A one-step adversary: among directions on the sphere, and no error, the one that maximises
    :math:`V(f(x, \pi(x + d)))`.

    Args:
        policy: States to controls.
        plant: ``(state, control) -> next state``.
        state: Where the loops are.
        radius: Norm of the error, at least 0.
        value: What the adversary maximises, ``(batch, dims) -> (batch,)``: such as the expert's cost to go.
        directions: How many are tried; in two dimensions they are even, in others drawn.
        generator: Draws them; None for torch's own.

    Returns:
        The error, to be added to the measurement.

    Raises:
        ValueError: If ``state`` is not finite, ``radius`` is negative or there is no direction.

    Example:
        >>> policy, plant = lambda x: -x, lambda x, u: 0.5 * x + 0.5 * u
        >>> measurement_attack(policy, plant, torch.tensor([[1.0, 0.0]]), radius=0.1, directions=4,
        ...     value=lambda x: x[:, 0]).round(decimals=3)
        tensor([[-0.1000, -0.0000]])

    Source:
        Al Makdah et al. 2021, arXiv 2103.16629, bounded adversarial errors of the measurement.
    """
    checks.finite(state, "state")
    checks.non_negative(radius, "radius")
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    batch, dims = state.shape
    if dims == 2:
        angle = torch.arange(directions, device=state.device, dtype=state.dtype) * (2 * math.pi / directions)
        way = torch.stack([angle.cos(), angle.sin()], 1)
    else:
        way = torch.randn(directions, dims, generator=generator, device=state.device, dtype=state.dtype)
        way = way / way.norm(dim=1, keepdim=True)
    errors = torch.cat([torch.zeros_like(way[:1]), radius * way])
    measured = (state[:, None] + errors).reshape(-1, dims)
    reached = plant(state.repeat_interleave(len(errors), 0), policy(measured))
    worst = value(reached).view(batch, len(errors)).argmax(1)
    return errors[worst]


def _edges(x: Tensor, neighbors: int | None) -> Int[Tensor, "2 pairs"]:
    count = len(x)
    if neighbors is None:
        if count * (count - 1) // 2 > _MOST_PAIRS:
            raise ValueError(f"{count} states have over {_MOST_PAIRS:,} pairs: set neighbors, for instance to 20")
        return torch.triu_indices(count, count, 1, device=x.device)
    if neighbors < 1:
        raise ValueError(f"neighbors must be at least 1 or None, got {neighbors}")
    near = torch.cdist(x, x).fill_diagonal_(math.inf).topk(min(neighbors, count - 1), largest=False).indices
    own = torch.arange(count, device=x.device)[:, None].expand_as(near)
    pairs = torch.stack([torch.minimum(own, near).flatten(), torch.maximum(own, near).flatten()])
    return pairs.unique(dim=1)


def _laplacian(edges: Tensor, weights: Tensor, count: int) -> Tensor:
    first, second = edges
    laplacian = torch.zeros(count, count, dtype=weights.dtype, device=weights.device)
    laplacian[first, second] = -weights
    laplacian[second, first] = -weights
    return laplacian - torch.diag(laplacian.sum(1))


def _check_pairs(inputs: Tensor, target: Tensor, *, distinct: bool = True) -> None:
    for value, name in ((inputs, "inputs"), (target, "target")):
        checks.floating(value, name)
        if value.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(value.shape)}")
        checks.finite(value, name)
    if len(inputs) != len(target):
        raise ValueError(f"inputs and target must hold the same states, got {len(inputs)} and {len(target)}")
    if len(inputs) < 2:
        raise ValueError(f"inputs must hold at least 2 states, got {len(inputs)}")
    if distinct and target.numel() > _MOST_UNKNOWNS:
        raise ValueError(
            f"{len(inputs):,} different states with {target.shape[1]} controls are more than the {_MOST_UNKNOWNS:,} "
            "unknowns this solver takes: constrain the weights of a network instead"
        )
