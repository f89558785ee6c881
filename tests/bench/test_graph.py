"""Learning graphs from a user's table: baselines, prior knowledge, what is refused, and the drawing."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from minimand.bench import Run
from minimand.bench.graph import (
    GraphSplit,
    LearnGraph,
    Prior,
    acyclic_graph,
    graph_study,
    held_out_score,
    prior_of,
    random_linear_model,
    wrong_edges,
)
from minimand.bench.graph_drawing import _crossings, _layers, _neighbours, _untangle, draw_graph
from minimand.bench.graph_learners import dagma, greedy_equivalence_search, notears, sort_and_regress
from minimand.bench.readers import DataError
from minimand.cli import app
from minimand.constraints import reachability

NAMES = ["a", "b", "c", "d"]


def chain(rows=400, seed=0):
    """Rows of a -> b -> c, d apart."""
    noise = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[0, 1], weights[1, 2] = 1.5, -1.0
    return noise @ torch.linalg.inv(torch.eye(4, dtype=torch.float64) - weights), weights


@pytest.fixture
def table(tmp_path):
    def write(rows=None, name="rows.csv", header=NAMES, text=None):
        path = tmp_path / name
        if text is None:
            np.savetxt(
                path, chain()[0].numpy() if rows is None else rows, delimiter=",", header=",".join(header), comments=""
            )
        else:
            path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("learner", [sort_and_regress, notears, dagma, greedy_equivalence_search])
def test_every_learner_finds_a_chain_or_its_equivalents(learner):
    rows, weights = chain()
    found = acyclic_graph(rows, learner(rows), "least_squares", Prior())
    if learner is greedy_equivalence_search:
        # A chain's direction is open under BIC; its pairs are not.
        assert torch.equal((found != 0) | (found.T != 0), (weights != 0) | (weights.T != 0))
    else:
        assert wrong_edges(found, weights != 0) == 0


def test_dagma_gives_the_same_weights_however_often_it_was_called():
    """The package keeps what it learnt of one call's domain for the next, unless it is given its levels anew."""
    rows, _ = random_linear_model(8, 300, 0, edges=3)
    first = dagma(rows)
    dagma(1e3 * random_linear_model(8, 300, 1, edges=3)[0])
    assert torch.equal(first, dagma(rows))


@pytest.mark.parametrize("kind", ["least_squares", "logistic"])
def test_notears_ends_at_no_cycle_and_keeps_off_forbidden_edges(kind):
    rows = chain()[0] if kind == "least_squares" else (chain()[0] > 0).double()
    forbidden = torch.zeros(4, 4, dtype=torch.bool)
    forbidden[0, 1] = True
    found = notears(rows, kind=kind, l1=0.02, forbidden=forbidden)
    assert float(found[0, 1]) == 0
    assert not bool(reachability(torch.where(found.abs() > 1e-3, found, 0)).diagonal().any())
    assert abs(float(found[1, 2])) + abs(float(found[2, 1])) > 0.1


def test_without_a_constraint_to_meet_notears_is_a_lasso_of_each_column():
    """Two columns, one direction forbidden: the other is a soft-thresholded regression."""
    rows, _ = chain()
    pair = rows[:, :2] - rows[:, :2].mean(0)
    forbidden = torch.tensor([[True, False], [True, True]])
    found = notears(pair, l1=0.1, forbidden=forbidden)
    covariance = pair.T @ pair / len(pair)
    assert float(found[0, 1]) == pytest.approx(float((covariance[0, 1] - 0.1) / covariance[0, 0]), abs=1e-4)


def test_wrong_edges_count_a_reversal_once():
    truth = torch.tensor([[False, True, False], [False, False, True], [False, False, False]])
    assert wrong_edges(truth.double(), truth) == 0
    assert wrong_edges(truth.T.double(), truth) == 2
    assert wrong_edges(torch.zeros(3, 3), truth) == 2
    assert wrong_edges(torch.ones(3, 3).triu(1), truth) == 1


