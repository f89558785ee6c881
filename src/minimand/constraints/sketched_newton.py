r"""Newton's method under equality constraints, its steps solved roughly and judged by an exact augmented Lagrangian.

For :math:`\min f(x)` subject to :math:`c(x) = 0`, with :math:`G = c'(x)`, :math:`H = \nabla^2_x L` and
:math:`\nabla_x L = \nabla f + G^\top\lambda`, a step :math:`(dx, d\lambda)` solves

.. math:: \begin{pmatrix} B & G^\top \\ G & 0 \end{pmatrix} \begin{pmatrix} dx \\ d\lambda \end{pmatrix}
          = -\begin{pmatrix} \nabla_x L \\ c \end{pmatrix}

up to a residual that is a share of the right-hand side (:func:`sketch_and_project`, or a direct solve). :math:`B` is
:math:`H`, shifted where it does not curve upwards along the constraints. The length of the step is found by
backtracking on the merit function

.. math:: L_\eta(x, \lambda) = f + \lambda^\top c + \frac{\eta_1}2 \|c\|^2 + \frac{\eta_2}2 \|\nabla_x L\|^2,

which is smooth, is :math:`f` at a solution, and lets full steps through near it, where merit functions such as
:math:`f + \mu\|c\|_1` may not (Maratos). The step must descend at least by
:math:`\nabla L_\eta \cdot (dx, d\lambda) \le -\frac{\eta_2}2 \|\nabla L\|^2`; if not, :math:`\eta_1` grows,
:math:`\eta_2` and the residual shrink, and the solve goes on from where it was.

Source: Hong, Na, Mahoney and Kolar, "Constrained Optimization via Exact Augmented Lagrangian and Randomized Iterative
Sketching", ICML 2023, arXiv 2305.18379; the merit function: Di Pillo and Grippo, SIAM J. Control Optim. 17, 1979. The
gradient of the merit holds the Hessian of the Lagrangian; the released code has that of the objective alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop
from .sketch import SKETCHES, Sketch, check_sketch_size, sketch_and_project

Forcing = float | Callable[[int, float], float]

_LEAST_CURVATURE = 1e-6  # of the Hessian along the constraints: below, it is shifted
_MOST_HALVINGS = 40
_LARGEST_ETA1, _SMALLEST_ETA2 = 1e8, 1e-8
_SMALLEST_ACCURACY = {"practical": 1e-8, "theory": 1e-6}


class SingularConstraintError(ValueError):
    """The gradients of the constraints are linearly dependent: redundant, contradictory or infeasible nearby."""


@dataclasses.dataclass(frozen=True)
class NewtonStep:
    """One accepted step of :class:`ExactALNewton`.

    Args:
        kkt_residual: Before the step.
        merit: The exact augmented Lagrangian before the step, with the step's ``eta1`` and ``eta2``.
        merit_after: And after it.
        slope: Its directional derivative along the full step.
        step_size: How much of the step was taken.
        eta1: Weight of the squared constraints.
        eta2: Weight of the squared gradient of the Lagrangian.
        accuracy: The residual that was asked of the Newton system, over its right-hand side.
        inner_residual: The residual that was reached, likewise; above ``accuracy`` where ``max_inner_iter`` ended it.
        inner_iterations: Projections of the inner solver.
        shift: What was added to the diagonal of the Hessian.
    """

    kkt_residual: float
    merit: float
    merit_after: float
    slope: float
    step_size: float
    eta1: float
    eta2: float
    accuracy: float
    inner_residual: float
    inner_iterations: int
    shift: float


@dataclasses.dataclass(frozen=True)
class NewtonResult:
    """What :meth:`ExactALNewton.minimize` found.

    Args:
        x: The minimiser, ``(variables,)``.
        multipliers: lambda, ``(constraints,)``: minus the derivative of the minimum by the constraints' level.
        objective: f at x.
        kkt_residual: Norm of the gradient of the Lagrangian and the constraints together.
        history: Every accepted step.
        iterations: How many they are.
        inner_iterations: Projections of all inner solves.
        evaluations: How often ``"objective"`` (with the constraints), ``"gradient"`` (of the Lagrangian),
            ``"jacobian"`` and ``"hessian"`` were evaluated.
        flops: Floating-point operations on matrices, those of the functions left out.
        inner_flops: Those among them that solve the Newton systems.
        status: Why it stopped; ``STALLED`` where no step descends, by rounding or because the system resists.
    """

    x: Tensor
    multipliers: Tensor
    objective: float
    kkt_residual: float
    history: tuple[NewtonStep, ...]
    iterations: int
    inner_iterations: int
    evaluations: Mapping[str, int]
    flops: int
    inner_flops: int
    status: Stop


def exact_augmented_lagrangian(
    objective: Callable[[Tensor], Tensor],
    constraint: Callable[[Tensor], Tensor],
    x: Float[Tensor, " variables"],
    multipliers: Float[Tensor, " constraints"],
    *,
    eta1: float = 1.0,
    eta2: float = 0.1,
) -> Float[Tensor, ""]:
    r"""Compute :math:`f + \lambda^\top c + \frac{\eta_1}2\|c\|^2 + \frac{\eta_2}2\|\nabla f + G^\top\lambda\|^2`.

    Minimise it over ``x`` and ``multipliers`` together, by any optimizer: for ``eta1`` large and ``eta2`` small enough
    its minimisers are the solutions of the constrained problem with their multipliers, without a limit to be taken. Its
    gradient costs one Hessian-vector product.

    Args:
        objective: f, from ``(variables,)`` to a scalar, twice differentiable by torch.
        constraint: c, from ``(variables,)`` to ``(constraints,)``, likewise.
        x: The variables.
        multipliers: lambda, of either sign.
        eta1: Weight of the squared constraints, at least 0; the paper's 1.
        eta2: Weight of the squared gradient of the Lagrangian, at least 0; the paper's 0.1.

    Returns:
        The value, with gradient in ``x`` and ``multipliers``.

    Raises:
        ValueError: If shapes do not match, or something is not finite.

    Example:
        >>> x, multipliers = torch.tensor([1.0, 0.0]), torch.tensor([-0.5])
        >>> exact_augmented_lagrangian(lambda x: x[0], lambda x: x.square().sum(-1, keepdim=True) - 1, x, multipliers)
        tensor(1.)

    Source:
        Hong et al. 2023, arXiv 2305.18379; Di Pillo and Grippo 1979.
    """
    checks.floating(x, "x")
    checks.finite(x, "x")
    checks.floating(multipliers, "multipliers")
    checks.finite(multipliers, "multipliers")
    checks.non_negative(eta1, "eta1")
    checks.non_negative(eta2, "eta2")
    gradient, (lagrangian, c) = _lagrangian_gradient(objective, constraint, x, multipliers)
    return lagrangian + eta1 / 2 * c.square().sum() + eta2 / 2 * gradient.square().sum()


class ExactALNewton:
    r"""Adaptive inexact Newton steps on the conditions of Karush, Kuhn and Tucker, for equality constraints.

    Use it for a smooth problem of up to a few thousand variables that is to be solved to many digits: a matrix of
    variables plus constraints is held and, unless ``sketch`` says otherwise, factorised.

    Args:
        sketch: How Newton systems are solved: ``"full"`` directly, ``"gaussian"``, ``"block"`` or ``"kaczmarz"`` by
            :func:`sketch_and_project`. The direct solve is the cheapest but for large, well-conditioned systems.
        sketch_size: Columns of the sketch; three quarters of the system if None, 1 for ``"kaczmarz"``.
        equilibrate: Whether the rows and columns of the Newton systems are scaled to like norms before they are
            sketched. None: for ``"block"`` and ``"kaczmarz"``, which then need far fewer steps; ``"gaussian"`` does
            better on the spectrum as it is. Ours: the released code never scales.
        eta1: First weight of the squared constraints, above 0; the paper's 1. It only grows.
        eta2: First weight of the squared gradient of the Lagrangian, above 0; the paper's 0.1. It only shrinks.
        armijo: The paper's beta, in (0, 1/2): the share of the promised descent that a step must keep; 0.1.
        growth: The paper's nu, above 1: eta1 grows by its square, eta2 shrinks by it; 1.5.
        accuracy: The paper's delta, in (0, 1]: first bound of the relative residual of the Newton systems; 0.1.
        forcing: The paper's theta, in (0, 1]: a factor on that bound, or a function of iteration and KKT residual. 1
            gives linear convergence at rate ``accuracy``, ``lambda k, kkt: min(1.0, kkt)`` quadratic.
        curvature: The paper's xi_B, above 0: what B curves by along the constraints where it was shifted; 0.1.
        constants: ``"practical"`` bounds the relative residual by ``accuracy * forcing`` and shifts the Hessian by
            twice its most negative curvature along the constraints. ``"theory"`` takes the paper's, whose bound also
            falls with norms of the matrices, to 1e-9 and below, and whose shift is the Hessian's norm.
        max_inner_iter: Most projections for one step; 100,000 in the released code.
        generator: Draws the sketches; torch's default if None.

    Example:
        >>> x0 = torch.tensor([0.8, 0.6], dtype=torch.float64)
        >>> solver = ExactALNewton()
        >>> found = solver.minimize(lambda x: x[0], lambda x: x.square().sum(-1, keepdim=True) - 1, x0)
        >>> round(found.objective, 6), found.status
        (-1.0, <Stop.CONVERGED: 'converged'>)

    Source:
        Hong et al. 2023, arXiv 2305.18379, algorithm 1; the constants are those of the released code.
    """

    def __init__(
        self,
        *,
        sketch: Sketch = "full",
        sketch_size: int | None = None,
        equilibrate: bool | None = None,
        eta1: float = 1.0,
        eta2: float = 0.1,
        armijo: float = 0.1,
        growth: float = 1.5,
        accuracy: float = 0.1,
        forcing: Forcing = 1.0,
        curvature: float = 0.1,
        constants: Literal["practical", "theory"] = "practical",
        max_inner_iter: int = 100_000,
        generator: torch.Generator | None = None,
    ) -> None:
        checks.one_of(sketch, "sketch", SKETCHES)
        checks.positive(eta1, "eta1")
        checks.positive(eta2, "eta2")
        checks.between(armijo, "armijo", 0.0, 0.5, low_open=True, high_open=True)
        checks.between(growth, "growth", 1.0, math.inf, low_open=True, high_open=True)
        checks.between(accuracy, "accuracy", 0.0, 1.0, low_open=True)
        if not callable(forcing):
            checks.between(forcing, "forcing", 0.0, 1.0, low_open=True)
        checks.positive(curvature, "curvature")
        checks.one_of(constants, "constants", ("practical", "theory"))
        if max_inner_iter < 1:
            raise ValueError(f"max_inner_iter must be at least 1, got {max_inner_iter}")
        self.sketch = sketch
        self.sketch_size = sketch_size
        self.equilibrate = sketch in ("block", "kaczmarz") if equilibrate is None else equilibrate
        self.eta1, self.eta2 = eta1, eta2
        self.armijo, self.growth = armijo, growth
        self.accuracy, self.forcing = accuracy, forcing
        self.curvature = curvature
        self.constants = constants
        self.max_inner_iter = max_inner_iter
        self.generator = generator

    def minimize(
        self,
        objective: Callable[[Tensor], Tensor],
        constraint: Callable[[Tensor], Tensor],
        x0: Float[Tensor, " variables"],
        multipliers0: Float[Tensor, " constraints"] | None = None,
        *,
        gradient: Callable[[Tensor], Tensor] | None = None,
        jacobian: Callable[[Tensor], Tensor] | None = None,
        hessian: Callable[[Tensor, Tensor], Tensor] | None = None,
        tolerance: float = 1e-6,
        max_iter: int = 200,
        max_seconds: float | None = None,
        callback: Callable[[NewtonStep], object] | None = None,
    ) -> NewtonResult:
        r"""Minimise f(x) subject to c(x) = 0.

        Derivatives that are not given are taken by torch.func, second ones forward over reverse. Given all three, the
        functions need not be differentiable by torch.

        Args:
            objective: f, from ``(variables,)`` to a scalar.
            constraint: c, from ``(variables,)`` to ``(constraints,)``: at least one, at most as many as variables.
            x0: Where to start; float64 for tolerances below about 1e-3. It need not be feasible.
            multipliers0: lambda to start with; if None those that make the gradient of the Lagrangian least.
            gradient: From x to the gradient of f.
            jacobian: From x to G, ``(constraints, variables)``, dense or sparse.
            hessian: From x and multipliers to that of the Lagrangian, ``(variables, variables)``, dense or sparse.
            tolerance: Stop when the norm of the Lagrangian's gradient and the constraints together is at most this.
            max_iter: Most steps.
            max_seconds: Most seconds; None for no limit.
            callback: Called with every accepted step.

        Returns:
            A :class:`NewtonResult`.

        Raises:
            SingularConstraintError: If the gradients of the constraints become linearly dependent.
            ValueError: If shapes do not match, or a function or derivative is not finite where the method stands.
        """
        budget = Budget(max_iter, max_seconds)
        checks.positive(tolerance, "tolerance")
        checks.floating(x0, "x0")
        checks.not_empty(x0, "x0")
        checks.finite(x0, "x0")
        problem = _Problem(objective, constraint, gradient, jacobian, hessian)
        x = x0.detach().clone()
        multipliers = problem.start(x, multipliers0)
        size = len(x) + len(multipliers)
        check_sketch_size(self.sketch, self.sketch_size, size, size)

        eta1, eta2, accuracy = self.eta1, self.eta2, self.accuracy
        history: list[NewtonStep] = []
        point = problem.first(x, multipliers)
        if not point.finite:
            raise ValueError("objective, constraint or a gradient is not finite at x0")
        flops = inner_flops = inner_iterations = 0

        def found(status: Stop) -> NewtonResult:
            return NewtonResult(
                point.x, point.multipliers, float(point.value), point.kkt_residual, tuple(history), len(history),
                inner_iterations, dict(problem.evaluations), flops + inner_flops, inner_flops, status,
            )  # fmt: skip

        while True:
            if point.kkt_residual <= tolerance:
                return found(Stop.CONVERGED)
            status = budget.spent(len(history))
            if status is not None:
                return found(status)
            system = self._system(problem, point, len(history))
            flops += system.flops
            forcing = self.forcing(len(history), point.kkt_residual) if callable(self.forcing) else self.forcing
            checks.between(forcing, "forcing", 0.0, 1.0, low_open=True)

            tightest = system.tightest(self.armijo, eta1, eta2)
            accuracy = max(min(accuracy, tightest), _SMALLEST_ACCURACY[self.constants])
            move = torch.zeros(size, dtype=x.dtype, device=x.device)
            inner = 0
            while True:
                wanted = forcing * accuracy / system.strictness
                left = None if max_seconds is None else max(0.0, budget.max_seconds - budget.seconds)
                solved = sketch_and_project(
                    system.matrix, system.target, sketch=self.sketch, sketch_size=self.sketch_size, initial=move,
                    equilibrate=self.equilibrate, tolerance=wanted, max_iter=self.max_inner_iter, max_seconds=left,
                    generator=self.generator,
                )  # fmt: skip
                move = solved.solution
                inner += solved.iterations
                inner_iterations += solved.iterations
                inner_flops += solved.flops
                if solved.status is Stop.TIME_LIMIT:
                    return found(Stop.TIME_LIMIT)
                if not bool(torch.isfinite(move).all()):
                    return found(Stop.STALLED)
                slope = float(point.merit_gradient(system, eta1, eta2) @ move)
                if slope <= -eta2 / 2 * point.kkt_residual**2:
                    break
                eta1, eta2 = eta1 * self.growth**2, eta2 / self.growth
                if eta1 > _LARGEST_ETA1 or eta2 < _SMALLEST_ETA2:
                    return found(Stop.STALLED)
                tightest = system.tightest(self.armijo, eta1, eta2)
                accuracy = max(min(accuracy / self.growth**4, tightest), _SMALLEST_ACCURACY[self.constants])

            merit = point.merit(eta1, eta2)
            # Near a solution the descent is below the rounding of the merit, and every comparison would be chance.
            rounding = 10 * torch.finfo(x.dtype).eps * abs(merit)
            along, across = move.split([len(x), len(multipliers)])
            step_size = 1.0
            for _ in range(_MOST_HALVINGS):
                trial = problem.first(point.x + step_size * along, point.multipliers + step_size * across)
                if trial.finite and trial.merit(eta1, eta2) <= merit + step_size * self.armijo * slope + rounding:
                    break
                step_size /= 2
            else:
                return found(Stop.STALLED)
            step = NewtonStep(
                point.kkt_residual, merit, trial.merit(eta1, eta2), slope, step_size, eta1, eta2,
                wanted, solved.residual, inner, system.shift,
            )  # fmt: skip
            point = trial
            history.append(step)
            if callback is not None:
                callback(step)

    def _system(self, problem: _Problem, point: _Point, iteration: int) -> _System:
        """Assemble the Newton system, its Hessian shifted where it does not curve upwards along the constraints."""
        jacobian, hessian = problem.jacobian_at(point.x), problem.hessian_at(point.x, point.multipliers)
        if not bool(torch.isfinite(jacobian).all() & torch.isfinite(hessian).all()):
            raise ValueError(f"the Jacobian or the Hessian is not finite after {iteration} iterations")
        constraints, variables = jacobian.shape
        basis, triangle = torch.linalg.qr(jacobian.T, mode="complete")
        singular = torch.linalg.svdvals(triangle[:constraints])
        largest, smallest = float(singular[0]), float(singular[-1])
        problem.largest = max(problem.largest, largest)
        if smallest <= variables * torch.finfo(jacobian.dtype).eps * problem.largest:
            raise SingularConstraintError(
                f"the gradients of the {constraints} constraints are linearly dependent after {iteration} iterations "
                f"(singular values of their Jacobian from {smallest:.1e} to {largest:.1e}): a constraint is redundant, "
                "contradicts the others, or cannot be met near here"
            )
        null = basis[:, constraints:]
        free = variables - constraints
        reduced = null.T @ hessian @ null
        norm = float(hessian.norm())
        shift = 0.0
        identity = torch.eye(free, dtype=hessian.dtype, device=hessian.device)
        if free and int(torch.linalg.cholesky_ex(reduced - _LEAST_CURVATURE * identity).info) > 0:
            shift = self.curvature + norm
            if self.constants == "practical":
                # Mirrored: as much curvature upwards as there was downwards, where the least shift overshoots.
                lowest = float(torch.linalg.eigvalsh(reduced)[0])
                shift = self.curvature + abs(lowest) - lowest
        matrix = hessian.new_zeros(variables + constraints, variables + constraints)
        matrix[:variables, :variables] = hessian
        matrix[:variables, :variables].diagonal().add_(shift)
        matrix[:variables, variables:] = jacobian.T
        matrix[variables:, :variables] = jacobian
        strictness, psi, upsilon = 1.0, 0.0, 0.0
        if self.constants == "theory":
            shifted = float(matrix[:variables, :variables].norm())
            psi = 20 * max(shifted**2, 1.0) / (min(smallest**2, 1.0) * min(self.curvature, 1.0))
            upsilon = max(float(jacobian.norm()), norm, 1.0)
            strictness = float(matrix.norm()) * psi
        # QR with its full Q, the reduced Hessian, its Cholesky factor and, where that fails, its eigenvalues.
        flops = 4 * variables**2 * constraints + 2 * variables * free * (variables + free) + free**3 // 3
        flops += 4 * free**3 // 3 if shift and self.constants == "practical" else 0
        target = -torch.cat([point.gradient, point.constraint])
        return _System(matrix, target, hessian, jacobian, shift, strictness, psi, upsilon, flops)


@dataclasses.dataclass(frozen=True)
class _System:
    matrix: Tensor
    target: Tensor
    hessian: Tensor
    jacobian: Tensor
    shift: float
    strictness: float
    psi: float
    upsilon: float
    flops: int

    def tightest(self, armijo: float, eta1: float, eta2: float) -> float:
        """Return the accuracy that the paper's constants allow; no limit with practical ones."""
        if not self.psi:
            return math.inf
        return (0.5 - armijo) * eta2 / ((1 + eta1 + eta2) * (self.upsilon * self.psi) ** 2)


