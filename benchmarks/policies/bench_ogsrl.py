"""Guardians and models against scikit-learn's trees, and the exact solver against cvxpy, each in the same run."""

import cvxpy
import numpy as np
import pytest
import torch
from sklearn.neighbors import BallTree, KernelDensity

from benchmarks.timing import paired_ratio
from minimand.policies import KernelDensityGuardian, NearestNeighborModel, TabularCMDP, Transitions

LOGGED, ASKED, FEATURES = 10_000, 512, 12


def rows(count, seed):
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_density_costs_no_more_than_scikit_learns(record):
    logged, asked = rows(LOGGED, 0), rows(ASKED, 1)
    guardian = KernelDensityGuardian(0.3).fit(logged)
    peer = KernelDensity(bandwidth=0.3).fit(((logged - guardian.center) / guardian.half_range).numpy())
    inputs = ((asked - guardian.center) / guardian.half_range).numpy()
    np.testing.assert_allclose(guardian.score(asked).numpy(), peer.score_samples(inputs), atol=1e-8)
    with torch.no_grad():
        ratio = paired_ratio(lambda: guardian.score(asked), lambda: peer.score_samples(inputs), rounds=7, warmup=1)
    record("ogsrl density of 512 rows by 10,000 against scikit-learn", ratio.median, unit="x", target="<= 1")
    record("ogsrl density, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert ratio.median <= 1


def test_nearest_rows_cost_no_more_than_those_of_a_ball_tree(record):
    logged, asked = rows(LOGGED, 0), rows(ASKED, 1)
    state, action = logged[:, :-1], logged[:, -1:]
    ends = torch.ones(LOGGED, dtype=torch.bool)
    model = NearestNeighborModel().fit(Transitions(state, action, state[:, 0], state, ends, ~ends))
    peer = BallTree(model.keys.numpy())
    inputs = ((asked - model.center) / model.half_range).numpy()
    given = asked[:, :-1], asked[:, -1:]
    assert (model.nearest(*given).numpy() == peer.query(inputs)[1][:, 0]).all()
    ratio = paired_ratio(lambda: model.nearest(*given), lambda: peer.query(inputs), rounds=7, warmup=1)
    record("ogsrl nearest of 10,000 rows for 512 against a ball tree", ratio.median, unit="x", target="<= 1")
    record("ogsrl nearest, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert ratio.median <= 1


@pytest.mark.parametrize("states", [50, 150])
def test_the_program_costs_no_more_than_the_same_one_through_cvxpy(record, states):
    generator = torch.Generator().manual_seed(0)
    transition = torch.rand(states, 5, states, generator=generator, dtype=torch.float64) ** 8
    transition = transition / transition.sum(-1, keepdim=True)
    reward, cost = torch.rand(2, states, 5, generator=generator, dtype=torch.float64)
    initial = torch.full((states,), 1 / states, dtype=torch.float64)
    problem = TabularCMDP(transition, reward, initial, discount=0.95, cost=cost[None])
    budget = problem.solve().costs * 0.9
    moves = transition.flatten(0, 1).numpy()
    leave = np.repeat(np.eye(states), 5, axis=1)

    def peer():
        occupancy = cvxpy.Variable(states * 5, nonneg=True)
        kept = [leave @ occupancy - 0.95 * moves.T @ occupancy == initial.numpy()]
        kept.append(cost.flatten().numpy() @ occupancy <= budget.item())
        program = cvxpy.Problem(cvxpy.Maximize(reward.flatten().numpy() @ occupancy), kept)
        return program.solve(solver="HIGHS")

    assert problem.solve(budget).value.item() == pytest.approx(peer(), abs=1e-6)
    ratio = paired_ratio(lambda: problem.solve(budget), peer, rounds=5, warmup=1)
    record(f"ogsrl constrained program, {states} states, against cvxpy", ratio.median, unit="x", target="<= 1")
    record(f"ogsrl constrained program, {states} states, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert ratio.median <= 1
