"""Sketch-and-project against direct solves, projections taken one at a time, and its proven rate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.constraints import sketch_and_project
from minimand.constraints.sketch import _equilibrated
from minimand.stopping import Stop


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def system(seed, equations=12, unknowns=12, dtype=torch.float64):
    draw = seeded(seed)
    matrix = torch.randn(equations, unknowns, generator=draw, dtype=dtype)
    solution = torch.randn(unknowns, generator=draw, dtype=dtype)
    return matrix, solution, matrix @ solution


def kkt(seed, n=8, m=4):
    draw = seeded(seed)
    G = torch.randn(m, n, generator=draw, dtype=torch.float64)
    H = torch.randn(n, n, generator=draw, dtype=torch.float64)
    matrix = torch.zeros(n + m, n + m, dtype=torch.float64)
    matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = H + H.T, G.T, G
    return matrix, torch.randn(n + m, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("sketch", ["full", "gaussian", "block"])
def test_a_sketch_of_all_equations_solves_in_one_step(sketch):
    matrix, target = kkt(0)
    size = None if sketch == "full" else 12
    found = sketch_and_project(
        matrix, target, sketch=sketch, sketch_size=size, max_iter=1, tolerance=1e-8, generator=seeded(1)
    )
    assert found.status is Stop.CONVERGED
    assert found.iterations == 1
    torch.testing.assert_close(found.solution, torch.linalg.solve(matrix, target), rtol=1e-8, atol=1e-10)


def test_a_full_solve_of_a_matrix_that_is_not_symmetric():
    matrix, solution, target = system(3)
    found = sketch_and_project(matrix, target, sketch="full", tolerance=1e-10)
    torch.testing.assert_close(found.solution, solution)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 11), sketch=st.sampled_from(["gaussian", "block"]))
def test_a_step_projects_orthogonally_onto_the_sketched_equations(seed, size, sketch):
    matrix, solution, target = system(seed)
    start = torch.randn(12, generator=seeded(seed + 1), dtype=torch.float64)
    found = sketch_and_project(
        matrix, target, sketch=sketch, sketch_size=size, initial=start, max_iter=1, tolerance=0.0, generator=seeded(7)
    ).solution
    if sketch == "gaussian":
        S = torch.randn(size, 12, generator=seeded(7), dtype=torch.float64).T
    else:
        S = torch.eye(12, dtype=torch.float64)[:, torch.randperm(12, generator=seeded(7))[:size]]
    sketched = S.T @ matrix
    scale = 1 + float((S.T @ target).norm())
    assert float((sketched @ found - S.T @ target).norm()) <= 1e-10 * scale
    by_formula = start - matrix.T @ S @ torch.linalg.pinv(S.T @ matrix @ matrix.T @ S) @ S.T @ (matrix @ start - target)
    # The formula's products square the condition of the rows.
    torch.testing.assert_close(found, by_formula, rtol=1e-4, atol=1e-4)
    assert (found - solution).norm() <= (start - solution).norm() * (1 + 1e-12)
    assert (start - solution).square().sum() == pytest.approx(
        float((found - solution).square().sum() + (start - found).square().sum()), rel=1e-8
    )


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 40])
def test_kaczmarz_steps_taken_together_are_steps_taken_one_after_the_other(steps):
    matrix, _, target = system(5, 40, 40)
    found = sketch_and_project(
        matrix, target, sketch="kaczmarz", max_iter=steps, tolerance=0.0, generator=seeded(2)
    )  # fmt: skip
    z = torch.zeros(40, dtype=torch.float64)
    for i in torch.multinomial(matrix.square().sum(1), steps, replacement=True, generator=seeded(2)):
        z = z - (matrix[i] @ z - target[i]) / matrix[i].square().sum() * matrix[i]
    assert found.iterations == steps
    torch.testing.assert_close(found.solution, z, rtol=1e-10, atol=1e-12)


def test_a_kaczmarz_step_contracts_as_fast_as_proven():
    matrix, solution, target = system(11, 6, 6)
    matrix = matrix * torch.tensor([1.0, 2, 0.5, 1, 3, 1], dtype=torch.float64)[:, None]
    target = matrix @ solution
    draw = seeded(0)
    ratios = (
        torch.stack(
            [
                sketch_and_project(
                    matrix, target, sketch="kaczmarz", max_iter=1, tolerance=0.0, generator=draw
                ).solution
                - solution
                for _ in range(2000)
            ]
        )
        .square()
        .sum(1)
        / solution.square().sum()
    )
    singular = torch.linalg.svdvals(matrix)
    bound = 1 - singular[-1] ** 2 / matrix.square().sum()
    error = ratios.std() / 2000**0.5
    assert ratios.mean() <= bound + 3 * error
    # Equal in expectation to the formula with all of A in place of its least singular value.
    exact = 1 - (matrix @ solution).square().sum() / (matrix.square().sum() * solution.square().sum())
    assert abs(ratios.mean() - exact) <= 4 * error


def test_a_kaczmarz_row_is_drawn_in_proportion_to_its_squared_norm():
    """From zero on orthogonal rows the step tells which row was drawn; a zero row never is."""
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    draw, hits = seeded(0), torch.zeros(3)
    for _ in range(1000):
        hits += sketch_and_project(
            matrix, matrix.sum(1), sketch="kaczmarz", max_iter=1, tolerance=0.0, generator=draw
        ).solution  # fmt: skip
    assert hits.sum() == 1000
    assert hits[2] == 0
    assert abs(hits[0] / 1000 - 0.8) < 0.05


@pytest.mark.parametrize("sketch", ["gaussian", "block", "kaczmarz"])
@pytest.mark.parametrize(("equations", "unknowns"), [(20, 10), (10, 20)])
def test_consistent_systems_of_any_shape_are_solved_at_the_least_distance(sketch, equations, unknowns):
    matrix, _, target = system(1, equations, unknowns)
    size = None if sketch == "kaczmarz" else 5
    found = sketch_and_project(
        matrix, target, sketch=sketch, sketch_size=size, tolerance=1e-9, generator=seeded(0)
    )  # fmt: skip
    assert found.status is Stop.CONVERGED
    torch.testing.assert_close(found.solution, torch.linalg.pinv(matrix) @ target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sketch", ["gaussian", "block", "kaczmarz"])
def test_equilibration_solves_the_system_as_it_came(sketch):
    """Rows and columns of wildly different size: hopeless as they are, easy once scaled."""
    matrix, solution, _ = system(4, 10, 10)
    matrix = matrix + 10 * torch.eye(10, dtype=torch.float64)
    matrix = torch.logspace(-3, 3, 10, dtype=torch.float64)[:, None] * matrix
    matrix = matrix * torch.logspace(2, -2, 10, dtype=torch.float64)
    target = matrix @ solution
    settings_ = {"sketch": sketch, "sketch_size": 1 if sketch == "kaczmarz" else 3, "tolerance": 1e-8}
    found = sketch_and_project(matrix, target, equilibrate=True, max_iter=5000, generator=seeded(0), **settings_)
    assert found.status is Stop.CONVERGED
    assert float((matrix @ found.solution - target).norm()) <= 1e-8 * float(target.norm())
    plain = sketch_and_project(matrix, target, max_iter=5000, generator=seeded(0), **settings_)
    assert plain.status is Stop.ITERATION_LIMIT


def test_equilibration_makes_norms_alike_and_leaves_zeros_alone():
    matrix = torch.tensor([[1e4, 2.0, 0.0], [3.0, 1e-3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    scaled, rows, columns = _equilibrated(matrix)
    torch.testing.assert_close(scaled, rows[:, None] * matrix * columns)
    assert scaled[:2, :2].norm(dim=1).std() < 0.2
    assert torch.isfinite(rows).all()
    assert torch.isfinite(columns).all()


def test_equations_that_repeat_do_no_harm():
    matrix, _, _ = system(2, 4, 8)
    matrix = torch.cat([matrix, matrix])
    target = matrix.sum(1)
    found = sketch_and_project(matrix, target, sketch="block", sketch_size=8, tolerance=1e-10)
    assert found.iterations == 1
    torch.testing.assert_close(matrix @ found.solution, target)


@pytest.mark.parametrize("sketch", ["full", "block"])
def test_a_singular_system_without_solution_is_told(sketch):
    matrix, target = torch.ones(2, 2), torch.tensor([1.0, -1.0])
    found = sketch_and_project(matrix, target, sketch=sketch, max_iter=50)
    assert found.status in (Stop.STALLED, Stop.ITERATION_LIMIT)
    assert not found.status.success


def test_flops_are_those_of_the_documented_formulas():
    matrix, target = kkt(0, 20, 10)
    N = 30

    def flops(sketch, steps, size=None):
        return sketch_and_project(
            matrix, target, sketch=sketch, sketch_size=size, max_iter=steps, tolerance=0.0, generator=seeded(0)
        ).flops

    residual = 2 * N**2
    assert flops("full", 1) == N**3 // 3 + 2 * N**2 + 2 * residual
    projection = 4 * N * 15**2 - 4 * 15**3 // 3 + 15**2 + 4 * N * 15
    assert flops("block", 2, 15) == 2 * projection + 2 * residual
    assert flops("gaussian", 2, 15) == 2 * (projection + 2 * N * N * 15 + 2 * N * 15) + 2 * residual
    together = 3 * 8**2 + 6**2
    found = sketch_and_project(matrix, target, equilibrate=True, max_iter=0, generator=seeded(0))
    assert found.flops == 30 * N**2 + residual
    assert flops("kaczmarz", N) == 2 * together * N + together + 4 * N * N + 2 * residual


@pytest.mark.parametrize("sketch", ["full", "gaussian", "block", "kaczmarz"])
def test_what_is_right_already_is_left_alone(sketch):
    matrix, solution, target = system(0)
    found = sketch_and_project(matrix, target, sketch=sketch, initial=solution, tolerance=1e-12)
    assert found.iterations == 0
    assert torch.equal(found.solution, solution)
    nothing = sketch_and_project(matrix, torch.zeros_like(target), sketch=sketch)
    assert nothing.status is Stop.CONVERGED
    assert not nothing.solution.any()


@pytest.mark.untyped
def test_bad_arguments_are_refused_by_name():
    matrix, target = torch.eye(3), torch.ones(3)
    for change, message in (
        ({"target": torch.ones(2)}, "target"),
        ({"matrix": torch.eye(3) * float("nan")}, "matrix contains NaN"),
        ({"target": target * float("inf")}, "target contains NaN"),
        ({"sketch": "sparse"}, "sketch must be one of"),
        ({"sketch_size": 0}, "sketch_size"),
        ({"sketch_size": 4}, "sketch_size"),
        ({"sketch": "kaczmarz", "sketch_size": 2}, "sketch_size"),
        ({"sketch": "kaczmarz", "matrix": torch.zeros(3, 3)}, "matrix is zero"),
        ({"sketch": "full", "matrix": torch.ones(3, 2)}, "square"),
        ({"initial": torch.ones(2)}, "initial"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"max_iter": -1}, "max_iter"),
    ):
        with pytest.raises(ValueError, match=message):
            sketch_and_project(**{"matrix": matrix, "target": target, **change})
    with pytest.raises(TypeError, match="floating"):
        sketch_and_project(torch.eye(3, dtype=torch.long), target)
