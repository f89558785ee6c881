"""TOPO against full refits, enumeration of all orders, scikit-learn, and the conditions that its graphs must meet."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression

from minimand.constraints import (
    LeastSquaresScore,
    LogisticScore,
    MLPScore,
    NodeFits,
    TopoSwap,
    kkt_residual,
    order_score,
    prune_edges,
    reachability,
    swap_change,
    topo,
    topological_order,
)
from minimand.stopping import Budget, Stop


def sem(size, rows=1000, seed=0, edges=2, noise=1.0):
    """Rows of a linear model on a random graph, its weights, and an order of it."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=draw)
    pairs = torch.triu_indices(size, size, 1)
    pairs = pairs[:, torch.randperm(pairs.shape[1], generator=draw)[: edges * size]]
    weights = torch.zeros(size, size, dtype=torch.float64)
    drawn = 0.5 + 1.5 * torch.rand(pairs.shape[1], generator=draw, dtype=torch.float64)
    drawn *= 2 * torch.randint(0, 2, drawn.shape, generator=draw) - 1
    weights[order[pairs[0]], order[pairs[1]]] = drawn
    x = noise * torch.randn(rows, size, generator=draw, dtype=torch.float64)
    return x @ torch.linalg.inv(torch.eye(size, dtype=torch.float64) - weights), weights, order


