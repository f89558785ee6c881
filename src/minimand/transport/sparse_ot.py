r"""Sparsity-constrained optimal transport: plans with at most k nonzeros in each column.

For histograms :math:`a \in R^m`, :math:`b \in R^n` of one total, costs :math:`C` and :math:`\gamma > 0`,

.. math:: \min_{T \ge 0} \langle T, C \rangle + \frac\gamma2 \|T\|_2^2
          \quad \text{with } T 1 = a,\ T^\top 1 = b,\ \|t_j\|_0 \le k \text{ for each column } t_j.

The constraint is not convex; its semi-dual and dual are concave, and without gap for the convex envelope of the
problem, in which half the squared k-support norm takes the place of the squared norm. With :math:`s_{[i]}` the i-th
largest entry,

.. math:: \max_\alpha \langle \alpha, a \rangle - \sum_j \Omega^*_{b_j}(\alpha - c_j), \qquad
          \max_{\alpha, \beta} \langle \alpha, a \rangle + \langle \beta, b \rangle
          - \sum_j \Omega^*_+(\alpha + \beta_j - c_j),

.. math:: \Omega^*_+(s) = \frac1{2\gamma} \sum_{i \le k} \max(s_{[i]}, 0)^2, \qquad
          \Omega^*_z(s) = \langle s, t \rangle - \frac\gamma2 \|t\|^2,\quad
          t_i = \frac{\max(s_i - \mu, 0)}{\gamma} \text{ on the k largest, 0 elsewhere, } \sum_i t_i = z.

k = 1 is unregularised transport (plus the constant :math:`\frac\gamma2 \|b\|^2`), k = m the quadratically regularised.
The gradient of the maximum V is :math:`\partial V / \partial C = T`, :math:`\partial V / \partial a = \alpha`,
:math:`\partial V / \partial b = \beta = -\mu`; the plan's own runs through its positive entries, see :class:`_Plan`.

Source: Tianlin Liu, Joan Puigcerver and Mathieu Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv
2209.15466. Values follow POT's convention; the official router's are lower by :math:`\frac\gamma2 \|b\|^2`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import checks
from ..projections import project_simplex
from ..reduction import Reduction, check_reduction, reduce
from ..stopping import Budget, Stop
from .lbfgs import Minima, minimize_lbfgs

Formulation = Literal["semi-dual", "dual"]
Solver = Literal["lbfgs", "adam"]
Gradient = Literal["envelope", "implicit"]

# The first length of a column's list of largest entries, beside twice k: longer lists last longer but sort slower.
SHORT_LIST = 16
ADAM_RATE = 1e-2  # the official router's, whose costs are probabilities: here in units of their spread


@dataclasses.dataclass(frozen=True)
class SparseTransport:
    r"""A plan with at most k nonzeros in each column, and what is known of it.

    Args:
        value: The dual value V, a lower bound of the cost of every such plan whatever the ``status``; with the
            quadratic term, as POT has it. Differentiable.
        plan: T. Its columns add up to b exactly, its rows to a but for ``row_residual`` (of the dual formulation,
            neither is exact before convergence).
        alpha: The potential of the rows; with the plan, never differentiable.
        beta: The potential of the columns.
        row_residual: :math:`\|a - T 1\|_1`. It stays above the tolerance where no plan with so few nonzeros has these
            marginals: then the optimum of the dual is a tie between plans, and this is one of them.
        iterations: Evaluations of the objective, but for the first.
        converged: Whether the residual met the tolerance.
        status: Why the solver stopped; of a batch, the worst.

    Example:
        >>> result = sparse_ot(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=1)
        >>> result.plan, result.status
        (tensor([[0.5000, 0.0000], [0.0000, 0.5000]]), <Stop.CONVERGED: 'converged'>)

    Source:
        Liu, Puigcerver and Blondel 2023, arXiv 2209.15466.
    """

    value: Float[Tensor, "*batch"]
    plan: Float[Tensor, "*batch rows columns"]
    alpha: Float[Tensor, "*batch rows"]
    beta: Float[Tensor, "*batch columns"]
    row_residual: Float[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]
    status: Stop


def sparse_ot(
    cost: Float[Tensor, "*batch rows columns"],
    a: Float[Tensor, "*#batch rows"] | None = None,
    b: Float[Tensor, "*#batch columns"] | None = None,
    *,
    k: int,
    regularization: float = 1.0,
    formulation: Formulation = "semi-dual",
    solver: Solver = "lbfgs",
    max_iter: int = 1000,
    max_seconds: float | None = None,
    tolerance: float = 1e-6,
    history: int = 10,
    gradient: Gradient = "envelope",
) -> SparseTransport:
    r"""Find a transport plan with at most k nonzeros in each column, for one problem or a batch of them in one call.

    Args:
        cost: C, ``(..., m, n)``. Leading dimensions are a batch of independent problems.
        a: Masses of the rows ``(..., m)``, non-negative; uniform if None.
        b: Masses of the columns ``(..., n)``, of the same total; uniform if None. Without both, the total is 1.
        k: Most nonzeros of a column, at least 1. 1 is unregularised transport, for which a linear program is the
            better solver; m and more put no limit.
        regularization: The paper's gamma, above 0, in units of cost over mass; 1 as in the official router and POT's
            regularizations. Larger spreads a column over more of its k entries and makes the dual easier.
        formulation: ``"semi-dual"`` over the potentials of the rows, with exact columns; or ``"dual"`` over both.
        solver: ``"lbfgs"``, or ``"adam"`` with the official router's step size (times the spread of the costs), which
            needs many more evaluations and is there to compare with.
        max_iter: Most evaluations of each problem after the first.
        max_seconds: Most seconds of wall clock, or None.
        tolerance: A problem has converged when its marginals are missed by this share of the mass (the sum of absolute
            errors). It stalls when ten steps raise the value by less than the square of this share.
        history: How many steps L-BFGS remembers; 10 as in POT (scipy). Where the optimum is a tie between plans the
            dual has a kink there, and a history as long as ``alpha`` comes much closer to its maximum.
        gradient: ``"envelope"`` makes the value differentiable in ``cost``, ``a`` and ``b``. ``"implicit"`` also the
            plan, by solving with an m x m matrix for each problem in the backward pass.

    Returns:
        The value, the plan, the potentials, what the rows miss and why the solver stopped.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes disagree, a cost or mass is not finite, a mass is negative, the totals of a and b differ
            (by more than rounding) or are zero, k is below 1 or the regularization is not above 0.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
        >>> result = sparse_ot(cost, torch.tensor([0.5, 0.25, 0.25]), k=2)
        >>> result.plan
        tensor([[0.3333, 0.1667, 0.0000],
                [0.0000, 0.1667, 0.0833],
                [0.0000, 0.0000, 0.2500]])

    Source:
        Liu, Puigcerver and Blondel 2023, arXiv 2209.15466.
    """
    cost, a, b = _check(cost, a, b, k, regularization)
    checks.one_of(formulation, "formulation", ("semi-dual", "dual"))
    checks.one_of(solver, "solver", ("lbfgs", "adam"))
    checks.one_of(gradient, "gradient", ("envelope", "implicit"))
    checks.non_negative(tolerance, "tolerance")
    if isinstance(history, bool) or not isinstance(history, int) or history < 1:
        raise ValueError(f"history must be an integer of at least 1, got {history!r}")
    *batch, rows, columns = cost.shape
    flat_cost, flat_a, flat_b = cost.reshape(-1, rows, columns), a.reshape(-1, rows), b.reshape(-1, columns)
    with torch.no_grad():
        problem = _Problem(flat_cost, flat_a, flat_b, min(k, rows), regularization)
        found = problem.solve(formulation, solver, Budget(max_iter, max_seconds), tolerance, history)
        plan, alpha, beta, residual = problem.plan_at(found.points)
    value = _Value.apply(flat_cost, flat_a, flat_b, -found.values, plan, alpha, beta)
    if gradient == "implicit":
        plan = _Plan.apply(flat_cost, flat_a, flat_b, plan, regularization)
    return SparseTransport(
        value=value.reshape(batch),
        plan=plan.reshape(*batch, rows, columns),
        alpha=alpha.reshape(*batch, rows),
        beta=beta.reshape(*batch, columns),
        row_residual=residual.reshape(batch),
        iterations=found.iterations.reshape(batch),
        converged=found.converged.reshape(batch),
        status=found.status,
    )


class _Problem:
    """A batch of problems, their columns laid out as rows so that sorting runs over contiguous memory."""

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, k: int, regularization: float) -> None:
        self.cost = cost.mT.contiguous()
        self.a, self.b, self.k, self.regularization = a, b, k, regularization

    def solve(self, formulation: str, solver: str, budget: Budget, tolerance: float, history: int) -> Minima:
        """Minimise the negative dual or semi-dual."""
        columns = _Columns(self.cost, self.k)
        size = self.a.shape[1]
        dual = formulation == "dual"
        start = self.a.new_zeros(len(self.a), size + (self.b.shape[1] if dual else 0))

        # The best potential for columns that all have potential 0 saves a tenth to a third of the evaluations.
        start[:, :size] = self.cost.amin(1)
        start[:, :size] -= start[:, :size].mean(1, keepdim=True)

        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.a[rows], self.b[rows]
            alpha = points[:, :size]
            if dual:
                level = -points[:, size:]
                top, index, _ = columns.top(alpha, rows, lambda top: level)
            else:
                mass = self.regularization * b
                top, index, level = columns.top(alpha, rows, lambda top: _water_level(top, mass))
            plan = (top - level[..., None]).clamp_min_(0).div_(self.regularization)
            sent = torch.zeros_like(a).scatter_add_(1, index.flatten(1), plan.flatten(1))
            quadratic = 0.5 * self.regularization * plan.square().sum((1, 2))
            value = torch.linalg.vecdot(alpha, a)
            if dual:
                # On its support the plan is (top - level) / regularization, so that Omega* is the quadratic term.
                value = value + torch.linalg.vecdot(points[:, size:], b) - quadratic
                return -value, torch.cat([sent - a, plan.sum(2) - b], dim=1)
            value = value - torch.linalg.vecdot(top.flatten(1), plan.flatten(1)) + quadratic
            slope = sent - a
            # Totals agree but for rounding, which must not drive alpha off along the one direction without an optimum.
            return -value, slope - slope.mean(1, keepdim=True)

        tolerances = tolerance * self.a.sum(1)
        if solver == "adam":
            spread = self.cost.amax((1, 2)) - self.cost.amin((1, 2))
            return _minimize_adam(objective, start, ADAM_RATE * spread, budget, tolerances)
        return minimize_lbfgs(
            objective,
            start,
            max_iter=budget.max_iter,
            max_seconds=budget.max_seconds,
            tolerance=tolerances,
            least_gain=tolerance**2,
            history=history,
        )

    def plan_at(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the plan ``(batch, rows, columns)``, both potentials and what the rows miss."""
        alpha, beta = points.split([self.a.shape[1], points.shape[1] - self.a.shape[1]], dim=1)
        mass = self.regularization * self.b
        rows = torch.arange(len(alpha), device=alpha.device)
        level_of = (lambda top: -beta) if beta.shape[1] else (lambda top: _water_level(top, mass))
        top, index, level = _Columns(self.cost, self.k).top(alpha, rows, level_of)
        entries = (top - level[..., None]).clamp_min_(0).div_(self.regularization)
        plan = torch.zeros_like(self.cost).scatter_(2, index, entries).mT
        return plan, alpha, -level, (self.a - plan.sum(2)).abs().sum(1)


