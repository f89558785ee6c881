"""Penalties on cycles, paths and orders, against autograd, networkx and enumeration."""

import math

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimand.constraints import acyclicity, reachability, topological_order

KINDS = ("logdet", "exp", "poly")


def graph(seed, size=6, edges=0.3, acyclic=False):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, size, generator=draw, dtype=torch.float64)
    weights *= torch.rand(size, size, generator=draw) < edges
    if acyclic:
        weights = weights.triu(1)
        order = torch.randperm(size, generator=draw)
        weights = weights[order][:, order]
    return weights


def closure(weights):
    found = networkx.from_numpy_array((weights != 0).numpy(), create_using=networkx.DiGraph)
    paths = torch.zeros_like(weights, dtype=torch.bool)
    for source in found:
        for target in networkx.descendants(found, source) | ({source} if found.has_edge(source, source) else set()):
            paths[source, target] = True
    for cycle in networkx.simple_cycles(found):
        paths[cycle, cycle] = True
    return paths


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_it_is_zero_exactly_where_there_is_no_cycle(kind, seed):
    acyclic, any_graph = graph(seed, acyclic=True), graph(seed)
    small = any_graph.abs() / (any_graph.abs().sum() + 1)
    torch.testing.assert_close(acyclicity(acyclic.square(), kind=kind), torch.zeros((), dtype=torch.float64))
    cyclic = bool(closure(any_graph).diagonal().any())
    assert (float(acyclicity(small, kind=kind)) > 1e-12) == cyclic


def test_on_a_pair_of_edges_all_kinds_have_a_closed_form():
    pair = torch.tensor([[0.0, 0.6], [0.3, 0.0]], dtype=torch.float64)
    product = 0.6 * 0.3
    assert math.isclose(acyclicity(pair), -math.log(1 - product), rel_tol=1e-12)
    assert math.isclose(acyclicity(pair, kind="exp"), 2 * math.cosh(math.sqrt(product)) - 2, rel_tol=1e-12)
    assert math.isclose(acyclicity(pair, kind="poly"), 2 * product / 4, rel_tol=1e-12)
    assert math.isclose(acyclicity(pair, level=2.0), -math.log(1 - product / 4), rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    strengths = (graph(1).abs() / 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: acyclicity(b.square(), kind=kind), strengths)


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_derivative_by_an_edge_is_zero_exactly_if_no_walk_leads_back_along_it(seed):
    """Card oracle 4: on an acyclic graph the derivative of log-det is the transposed sum of all walks."""
    weights = graph(seed, acyclic=True).abs()
    strengths = weights.clone().requires_grad_()
    for kind in KINDS:
        (slope,) = torch.autograd.grad(acyclicity(strengths, kind=kind), strengths)
        walks = sum(torch.linalg.matrix_power(weights, power) for power in range(len(weights)))
        if kind == "logdet":
            torch.testing.assert_close(slope, walks.T)
        paths = closure(weights) | torch.eye(len(weights), dtype=torch.bool)
        assert torch.equal(slope.abs() > 1e-14, paths.T)


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_reachability_is_the_transitive_closure(seed):
    weights = graph(seed, size=8, edges=0.2)
    assert torch.equal(reachability(weights), closure(weights))
    assert torch.equal(reachability(weights != 0), closure(weights))


def test_a_long_chain_is_followed_to_its_end():
    chain = torch.diag(torch.ones(32), 1)
    assert torch.equal(reachability(chain), torch.ones(33, 33, dtype=torch.bool).triu(1))


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_topological_order_puts_parents_first(seed):
    weights = graph(seed, acyclic=True)
    order = topological_order(weights)
    assert not bool(weights[order][:, order].tril().any())
    assert order.tolist() == list(
        networkx.lexicographical_topological_sort(
            networkx.from_numpy_array((weights != 0).numpy(), create_using=networkx.DiGraph)
        )
    )


def test_breaking_cycles_costs_the_weakest_edges():
    ring = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, -2.0], [1.0, 0.0, 0.0]])
    assert topological_order(ring, break_cycles=True).tolist() == [0, 1, 2]
    ring[2, 0] = 5.0  # now 1 -> 2 is the weakest
    assert topological_order(ring, break_cycles=True).tolist() == [2, 0, 1]


def test_a_batch_is_its_graphs_one_by_one():
    batch = torch.stack([graph(seed).abs() / 20 for seed in range(4)])
    for kind in KINDS:
        torch.testing.assert_close(
            acyclicity(batch, kind=kind), torch.stack([acyclicity(one, kind=kind) for one in batch])
        )


def test_a_penalised_loss_ends_at_an_acyclic_graph():
    """The penalty in a plain loop: two variables that explain each other, of which one edge survives."""
    weights = torch.tensor([[0.0, 0.6], [0.5, 0.0]], requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.002)
    for _ in range(1000):
        optimizer.zero_grad()
        ((weights - torch.tensor([[0.0, 0.8], [0.3, 0.0]])).square().sum() + 10 * acyclicity(weights.abs())).backward()
        optimizer.step()
    assert abs(float(weights[1, 0].detach())) < 0.05
    assert float(weights[0, 1].detach()) > 0.7


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: acyclicity(torch.tensor([[0.0, -1.0], [0.0, 0.0]])), "squared"),
        (lambda: acyclicity(torch.tensor([[0.0, 2.0], [2.0, 0.0]])), "spectral radius below level"),
        (lambda: acyclicity(torch.tensor([[0.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])), "spectral radius"),
        (lambda: acyclicity(torch.full((3, 3), 1e30), kind="exp"), "too large"),
        (lambda: acyclicity(torch.zeros(2, 3)), "shape"),
        (lambda: acyclicity(torch.zeros(2, 2), kind="trace"), "kind"),
        (lambda: acyclicity(torch.tensor([[0.0, float("nan")], [0.0, 0.0]])), "NaN"),
        (lambda: reachability(torch.zeros(2, 3)), "shape"),
        (lambda: topological_order(torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 1, 0]])), "cycle: 1 -> 2 -> 1"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