@dataclasses.dataclass(frozen=True)
class _Point:
    """Variables, multipliers, and what first derivatives say there."""

    x: Tensor
    multipliers: Tensor
    value: Tensor
    constraint: Tensor
    gradient: Tensor

    @property
    def kkt_residual(self) -> float:
        return float(torch.cat([self.gradient, self.constraint]).norm())

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.value + self.constraint.sum() + self.gradient.sum()))

    def merit(self, eta1: float, eta2: float) -> float:
        c, gradient = self.constraint, self.gradient
        return float(self.value + self.multipliers @ c + eta1 / 2 * c @ c + eta2 / 2 * gradient @ gradient)

    def merit_gradient(self, system: _System, eta1: float, eta2: float) -> Tensor:
        c, gradient, G = self.constraint, self.gradient, system.jacobian
        return torch.cat([gradient + eta2 * system.hessian @ gradient + eta1 * c @ G, c + eta2 * G @ gradient])


class _Problem:
    """The functions of the problem with their derivatives, given or taken, and how often each was evaluated."""

    def __init__(
        self,
        objective: Callable[[Tensor], Tensor],
        constraint: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor], Tensor] | None,
        jacobian: Callable[[Tensor], Tensor] | None,
        hessian: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.objective, self.constraint = objective, constraint
        self.gradient, self.jacobian, self.hessian = gradient, jacobian, hessian
        self.evaluations = {"objective": 0, "gradient": 0, "jacobian": 0, "hessian": 0}
        self.count = 0  # of constraints
        self.largest = 0.0  # singular value of the Jacobian so far: the scale by which it may lose rank

    def start(self, x: Tensor, multipliers: Tensor | None) -> Tensor:
        """Check the functions at x and return the first multipliers."""
        value, c = self.objective(x), self.constraint(x)
        for result, name, dims in ((value, "objective", 0), (c, "constraint", 1)):
            checks.tensor(result, f"{name}(x0)")
            if result.dim() != dims:
                shape = "a scalar" if dims == 0 else "shape (constraints,)"
                raise ValueError(f"{name} must return {shape}, got shape {tuple(result.shape)}")
            if result.dtype != x.dtype:
                raise TypeError(f"{name} must return the dtype of x0, {x.dtype}, got {result.dtype}")
        if not 1 <= len(c) <= len(x):
            raise ValueError(f"there must be 1 to {len(x)} constraints, as many as variables at most, got {len(c)}")
        self.count = len(c)
        if multipliers is not None:
            if tuple(multipliers.shape) != tuple(c.shape):
                raise ValueError(f"multipliers0 must have shape ({len(c)},), got {tuple(multipliers.shape)}")
            checks.finite(multipliers, "multipliers0")
            return multipliers.detach().to(x)
        slope = self.first(x, torch.zeros_like(c.detach())).gradient
        jacobian = self.jacobian_at(x)
        if not bool(torch.isfinite(jacobian).all() & torch.isfinite(slope).all()):
            raise ValueError("the gradient of the objective or the Jacobian of the constraints is not finite at x0")
        # By the pseudo-inverse, which a Jacobian that lost its rank does not stop: the method itself will tell.
        return -(torch.linalg.pinv(jacobian).T @ slope)

    def first(self, x: Tensor, multipliers: Tensor) -> _Point:
        """Evaluate the functions and the gradient of the Lagrangian."""
        self.evaluations["objective"] += 1
        self.evaluations["gradient"] += 1
        if self.gradient is None and self.jacobian is None:
            gradient, (lagrangian, c) = _lagrangian_gradient(self.objective, self.constraint, x, multipliers)
            return _Point(x, multipliers, (lagrangian - multipliers @ c).detach(), c.detach(), gradient.detach())
        if self.gradient is None:
            gradient, value = torch.func.grad_and_value(self.objective)(x)
        else:
            gradient, value = self.gradient(x), self.objective(x)
            _has_shape(gradient, "gradient", (len(x),))
        if self.jacobian is None:
            pulled, (_, c) = _lagrangian_gradient(lambda x: x.new_zeros(()), self.constraint, x, multipliers)
            gradient = gradient + pulled
        else:
            c = self.constraint(x)
            gradient = gradient + multipliers @ self.jacobian_at(x)
        return _Point(x, multipliers, value.detach(), c.detach(), gradient.detach())

    def jacobian_at(self, x: Tensor) -> Tensor:
        """Return G, dense."""
        self.evaluations["jacobian"] += 1
        if self.jacobian is None:
            return torch.func.jacrev(self.constraint)(x).detach()
        return _dense(self.jacobian(x), "jacobian", (self.count, len(x)))

    def hessian_at(self, x: Tensor, multipliers: Tensor) -> Tensor:
        """Return the Hessian of the Lagrangian, dense and symmetric to the last bit."""
        self.evaluations["hessian"] += 1
        if self.hessian is None:

            def slope(x: Tensor) -> Tensor:
                return _lagrangian_gradient(self.objective, self.constraint, x, multipliers)[0]

            found = torch.func.jacfwd(slope)(x).detach()
        else:
            found = _dense(self.hessian(x, multipliers), "hessian", (len(x), len(x)))
        return (found + found.T) / 2


def _lagrangian_gradient(
    objective: Callable[[Tensor], Tensor], constraint: Callable[[Tensor], Tensor], x: Tensor, multipliers: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradient of the Lagrangian in x, the Lagrangian, and the constraints."""

    def lagrangian(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c = constraint(x)
        if c.shape != multipliers.shape:
            raise ValueError(
                f"constraint must return one number a multiplier, {tuple(multipliers.shape)}, got {tuple(c.shape)}"
            )
        value = objective(x) + multipliers @ c
        return value, (value, c)

    return torch.func.grad(lagrangian, has_aux=True)(x)


def _dense(matrix: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    _has_shape(matrix, name, shape)
    return (matrix if matrix.layout == torch.strided else matrix.to_dense()).detach()


def _has_shape(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
    checks.tensor(value, name)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must return shape {shape}, got {tuple(value.shape)}")