class _Columns:
    """The k largest entries of alpha - c_j for every column of every problem: exact, and mostly without a full sort.

    Each column keeps a list of its largest entries and a bound that none outside it exceeds. As alpha moves, the bound
    rises by the largest entry of the move at most. While it stays below the smallest entry that the column uses, the
    list holds all that count; columns for which it no longer does draw up a new one.
    """

    def __init__(self, cost: Tensor, k: int) -> None:
        self.cost, self.k = cost, k
        batch, columns, self.entries = cost.shape
        self.width = min(self.entries, max(SHORT_LIST, 2 * min(k, SHORT_LIST)))
        self.rows = torch.arange(batch, device=cost.device)
        self.scratch = torch.empty_like(cost)
        self.last = cost.new_zeros(batch, self.entries)
        self.bound = cost.new_full((batch, columns), math.inf)
        self.index = torch.zeros(batch, columns, self.width, dtype=torch.long, device=cost.device)
        self.listed = cost.new_zeros(batch, columns, self.width)

    def top(self, alpha: Tensor, rows: Tensor, level_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest entries of each column sorted down, their rows, and the level that ``level_of`` sets."""
        if len(rows) < len(self.rows):
            kept = torch.isin(self.rows, rows)
            for name in ("rows", "cost", "last", "bound", "index", "listed"):
                setattr(self, name, getattr(self, name)[kept])
        self.bound += (alpha - self.last).amax(1)[:, None]
        self.last = alpha
        fresh = False
        while True:
            entries = alpha.gather(1, self.index.flatten(1)).view_as(self.index) - self.listed
            top, place = entries.topk(min(self.k + 1, self.width), dim=2)
            if self.k < self.width:
                # Where the cap cuts through equal entries the first rows get in, whatever the order of the list.
                problem, column = (top[..., self.k - 1] == top[..., self.k]).nonzero(as_tuple=True)
                if len(problem):
                    by_row = self.index[problem, column].argsort(dim=1)
                    entries = entries[problem, column].gather(1, by_row)
                    order = entries.argsort(dim=1, descending=True, stable=True)[:, : top.shape[2]]
                    place[problem, column] = by_row.gather(1, order)
                top, place = top[..., : self.k], place[..., : self.k]
            level = level_of(top)
            # Entries below the level get nothing, so that those below it need not even be among the k largest.
            least = level if self.width < self.k else torch.maximum(level, top[..., -1])
            stale = (least <= self.bound) & (self.bound > -math.inf)
            if not bool(stale.any()):
                return top, self.index.gather(2, place), level
            if fresh:
                self._widen()
                stale = torch.ones_like(stale)
            self._draw_up(alpha, stale)
            fresh = True

    def _widen(self) -> None:
        self.width = min(2 * self.width, self.entries)
        batch, columns, _ = self.index.shape
        self.index = self.index.new_zeros(batch, columns, self.width)
        self.listed = self.listed.new_zeros(batch, columns, self.width)

    def _draw_up(self, alpha: Tensor, stale: Tensor) -> None:
        """List the largest entries of the stale columns anew."""
        everything = 2 * int(stale.sum()) > stale.numel()
        if everything:
            self.scratch = self.scratch[: len(self.cost)]
            cost, entries = self.cost, torch.sub(alpha[:, None], self.cost, out=self.scratch)
        else:
            problem, column = stale.nonzero(as_tuple=True)
            cost = self.cost[problem, column]
            entries = alpha[problem] - cost
        largest, index = entries.topk(self.width, dim=-1)
        listed = cost.gather(-1, index)
        bound = largest[..., -1] if self.width < self.entries else torch.full_like(largest[..., 0], -math.inf)
        if everything:
            self.index, self.listed, self.bound = index, listed, bound
        else:
            self.index[problem, column], self.listed[problem, column] = index, listed
            self.bound[problem, column] = bound


def _water_level(top: Tensor, mass: Tensor) -> Tensor:
    """Return the level above which entries sorted down hold so much mass: the largest level of any number of them."""
    ranks = torch.arange(1, top.shape[-1] + 1, dtype=top.dtype, device=top.device)
    return ((top.cumsum(-1) - mass[..., None]) / ranks).amax(-1)


class _Value(torch.autograd.Function):
    """The value, whose gradient is the plan and the potentials (Danskin)."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, value: Tensor, plan: Tensor, alpha: Tensor, beta: Tensor
    ) -> Tensor:
        ctx.save_for_backward(plan, alpha, beta)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, alpha, beta = ctx.saved_tensors
        return grad[:, None, None] * plan, grad[:, None] * alpha, grad[:, None] * beta, None, None, None, None