def confounded(size, rows=200, seed=0):
    """Rows of correlated columns with no graph behind them, where searches are hard."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=draw, dtype=torch.float64)
    return torch.randn(rows, size, generator=draw, dtype=torch.float64) @ mix


def covariance(x):
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def best_by_enumeration(x, forbidden=None, required=None, tiers=None):
    """The least sum of residuals over all orders, by one regression for each node and each set of parents."""
    size = x.shape[1]
    x = x - x.mean(0)
    forbidden = torch.zeros(size, size, dtype=torch.bool) if forbidden is None else forbidden
    values = {}

    def residual(node, parents):
        if (node, parents) not in values:
            columns = x[:, list(parents)]
            fitted = columns @ torch.linalg.lstsq(columns, x[:, node]).solution if parents else 0
            values[node, parents] = float((x[:, node] - fitted).square().mean() / 2)
        return values[node, parents]

    best = math.inf
    for order in itertools.permutations(range(size)):
        rank = {node: place for place, node in enumerate(order)}
        if required is not None and any(rank[a] > rank[b] for a, b in required.nonzero().tolist()):
            continue
        if tiers is not None and any(tiers[a] > tiers[b] for a, b in itertools.combinations(order, 2)):
            continue
        sets = [tuple(sorted(one for one in order[:place] if not forbidden[one, node])) for node, place in rank.items()]
        best = min(best, sum(residual(node, parents) for node, parents in zip(rank, sets, strict=True)))
    return best


def test_the_score_of_an_order_is_the_sum_of_its_regressions():
    """Card oracle 1, against scikit-learn."""
    x = confounded(6)
    order = [3, 0, 5, 1, 4, 2]
    total = x[:, 3].var(correction=0)
    for place in range(1, 6):
        before, node = x[:, order[:place]].numpy(), x[:, order[place]].numpy()
        total += float(np.square(node - LinearRegression().fit(before, node).predict(before)).mean())
    torch.testing.assert_close(order_score(covariance(x), order), total / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("blocks", [1, 3, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_every_swap_changes_the_score_by_what_a_full_refit_says(size, blocks):
    x = confounded(size)
    matrix = covariance(x)
    changes = swap_change(torch.linalg.cholesky(matrix), blocks=blocks)
    wanted = torch.zeros_like(matrix)
    start = order_score(matrix, list(range(size)))
    for a, b in itertools.combinations(range(size), 2):
        order = list(range(size))
        order[a], order[b] = order[b], order[a]
        wanted[a, b] = order_score(matrix, order) - start
    torch.testing.assert_close(changes, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["swap", "behind", "before"])
def test_every_move_changes_the_score_by_what_a_full_refit_says(kind):
    matrix = covariance(confounded(7))
    changes = dict(zip(topo._MOVES, topo._changes(torch.linalg.cholesky(matrix)), strict=True))[kind]
    first, last = torch.triu_indices(7, 7, 1)
    orders = topo._after(torch.arange(7), kind, first, last)
    for a, b, order in zip(first.tolist(), last.tolist(), orders.tolist(), strict=True):
        wanted = list(range(7))
        if kind == "swap":
            wanted[a], wanted[b] = wanted[b], wanted[a]
        else:
            wanted.insert(b, wanted.pop(a)) if kind == "behind" else wanted.insert(a, wanted.pop(b))
        assert order == wanted
        change = order_score(matrix, order) - order_score(matrix, list(range(7)))
        torch.testing.assert_close(changes[a, b], change, rtol=0, atol=1e-9)


def test_swap_changes_keep_their_digits_where_a_refit_loses_them():
    """Entries of the factor span ten orders of magnitude; the exact answer is that of rational arithmetic."""
    lower = [
        [Fraction(1), 0, 0],
        [Fraction(10**5), Fraction(1, 10**5), 0],
        [Fraction(3), Fraction(2), Fraction(1, 10**5)],
    ]
    gram = [[sum(lower[i][k] * lower[j][k] for k in range(3)) for j in range(3)] for i in range(3)]

    def variances(order):
        total, rest = Fraction(0), [[gram[i][j] for j in order] for i in order]
        while rest:
            pivot = rest[0][0]
            total += pivot
            rest = [[row[j] - row[0] * rest[0][j] / pivot for j in range(1, len(row))] for row in rest[1:]]
        return total

    changes = swap_change(torch.tensor([[float(one) for one in row] for row in lower], dtype=torch.float64))
    for a, b, order in ((0, 1, [1, 0, 2]), (1, 2, [0, 2, 1]), (0, 2, [2, 1, 0])):
        exact = (variances(order) - variances([0, 1, 2])) / 2
        assert float(changes[a, b]) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_the_best_order_of_all_is_found_nearly_always_and_never_beaten(size):
    """Card oracle 2."""
    hits = 0
    for seed in range(10):
        x = confounded(size, seed=seed)
        best = best_by_enumeration(x)
        found = TopoSwap(generator=generator(seed)).fit(x)
        assert found.score >= best * (1 - 1e-9)
        assert found.status is Stop.CONVERGED
        hits += found.score <= best * (1 + 1e-9)
    assert hits >= 9


def test_any_order_of_the_true_graph_recovers_it_from_the_true_covariance():
    """Card oracle 7."""
    _, weights, order = sem(8, seed=3)
    back = torch.linalg.inv(torch.eye(8, dtype=torch.float64) - weights)
    matrix = back.T @ back
    torch.testing.assert_close(order_score(matrix, order), torch.tensor(4.0, dtype=torch.float64), rtol=1e-10, atol=0)
    # Rows whose sample covariance is the population's.
    white = torch.linalg.qr(confounded(8, rows=400) - confounded(8, rows=400).mean(0)).Q * math.sqrt(400)
    x = white @ back
    for start in (order, topological_order(weights)):
        found = TopoSwap(max_iter=0).fit(x, order=start)
        torch.testing.assert_close(found.weights, weights, rtol=0, atol=1e-10)
    searched = TopoSwap(generator=generator()).fit(x)
    assert searched.score == pytest.approx(4.0, rel=1e-9)
    torch.testing.assert_close(searched.weights, weights, rtol=0, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"small": 5}, {"small": 5, "large": 12}, {"small": 3, "large_budget": 1}])
def test_the_score_falls_with_every_round_and_never_ends_above_the_start(settings):
    """Card oracle 3."""
    x = confounded(12)
    start = list(range(12))
    found = TopoSwap(**settings).fit(x, order=start)
    assert found.history[0] == pytest.approx(float(order_score(covariance(x), start)))
    assert all(later < earlier for earlier, later in itertools.pairwise(found.history))
    assert len(found.history) == found.iterations + 1
    assert found.score == found.history[-1] == pytest.approx(float(order_score(covariance(x), found.order)))


def test_when_it_has_converged_no_swap_and_no_single_move_gains():
    x = confounded(12)
    for settings in ({}, {"small": 4}):
        found = TopoSwap(**settings, generator=generator()).fit(x)
        places = torch.triu_indices(12, 12, 1)
        for kind in ("swap", "behind", "before"):
            for order in topo._after(found.order, kind, *places):
                assert float(order_score(covariance(x), order)) >= found.score * (1 - 2e-9)


def test_weights_are_acyclic_and_optimal_given_their_order():
    """Card oracle 5."""
    x = confounded(9)
    found = TopoSwap(generator=generator()).fit(x)
    sorted_weights = found.weights[found.order][:, found.order]
    assert not bool(sorted_weights.tril().any())
    slope = covariance(x) @ (found.weights - torch.eye(9, dtype=torch.float64))
    assert float(slope[found.order][:, found.order].triu(1).abs().max()) <= 1e-8
    assert found.kkt_residual <= 1e-8
    assert kkt_residual(x, found.weights) == pytest.approx(found.kkt_residual, abs=1e-9)


def test_the_residual_is_the_steepest_missing_edge_that_closes_no_cycle():
    """By the definition, pair by pair: from an empty, a partial and a fitted graph."""
    x, weights, _ = sem(5)
    matrix = covariance(x)
    for graph in (torch.zeros_like(weights), weights, weights * (weights.abs() > 1)):
        slope, paths = matrix @ graph - matrix, reachability(graph)
        wanted = max(
            abs(float(slope[i, j]))
            for i, j in itertools.permutations(range(5), 2)
            if graph[i, j] != 0 or not paths[j, i]
        )
        assert kkt_residual(x, graph) == pytest.approx(wanted, rel=1e-9)


def test_the_repair_alone_leads_from_any_order_to_a_kkt_point():
    """With a penalty many weights are 0, so that orders leave missing edges which close no cycle."""
    score, repairs = LeastSquaresScore(l1=0.05), 0
    for seed in range(6):
        x, _, order = sem(9, seed=seed, edges=1)
        x = x / x.std(0)
        prior = topo._Prior(None, None, None, 9, x.device)
        for start in (order.flip(0), torch.arange(9)):
            search = topo._Refits(x, score, start, prior, 1e-9, Budget(1))
            value = search.value
            while TopoSwap(score)._repair(search, prior):
                assert search.value < value
                value, repairs = search.value, repairs + 1
            weights = search.fits().weights.T
            assert kkt_residual(x, weights, score=score) <= 2e-6
            assert not bool(weights[search.order][:, search.order].tril().any())
    assert repairs >= 5


def test_permuting_the_columns_permutes_the_graph():
    """Card oracle 6."""
    x = confounded(8)
    order = torch.randperm(8, generator=generator(1))
    shuffle = torch.randperm(8, generator=generator(2))
    first = TopoSwap().fit(x, order=order)
    second = TopoSwap().fit(x[:, shuffle], order=torch.argsort(shuffle)[order])
    torch.testing.assert_close(second.weights, first.weights[shuffle][:, shuffle], rtol=0, atol=1e-9)
    assert torch.equal(shuffle[second.order], first.order)


def test_turning_a_column_round_turns_its_weights_round():
    x = confounded(8)
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1], dtype=torch.float64)
    first, second = (TopoSwap().fit(rows, order=list(range(8))) for rows in (x, x * signs))
    torch.testing.assert_close(second.weights, signs[:, None] * first.weights * signs, rtol=0, atol=1e-9)


def test_moving_the_mean_changes_nothing():
    x = confounded(6)
    first, second = (TopoSwap().fit(rows, order=list(range(6))) for rows in (x, x + 10))
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=1e-9)


def test_equal_variance_has_the_same_graph_and_a_logarithm_of_the_score():
    x = confounded(6)
    squares, likelihood = (
        TopoSwap(score, generator=generator()).fit(x) for score in ("least_squares", "equal_variance")
    )
    assert torch.equal(squares.order, likelihood.order)
    assert likelihood.score == pytest.approx(3 * math.log(2 * squares.score), rel=1e-12)
    # The derivative of (d/2) log(2 Q), by autograd.
    w = squares.weights.clone().requires_grad_()
    centred = x - x.mean(0)
    (3 * torch.log((centred - centred @ w).square().sum() / len(x))).backward()
    torch.testing.assert_close(
        likelihood.fits.gradients.T.fill_diagonal_(0), w.grad.fill_diagonal_(0), atol=1e-9, rtol=1e-7
    )


def test_it_finds_the_graph_behind_the_rows_where_variances_are_equal():
    x, weights, order = sem(20, seed=1, edges=4)
    found = TopoSwap(generator=generator()).fit(x)
    pruned = prune_edges(covariance(x), found.weights, num_rows=len(x))
    assert found.score <= float(order_score(covariance(x), order))
    assert torch.equal(pruned != 0, weights != 0)


@pytest.mark.parametrize("peer", ["sorted by variance", "reversed truth"])
def test_as_post_processing_it_never_ends_above_the_graph_it_was_given(peer):
    x, weights, _ = sem(10, seed=2, edges=3)
    start = weights.T if peer == "reversed truth" else None
    if start is None:
        ranked = torch.argsort(x.var(0))
        start = torch.zeros_like(weights)
        start[ranked[:, None], ranked] = torch.ones_like(weights).triu(1)
    before = float(order_score(covariance(x), topological_order(start)))
    found = TopoSwap().fit(x, weights=start)
    assert found.history[0] == pytest.approx(before)
    assert found.score <= before
    cyclic = start + 0.01 * start.T
    assert TopoSwap().fit(x, weights=cyclic, break_cycles=True).history[0] == pytest.approx(before)


# --- prior knowledge -------------------------------------------------------------------------------------------------


def prior_cases(size, seed):
    draw = torch.Generator().manual_seed(seed)
    forbidden = torch.rand(size, size, generator=draw) < 0.3
    required = torch.zeros(size, size, dtype=torch.bool)
    order = torch.randperm(size, generator=draw).tolist()
    for a, b in ((order[0], order[2]), (order[1], order[3])):
        required[a, b], forbidden[a, b] = True, False
    tiers = [0] * size
    for place, node in enumerate(order):
        tiers[node] = int(place >= size // 2)
    return {
        "forbidden": {"forbidden": forbidden},
        "required": {"required": required},
        "tiers": {"tiers": tiers},
        "all": {"forbidden": forbidden, "required": required, "tiers": tiers},
    }


@pytest.mark.parametrize("kind", ["forbidden", "required", "tiers", "all"])
@pytest.mark.parametrize("size", [4, 5])
def test_under_prior_knowledge_it_finds_the_best_permitted_graph(size, kind):
    hits, count = 0, 8
    for seed in range(count):
        x, prior = confounded(size, seed=seed), prior_cases(size, seed)[kind]
        best = best_by_enumeration(x, **prior)
        found = TopoSwap(**prior, generator=generator(seed)).fit(x)
        assert found.score >= best * (1 - 1e-9)
        hits += found.score <= best * (1 + 1e-9)
        edges = found.weights != 0
        rank = torch.argsort(found.order)
        if "forbidden" in prior:
            assert not bool((edges & prior["forbidden"]).any())
        for a, b in prior.get("required", torch.zeros(0, 2)).nonzero().tolist():
            assert rank[a] < rank[b]
            assert bool(edges[a, b])
        tiers = torch.tensor(prior.get("tiers", [0] * size))
        assert not bool((edges & (tiers[:, None] > tiers)).any())
    assert hits >= count - 2


def test_with_an_empty_list_of_forbidden_edges_refits_agree_with_the_closed_form():
    x = confounded(7)
    none = torch.zeros(7, 7, dtype=torch.bool)
    closed = TopoSwap(small=10**6).fit(x, order=list(range(7)))
    refits = TopoSwap(small=10**6, forbidden=none).fit(x, order=list(range(7)))
    torch.testing.assert_close(closed.weights, refits.weights, rtol=0, atol=1e-9)
    assert closed.history == pytest.approx(refits.history)
    assert closed.evaluations == refits.evaluations


# --- other scores ----------------------------------------------------------------------------------------------------


def test_with_a_penalty_each_node_is_a_lasso():
    x = confounded(6)
    score = LeastSquaresScore(l1=0.4)
    parents = torch.tensor([[False, True, True, False, True, True], [True, True, False, True, False, False]])
    fits = score.fit(x, torch.tensor([0, 4]), parents)
    for row, node in enumerate((0, 4)):
        mask = parents[row].numpy()
        peer = Lasso(alpha=0.4, tol=1e-12, max_iter=100_000).fit(x[:, mask].numpy(), x[:, node].numpy())
        np.testing.assert_allclose(fits.weights[row, parents[row]].numpy(), peer.coef_, atol=1e-7)
        residual = x[:, node].numpy() - peer.predict(x[:, mask].numpy())
        value = np.square(residual).mean() / 2 + 0.4 * np.abs(peer.coef_).sum()
        assert float(fits.values[row]) == pytest.approx(value, rel=1e-9)


def binary(size, rows=800, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weights = (1.5 * torch.randn(size, size, generator=draw, dtype=torch.float64)).triu(1)
    x = torch.zeros(rows, size, dtype=torch.float64)
    for node in range(size):
        x[:, node] = torch.bernoulli(torch.sigmoid(x @ weights[:, node] - 0.5), generator=draw)
    return x


@pytest.mark.parametrize("l1", [0.0, 0.02])
@pytest.mark.parametrize("intercept", [True, False])
def test_each_logistic_node_is_scikit_learns(l1, intercept):
    x = binary(5)
    parents = torch.tensor([[False, True, True, False, True], [True, True, True, False, False]])
    fits = LogisticScore(l1=l1, intercept=intercept).fit(x, torch.tensor([0, 3]), parents)
    for row, node in enumerate((0, 3)):
        mask = parents[row].numpy()
        # C multiplies the sum of losses there; our penalty stands beside their mean.
        kind = {"l1_ratio": 1.0, "C": 1 / (len(x) * l1)} if l1 else {"C": np.inf}
        peer = LogisticRegression(
            **kind, solver="saga" if l1 else "lbfgs", fit_intercept=intercept, tol=1e-10, max_iter=20_000
        )
        peer.fit(x[:, mask].numpy(), x[:, node].numpy())
        np.testing.assert_allclose(fits.weights[row, parents[row]].numpy(), peer.coef_[0], atol=1e-4)
        if intercept:
            assert float(fits.state[row, 0]) == pytest.approx(float(peer.intercept_[0]), abs=1e-4)
    own = fits.gradients.gather(1, torch.tensor([[0], [3]]))
    assert float(torch.where(parents, fits.gradients, 0).abs().max()) <= 1e-8
    assert not bool(own.any())


def test_logistic_search_orders_binary_columns_and_meets_the_conditions():
    x = binary(5)
    found = TopoSwap(LogisticScore(l1=0.01), generator=generator()).fit(x)
    assert all(later < earlier for earlier, later in itertools.pairwise(found.history))
    assert found.kkt_residual <= 1e-5
    assert kkt_residual(x, found.weights, score=LogisticScore(l1=0.01)) == pytest.approx(found.kkt_residual, abs=1e-6)
    empty = float(LogisticScore().fit(x, torch.arange(5), torch.zeros(5, 5, dtype=torch.bool)).values.sum())
    assert found.score < empty


def test_a_separable_logistic_node_is_finite():
    x = torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]])
    found = TopoSwap("logistic", generator=generator()).fit(x)
    assert math.isfinite(found.score)
    assert bool(torch.isfinite(found.weights).all())


def test_the_gradient_of_the_networks_is_autograds():
    x = confounded(4, rows=50)
    score = MLPScore(hidden=3, num_iters=5)
    nodes, parents = torch.tensor([0, 2]), torch.tensor([[False, True, True, False], [True, True, False, True]])
    fits = score.fit(x, nodes, parents)
    state = fits.state.clone().requires_grad_()
    predicted = score.predict(x, dataclasses.replace(fits, state=state), mean=x.mean(0))
    centred = x - x.mean(0)
    into = state[:, :15].unflatten(1, (3, 5))[..., :4]  # the last column holds the biases
    squares = into.square().sum((1, 2)) + state[:, 15:].square().sum(1)
    loss = (predicted - centred[:, nodes]).square().mean(0) / 2 + 0.005 * squares
    loss.sum().backward()
    value, slope = score._smooth(score._with_ones(centred), centred[:, nodes].T, fits.state)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(slope, state.grad)
    penalised = value + 0.01 * into.detach().abs().sum((1, 2))
    torch.testing.assert_close(penalised, fits.values)
    assert not bool(torch.where(parents, 0, fits.weights).any())


def test_networks_learn_what_no_line_can():
    draw = generator()
    first = 2 * torch.rand(200, 1, generator=draw) - 1
    x = torch.cat([first, (3 * first).cos() + 0.1 * torch.randn(200, 1, generator=draw)], 1)
    x = x / x.std(0)
    parents = torch.tensor([[True, False]])
    network = MLPScore(l1=0.0, l2=0.0, num_iters=400).fit(x, torch.tensor([1]), parents)
    line = LeastSquaresScore().fit(x, torch.tensor([1]), parents)
    assert float(network.values) < 0.2 * float(line.values)
    found = TopoSwap(MLPScore(hidden=10, l1=1e-3, l2=1e-3, num_iters=200), generator=generator(1)).fit(x)
    assert found.order.tolist() == [0, 1]
    assert all(later < earlier for earlier, later in itertools.pairwise(found.history))


class Sizes:
    """A user's score without derivatives: what a node costs depends on how many parents it has, and on which."""

    max_fits = 7

    def fit(self, data, nodes, parents, start=None):
        likes = torch.arange(parents.shape[1], dtype=torch.float64)
        weights = parents.double()
        return NodeFits(10 + (nodes[:, None] - likes).mul(weights).sum(1) * nodes.double(), weights)


