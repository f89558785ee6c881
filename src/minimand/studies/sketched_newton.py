"""Do steps judged by an exact augmented Lagrangian need fewer iterations, and does sketching need fewer flops?

Four problems: the circle on which Maratos showed that an l1 merit function refuses good steps; logistic regression
under linear constraints on the unit sphere; control of a Poisson equation on two grids, whose Newton systems are
ill-conditioned; and two whose systems are as well-conditioned as one could wish. A solver stands on a
solution when the gradient of the Lagrangian, with the multipliers that make it least, and the constraints together
have norm 1e-6.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from scipy.sparse.linalg import LinearOperator, minres
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..bench import Claim, Metric, Outcome, Run, Study
from ..constraints import ExactALNewton
from ..constraints.sketch import Sketch

TOLERANCE = 1e-6
MARATOS, LOGISTIC, COARSE, FINE = "Maratos", "logistic", "control, 27", "control, 300"
EASY, LARGE = "well-conditioned, 500", "well-conditioned, 1500"
ITERATIONS, FULL_STEPS = f"iterations, {MARATOS}", f"full steps, {MARATOS}"
POINTS, GRADIENTS, KKT = f"points, {LOGISTIC}", f"gradients, {LOGISTIC}", f"log10 KKT residual, {LOGISTIC}"
FLOPS = {name: f"log10 flops, {name}" for name in (LOGISTIC, COARSE, FINE, EASY, LARGE)}
ROWS = 10
MOST_ROWS = 20_000

Vector = NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem with equality constraints.

    Args:
        objective: f.
        constraint: c.
        x0: Where every solver starts.
    """

    objective: Callable[[Tensor], Tensor]
    constraint: Callable[[Tensor], Tensor]
    x0: Tensor


def problem(source: Any, seed: int) -> dict[str, Problem]:
    """Draw the start, the constraints, the states that are wanted, and the well-conditioned problem."""
    draw = torch.Generator().manual_seed(seed)
    return {
        MARATOS: circle(draw),
        LOGISTIC: logistic(draw),
        COARSE: control(3, draw),
        FINE: control(10, draw),
        EASY: easy(400, 100, draw),
        LARGE: easy(1200, 300, draw),
    }


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def circle(draw: torch.Generator) -> Problem:
    """Minimise 2 (|x|^2 - 1) - x_0 on the unit circle, from a point on it 0.05 to 0.6 radians off."""
    angle = float(0.05 + 0.55 * torch.rand((), generator=draw))
    return Problem(
        lambda x: 2 * (x.square().sum() - 1) - x[0],
        lambda x: (x.square().sum() - 1)[None],
        torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64),
    )


def logistic(draw: torch.Generator) -> Problem:
    """Classify tumours by weights on the unit sphere that meet ten random linear equations."""
    features, labels = load_breast_cancer(return_X_y=True)
    rows = torch.from_numpy(StandardScaler().fit_transform(features) * (1 - 2 * labels)[:, None])
    A, inside = _normal(draw, ROWS, 30), _normal(draw, 30)
    b = A @ (inside / inside.norm())
    return Problem(
        lambda x: torch.nn.functional.softplus(rows @ x).mean(),
        lambda x: torch.cat([A @ x - b, (x @ x - 1)[None]]),
        torch.ones(30, dtype=torch.float64),
    )


def control(grid: int, draw: torch.Generator) -> Problem:
    """Steer the solution w of a Poisson equation by its right-hand side z to a wanted state; five-point Laplacian."""
    count = grid**2
    line = 2 * torch.eye(grid, dtype=torch.float64)
    line.diagonal(1).fill_(-1)
    line.diagonal(-1).fill_(-1)
    identity = torch.eye(grid, dtype=torch.float64)
    laplacian = -(torch.kron(line, identity) + torch.kron(identity, line)) * (grid + 1) ** 2 / 4
    place = 0.1 / math.sqrt(15) * (torch.arange(1, grid + 1, dtype=torch.float64) - (grid + 1) / 2)
    phases = 2 * math.pi * torch.rand(2, generator=draw, dtype=torch.float64)
    wanted = (torch.sin(phases[0] + place)[:, None] + torch.cos(phases[1] + place)[None, :]).flatten()
    return Problem(
        lambda x: (x[:count] - wanted).square().sum() / 2 + 0.05 * x[count:].square().sum(),
        lambda x: laplacian @ x[:count] + x[count:],
        torch.ones(2 * count, dtype=torch.float64),
    )


