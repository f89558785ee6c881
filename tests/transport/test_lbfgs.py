"""The batched L-BFGS against scipy's, against the two-loop recursion, and on functions with kinks."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der

from minimand.stopping import Stop
from minimand.transport.lbfgs import _Memory, minimize_lbfgs

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_gradients(function):
    """Turn ``function(points, rows) -> values`` into an objective."""

    def objective(points, rows):
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            values = function(leaf, rows)
            (gradients,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradients

    return objective


def rosenbrock(points, rows):
    return (100 * (points[:, 1:] - points[:, :-1] ** 2) ** 2 + (1 - points[:, :-1]) ** 2).sum(1)


def softmax_regression(seed, batch=5, variables=8):
    """Draw strictly convex problems: log-sum-exp of random planes, and a small square."""
    slopes, heights = random(batch, 20, variables, seed=seed), random(batch, 20, seed=seed + 1)

    def function(points, rows):
        planes = torch.einsum("pij,pj->pi", slopes[rows], points) + heights[rows]
        return planes.logsumexp(1) + 0.01 * points.square().sum(1)

    return function


@pytest.mark.parametrize("seed", range(4))
def test_every_problem_of_a_batch_ends_at_scipys_minimum_in_about_as_many_evaluations(seed):
    function = softmax_regression(seed)
    found = minimize_lbfgs(with_gradients(function), torch.zeros(5, 8, dtype=F64), max_iter=500, tolerance=1e-9)
    assert found.status is Stop.CONVERGED
    ours, theirs = 0, 0
    for row in range(5):
        objective = with_gradients(function)

        def one(x, row=row, objective=objective):
            value, gradient = objective(torch.from_numpy(x)[None], torch.tensor([row]))
            return value.item(), gradient[0].numpy()

        peer = minimize(one, np.zeros(8), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 1e-20})
        assert found.values[row].item() == pytest.approx(peer.fun, abs=1e-12)
        np.testing.assert_allclose(found.points[row].numpy(), peer.x, atol=1e-6)
        ours, theirs = ours + int(found.iterations[row]), theirs + peer.nfev
    assert ours <= 1.5 * theirs


def test_it_follows_rosenbrocks_valley_as_fast_as_scipy():
    start = 2 * random(6, 12).sigmoid()
    found = minimize_lbfgs(with_gradients(rosenbrock), start, max_iter=500, tolerance=1e-8)
    assert found.converged.all()
    torch.testing.assert_close(found.points, torch.ones(6, 12, dtype=F64), rtol=0, atol=1e-6)
    peers = [
        minimize(rosen, point.numpy(), jac=rosen_der, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 1e-20})
        for point in start
    ]
    assert found.iterations.sum() <= 1.25 * sum(peer.nfev for peer in peers)


def test_a_problem_takes_the_same_path_in_any_company():
    function = softmax_regression(3)
    start = random(5, 8, seed=9)
    together = minimize_lbfgs(with_gradients(function), start, max_iter=500, tolerance=1e-8)
    for row in range(5):
        alone = minimize_lbfgs(
            with_gradients(lambda points, rows, row=row: function(points, rows + row)),
            start[row : row + 1],
            max_iter=500,
            tolerance=1e-8,
        )
        assert alone.iterations == together.iterations[row]
        torch.testing.assert_close(alone.points[0], together.points[row], rtol=0, atol=1e-7)


@pytest.mark.parametrize("pairs", [1, 3, 4, 7])
def test_the_compact_product_is_the_two_loop_recursion_also_when_problems_store_at_different_times(pairs):
    size, variables = 4, 6
    memory = _Memory(torch.zeros(2, variables, dtype=F64), size)
    hessians = random(2, variables, variables, seed=5)
    hessians = hessians @ hessians.mT + torch.eye(variables, dtype=F64)
    kept = [[], []]
    for number in range(pairs):
        moves = random(2, variables, seed=20 + number)
        turns = (hessians @ moves[..., None])[..., 0]
        storing = torch.tensor([True, number % 2 == 0])
        memory.store(storing, moves, turns)
        for row in range(2):
            if storing[row]:
                kept[row] = [*kept[row], (moves[row], turns[row])][-size:]
    gradient = random(2, variables, seed=99)
    product = memory.times(gradient)
    for row in range(2):
        q, weights = gradient[row].clone(), []
        for move, turn in reversed(kept[row]):
            weights.append(move @ q / (move @ turn))
            q -= weights[-1] * turn
        move, turn = kept[row][-1]
        q *= move @ turn / (turn @ turn)
        for (move, turn), weight in zip(kept[row], reversed(weights), strict=True):
            q += (weight - turn @ q / (move @ turn)) * move
        torch.testing.assert_close(product[row], q, rtol=1e-9, atol=1e-9)


def test_on_a_function_with_kinks_it_comes_to_the_minimum_and_says_that_it_stalls_there():
    weights = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.5]], dtype=F64)
    target = torch.tensor([0.3, -1.0, 2.0], dtype=F64)

    def function(points, rows):
        # A gradient of one side or the other even at the kink, where that of abs would be 0.
        side = torch.where(points.detach() >= target, 1.0, -1.0)
        return 1 + (weights[rows] * side * (points - target)).sum(1)

    found = minimize_lbfgs(with_gradients(function), torch.zeros(2, 3, dtype=F64), max_iter=2000, tolerance=1e-9)
    assert found.status is Stop.STALLED
    assert found.stalled.all()
    torch.testing.assert_close(found.values, torch.ones(2, dtype=F64), rtol=0, atol=1e-9)


def test_values_only_ever_fall_and_rows_only_ever_become_fewer():
    seen = []
    function = with_gradients(softmax_regression(7))

    def watched(points, rows):
        seen.append(rows.tolist())
        return function(points, rows)

    values = [
        minimize_lbfgs(watched, 5 * random(5, 8), max_iter=limit, tolerance=1e-7).values for limit in (0, 3, 10, 30, 90)
    ]
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(values))
    last = seen[-90:]
    assert all(set(later) <= set(earlier) for earlier, later in itertools.pairwise(last) if len(earlier) < 5)


def test_an_unbounded_function_ends():
    found = minimize_lbfgs(
        with_gradients(lambda points, rows: points.sum(1)), torch.zeros(1, 2, dtype=F64), max_iter=50, tolerance=1e-9
    )
    assert found.status in (Stop.ITERATION_LIMIT, Stop.STALLED)
    assert not found.converged.any()


def test_a_start_at_the_minimum_takes_no_step():
    found = minimize_lbfgs(with_gradients(rosenbrock), torch.ones(2, 3, dtype=F64), max_iter=10, tolerance=1e-9)
    assert found.status is Stop.CONVERGED
    assert found.iterations.tolist() == [0, 0]
