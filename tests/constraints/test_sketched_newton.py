"""Newton steps under an exact augmented Lagrangian: identities, rates, Maratos, known optima, scipy, and refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from minimand.constraints import ExactALNewton, SingularConstraintError, exact_augmented_lagrangian
from minimand.constraints.sketched_newton import _Problem
from minimand.stopping import Stop


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sphere(x):
    return (x.square().sum() - 1)[None]


def maratos(x):
    return 2 * (x.square().sum() - 1) - x[0]


def curved(seed, n=7, m=3):
    """Draw a nonconvex objective and curved constraints."""
    draw = seeded(seed)
    W, A = (torch.randn(n, n, generator=draw, dtype=torch.float64) for _ in range(2))
    C = torch.randn(m, n, generator=draw, dtype=torch.float64)
    b = torch.randn(m, generator=draw, dtype=torch.float64)

    def objective(x):
        return torch.log1p((W @ x - 1).square()).sum() + 0.1 * x.square().sum() + torch.sin(A @ x).sum()

    def constraint(x):
        return C @ x + 0.3 * (C @ x.square()) * x[0] - 0.1 * b

    return objective, constraint, torch.randn(n, generator=draw, dtype=torch.float64)


def quadratic(seed, n=9, m=4):
    draw = seeded(seed)
    W = torch.randn(n, n, generator=draw, dtype=torch.float64)
    Q, q = W @ W.T + torch.eye(n, dtype=torch.float64), torch.randn(n, generator=draw, dtype=torch.float64)
    A, b = (torch.randn(m, *size, generator=draw, dtype=torch.float64) for size in ((n,), ()))
    return Q, q, A, b


# Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes", 1981: functions, starts and optima.
HOCK_SCHITTKOWSKI = {
    "6": (lambda x: (1 - x[0]) ** 2, lambda x: (10 * (x[1] - x[0] ** 2))[None], vector(-1.2, 1), 0.0),
    "7": (
        lambda x: torch.log1p(x[0] ** 2) - x[1],
        lambda x: ((1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4)[None],
        vector(2, 2),
        -math.sqrt(3),
    ),
    "28": (
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        lambda x: (x[0] + 2 * x[1] + 3 * x[2] - 1)[None],
        vector(-4, 1, 1),
        0.0,
    ),
    "39": (
        lambda x: -x[0],
        lambda x: torch.stack([x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2]),
        vector(2, 2, 2, 2),
        -1.0,
    ),
    "40": (
        lambda x: -x.prod(),
        lambda x: torch.stack([x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]]),
        vector(0.8, 0.8, 0.8, 0.8),
        -0.25,
    ),
    "48": (
        lambda x: (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
        lambda x: torch.stack([x.sum() - 5, x[2] - 2 * (x[3] + x[4]) + 3]),
        vector(3, 5, -3, 2, -2),
        0.0,
    ),
    "77": (
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6,
        lambda x: torch.stack(
            [
                x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * math.sqrt(2),
                x[1] + x[2] ** 4 * x[3] ** 2 - 8 - math.sqrt(2),
            ]
        ),
        vector(2, 2, 2, 2, 2),
        0.24150513,
    ),
    "78": (
        lambda x: x.prod(),
        lambda x: torch.stack([x.square().sum() - 10, x[1] * x[2] - 5 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1]),
        vector(-2, 1.5, 2, -1, -1),
        -2.91970041,
    ),
    "79": (
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4,
        lambda x: torch.stack(
            [
                x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * math.sqrt(2),
                x[1] - x[2] ** 2 + x[3] + 2 - 2 * math.sqrt(2),
                x[0] * x[4] - 2,
            ]
        ),
        vector(2, 2, 2, 2, 2),
        0.0787768,
    ),
}


# ---------------------------------------------------------------------------------------------------- the merit


def test_the_merit_is_its_formula():
    objective, constraint, x = curved(0)
    multipliers = vector(0.3, -1.0, 2.0)
    g = torch.autograd.functional.jacobian(objective, x)
    G = torch.autograd.functional.jacobian(constraint, x)
    slope, c = g + G.T @ multipliers, constraint(x)
    by_hand = objective(x) + multipliers @ c + 1.5 * c @ c + 0.35 * slope @ slope
    found = exact_augmented_lagrangian(objective, constraint, x, multipliers, eta1=3.0, eta2=0.7)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)


def test_the_merit_passes_gradcheck():
    objective, constraint, x = curved(1)
    leaves = (x.requires_grad_(), vector(0.3, -1.0, 2.0).requires_grad_())
    assert torch.autograd.gradcheck(lambda *z: exact_augmented_lagrangian(objective, constraint, *z, eta2=0.7), leaves)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), eta1=st.floats(0.1, 10), eta2=st.floats(0.01, 5))
def test_the_slope_is_the_derivative_of_the_merit_with_the_hessian_of_the_lagrangian(seed, eta1, eta2):
    objective, constraint, x = curved(seed)
    multipliers = torch.randn(3, generator=seeded(seed), dtype=torch.float64)
    problem = _Problem(objective, constraint, None, None, None)
    point = problem.first(x, multipliers)
    system = ExactALNewton()._system(problem, point, 0)
    leaves = (x.clone().requires_grad_(), multipliers.clone().requires_grad_())
    merit = exact_augmented_lagrangian(objective, constraint, *leaves, eta1=eta1, eta2=eta2)
    by_autograd = torch.cat(torch.autograd.grad(merit, leaves))
    torch.testing.assert_close(point.merit_gradient(system, eta1, eta2), by_autograd, rtol=1e-10, atol=1e-10)
    assert point.merit(eta1, eta2) == pytest.approx(float(merit.detach()), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), eta1=st.floats(0.1, 10), eta2=st.floats(0.01, 5))
def test_the_exact_step_descends_by_the_identity(seed, eta1, eta2):
    """Slope = -dx' H dx + 2 c' dlam - eta1 |c|^2 - eta2 |grad_x L|^2, derived from the Newton system."""
    objective, constraint, x = curved(seed)
    problem = _Problem(objective, constraint, None, None, None)
    point = problem.first(x, torch.ones(3, dtype=torch.float64))
    system = ExactALNewton()._system(problem, point, 0)
    H, G, c, slope = system.hessian, system.jacobian, point.constraint, point.gradient
    matrix = torch.cat([torch.cat([H, G.T], 1), torch.cat([G, torch.zeros(3, 3, dtype=torch.float64)], 1)])
    move = torch.linalg.solve(matrix, -torch.cat([slope, c]))
    dx, dlam = move[:7], move[7:]
    identity = -dx @ H @ dx + 2 * c @ dlam - eta1 * c @ c - eta2 * slope @ slope
    size = float(dx @ dx * H.norm() + c.norm() * dlam.norm() + identity.abs())
    assert abs(float(point.merit_gradient(system, eta1, eta2) @ move - identity)) <= 1e-10 * max(1.0, size)


@pytest.mark.parametrize(("eta1", "eta2"), [(0.0, 0.0), (1.0, 0.1), (50.0, 3.0)])
def test_a_solution_is_stationary_for_every_weight_and_the_merit_there_is_the_objective(eta1, eta2):
    x, multipliers = vector(1, 0).requires_grad_(), vector(-1.5).requires_grad_()
    merit = exact_augmented_lagrangian(maratos, sphere, x, multipliers, eta1=eta1, eta2=eta2)
    assert float(merit.detach()) == float(maratos(x.detach())) == -1.0
    for slope in torch.autograd.grad(merit, (x, multipliers)):
        assert not slope.any()


def test_the_merit_is_minimised_by_any_optimizer():
    x, multipliers = vector(0.6, 0.9).requires_grad_(), vector(-1.0).requires_grad_()
    optimizer = torch.optim.LBFGS([x, multipliers], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        merit = exact_augmented_lagrangian(maratos, sphere, x, multipliers, eta1=4.0)
        merit.backward()
        return merit

    optimizer.step(closure)
    torch.testing.assert_close(x.detach(), vector(1, 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(multipliers.detach(), vector(-1.5), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("sketch", ["full", "gaussian", "block"])
def test_a_quadratic_under_linear_constraints_takes_one_full_step(sketch):
    Q, q, A, b = quadratic(0)
    size = None if sketch == "full" else 13
    solver = ExactALNewton(sketch=sketch, sketch_size=size, generator=seeded(0))
    found = solver.minimize(
        lambda x: x @ Q @ x / 2 + q @ x, lambda x: A @ x - b, torch.zeros(9, dtype=torch.float64), tolerance=1e-8
    )
    assert [step.step_size for step in found.history] == [1.0]
    zero = torch.zeros(4, 4, dtype=torch.float64)
    exact = torch.linalg.solve(torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, zero], 1)]), torch.cat([-q, b]))
    torch.testing.assert_close(torch.cat([found.x, found.multipliers]), exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("angle", "iterations"), [(0.5, 5), (0.1, 4), (0.01, 3)])
def test_maratos_takes_full_steps_only(angle, iterations):
    x0 = vector(math.cos(angle), math.sin(angle))
    found = ExactALNewton().minimize(maratos, sphere, x0, vector(-1.5), tolerance=1e-10)
    assert [step.step_size for step in found.history] == [1.0] * iterations
    assert found.kkt_residual < 1e-14
    torch.testing.assert_close(found.x, vector(1, 0), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.multipliers, vector(-1.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("number", HOCK_SCHITTKOWSKI)
def test_optima_of_hock_and_schittkowski_are_found(number):
    objective, constraint, x0, optimum = HOCK_SCHITTKOWSKI[number]
    found = ExactALNewton().minimize(objective, constraint, x0, tolerance=1e-8)
    assert found.status is Stop.CONVERGED
    assert found.objective == pytest.approx(optimum, abs=1e-6)
    assert float(constraint(found.x).norm()) <= 1e-8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sketch", ["full", "gaussian", "block", "kaczmarz"])
@pytest.mark.parametrize("constants", ["practical", "theory"])
def test_every_accepted_step_descends_and_keeps_armijo(seed, sketch, constants):
    objective, constraint, x0 = curved(seed, 4, 2)
    seen = []
    solver = ExactALNewton(sketch=sketch, constants=constants, generator=seeded(seed), max_inner_iter=500)
    found = solver.minimize(objective, constraint, x0, max_iter=12, callback=seen.append)
    assert tuple(seen) == found.history
    assert seen
    for step in seen:
        assert step.slope <= -step.eta2 / 2 * step.kkt_residual**2
        slack = 1e-14 * abs(step.merit)
        assert step.merit_after <= step.merit + step.step_size * solver.armijo * step.slope + slack
    weights = [(step.eta1, -step.eta2) for step in seen]
    assert weights == sorted(weights)


def test_the_residual_asked_of_the_newton_system_is_reached():
    objective, constraint, x0 = curved(1)
    solver = ExactALNewton(sketch="gaussian", sketch_size=8, generator=seeded(0), forcing=0.5)
    found = solver.minimize(objective, constraint, x0)
    assert found.status is Stop.CONVERGED
    for step in found.history:
        assert step.inner_residual <= step.accuracy <= 0.05
    assert found.inner_iterations == sum(step.inner_iterations for step in found.history)


def test_the_constants_of_the_theory_are_the_papers():
    objective, constraint, x0 = curved(1)
    problem, solver = _Problem(objective, constraint, None, None, None), ExactALNewton(constants="theory")
    found = solver.minimize(objective, constraint, x0, multipliers0=vector(1, 1, 1), max_iter=1)
    first = found.history[0]
    H, G = problem.hessian_at(x0, vector(1, 1, 1)), torch.func.jacrev(constraint)(x0)
    null = torch.linalg.svd(G).Vh[3:].T
    indefinite = torch.linalg.eigvalsh(null.T @ H @ null)[0] < 1e-6
    assert first.shift == pytest.approx(0.1 + float(H.norm()) if indefinite else 0.0)
    B = H + first.shift * torch.eye(7, dtype=torch.float64)
    A = torch.cat([torch.cat([B, G.T], 1), torch.cat([G, torch.zeros(3, 3, dtype=torch.float64)], 1)])
    psi = 20 * max(float(B.norm()) ** 2, 1) / (min(float(torch.linalg.eigvalsh(G @ G.T)[0]), 1) * 0.1)
    upsilon = max(float(G.norm()), float(H.norm()), 1)
    trial = 0.4 * first.eta2 / ((1 + first.eta1 + first.eta2) * upsilon**2 * psi**2)
    system = solver._system(problem, problem.first(x0, vector(1, 1, 1)), 0)
    assert system.tightest(0.1, first.eta1, first.eta2) == pytest.approx(trial, rel=1e-9)
    assert first.accuracy == pytest.approx(max(trial, 1e-6) / (float(A.norm()) * psi), rel=1e-9)


def rates(forcing, seed=0):
    x0 = vector(math.cos(0.05), math.sin(0.05))
    solver = ExactALNewton(sketch="kaczmarz", equilibrate=False, forcing=forcing, generator=seeded(seed))
    found = solver.minimize(maratos, sphere, x0, vector(-1.5), tolerance=1e-12)
    return np.array([step.kkt_residual for step in found.history] + [found.kkt_residual]), found.history


def test_a_fixed_forcing_converges_at_its_rate_and_a_vanishing_one_faster_than_any():
    """Near the solution the next residual is that of the Newton system plus a term of second order."""
    for forcing in (1.0, 0.1, lambda k, kkt: min(1.0, kkt), lambda k, kkt: 0.5**k):
        residuals, history = rates(forcing)
        accuracy = np.array([step.accuracy for step in history])
        assert (residuals[1:] <= accuracy * residuals[:-1] + 3 * residuals[:-1] ** 2 + 1e-15).all()
    linear, quadratic = rates(1.0)[0], rates(lambda k, kkt: min(1.0, kkt))[0]
    assert len(linear) - 1 >= 8
    assert len(quadratic) - 1 <= 5
    assert (np.diff(np.diff(np.log(quadratic[quadratic > 1e-14]))) < 0).all()


def test_turning_the_coordinates_turns_the_path():
    objective, constraint, x0 = curved(1)
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=seeded(0), dtype=torch.float64))
    plain = ExactALNewton().minimize(objective, constraint, x0)
    turned = ExactALNewton().minimize(lambda y: objective(turn @ y), lambda y: constraint(turn @ y), turn.T @ x0)
    ours, theirs = ([step.kkt_residual for step in found.history] for found in (plain, turned))
    assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-8)
    torch.testing.assert_close(turn @ turned.x, plain.x, rtol=1e-8, atol=1e-8)


def test_turning_the_coordinates_leaves_the_distribution_of_gaussian_paths():
    Q, q, A, b = quadratic(1, 5, 2)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=seeded(0), dtype=torch.float64))

    def second(objective, constraint, seed):
        solver = ExactALNewton(
            sketch="gaussian", sketch_size=3, equilibrate=False, accuracy=0.5, generator=seeded(seed)
        )
        found = solver.minimize(objective, constraint, torch.zeros(5, dtype=torch.float64), max_iter=1)
        return math.log(found.kkt_residual)

    def f(x):
        return x @ Q @ x / 2 + q @ x

    plain = np.array([second(f, lambda x: A @ x - b, seed) for seed in range(60)])
    turned = np.array([second(lambda y: f(turn @ y), lambda y: A @ turn @ y - b, seed + 500) for seed in range(60)])
    error = math.hypot(plain.std(), turned.std()) / math.sqrt(60)
    assert abs(plain.mean() - turned.mean()) <= 3.5 * error


@pytest.mark.parametrize("seed", range(4))
def test_solutions_meet_the_conditions_and_are_no_worse_than_slsqp(seed):
    objective, constraint, x0 = curved(seed)
    found = ExactALNewton().minimize(objective, constraint, x0, tolerance=1e-9)
    assert found.status is Stop.CONVERGED
    x = found.x.clone().requires_grad_()
    lagrangian = objective(x) + found.multipliers @ constraint(x)
    assert torch.autograd.grad(lagrangian, x)[0].norm() <= 1e-9
    peer = optimize.minimize(
        lambda z: float(objective(torch.tensor(z))), found.x.numpy() + 1e-2, method="SLSQP", tol=1e-12,
        constraints={"type": "eq", "fun": lambda z: constraint(torch.tensor(z)).numpy()},
    )  # fmt: skip
    np.testing.assert_allclose(peer.x, found.x, atol=1e-4)
    assert found.objective <= peer.fun + 1e-6


def test_multipliers_are_the_price_of_the_constraints():
    def minimum(level):
        return ExactALNewton().minimize(
            maratos, lambda x: sphere(x) - level, vector(0.9, 0.1), tolerance=1e-10
        )  # fmt: skip

    slope = (minimum(1e-4).objective - minimum(-1e-4).objective) / 2e-4
    assert slope == pytest.approx(-float(minimum(0.0).multipliers), rel=1e-5)


def test_negative_curvature_along_the_constraints_is_shifted_away():
    """From next to the maximum of x_0 on the circle plain Newton would climb to it."""
    for constants in ("practical", "theory"):
        found = ExactALNewton(constants=constants).minimize(lambda x: x[0], sphere, vector(0.999, 0.04))
        assert found.status is Stop.CONVERGED
        assert found.objective == pytest.approx(-1)
        assert found.history[0].shift > 0
        assert found.history[-1].shift == 0


def test_given_derivatives_dense_or_sparse_lead_the_same_way_as_those_of_torch():
    objective, constraint, x0 = curved(5)
    plain = ExactALNewton().minimize(objective, constraint, x0)
    gradient, jacobian = torch.func.grad(objective), torch.func.jacrev(constraint)

    def hessian(x, multipliers):
        return torch.func.hessian(lambda x: objective(x) + multipliers @ constraint(x))(x)

    for given_ in (
        {"gradient": gradient},
        {"jacobian": lambda x: jacobian(x).to_sparse()},
        {"jacobian": lambda x: jacobian(x).to_sparse_csr(), "hessian": lambda *z: hessian(*z).to_sparse()},
        {"gradient": gradient, "jacobian": jacobian, "hessian": hessian},
    ):
        found = ExactALNewton().minimize(objective, constraint, x0, **given_)
        assert found.iterations == plain.iterations
        torch.testing.assert_close(found.x, plain.x, rtol=1e-9, atol=1e-9)


def test_functions_with_all_derivatives_given_may_leave_torch():
    found = ExactALNewton().minimize(
        lambda x: torch.tensor(2 * (np.square(x.numpy()).sum() - 1) - x.numpy()[0]),
        lambda x: torch.tensor([np.square(x.numpy()).sum() - 1]),
        vector(0.8, 0.5),
        gradient=lambda x: 4 * x - vector(1, 0),
        jacobian=lambda x: 2 * x[None],
        hessian=lambda x, multipliers: (4 + 2 * multipliers) * torch.eye(2, dtype=x.dtype),
    )
    assert found.status is Stop.CONVERGED
    torch.testing.assert_close(found.x, vector(1, 0), atol=1e-6, rtol=0)


def test_evaluations_are_counted():
    calls = [0]

    def objective(x):
        calls[0] += 1
        return maratos(x)

    given_ = {"gradient": lambda x: 4 * x - vector(1, 0), "jacobian": lambda x: 2 * x[None]}
    found = ExactALNewton().minimize(
        objective, sphere, vector(0.3, 0.9), hessian=lambda x, m: (4 + 2 * m) * torch.eye(2, dtype=x.dtype), **given_
    )
    halvings = sum(round(-math.log2(step.step_size)) for step in found.history)
    # One to look at the shapes, and one for the first multipliers.
    assert calls[0] - 1 == found.evaluations["objective"] == found.iterations + halvings + 2
    assert found.evaluations["hessian"] == found.iterations


def test_flops_of_the_newton_systems_are_kept_apart():
    found = ExactALNewton().minimize(maratos, sphere, vector(math.cos(0.5), math.sin(0.5)), vector(-1.5))
    assert {step.eta1 for step in found.history} == {1.0}  # or the residual would be looked at more often
    solve = 3**3 // 3 + 2 * 3**2 + 2 * 2 * 3**2
    assert found.inner_flops == solve * found.iterations
    assert found.flops > found.inner_flops


def test_as_many_constraints_as_variables_is_newton_on_the_constraints():
    found = ExactALNewton().minimize(
        lambda x: x.sum(), lambda x: torch.stack([x[0] ** 2 + x[1] ** 2 - 2, x[0] - x[1]]), vector(2.0, 0.5)
    )
    assert found.status is Stop.CONVERGED
    torch.testing.assert_close(found.x, vector(1, 1), atol=1e-6, rtol=0)


def test_single_precision_reaches_what_it_can():
    found = ExactALNewton().minimize(maratos, sphere, vector(0.8, 0.5, dtype=torch.float32), tolerance=1e-5)
    assert found.status is Stop.CONVERGED
    assert found.x.dtype == torch.float32


def test_the_path_follows_from_the_generator():
    one, two, other = (
        ExactALNewton(sketch="kaczmarz", generator=seeded(seed)).minimize(maratos, sphere, vector(0.8, 0.6)).x
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# -------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    "constraint",
    [
        lambda x: torch.stack([x[0] + x[1], 2 * x[0] + 2 * x[1]]),
        lambda x: torch.stack([x[0] + x[1], x[0] + x[1] - 1]),
        lambda x: (x[:1] - x[:1].detach()) * 0,
    ],
    ids=["redundant", "contradictory", "without gradient"],
)
@pytest.mark.parametrize("multipliers", [None, 1.0])
def test_constraints_without_independent_gradients_are_refused(constraint, multipliers):
    x0 = vector(1, 2)
    start = None if multipliers is None else torch.full_like(constraint(x0), multipliers)
    with pytest.raises(SingularConstraintError, match="linearly dependent after 0 iterations"):
        ExactALNewton().minimize(maratos, constraint, x0, start)
    assert issubclass(SingularConstraintError, ValueError)


@pytest.mark.parametrize("sketch", ["full", "gaussian", "kaczmarz"])
def test_a_problem_without_feasible_point_ends_and_does_not_claim_success(sketch):
    solver = ExactALNewton(sketch=sketch, generator=seeded(0), max_inner_iter=1000)
    try:
        found = solver.minimize(lambda x: x[0], lambda x: (x.square().sum() + 1)[None], vector(1, 2), max_seconds=5.0)
    except SingularConstraintError:
        return
    assert not found.status.success
    assert found.kkt_residual >= 1


def test_an_unbounded_problem_ends_and_does_not_claim_success():
    found = ExactALNewton().minimize(lambda x: x[0], lambda x: x[1:2], vector(0, 0), max_iter=100)
    assert not found.status.success


def test_the_time_limit_holds_inside_the_newton_system():
    """A system far too ill-conditioned for single equations: the inner solver would go on for hours."""
    scale = vector(1, 1e-4, 1e4)
    solver = ExactALNewton(sketch="kaczmarz", max_inner_iter=10**9, equilibrate=False)
    found = solver.minimize(
        lambda x: (scale * x.square()).sum() + x.sum(), lambda x: x[:1] - x[1:2] - 1, vector(1, 2, 3), max_seconds=0.3
    )
    assert found.status is Stop.TIME_LIMIT


def test_a_step_into_undefined_ground_is_cut_back():
    found = ExactALNewton().minimize(lambda x: x[0] - torch.log(x[0]) + x[1] ** 2, lambda x: x[1:] - 1, vector(3.5, 0))
    assert found.status is Stop.CONVERGED
    assert found.history[0].step_size < 1
    torch.testing.assert_close(found.x, vector(1, 1), atol=1e-6, rtol=0)


@pytest.mark.untyped
def test_bad_problems_are_refused_by_name():
    def solve(objective=maratos, constraint=sphere, x0=None, multipliers0=None, **given_):
        ExactALNewton().minimize(objective, constraint, vector(1, 2) if x0 is None else x0, multipliers0, **given_)

    for change, message in (
        ({"x0": vector(math.nan, 1)}, "x0 contains NaN"),
        ({"x0": vector()}, "x0 is empty"),
        ({"objective": lambda x: x}, "objective must return a scalar"),
        ({"objective": lambda x: maratos(x) * math.nan}, "not finite at x0"),
        ({"constraint": lambda x: x.sum()}, "constraint must return shape"),
        ({"constraint": lambda x: torch.cat([x, x])}, "there must be 1 to 2 constraints"),
        ({"constraint": lambda x: x[:0]}, "there must be 1 to 2 constraints"),
        ({"constraint": lambda x: sphere(x) * math.nan}, "not finite at x0"),
        ({"multipliers0": vector(1, 2)}, "multipliers0"),
        ({"multipliers0": vector(math.inf)}, "multipliers0 contains NaN"),
        ({"jacobian": lambda x: x}, "jacobian must return shape"),
        ({"gradient": lambda x: x[:1]}, "gradient must return shape"),
        ({"hessian": lambda x, multipliers: x}, "hessian must return shape"),
        ({"hessian": lambda x, multipliers: x.new_full((2, 2), math.nan)}, "Hessian is not finite"),
        ({"tolerance": 0.0}, "tolerance"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(**change)
    with pytest.raises(TypeError, match="floating"):
        solve(x0=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="dtype of x0"):
        solve(objective=lambda x: maratos(x).float())


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"sketch": "sparse"}, "sketch must be one of"),
        ({"sketch": "block", "sketch_size": 9}, "sketch_size"),
        ({"eta1": 0.0}, "eta1"),
        ({"eta2": -1.0}, "eta2"),
        ({"armijo": 0.5}, "armijo"),
        ({"growth": 1.0}, "growth"),
        ({"accuracy": 0.0}, "accuracy"),
        ({"forcing": 2.0}, "forcing"),
        ({"forcing": lambda k, kkt: 0.0}, "forcing"),
        ({"curvature": 0.0}, "curvature"),
        ({"constants": "paper"}, "constants"),
        ({"max_inner_iter": 0}, "max_inner_iter"),
    ],
)
def test_bad_settings_are_refused_by_name(settings_, message):
    with pytest.raises(ValueError, match=message):
        ExactALNewton(**settings_).minimize(maratos, sphere, vector(1, 2))