def easy(variables: int, constraints: int, draw: torch.Generator) -> Problem:
    """Minimise a mildly curved function, Hessian 0.7 to 1.3, under orthonormal linear constraints."""
    A = torch.linalg.qr(_normal(draw, variables, constraints))[0].T
    centre, phase = _normal(draw, variables), 6 * torch.rand(variables, generator=draw, dtype=torch.float64)
    return Problem(
        lambda x: (x - centre).square().sum() / 2 + 0.3 * torch.sin(x + phase).sum(),
        lambda x: A @ x,
        torch.ones(variables, dtype=torch.float64),
    )


class Counted:
    """The functions of a problem for solvers that speak NumPy, and what it had cost when a solution was reached.

    Args:
        given: The problem.
        watch: Whether ``look`` looks; without, the solver costs what it costs, and stops as it pleases.
    """

    def __init__(self, given: Problem, *, watch: bool = True) -> None:
        self.given, self.watch = given, watch
        self.cost = {"points": 0, "gradients": 0, "iterations": 0}
        self.reached: dict[str, int] | None = None
        self.residual = math.inf
        self._jacobian = torch.func.jacrev(given.constraint)

    def value(self, x: Vector) -> float:
        """Return f."""
        return float(self.given.objective(torch.from_numpy(x)))

    def gradient(self, x: Vector) -> Vector:
        """Return the gradient of f; with the Jacobian it is one point and one gradient."""
        self.cost["points"] += 1
        self.cost["gradients"] += 1
        return torch.func.grad(self.given.objective)(torch.from_numpy(x)).numpy()

    def constraint(self, x: Vector) -> Vector:
        """Return c."""
        return self.given.constraint(torch.from_numpy(x)).numpy()

    def jacobian(self, x: Vector) -> Vector:
        """Return G."""
        return self._jacobian(torch.from_numpy(x)).numpy()

    def hessian(self, x: Vector, multipliers: Vector) -> Vector:
        """Return the Hessian of the Lagrangian; it costs a gradient a variable."""
        self.cost["gradients"] += len(x)
        weights = torch.from_numpy(multipliers)
        return torch.func.hessian(lambda x: self.given.objective(x) + weights @ self.given.constraint(x))(
            torch.from_numpy(x)
        ).numpy()

    def look(self, x: Vector) -> bool:
        """Count an iteration and tell whether it stands on a solution; looking is free."""
        self.cost["iterations"] += 1
        if not self.watch:
            return False
        slope = torch.func.grad(self.given.objective)(torch.from_numpy(x)).numpy()
        G = self.jacobian(x)
        multipliers = np.linalg.lstsq(G.T, -slope, rcond=None)[0]
        self.residual = math.hypot(np.linalg.norm(slope + G.T @ multipliers), np.linalg.norm(self.constraint(x)))
        if self.residual <= TOLERANCE and self.reached is None:
            self.reached = dict(self.cost)
        return self.reached is not None


class Reached(Exception):  # noqa: N818
    """A solver stands on a solution, and need not go on."""


class Peer:
    """A solver that speaks NumPy, on the two problems whose evaluations are compared.

    Args:
        solve: Called with the counted problem and the start; calls ``look`` after every iteration. May return step
            sizes.
    """

    def __init__(self, solve: Callable[[Counted, Vector], list[float] | None]) -> None:
        self.solve = solve

    def __call__(self, data: Mapping[str, Problem], run: Run) -> Outcome:
        """Count iterations and evaluations until a solution is reached, or until it gives up."""
        found: dict[str, float] = {}
        for name in (MARATOS, LOGISTIC):
            counted, steps = Counted(data[name]), None
            with contextlib.suppress(Reached):
                steps = self.solve(counted, data[name].x0.numpy().copy())
            cost = counted.reached or counted.cost
            if name == MARATOS:
                found[ITERATIONS] = cost["iterations"]
                if steps is not None:
                    found[FULL_STEPS] = float(np.mean(np.array(steps) == 1))
            else:
                found[POINTS], found[GRADIENTS] = cost["points"], cost["gradients"]
                found[KKT] = math.log10(counted.residual)
        return _outcome(found)