def test_the_held_out_score_refits_on_the_training_rows():
    rows, weights = chain()
    train, test = rows[:300], rows[300:]
    total = 0.0
    for node in range(4):
        parents = weights[:, node].nonzero()[:, 0].tolist()
        design = torch.cat([train[:, parents], torch.ones(300, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(design, train[:, node]).solution
        ahead = torch.cat([test[:, parents], torch.ones(100, 1, dtype=torch.float64)], 1) @ solution
        total += float((test[:, node] - ahead).square().mean() / 2)
    assert held_out_score(train, test, weights, "least_squares") == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("family", ["ER", "SF"])
def test_random_models_have_the_edges_they_promise(family):
    rows, weights = random_linear_model(20, 50, 3, edges=4, family=family)
    assert rows.shape == (50, 20)
    assert int((weights != 0).sum()) == (80 if family == "ER" else 4 * 20 - 4 * 5 // 2)
    assert not bool(reachability(weights).diagonal().any())
    sizes = weights[weights != 0].abs()
    assert 0.5 <= float(sizes.min()) <= float(sizes.max()) <= 2
    scaled, _ = random_linear_model(20, 50, 3, family=family, standardize=True)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("learner", ["sort-n-regress", "NOTEARS"])
def test_every_contender_keeps_prior_knowledge(learner, swaps):
    rows, _ = chain()
    prior = Prior(forbidden=((0, 1),), required=((3, 0),), tiers=(1, 1, 2, 0))
    outcome = LearnGraph(learner, swaps, "least_squares", prior)(GraphSplit(rows[:300], rows[300:]), Run(0))
    edges = {(i, j) for i, j, _ in outcome.details["edges"]}
    assert (0, 1) not in edges
    assert (3, 0) in edges
    assert all(prior.tiers[i] <= prior.tiers[j] for i, j in edges)
    assert all(math.isfinite(value) for value in outcome.metrics.values())
    json.dumps(outcome.details)


def test_prior_knowledge_is_read_by_names():
    names = ["a", "b:c", "d"]
    prior = prior_of(names, ["a:d, b:c:a"], ["d:b:c"], "a;b:c\nd")
    assert prior.forbidden == ((0, 2), (1, 0))
    assert prior.required == ((2, 1),)
    assert prior.tiers == (0, 1, 2)


def test_tiers_may_be_a_file(tmp_path):
    path = tmp_path / "tiers.txt"
    path.write_text("c, d\na,b\n")
    assert prior_of(NAMES, [], [], str(path)).tiers == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"forbid": ["a:z"]}, "--forbid: there is no column 'z'"),
        ({"forbid": ["ab"]}, "FROM:TO"),
        ({"require": ["a:a"]}, "to itself"),
        ({"tiers": "a,b;c"}, "leaves out d"),
        ({"tiers": "a,b,c,d;a"}, "in two tiers"),
        ({"require": ["a:b", "b:c", "c:a"]}, "cycle: a -> b -> c -> a"),
        ({"require": ["a:b"], "forbid": ["a:b"]}, "a -> b is both forbidden and required"),
        ({"require": ["a:b"], "tiers": "b,c,d;a"}, "a -> b leads from tier"),
        ({"drop": ["zz"]}, "--drop: there is no column"),
        ({"score": "mlp"}, "--score"),
        ({"score": "logistic"}, "zeros and ones, column 'a'"),
        ({"folds": 1}, "--folds"),
        ({"contenders": ["TOPPO"]}, "did you mean 'TOPO'"),
        ({"drop": ["a,b,c"]}, "at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(table, settings, words):
    with pytest.raises(DataError, match=words):
        graph_study(table(), **settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n" + "1,2\n" * 30, "column 'a' is constant"),
        ("a,b\n" + "1,2\n2,1\n" * 15 + "3,\n", "column 'b' misses 1 values"),
        ("a,b\n" + "1,x\n2,y\n" * 15, "column 'b' holds String"),
        ("a,b\n1,2\n2,1\n", "2 rows of 2 columns"),
    ],
)
def test_tables_that_hold_no_numbers_are_refused(table, text, words):
    with pytest.raises(DataError, match=words):
        graph_study(table(text=text))


@pytest.mark.parametrize("text", ["from,to\na,b\nb,c\n", "a,b\nb,c\n"])
def test_true_edges_are_read_with_and_without_a_header(table, text):
    study = graph_study(table(), truth=table(text=text, name="edges.csv"), contenders=["TOPO"])
    split = study.problem(None, 0)
    assert split.truth.nonzero().tolist() == [[0, 1], [1, 2]]
    assert study.contenders["TOPO"](split, Run(0)).metrics["wrong edges"] == 0
    with pytest.raises(DataError, match="--truth: there is no column 'e'"):
        graph_study(table(), truth=table(text="from,to\na,e\n", name="edges.csv"))


def test_every_row_is_held_out_once(table):
    study = graph_study(table(), folds=5)
    held = torch.cat([study.problem(None, seed).test for seed in range(5)])
    torch.testing.assert_close(held.sort(0).values, chain()[0].sort(0).values)
    assert study.test_train_ratio == 0.25


def test_standardising_uses_the_training_rows_only(table):
    split = graph_study(table(), standardize=True).problem(None, 0)
    torch.testing.assert_close(split.train.mean(0), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(split.train.std(0, correction=0), torch.ones(4, dtype=torch.float64))
    assert float(split.test.mean(0).abs().max()) > 1e-6


def test_binary_columns_are_compared_by_the_logistic_score(table):
    path = table((chain()[0] > 0).numpy().astype(int))
    study = graph_study(path, score="logistic", contenders=["TOPO", "NOTEARS"])
    assert "sort-n-regress" not in study.contenders
    split = study.problem(None, 0)
    found = {name: one(split, Run(0)) for name, one in study.contenders.items()}
    for outcome in found.values():
        pairs = {frozenset(edge[:2]) for edge in outcome.details["edges"]}
        assert {frozenset((0, 1)), frozenset((1, 2))} <= pairs
    assert found["TOPO"].metrics["held-out score"] < held_out_score(
        split.train, split.test, torch.zeros(4, 4), "logistic"
    )


def test_the_command_prints_the_graph_and_draws_it(table, tmp_path):
    arguments = ["compare", "graph", table(), "--contenders", "sort-n-regress,TOPO", "--folds", "3", "--jobs", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store.db")]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 0, plain.output
    assert "a -> b" in plain.output
    assert "b -> c" in plain.output
    assert "KKT residual" in plain.output
    report = (tmp_path / "out" / "compare-graph.html").read_text()
    assert "The graph that" in report
    assert "a → b" in report
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["graph"]
    assert {(edge["from"], edge["to"]) for edge in found["edges"]} == {("a", "b"), ("b", "c")}
    assert found["means"]["cycles before repair"] < 1e-12
    assert all(edge["share"] == 1 for edge in found["edges"])


def drawn_edges(seed=1, size=40):
    _, weights = random_linear_model(size, 2, seed, edges=2)
    return [(i, j, float(weights[i, j]), f"{i} & {j}") for i, j in weights.nonzero().tolist()]


def test_a_drawing_leads_every_edge_downwards_and_sets_no_two_boxes_on_one_another():
    edges = drawn_edges()
    svg = ElementTree.fromstring(draw_graph([f"node {node}" for node in range(40)], edges, label="<a graph>"))
    space = {"s": "http://www.w3.org/2000/svg"}
    boxes = [
        tuple(float(box.get(key)) for key in ("x", "y", "width", "height")) for box in svg.findall("s:g/s:rect", space)
    ]
    assert len(boxes) == 40
    assert len(svg.findall("s:path", space)) == len(edges)
    for tail, head, *_ in edges:
        assert boxes[tail][1] < boxes[head][1]
    for number, (x, y, width, _) in enumerate(boxes):
        for other_x, other_y, other_width, _ in boxes[:number]:
            assert y != other_y or x + width <= other_x or other_x + other_width <= x


def test_untangling_leaves_fewer_crossings():
    layers, paths = _layers(40, drawn_edges())
    _, below = _neighbours(paths)
    before = _crossings(layers, below)
    _untangle(layers, paths)
    assert _crossings(layers, below) < before / 2
    crossed = _crossings([[0, 1], [2, 3]], {0: [3], 1: [2]})
    assert crossed == 1


def test_names_cannot_break_the_drawing():
    svg = draw_graph(["<script>", "a" * 60], [(0, 1, 0.5, '"&')], label='"')
    ElementTree.fromstring(svg)
    assert "<script>" not in svg