class _Plan(torch.autograd.Function):
    r"""The plan, differentiated through its positive entries (the implicit function theorem).

    With :math:`A_j` those of column j and :math:`P_j` the projection onto vectors on them that add up to 0,

    .. math:: dt_j = \frac1\gamma P_j (d\alpha - dc_j) + \frac{1_{A_j}}{|A_j|} db_j, \qquad
              L\, d\alpha = da + \sum_j \Bigl(\frac1\gamma P_j dc_j - \frac{1_{A_j}}{|A_j|} db_j\Bigr), \qquad
              L = \frac1\gamma \sum_j P_j.

    For an incoming gradient G and :math:`L \lambda = \frac1\gamma \sum_j P_j g_j`, the gradients are
    :math:`-P_j (g_j - \lambda) / \gamma` in :math:`c_j`, :math:`\lambda` in a and the mean of :math:`g_j - \lambda`
    over :math:`A_j` in :math:`b_j`. L is the Laplacian of the graph that joins rows which share a column: constants
    on a connected component are its null space, and :math:`\lambda` is made to add up to 0 on each.
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor, plan: Tensor, regularization: float) -> Tensor:
        ctx.save_for_backward(plan)
        ctx.regularization = regularization
        return plan.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (plan,) = ctx.saved_tensors
        active = (plan > 0).to(grad.dtype)
        count = active.sum(1, keepdim=True).clamp_min(1)

        def centred(columns: Tensor) -> Tensor:
            return active * (columns - (active * columns).sum(1, keepdim=True) / count)

        # regularization cancels: both sides of the system are divided by it.
        laplacian = torch.diag_embed(active.sum(2)) - active / count @ active.mT
        component = _components(active)
        laplacian += component / component.sum(2, keepdim=True)
        shift = torch.linalg.solve(laplacian, centred(grad).sum(2))
        rest = grad - shift[:, :, None]
        to_b = (active * rest).sum(1) / count[:, 0]
        return -centred(rest) / ctx.regularization, shift, to_b, None, None


def _components(active: Tensor) -> Tensor:
    """Tell for every two rows whether chains of shared columns join them, as 0 and 1 in ``(batch, rows, rows)``."""
    joined = active @ active.mT
    joined.diagonal(dim1=1, dim2=2).add_(1)
    joined = (joined > 0).to(active.dtype)
    # Each squaring doubles the length of the chains.
    for _ in range(max(1, math.ceil(math.log2(active.shape[1])))):
        joined = (joined @ joined > 0).to(active.dtype)
    return joined


def _minimize_adam(
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    rate: Tensor,
    budget: Budget,
    tolerance: Tensor,
) -> Minima:
    """Minimise by Adam at one rate a problem; the lowest points count, as those of kinked functions do not settle."""
    everyone = torch.arange(len(start), device=start.device)
    points, lowest = start.clone(), start.clone()
    values, gradients = objective(points, everyone)
    best, best_gradients = values.clone(), gradients.clone()
    converged = gradients.abs().sum(1) <= tolerance
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    iterations, iteration, spent = torch.zeros_like(everyone), 0, None
    while not bool(converged.all()):
        spent = budget.spent(iteration)
        if spent is not None:
            break
        iteration += 1
        iterations += (~converged).long()
        first = first.lerp(gradients, 0.1)
        second = second.lerp(gradients.square(), 0.001)
        scale = (second / (1 - 0.999**iteration)).sqrt() + torch.finfo(start.dtype).tiny
        move = rate[:, None] / (1 - 0.9**iteration) * first / scale
        points = torch.where(converged[:, None], points, points - move)
        values, gradients = objective(points, everyone)
        done = gradients.abs().sum(1) <= tolerance
        lower = (done & ~converged) | (~converged & (values < best))
        best = torch.where(lower, values, best)
        lowest = torch.where(lower[:, None], points, lowest)
        best_gradients = torch.where(lower[:, None], gradients, best_gradients)
        converged = converged | done
    stalled = torch.zeros_like(converged)
    return Minima(lowest, best, best_gradients, iterations, converged, stalled, spent or Stop.CONVERGED)


def project_topk_simplex(
    point: Float[Tensor, "*shape"], *, k: int, total: float | Tensor = 1.0, dim: int = -1
) -> Float[Tensor, "*shape"]:
    r"""Return a nearest point of :math:`\{p \ge 0, \sum_i p_i = z, \|p\|_0 \le k\}` along one dimension.

    The k largest entries are projected onto the simplex and the others are 0. The set is not convex: where the k-th and
    the next entry tie there are several nearest points, and this is one of them.

    Args:
        point: Any shape.
        k: Most nonzeros, at least 1.
        total: The sum z, above 0: a number, or a tensor that broadcasts against ``point`` with ``dim`` of size 1.
        dim: Along which entries are counted and added up.

    Returns:
        The projection, of the shape, dtype and device of ``point``; differentiable but at ties and edges.

    Raises:
        TypeError: If k is not an integer.
        ValueError: If ``point`` is empty or not finite, ``total`` is not above 0 or k is below 1.

    Example:
        >>> project_topk_simplex(torch.tensor([0.5, 0.4, 0.3]), k=2)
        tensor([0.5500, 0.4500, 0.0000])

    Source:
        Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", ICML 2013, theorem 1.
    """
    _check_k(k)
    checks.floating(point, "point")
    checks.not_empty(point, "point")
    checks.finite(point, "point")
    top, index = point.topk(min(k, point.shape[dim]), dim=dim)
    return torch.zeros_like(point).scatter(dim, index, project_simplex(top, total=total, dim=dim))


class SparseOTLoss(nn.Module):
    r"""The sparsity-constrained transport cost as a loss, with the envelope gradient: no solver step is unrolled.

    Args:
        k: Most nonzeros of a column of the plan.
        regularization: The paper's gamma, above 0, in units of cost over mass.
        num_iters: Most evaluations of each problem. Fewer give a lower bound of the loss, with the gradient of that
            bound's plan.
        tolerance: At which share of the mass misplaced the solver stops.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk, over the problems of the batch.

    Example:
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], requires_grad=True)
        >>> SparseOTLoss(k=1)(cost).backward()
        >>> cost.grad  # the plan
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])

    Source:
        Liu, Puigcerver and Blondel 2023, arXiv 2209.15466.
    """

    def __init__(
        self,
        k: int,
        *,
        regularization: float = 1.0,
        num_iters: int = 1000,
        tolerance: float = 1e-4,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_k(k)
        checks.positive(regularization, "regularization")
        checks.non_negative(tolerance, "tolerance")
        check_reduction(reduction)
        Budget(num_iters)
        self.k, self.regularization, self.num_iters = k, regularization, num_iters
        self.tolerance, self.reduction = tolerance, reduction

    def forward(
        self,
        cost: Float[Tensor, "*batch rows columns"],
        a: Float[Tensor, "*#batch rows"] | None = None,
        b: Float[Tensor, "*#batch columns"] | None = None,
    ) -> Tensor:
        """Compute the transport cost of each problem, and reduce over them."""
        value = sparse_ot(
            cost,
            a,
            b,
            k=self.k,
            regularization=self.regularization,
            max_iter=self.num_iters,
            tolerance=self.tolerance,
        ).value
        return reduce(value.reshape(-1), self.reduction, shape=value.shape)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"k={self.k}, regularization={self.regularization}, num_iters={self.num_iters}"


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which tokens go to which experts.

    Args:
        dispatch: Whether an expert takes a token: never more tokens an expert than its capacity.
        combine: With what weight its output counts: the token's softmax probability where dispatched, else 0. The
            gate learns through it.
        load: Tokens each expert takes.
        unserved: Share of the tokens that no expert takes.
        row_residual: How far the plan is from sending every token exactly once, as a share of the tokens.

    Example:
        >>> router = SparseOTRouter(2, capacity_factor=1.5)
        >>> routing = router(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 1.0]]))
        >>> routing.load, routing.unserved
        (tensor([3, 3]), tensor(0.))

    Source:
        Liu, Puigcerver and Blondel 2023, arXiv 2209.15466, section 5.
    """

    dispatch: Bool[Tensor, "*batch tokens experts"]
    combine: Float[Tensor, "*batch tokens experts"]
    load: Int[Tensor, "*batch experts"]
    unserved: Float[Tensor, "*batch"]
    row_residual: Float[Tensor, "*batch"]