def _outcome(found: Mapping[str, float], curves: Mapping[str, list[float]] | None = None) -> Outcome:
    """Fill in what a contender does not measure."""
    return Outcome({metric.name: float(found.get(metric.name, math.nan)) for metric in METRICS}, curves or {})


def slsqp(counted: Counted, x: Vector, *, max_iter: int = 500) -> None:
    """Minimise by sequential least squares, quasi-Newton."""

    def look(x: Vector) -> None:
        if counted.look(x):
            raise Reached

    optimize.minimize(
        counted.value, x, jac=counted.gradient, method="SLSQP", callback=look,
        constraints={"type": "eq", "fun": counted.constraint, "jac": counted.jacobian},
        options={"maxiter": max_iter, "ftol": 1e-14},
    )  # fmt: skip


def trust_constr(counted: Counted, x: Vector, *, max_iter: int = 500) -> None:
    """Minimise by a trust region with exact Hessians."""
    zero = np.zeros(len(counted.constraint(x)))

    def of_constraints(x: Vector, multipliers: Vector) -> Vector:
        weights = torch.from_numpy(np.asarray(multipliers))
        return torch.func.hessian(lambda x: weights @ counted.given.constraint(x))(torch.from_numpy(x)).numpy()

    optimize.minimize(
        counted.value, x, jac=counted.gradient, hess=lambda x: counted.hessian(x, zero), method="trust-constr",
        constraints=optimize.NonlinearConstraint(counted.constraint, 0, 0, jac=counted.jacobian, hess=of_constraints),
        callback=lambda x, state: counted.look(x), options={"maxiter": max_iter, "gtol": 1e-10, "xtol": 1e-14},
    )  # fmt: skip


def multiplier_method(counted: Counted, x: Vector) -> None:
    """Minimise the ordinary augmented Lagrangian by L-BFGS, then move the multipliers; its weight grows if it must."""
    multipliers, weight = np.zeros(len(counted.constraint(x))), 10.0
    violation = math.inf

    def look(x: Vector) -> None:
        if counted.look(x):
            raise Reached

    for _ in range(30):

        def merit(x: Vector, multipliers: Vector = multipliers, weight: float = weight) -> tuple[float, Vector]:
            c = counted.constraint(x)
            value = counted.value(x) + float(multipliers @ c + weight / 2 * c @ c)
            return value, counted.gradient(x) + (multipliers + weight * c) @ counted.jacobian(x)

        options = {"maxiter": 500, "gtol": 1e-8, "ftol": 1e-15}
        x = optimize.minimize(merit, x, jac=True, method="L-BFGS-B", callback=look, options=options).x
        c = counted.constraint(x)
        multipliers = multipliers + weight * c
        if np.linalg.norm(c) > 0.25 * violation:
            weight *= 10
        violation = float(np.linalg.norm(c))


def l1_sqp(counted: Counted, x: Vector) -> list[float]:
    """Take the same Newton steps, judged by f + mu |c|_1, mu 10 or a tenth more than the largest multiplier."""
    G = counted.jacobian(x)
    multipliers = np.linalg.lstsq(G.T, -counted.gradient(x), rcond=None)[0]
    steps, mu = [], 10.0
    for _ in range(200):
        g = counted.gradient(x)
        if counted.look(x):
            break
        G, c, H = counted.jacobian(x), counted.constraint(x), counted.hessian(x, multipliers)
        null = np.linalg.svd(G)[2][len(c) :].T
        lowest = np.linalg.eigvalsh(null.T @ H @ null)[0]
        if lowest < 1e-6:
            H = H + (0.1 + abs(lowest) - lowest) * np.eye(len(x))
        matrix = np.block([[H, G.T], [G, np.zeros((len(c), len(c)))]])
        move, multipliers_there = np.split(np.linalg.solve(matrix, -np.concatenate([g, c])), [len(x)])
        mu = max(mu, 1.1 * float(np.abs(multipliers_there).max()))
        value, slope, size = counted.value(x) + mu * np.abs(c).sum(), g @ move - mu * np.abs(c).sum(), 1.0
        while size > 1e-10:
            there = x + size * move
            if counted.value(there) + mu * np.abs(counted.constraint(there)).sum() <= value + 0.1 * size * slope:
                break
            counted.cost["points"] += 1
            size /= 2
        x, multipliers = x + size * move, multipliers + size * (multipliers_there - multipliers)
        steps.append(size)
    return steps