def test_a_score_of_ones_own_is_searched_and_needs_no_derivatives():
    x = confounded(5)
    found = TopoSwap(Sizes(), generator=generator()).fit(x)
    # The sum is least where a node with a large index has those with larger ones before it.
    best = min(
        sum(10 + sum(node - one for one in order[:place]) * node for place, node in enumerate(order))
        for order in itertools.permutations(range(5))
    )
    assert found.score == pytest.approx(best)
    assert found.kkt_residual is None


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_pruning_is_backward_elimination_by_full_refits():
    x, _, order = sem(5, rows=100, seed=4)
    matrix, n = covariance(x), 100
    rank = torch.argsort(order)
    full = (rank[:, None] < rank).double()
    pruned = prune_edges(matrix, full, num_rows=n)
    centred = (x - x.mean(0)).numpy()

    def variance(node, parents):
        if not parents:
            return np.square(centred[:, node]).mean()
        solution = np.linalg.lstsq(centred[:, parents], centred[:, node], rcond=None)[0]
        return np.square(centred[:, node] - centred[:, parents] @ solution).mean()

    for node in range(5):
        parents = full[:, node].nonzero()[:, 0].tolist()
        while parents:
            costs = {one: variance(node, [p for p in parents if p != one]) for one in parents}
            weakest = min(costs, key=costs.get)
            if n * math.log(costs[weakest] / variance(node, parents)) >= math.log(n) + 2 * math.log(5):
                break
            parents.remove(weakest)
        assert pruned[:, node].nonzero()[:, 0].tolist() == parents
        if parents:
            wanted = np.linalg.lstsq(centred[:, parents], centred[:, node], rcond=None)[0]
            np.testing.assert_allclose(pruned[parents, node].numpy(), wanted, atol=1e-9)


