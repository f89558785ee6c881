"""Lipschitz policies: the finite problem's optimum, its certificate, the extension, and bounds that the loop obeys."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.constraints import (
    LipschitzRegressor,
    Multiplier,
    closed_loop_bounds,
    fill_distance,
    fill_failure_probability,
    lipschitz_regression,
    mcshane_extension,
    measurement_attack,
    policy_error_bound,
    slope_violation,
)
from minimand.stopping import Stop

DOUBLE = torch.float64


def demonstrations(count=40, *, dims=2, controls=1, noise=0.5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(count, dims, generator=draw, dtype=DOUBLE) - 2
    gain = torch.randn(dims, controls, generator=draw, dtype=DOUBLE) * 3
    return x, x @ gain + noise * torch.randn(count, controls, generator=draw, dtype=DOUBLE)


def largest_slope(x, v):
    first, second = torch.triu_indices(len(x), len(x), 1)
    return ((v[first] - v[second]).norm(dim=1) / (x[first] - x[second]).norm(dim=1)).max().item()


@pytest.mark.parametrize("controls", [1, 2, 3])
@pytest.mark.parametrize("lipschitz", [0.3, 2.0, 6.0])
def test_no_pair_is_steeper_than_the_bound(controls, lipschitz):
    x, u = demonstrations(controls=controls)
    fit = lipschitz_regression(x, u, lipschitz=lipschitz)
    assert fit.status is Stop.CONVERGED
    assert largest_slope(x, fit.values) <= lipschitz * (1 + 1e-12)


@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("lipschitz", [0.5, 3.0])
def test_the_optimum_is_that_of_an_independent_conic_solver(controls, lipschitz):
    import cvxpy

    x, u = demonstrations(14, controls=controls)
    v = cvxpy.Variable(u.shape)
    first, second = torch.triu_indices(len(x), len(x), 1)
    reach = (lipschitz * (x[first] - x[second]).norm(dim=1)).numpy()
    slopes = [cvxpy.norm(v[first.numpy()] - v[second.numpy()], axis=1) <= reach]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(v - u.numpy()) / len(x)), slopes)
    problem.solve(solver="CLARABEL")
    fit = lipschitz_regression(x, u, lipschitz=lipschitz, tolerance=1e-9)
    assert fit.error == pytest.approx(problem.value, rel=1e-6)
    assert np.allclose(fit.values.numpy(), v.value, atol=1e-3)


def test_the_gap_is_a_true_distance_from_the_optimum():
    x, u = demonstrations(controls=2)
    best = lipschitz_regression(x, u, lipschitz=1.0, tolerance=1e-10)
    spread = (u - u.mean(0)).square().sum(1).mean()
    for most in (2, 4, 8, 12):
        early = lipschitz_regression(x, u, lipschitz=1.0, max_iter=most)
        assert early.status is Stop.ITERATION_LIMIT
        assert early.error >= best.error - 1e-12
        assert early.error - best.error <= early.gap * spread + 1e-9
        assert largest_slope(x, early.values) <= 1.0


def test_a_bound_above_the_datas_own_changes_nothing():
    x, u = demonstrations()
    fit = lipschitz_regression(x, u, lipschitz=largest_slope(x, u) * (1 + 1e-9))
    assert torch.equal(fit.values, u)
    assert fit.multipliers.max() == 0
    assert fit.error == 0


def test_a_bound_near_zero_leaves_the_mean():
    x, u = demonstrations(controls=2)
    fit = lipschitz_regression(x, u, lipschitz=1e-6)
    assert torch.allclose(fit.values, u.mean(0).expand_as(u), atol=1e-5)


@given(gap=st.floats(-5, 5), distance=st.floats(0.1, 3), lipschitz=st.floats(0.1, 3))
@settings(max_examples=40, deadline=None)
def test_two_points_are_pulled_together_evenly(gap, distance, lipschitz):
    x = torch.tensor([[0.0], [distance]], dtype=DOUBLE)
    u = torch.tensor([[gap], [0.0]], dtype=DOUBLE)
    half = max(min(gap, lipschitz * distance), -lipschitz * distance) / 2
    expected = torch.tensor([[gap / 2 + half], [gap / 2 - half]], dtype=DOUBLE)
    found = lipschitz_regression(x, u, lipschitz=lipschitz, tolerance=1e-12).values
    assert torch.allclose(found, expected, atol=2e-5 * max(1, abs(gap)))


@pytest.mark.parametrize("controls", [1, 2])
def test_the_values_are_the_labels_smoothed_by_the_laplacian_of_the_multipliers(controls):
    """(I + N Delta_w) v = u, with w the multiplier over the squared distance."""
    x, u = demonstrations(controls=controls)
    fit = lipschitz_regression(x, u, lipschitz=1.0, tolerance=1e-10)
    first, second = fit.edges
    w = torch.zeros(len(x), len(x), dtype=DOUBLE)
    w[first, second] = w[second, first] = fit.multipliers / (x[first] - x[second]).square().sum(1)
    laplacian = torch.diag(w.sum(1)) - w
    smoothed = torch.linalg.solve(torch.eye(len(x), dtype=DOUBLE) + len(x) * laplacian, u)
    assert torch.allclose(smoothed, fit.values, atol=1e-4)
    assert torch.allclose(fit.values.sum(0), u.sum(0), atol=1e-4)  # Laplacians know no constants
    assert fit.multipliers.min() >= 0
    slack = (x[first] - x[second]).norm(dim=1) - (fit.values[first] - fit.values[second]).norm(dim=1)
    assert (fit.multipliers * slack).abs().max() < 1e-6  # complementary slackness


def test_the_error_falls_and_is_convex_in_the_bound():
    x, u = demonstrations()
    bounds = torch.linspace(0.5, 6, 12, dtype=DOUBLE)
    errors = torch.tensor([lipschitz_regression(x, u, lipschitz=float(b), tolerance=1e-9).error for b in bounds])
    assert (errors.diff() <= 1e-7).all()
    assert (errors.diff().diff() >= -1e-6).all()


def test_a_graph_of_neighbours_bounds_its_own_edges_and_costs_no_more():
    x, u = demonstrations()
    full = lipschitz_regression(x, u, lipschitz=1.0)
    near = lipschitz_regression(x, u, lipschitz=1.0, neighbors=4)
    first, second = near.edges
    slopes = (near.values[first] - near.values[second]).norm(dim=1) / (x[first] - x[second]).norm(dim=1)
    assert len(first) < len(x) * 4 + 1
    assert slopes.max() <= 1 + 1e-12
    assert near.error <= full.error + 1e-6


def test_rotations_permutations_and_shifts_carry_over():
    x, u = demonstrations(controls=2)
    base = lipschitz_regression(x, u, lipschitz=1.0, tolerance=1e-9).values
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)).Q
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    moved = lipschitz_regression((x @ turn)[order], (u @ turn)[order] + 7, lipschitz=1.0, tolerance=1e-9).values
    assert torch.allclose(moved, (base @ turn)[order] + 7, atol=1e-3)


def test_a_state_seen_often_counts_as_often():
    x, u = demonstrations(12)
    repeated = torch.cat([x, x[:3], x[:3]]), torch.cat([u, u[:3] + 1, u[:3] - 1])
    policy = LipschitzRegressor(0.8, tolerance=1e-10).fit(*repeated)
    weights = torch.ones(12, dtype=DOUBLE)
    weights[:3] = 3
    direct = lipschitz_regression(x, u, lipschitz=0.8, weights=weights, tolerance=1e-10)
    assert torch.allclose(policy(x), direct.values, atol=1e-4)


@pytest.mark.parametrize("lipschitz", [0.5, 2.0])
def test_the_extension_goes_through_the_values_and_is_no_steeper(lipschitz):
    x, u = demonstrations()
    policy = LipschitzRegressor(lipschitz).fit(x, u)
    assert torch.allclose(policy(x), lipschitz_regression(x, u, lipschitz=lipschitz).values, atol=1e-12)
    draw = torch.Generator().manual_seed(1)
    one, other = (8 * torch.rand(4000, 2, generator=draw, dtype=DOUBLE) - 4 for _ in range(2))
    other = torch.where(torch.arange(4000)[:, None] % 2 == 0, other, one + 1e-3 * other)
    slopes = (policy(one) - policy(other)).norm(dim=1) / (one - other).norm(dim=1)
    assert slopes.max() <= lipschitz * (1 + 1e-9)


def test_several_controls_cost_the_root_of_their_number():
    x, u = demonstrations(controls=3)
    policy = LipschitzRegressor(1.0).fit(x, u)
    assert policy.lipschitz_constant == pytest.approx(math.sqrt(3))
    draw = torch.Generator().manual_seed(1)
    one, other = (8 * torch.rand(4000, 2, generator=draw, dtype=DOUBLE) - 4 for _ in range(2))
    assert ((policy(one) - policy(other)).norm(dim=1) / (one - other).norm(dim=1)).max() <= math.sqrt(3)


def test_between_two_points_of_full_slope_the_extension_is_a_line():
    x, v = torch.tensor([[0.0], [1.0]], dtype=DOUBLE), torch.tensor([[1.0], [3.0]], dtype=DOUBLE)
    between = torch.linspace(0, 1, 11, dtype=DOUBLE)[:, None]
    assert torch.allclose(mcshane_extension(between, x, v, lipschitz=2.0), 1 + 2 * between, atol=1e-12)


def test_kirszbraun_the_finite_problem_loses_nothing_to_one_more_point():
    """At any new point there is a value within the bound of all others (two controls), as the theorem says."""
    x, u = demonstrations(12, controls=2)
    fit = lipschitz_regression(x, u, lipschitz=1.0)
    import cvxpy

    for seed in range(3):
        query = 4 * torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) - 2
        reach = (query - x).norm(dim=1).numpy()
        value, ratio = cvxpy.Variable(2), cvxpy.Variable()
        bounds = [cvxpy.norm(value - v) <= ratio * r for v, r in zip(fit.values.numpy(), reach, strict=True)]
        cvxpy.Problem(cvxpy.Minimize(ratio), bounds).solve(solver="CLARABEL")
        assert ratio.value <= 1.0 + 1e-6


def test_a_policy_travels_in_its_state_dict_and_is_differentiable():
    x, u = demonstrations()
    policy = LipschitzRegressor(1.0).fit(x, u)
    other = LipschitzRegressor(1.0)
    other.load_state_dict(policy.state_dict())
    state = torch.tensor([[0.3, -0.2]], dtype=DOUBLE, requires_grad=True)
    assert torch.equal(other(state), policy(state))
    assert torch.autograd.gradcheck(policy, state)
    (gradient,) = torch.autograd.grad(policy(state).sum(), state)
    assert gradient.norm() <= 1 + 1e-9


def test_a_multiplier_holds_a_networks_slopes_at_the_bound():
    torch.manual_seed(0)
    x, u = demonstrations(64)
    net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    bound = largest_slope(x, lipschitz_regression(x, u, lipschitz=1.0).values)
    multiplier = Multiplier(0.3, damping=1.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(1500):
        optimizer.zero_grad()
        out = net(x)
        ((out - u).square().mean() + multiplier(slope_violation(out, x, lipschitz=bound))).backward()
        optimizer.step()
    assert largest_slope(x, net(x).detach()) <= 1.15 * bound
    assert multiplier.value > 0


# The loop: a linear plant whose expert contracts in a norm of its own.
A = torch.tensor([[0.99, 0.1], [-0.1, 0.97]], dtype=DOUBLE)
B = torch.tensor([[0.0], [0.15]], dtype=DOUBLE)


def loop():
    """Return the expert's gain, the root of the norm's matrix, and the constants in that norm."""
    import scipy.linalg

    cost = scipy.linalg.solve_discrete_are(A.numpy(), B.numpy(), np.eye(2), 0.1 * np.eye(1))
    gain = torch.tensor(np.linalg.solve(0.1 + B.numpy().T @ cost @ B.numpy(), B.numpy().T @ cost @ A.numpy()))
    root = torch.linalg.cholesky(torch.tensor(cost)).T  # |x|_P = |root x|
    back = torch.linalg.inv(root)
    contraction = torch.linalg.matrix_norm(root @ (A - B @ gain) @ back, 2).item()
    assert contraction < 1
    input_gain = torch.linalg.matrix_norm(root @ B, 2).item()
    expert = torch.linalg.matrix_norm(gain @ back, 2).item()
    return gain, root, contraction, input_gain, expert


def test_no_run_leaves_the_bounds_on_state_and_regret():
    gain, root, contraction, input_gain, expert_lipschitz = loop()
    draw = torch.Generator().manual_seed(0)
    side = 2.5
    states = side * (2 * torch.rand(300, 2, generator=draw, dtype=DOUBLE) - 1)
    scaled = states @ root.T  # the policy is Lipschitz in the norm in which the loop contracts
    cost_lipschitz = 0.7
    grid = torch.cartesian_prod(*[torch.linspace(-side, side, 61, dtype=DOUBLE)] * 2)
    corner = torch.full((2,), side / 60, dtype=DOUBLE) @ root.T
    radius = (fill_distance(scaled, grid @ root.T) + corner.norm()).item()
    for lipschitz, delta in ((1.0 * expert_lipschitz, 0.0), (expert_lipschitz, 0.1), (2 * expert_lipschitz, 0.1)):
        policy = LipschitzRegressor(lipschitz).fit(scaled, -(states @ gain.T))
        fit_error = (policy(scaled) + states @ gain.T).abs().max().item()
        error = policy_error_bound(
            fit_error=fit_error, lipschitz=lipschitz, expert_lipschitz=expert_lipschitz, covering_radius=radius
        )
        assert ((policy(grid @ root.T) + grid @ gain.T).norm(dim=1)).max() <= error
        common = {
            "lipschitz": lipschitz,
            "expert_lipschitz": expert_lipschitz,
            "input_gain": input_gain,
            "contraction": contraction,
            "cost_lipschitz": cost_lipschitz,
            "policy_error": error,
            "measurement_error": delta,
        }
        x = expert = 0.5 * (2 * torch.rand(1000, 2, generator=draw, dtype=DOUBLE) - 1)
        regrets = []
        for step in range(1, 41):
            way = torch.randn(1000, 2, generator=draw, dtype=DOUBLE)
            measured = x @ root.T + delta * way / way.norm(dim=1, keepdim=True)
            u, v = policy(measured), -(expert @ gain.T)
            # A cost that is as steep as allowed, in the norm: the difference of its values is the distance times L_c.
            cost = cost_lipschitz * ((x @ root.T).norm(dim=1) + u.norm(dim=1))
            regrets.append(cost - cost_lipschitz * ((expert @ root.T).norm(dim=1) + v.norm(dim=1)))
            x, expert = x @ A.T + u @ B.T, expert @ A.T + v @ B.T
            assert x.abs().max() < side - 0.3  # the states stay where the policy's error is bounded
            away = ((x - expert) @ root.T).norm(dim=1).max()
            assert away <= closed_loop_bounds(**common, horizon=step).state + 1e-9
        assert torch.stack(regrets).mean(0).abs().max() <= closed_loop_bounds(**common).regret


def test_the_bounds_are_met_by_the_worst_loop():
    """x' = rho x + L_u u, an expert that does nothing, and a control that is off by eps + alpha delta every time."""
    contraction, input_gain, error, slope, delta, horizon = 0.8, 0.5, 0.3, 2.0, 0.1, 12
    x = 0.0
    for _ in range(horizon):
        x = contraction * x + input_gain * (error + slope * delta)
    found = closed_loop_bounds(
        lipschitz=slope, expert_lipschitz=0.0, input_gain=input_gain, contraction=contraction, cost_lipschitz=2.0,
        policy_error=error, measurement_error=delta, horizon=horizon,
    )  # fmt: skip
    assert found.state == pytest.approx(x)
    # In the limit the state is off by L_u (eps + alpha delta) / (1 - rho) and the control by the bracket, at slope L_c.
    off = error + slope * delta
    assert found.regret == pytest.approx(2.0 * (input_gain * off / (1 - contraction) + off))
    assert found.deterioration == pytest.approx(found.regret * slope * delta / off)