class Newton:
    """The exact augmented Lagrangian, its systems solved in one of the ways.

    Args:
        sketch: How the Newton systems are solved.
        share: Columns of the sketch over the size of the system; None for the default.
        without: Problems on which it would take minutes, left out.
    """

    def __init__(self, sketch: Sketch, *, share: float | None = None, without: tuple[str, ...] = ()) -> None:
        self.sketch, self.share, self.without = sketch, share, without

    def __call__(self, data: Mapping[str, Problem], run: Run) -> Outcome:
        """Solve every problem and count."""
        found: dict[str, float] = {}
        curves = {}
        for name, given in data.items():
            if name in self.without:
                continue
            size = len(given.x0) + len(given.constraint(given.x0))
            solver = ExactALNewton(
                sketch=self.sketch,
                sketch_size=None if self.share is None else max(1, round(self.share * size)),
                max_inner_iter=MOST_ROWS,
                generator=torch.Generator().manual_seed(run.stream(name)),
            )
            result = solver.minimize(given.objective, given.constraint, given.x0, tolerance=TOLERANCE, max_iter=100)
            curves[f"log10 KKT residual, {name}"] = [
                math.log10(max(residual, 1e-16))
                for residual in [*(step.kkt_residual for step in result.history), result.kkt_residual]
            ]
            if name == MARATOS:
                found[ITERATIONS] = result.iterations
                found[FULL_STEPS] = float(np.mean([step.step_size == 1 for step in result.history]))
                continue
            # What did not arrive is left out: the flops of giving up are no price of a solution.
            if result.status.success:
                found[FLOPS[name]] = math.log10(result.inner_flops)
            if name == LOGISTIC:
                found[POINTS] = result.evaluations["gradient"]
                found[GRADIENTS] = result.evaluations["gradient"] + len(given.x0) * result.evaluations["hessian"]
                found[KKT] = math.log10(max(result.kkt_residual, 1e-16))
        return _outcome(found, curves)


def _minres_flops(matrix: Vector, target: Vector) -> float:
    """Return log10 of the flops until the residual is small enough; NaN if it never is."""
    products = 0
    arrived: list[int] = []

    def product(v: Vector) -> Vector:
        nonlocal products
        products += 1
        return matrix @ v

    # Its own test of the residual stops late or early: it is asked for more, and looked at after every iteration.
    def look(z: Vector) -> None:
        if not arrived and np.linalg.norm(matrix @ z - target) <= TOLERANCE:
            arrived.append(products)

    size = len(target)
    operator = LinearOperator(matrix.shape, matvec=product, dtype=np.float64)
    minres(operator, target, rtol=1e-14, maxiter=5 * size, callback=look)
    return math.log10(arrived[0] * (2 * size**2 + 20 * size)) if arrived else math.nan


def with_minres(data: Mapping[str, Problem], run: Run) -> Outcome:
    """Solve the one Newton system of each control problem by MINRES, its products counted as those of full matrices."""
    found = {}
    for name in (COARSE, FINE):
        given = data[name]
        G = torch.func.jacrev(given.constraint)(given.x0).numpy()
        H = torch.func.hessian(given.objective)(given.x0).numpy()
        matrix = np.block([[H, G.T], [G, np.zeros((len(G), len(G)))]])
        target = -np.concatenate(
            [torch.func.grad(given.objective)(given.x0).numpy(), given.constraint(given.x0).numpy()]
        )
        found[FLOPS[name]] = _minres_flops(matrix, target)
    return _outcome(found)


METRICS = (
    Metric(ITERATIONS, "lower is better"),
    Metric(FULL_STEPS, "higher is better", "%"),
    Metric(POINTS, "lower is better"),
    Metric(GRADIENTS, "lower is better"),
    Metric(KKT, "lower is better"),
    *(Metric(name, "lower is better") for name in FLOPS.values()),
)


def _fewer_flops(contender: str, name: str, says: str, beats: str = "direct") -> Claim:
    return Claim(contender, beats=beats, metric=FLOPS[name], says=says)