def test_pruning_keeps_what_is_required_and_does_not_ask_for_units():
    x, _, order = sem(6, rows=200)
    rank = torch.argsort(order)
    full = (rank[:, None] < rank).double()
    scale = torch.tensor([1e-3, 1.0, 1e3, 10.0, 1.0, 0.1], dtype=torch.float64)
    plain = prune_edges(covariance(x), full, num_rows=200)
    scaled = prune_edges(covariance(x * scale), full, num_rows=200)
    torch.testing.assert_close(scaled, plain / scale[:, None] * scale, rtol=1e-6, atol=1e-9)
    missing = ((plain == 0) & (full != 0)).nonzero()[0]
    required = torch.zeros(6, 6, dtype=torch.bool)
    required[missing[0], missing[1]] = True
    assert bool(prune_edges(covariance(x), full, num_rows=200, required=required)[missing[0], missing[1]])


# --- errors and limits -----------------------------------------------------------------------------------------------


def test_single_precision_gives_the_same_graph():
    x, _, _ = sem(8)
    double, single = (TopoSwap().fit(rows, order=list(range(8))) for rows in (x, x.float()))
    assert single.weights.dtype == torch.float32
    assert torch.equal(single.order, double.order)
    torch.testing.assert_close(single.weights.double(), double.weights, rtol=1e-4, atol=1e-4)