def test_the_chance_of_a_gap_is_bounded_on_the_circle():
    """Points on a circle of length 1: balls of diameter 0.1 are ten arcs, each hit with probability 0.1."""
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(4000, 30, generator=draw).sort(dim=1).values
    arcs = (points * 10).long()
    missed = torch.stack([(arcs != arc).all(1) for arc in range(10)]).any(0).double().mean().item()
    assert missed <= fill_failure_probability(num_samples=30, num_balls=10, ball_probability=0.1)
    assert fill_failure_probability(num_samples=0, num_balls=10, ball_probability=0.1) == 1.0


def test_the_fill_distance_falls_with_the_root_of_the_samples_in_two_dimensions():
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 60)] * 2)
    counts = [50, 200, 800, 3200]
    distances = [
        torch.stack(
            [
                fill_distance(torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)), grid)
                for seed in range(5)
            ]
        ).mean()
        for count in counts
    ]
    slope = np.polyfit(np.log(counts), [float(d.log()) for d in distances], 1)[0]
    assert -0.6 < slope < -0.35


def test_the_attack_finds_the_worst_direction_and_no_error_where_none_hurts():
    gain = torch.tensor([[1.0, 2.0]], dtype=DOUBLE)
    state = torch.tensor([[0.5, 0.1], [-0.3, 0.4]], dtype=DOUBLE)
    found = measurement_attack(
        lambda x: -(x @ gain.T), lambda x, u: x @ A.T + u @ B.T, state, radius=0.3, directions=360,
        value=lambda x: x[:, 1],
    )  # fmt: skip
    # The next state's second entry falls with the control's size, so the error points against the gain.
    assert torch.allclose(found, (-0.3 * gain / gain.norm()).expand(2, 2), atol=0.02)
    nothing = measurement_attack(
        lambda x: 0 * x[:, :1], lambda x, u: x, state, radius=0.3, value=lambda x: x.sum(1), directions=8
    )
    assert torch.equal(nothing, torch.zeros_like(state))