study = Study(
    method="sketched-newton",
    problem=problem,
    contenders={
        "l1-sqp": Peer(l1_sqp),
        "multiplier method": Peer(multiplier_method),
        "slsqp": Peer(slsqp),
        "trust-constr": Peer(trust_constr),
        "minres": with_minres,
        "direct": Newton("full"),
        "gaussian, s = 3N/4": Newton("gaussian", without=(EASY, LARGE)),
        "block, s = 3N/4": Newton("block", without=(FINE, EASY, LARGE)),
        "block, s = N/4": Newton("block", share=0.25, without=(FINE, EASY, LARGE)),
        "kaczmarz": Newton("kaczmarz", without=(FINE,)),
    },
    metrics=METRICS,
    claims=(
        Claim("direct", "l1-sqp", ITERATIONS, 10, "Maratos: more than ten iterations fewer than with an l1 merit"),
        Claim("direct", "l1-sqp", FULL_STEPS, 0.5, "Maratos: steps are taken in full, those of the l1 merit are not"),
        Claim("direct", "slsqp", ITERATIONS, 0, "Maratos: fewer iterations than SLSQP"),
        Claim("direct", "l1-sqp", POINTS, 0, "logistic: fewer points evaluated than l1-SQP with the same steps"),
        Claim("direct", "multiplier method", POINTS, 0, "logistic: fewer points than the multiplier method"),
        Claim("direct", "slsqp", POINTS, 0, "logistic: fewer points than SLSQP"),
        Claim("direct", "trust-constr", POINTS, 0, "logistic: fewer points than trust-constr"),
        Claim("direct", "slsqp", GRADIENTS, 0, "logistic: fewer gradients than SLSQP, a Hessian counted as 30"),
        _fewer_flops("gaussian, s = 3N/4", LOGISTIC, "logistic: Gaussian sketches need fewer flops than direct solves"),
        _fewer_flops("block, s = N/4", LOGISTIC, "logistic: blocks need fewer flops than direct solves"),
        _fewer_flops("kaczmarz", LOGISTIC, "logistic: Kaczmarz needs fewer flops than direct solves"),
        _fewer_flops("block, s = 3N/4", COARSE, "control, 27 unknowns: blocks need fewer flops than a direct solve"),
        _fewer_flops("kaczmarz", COARSE, "control, 27 unknowns: Kaczmarz needs fewer flops than a direct solve"),
        _fewer_flops("gaussian, s = 3N/4", FINE, "control, 300 unknowns: Gaussian sketches need fewer flops"),
        _fewer_flops("gaussian, s = 3N/4", FINE, "control, 300 unknowns: fewer flops than MINRES", "minres"),
        _fewer_flops("minres", FINE, "control, 300 unknowns: MINRES needs fewer flops than a direct solve"),
        _fewer_flops("kaczmarz", EASY, "500 unknowns, well-conditioned: Kaczmarz needs fewer flops than direct solves"),
        _fewer_flops(
            "kaczmarz", LARGE, "1500 unknowns, well-conditioned: Kaczmarz needs fewer flops than direct solves"
        ),
    ),
    seeds=5,
    about=(
        "Maratos' circle, logistic regression on the unit sphere under ten equations, control of a Poisson equation, "
        "and well-conditioned systems of 500 and 1500 unknowns; to a KKT residual of 1e-6."
    ),
    notes=(
        "Every seed draws the start on the circle, the ten equations, the wanted state and the well-conditioned "
        "problems anew. A solver's points are those at which it took a gradient or tried a step. Flops are those of "
        "solving the Newton systems, counted as the operations that are carried out; factorisations that test "
        "curvature and rank, alike for all ways of solving, are left out. Systems for blocks and Kaczmarz are "
        "equilibrated first, which the paper does not do: without, Kaczmarz does not arrive on the control problems. "
        "Ways that do not arrive, or were not tried because they would take minutes, have no flops. MINRES solves the "
        "one system of the quadratic control problem, as it is; its products are counted as those of full matrices, "
        "though the matrix is sparse. CUTEst problems are in the benchmark. None of the paper's numbers is reproduced: "
        "its figures are box plots of other problems, of an implementation in Julia."
    ),
)