class SparseOTRouter(nn.Module):
    r"""Route tokens to experts by a transport plan in which no expert takes more than its capacity.

    With gate probabilities p, the plan minimises :math:`-\langle T, p \rangle + \frac\gamma2 \|T\|^2` with mass 1 a
    token, mass tokens/experts an expert and at most ``capacity`` nonzeros a column. An expert takes the tokens of its
    nonzeros, so that the cap holds exactly, whatever the logits and however few the iterations; that each token is
    served is what the solver works for.

    Args:
        num_experts: Number of experts, the last dimension of the logits.
        capacity_factor: An expert takes at most the even share of tokens times this, rounded up; 1 leaves no slack.
        regularization: The paper's gamma, 1 in the official code.
        num_iters: Evaluations of the semi-dual, by L-BFGS. The official code takes 20 steps of Adam, which leave
            several times as many tokens unserved where the gate favours some experts.

    Example:
        >>> router = SparseOTRouter(4, capacity_factor=1.5)
        >>> routing = router(torch.randn(8, 64, 4))
        >>> routing.combine.shape, int(routing.load.max()) <= router.capacity(64)
        (torch.Size([8, 64, 4]), True)

    Source:
        Liu, Puigcerver and Blondel 2023, arXiv 2209.15466, section 5; that combine weights are the softmax is the
        official code's. Its rounding of capacities to multiples of 4 is left out.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        regularization: float = 1.0,
        num_iters: int = 20,
    ) -> None:
        super().__init__()
        if isinstance(num_experts, bool) or not isinstance(num_experts, int):
            raise TypeError(f"num_experts must be an integer, got {num_experts!r}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        checks.positive(capacity_factor, "capacity_factor")
        checks.positive(regularization, "regularization")
        Budget(num_iters)
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        self.regularization, self.num_iters = regularization, num_iters

    def capacity(self, tokens: int) -> int:
        """Return the most tokens that an expert takes out of so many."""
        return max(1, math.ceil(tokens / self.num_experts * self.capacity_factor))

    def forward(self, logits: Float[Tensor, "*batch tokens experts"]) -> Routing:
        """Route the tokens of each group: logits ``(..., tokens, experts)``."""
        checks.floating(logits, "logits")
        checks.not_empty(logits, "logits")
        if logits.dim() < 2 or logits.shape[-1] != self.num_experts:
            raise ValueError(f"logits must have shape (..., tokens, {self.num_experts}), got {tuple(logits.shape)}")
        checks.finite(logits, "logits")
        probability = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        tokens = logits.shape[-2]
        ones = torch.ones_like(probability)
        plan = sparse_ot(
            -probability.detach(),
            ones[..., 0],
            ones[..., 0, :] * (tokens / self.num_experts),
            k=self.capacity(tokens),
            regularization=self.regularization,
            max_iter=self.num_iters,
            tolerance=1e-4,
        )
        dispatch = plan.plan > 0
        return Routing(
            dispatch=dispatch,
            combine=(probability * dispatch).to(logits.dtype),
            load=dispatch.sum(-2),
            unserved=1 - dispatch.any(-1).to(probability.dtype).mean(-1),
            row_residual=plan.row_residual / tokens,
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"num_experts={self.num_experts}, capacity_factor={self.capacity_factor}, "
            f"regularization={self.regularization}, num_iters={self.num_iters}"
        )


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _check(
    cost: Tensor, a: Tensor | None, b: Tensor | None, k: int, regularization: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the problem, fill in uniform masses and give all three one batch shape and at least single precision."""
    _check_k(k)
    checks.positive(regularization, "regularization")
    checks.floating(cost, "cost")
    if cost.dim() < 2:
        raise ValueError(f"cost must have shape (..., rows, columns), got {tuple(cost.shape)}")
    checks.not_empty(cost, "cost")
    checks.finite(cost, "cost")
    dtype = torch.promote_types(cost.dtype, torch.float32)
    cost = cost.to(dtype)
    batch = cost.shape[:-2]
    first = None if a is None else _masses(a, "a", batch, cost.shape[-2], dtype)
    second = None if b is None else _masses(b, "b", batch, cost.shape[-1], dtype)
    if first is None:
        first = _uniform(cost.new_ones(batch) if second is None else second.sum(-1), cost.shape[-2])
    if second is None:
        second = _uniform(first.sum(-1), cost.shape[-1])
    total, other = first.sum(-1), second.sum(-1)
    checks.require(total > 0, lambda: "a must hold some mass, got a total of 0")
    slack = max(1e-6, 100 * torch.finfo(dtype).eps)
    checks.require(
        (total - other).abs() <= slack * total,
        lambda: (
            "a and b must have the same total, got "
            f"{float(total.flatten()[(total - other).abs().argmax()]):.9g} and "
            f"{float(other.flatten()[(total - other).abs().argmax()]):.9g}"
        ),
    )
    return cost, first, second


def _masses(masses: Tensor, name: str, batch: torch.Size, size: int, dtype: torch.dtype) -> Tensor:
    checks.floating(masses, name)
    if masses.dim() < 1 or masses.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}) to go with cost, got {tuple(masses.shape)}")
    checks.finite(masses, name)
    checks.require(masses >= 0, lambda: f"{name} must hold no negative mass, got {float(masses.min())}")
    try:
        return masses.to(dtype).expand(*batch, size)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the batch {tuple(batch)} of cost, got shape {tuple(masses.shape)}"
        ) from None


def _uniform(total: Tensor, size: int) -> Tensor:
    return (total / size)[..., None].expand(*total.shape, size)