@pytest.mark.untyped
def test_bad_demonstrations_are_refused_by_name():
    x, u = demonstrations(5)
    cases = [
        (lambda: lipschitz_regression(x, u, lipschitz=-1.0), "lipschitz"),
        (lambda: lipschitz_regression(x[:1], u[:1], lipschitz=1.0), "at least 2 states"),
        (lambda: lipschitz_regression(x, u[:3], lipschitz=1.0), "same states, got 5 and 3"),
        (lambda: lipschitz_regression(x, u * math.nan, lipschitz=1.0), "target contains NaN"),
        (lambda: lipschitz_regression(x[:, 0], u, lipschitz=1.0), "inputs must have two dimensions"),
        (lambda: lipschitz_regression(x[[0, 0, 1]], u[:3], lipschitz=1.0), "more than once"),
        (lambda: lipschitz_regression(x, u, lipschitz=1.0, neighbors=0), "neighbors"),
        (lambda: lipschitz_regression(torch.rand(6000, 2), torch.rand(6000, 1), lipschitz=1.0), "weights of a network"),
        (lambda: LipschitzRegressor(1.0).fit(x[[0, 0]], u[[0, 1]]), "fewer than two different"),
        (lambda: mcshane_extension(x[:, :1], x, u, lipschitz=1.0), "queries must have 2 dimensions"),
        (lambda: closed_loop_bounds(lipschitz=1.0, expert_lipschitz=1.0, input_gain=1.0, contraction=1.0,
                                    cost_lipschitz=1.0, policy_error=0.1), "contraction must lie in"),
    ]  # fmt: skip
    for call, says in cases:
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(RuntimeError, match="not fitted"):
        LipschitzRegressor(1.0)(x)
