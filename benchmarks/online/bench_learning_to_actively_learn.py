"""The complexity against a general conic solver, and the exact game against one linear program of all its flows.

No other package trains a policy against the worst instances of a class, or plays this game: the peers are the solvers
that one would use in their place, cvxpy's Clarabel for the complexity and HiGHS for the game in sequence form.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from benchmarks.timing import paired_ratio
from minimand.online import QueryGame, complexity, thresholds


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def by_clarabel(theta, hypotheses, queries):
    """The complexity of one instance as a conic program."""
    cvxpy = pytest.importorskip("cvxpy")
    values = (hypotheses @ theta).numpy()
    best = int(values.argmax())
    share = cvxpy.Variable(len(queries), nonneg=True)
    information = sum(share[x] * np.outer(queries[x], queries[x]) for x in range(len(queries)))
    costs = [
        cvxpy.matrix_frac((hypotheses[best] - hypotheses[z]).numpy() / (values[best] - values[z]), information)
        for z in range(len(hypotheses))
        if z != best
    ]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.maximum(*costs)), [cvxpy.sum(share) == 1])
    return problem.solve(solver=cvxpy.CLARABEL)


def test_the_complexity_of_eight_instances_costs_less_than_by_a_conic_solver(record):
    hypotheses, queries, theta = draw(10, 4, seed=1), draw(8, 4, seed=2), draw(8, 4, seed=3)
    found = complexity(theta, hypotheses, queries=queries).value
    assert found[0].item() == pytest.approx(by_clarabel(theta[0], hypotheses, queries), rel=1e-4)
    ratio = paired_ratio(
        lambda: complexity(theta, hypotheses, queries=queries),
        lambda: [by_clarabel(each, hypotheses, queries) for each in theta],
        rounds=5,
        warmup=1,
    )
    record("complexity of 8 instances against Clarabel", ratio.median, unit="x", target="<= 0.2")
    record("complexity of 8 instances, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert ratio.median <= 0.2


def sequence_form(game, theta):
    """Return the program over how often every state and query is reached, sparse."""
    levels = [level.numpy() for level in game._levels]
    places = [{tuple(state): row for row, state in enumerate(level)} for level in levels]
    queries = game.num_queries
    starts = np.cumsum([0] + [len(level) * queries for level in levels[:-1]])
    count, base = starts[-1] + len(levels[-1]), 0
    entries = []
    for t, level in enumerate(levels):
        for row, state in enumerate(level):
            first = starts[t] + row * queries
            leaves = [starts[-1] + row] if t == game.budget else range(first, first + queries)
            entries += [(base + row, column, 1.0) for column in leaves]
            for part in np.flatnonzero(state):
                before = state.copy()
                before[part] -= 1
                column = starts[t - 1] + places[t - 1][tuple(before)] * queries + part % queries
                entries.append((base + row, column, -1.0))
        base += len(level)
    rows, columns, values = zip(*entries, strict=True)
    flows = csr_matrix((values, (rows, columns)), shape=(base, count + 1))
    right = np.zeros(base)
    right[0] = 1
    losses = np.hstack([np.zeros((len(theta), starts[-1])), game._losses(theta).numpy(), -np.ones((len(theta), 1))])
    bounds = [(0, None)] * count + [(None, None)]
    return np.append(np.zeros(count), 1.0), csr_matrix(losses), flows, right, bounds


def test_the_exact_game_costs_less_than_its_linear_program(record):
    game = QueryGame(thresholds(3), budget=6)
    theta = game.classes.draw(30, radius=4.0, generator=torch.Generator().manual_seed(0)).theta
    objective, losses, flows, right, bounds = sequence_form(game, theta)

    def peer():
        return linprog(objective, losses, np.zeros(len(theta)), flows, right, bounds, method="highs").fun

    assert game.solve(theta, tolerance=1e-6).value == pytest.approx(peer(), abs=1e-5)
    ratio = paired_ratio(lambda: game.solve(theta, tolerance=1e-6), peer, rounds=5, warmup=1)
    record("exact game of 924 final states against HiGHS in sequence form", ratio.median, unit="x", target="<= 1")
    record("exact game of 924 final states, ours", 1e3 * ratio.ours_seconds, unit="ms")
    assert ratio.median <= 1
