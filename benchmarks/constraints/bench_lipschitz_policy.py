"""The exact Lipschitz regression against a conic and a quadratic solver on the same pairs, in the same run."""

import cvxpy
import pytest
import torch

from benchmarks.timing import paired_ratio
from minimand.constraints import lipschitz_regression


def demonstrations(count, controls):
    draw = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(count, 2, generator=draw, dtype=torch.float64) - 2
    u = x @ torch.tensor([[1.0], [3.0]], dtype=torch.float64).expand(2, controls)
    return x, u + 0.5 * torch.randn(u.shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("controls", "solver"), [(1, "OSQP"), (1, "CLARABEL"), (2, "CLARABEL")])
def test_the_exact_problem_is_solved_faster(record, controls, solver):
    """150 states, all 11,175 pairs, a bound that binds: an equal optimum, in less time."""
    x, u = demonstrations(150, controls)
    v = cvxpy.Variable(u.shape)
    first, second = (side.numpy() for side in torch.triu_indices(len(x), len(x), 1))
    reach = 2.0 * (x[first] - x[second]).norm(dim=1).numpy()
    difference = v[first] - v[second]
    size = cvxpy.abs(difference[:, 0]) if controls == 1 else cvxpy.norm(difference, axis=1)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(v - u.numpy()) / len(x)), [size <= reach])
    # The peer's own compilation is not timed: its second call solves the same compiled problem.
    problem.solve(solver=solver)
    ours = lipschitz_regression(x, u, lipschitz=2.0)
    assert ours.error == pytest.approx(problem.value, rel=1e-3)
    ratio = paired_ratio(
        lambda: lipschitz_regression(x, u, lipschitz=2.0),
        lambda: problem.solve(solver=solver, warm_start=False),
        rounds=3,
        warmup=0,
    )
    record(f"Lipschitz regression, 150 states, {controls} control(s), against {solver}", ratio.median, unit="x",
           target="<= 1")  # fmt: skip
    record(f"Lipschitz regression, 150 states, {controls} control(s), ours", ratio.ours_seconds, unit="s")
    assert ratio.median <= 1.0