def test_dependent_columns_are_said_and_survived():
    x = confounded(4)
    with pytest.warns(UserWarning, match="linearly dependent"):
        found = TopoSwap(generator=generator()).fit(torch.cat([x, x[:, :1] + x[:, 1:2]], 1))
    assert bool(torch.isfinite(found.weights).all())
    with pytest.warns(UserWarning, match="5 rows, 9 columns"):
        assert math.isfinite(TopoSwap(generator=generator()).fit(confounded(9, rows=5)).score)


def test_a_search_that_may_not_look_further_says_that_it_stalled():
    x = confounded(12)
    found = TopoSwap(small=1, large_budget=0, single_moves=False).fit(x, order=list(range(12)))
    assert found.status is Stop.STALLED
    assert not found.status.success


def mask(*pairs):
    matrix = torch.zeros(3, 3, dtype=torch.bool)
    for i, j in pairs:
        matrix[i, j] = True
    return matrix


ROWS = confounded(3)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TopoSwap().fit(torch.cat([ROWS, ROWS[:1] * math.nan])), "NaN"),
        (lambda: TopoSwap().fit(ROWS * torch.tensor([1.0, 0.0, 1.0])), r"constant columns: leave out \[1\]"),
        (lambda: TopoSwap().fit(ROWS[:1]), "at least 2 rows"),
        (lambda: TopoSwap().fit(ROWS[0]), "shape"),
        (lambda: TopoSwap().fit(ROWS, order=[0, 1, 1]), "permutation of 0 to 2"),
        (lambda: TopoSwap().fit(ROWS, order=[0, 1, 2], weights=torch.zeros(3, 3)), "not both"),
        (lambda: TopoSwap().fit(ROWS, weights=torch.ones(3, 3).fill_diagonal_(0)), "cycle: "),
        (lambda: TopoSwap().fit(ROWS, weights=torch.zeros(2, 2)), "shape"),
        (lambda: TopoSwap("logistic").fit(ROWS), "zeros and ones"),
        (lambda: TopoSwap("deviance"), "score must be one of"),
        (lambda: TopoSwap(small=0), "small"),
        (lambda: TopoSwap(small=9, large=3), "large"),
        (lambda: TopoSwap(forbidden=mask((0, 1)), required=mask((0, 1))).fit(ROWS), "0 -> 1 is both"),
        (lambda: TopoSwap(required=mask((0, 1), (1, 2), (2, 0))).fit(ROWS), "required has a cycle: 0 -> 1 -> 2 -> 0"),
        (lambda: TopoSwap(required=mask((0, 1)), tiers=[1, 0, 0]).fit(ROWS), "a cycle 0 -> 1 -> 0"),
        (lambda: TopoSwap(required=mask((0, 1))).fit(ROWS, order=[1, 0, 2]), "node 0 before node 1"),
        (lambda: TopoSwap(tiers=[0, 1]).fit(ROWS), "one integer a node"),
        (lambda: TopoSwap(forbidden=torch.zeros(2, 2, dtype=torch.bool)).fit(ROWS), "forbidden must be booleans"),
        (lambda: order_score(torch.ones(2, 2), [0, 1]), "positive definite"),
        (lambda: swap_change(torch.zeros(2, 2)), "diagonal above 0"),
        (lambda: kkt_residual(ROWS, torch.ones(3, 3).double()), "cycle"),
        (lambda: prune_edges(torch.eye(3), torch.ones(3, 3), num_rows=5), "cycle"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.untyped
def test_a_score_must_be_a_score():
    with pytest.raises(TypeError, match="max_fits and fit"):
        TopoSwap(3.0)
