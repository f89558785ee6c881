"""Do swaps of an order find better graphs than descent on weights, and do they help after it?

Linear models of 20 nodes and 4 edges a node, unit noise, 1,000 rows: random graphs (ER), graphs with hubs (SF), and
random graphs whose columns are standardised, which takes away that variances grow along the graph.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from ..bench import Claim, Metric, Outcome, Run, Study
from ..bench.graph import random_linear_model, wrong_edges
from ..bench.graph_learners import learnt
from ..constraints import TopoSwap, kkt_residual, order_score, prune_edges, topological_order

NODES, ROWS, EDGES = 20, 1000, 4
CONDITIONS = {"ER": ("ER", False), "SF": ("SF", False), "ER, standardised": ("ER", True)}
_CUT = 0.3


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Rows of a linear model, and its weights before standardising."""

    rows: Tensor
    weights: Tensor


def linear_models(source: Any, seed: int) -> dict[str, LinearModel]:
    """Draw the models of cell ``seed``, one a condition."""
    return {
        name: LinearModel(*random_linear_model(NODES, ROWS, seed, edges=EDGES, family=family, standardize=standardize))
        for name, (family, standardize) in CONDITIONS.items()
    }


@dataclasses.dataclass(frozen=True)
class Learn:
    """A contender: learn weights under every condition, and measure the graph and its order.

    Args:
        learner: ``"sort-n-regress"``, ``"NOTEARS"`` or ``"DAGMA"``; None for a random order.
        swaps: ``"none"``, ``"paper"`` (swaps only, the released code's candidate sets) or ``"all"`` (this library's
            defaults).
        conditions: Under which it takes part.
    """

    learner: str | None
    swaps: str = "none"
    conditions: tuple[str, ...] = tuple(CONDITIONS)

    def __call__(self, data: dict[str, LinearModel], run: Run) -> Outcome:
        """Learn and measure one cell."""
        metrics: dict[str, float] = {}
        seconds = 0.0
        for name in self.conditions:
            model, start = data[name], time.perf_counter()
            weights, spent = torch.zeros_like(model.weights), 0.0
            if self.learner is not None:
                weights, spent = learnt(self.learner, model.rows)
                start = time.perf_counter()
            if self.swaps != "none":
                generator = torch.Generator().manual_seed(run.stream(name))
                paper = {"small": 100, "large_budget": 10, "single_moves": False, "kkt_repair": False}
                solver = TopoSwap(generator=generator, **(paper if self.swaps == "paper" else {}))  # type: ignore[arg-type]
                given = None if self.learner is None else weights
                weights = solver.fit(model.rows, weights=given, break_cycles=True).weights
            seconds += spent + time.perf_counter() - start
            metrics |= {f"{metric}, {name}": value for metric, value in measured(model, weights).items()}
        return Outcome(metrics, seconds=seconds)


def measured(model: LinearModel, weights: Tensor) -> dict[str, float]:
    """Measure weights: their order's score above the true order's, the graph cut at 0.3 and that of few edges.

    The score is that of least squares refitted along the order, so that no penalty of a learner counts against it.
    """
    centred = model.rows - model.rows.mean(0)
    covariance = centred.T @ centred / len(centred)
    order = topological_order(weights, break_cycles=True)
    rank = torch.argsort(order)
    best = float(order_score(covariance, topological_order(model.weights)))
    along = (rank[:, None] < rank).double()
    pruned = prune_edges(covariance, along, num_rows=len(centred))
    cut = torch.where((weights.abs() >= _CUT) & (along > 0), weights, 0)
    return {
        "score above the true order's": float(order_score(covariance, order)) - best,
        "wrong edges": float(wrong_edges(cut, model.weights != 0)),
        "wrong edges after elimination": float(wrong_edges(pruned, model.weights != 0)),
        "KKT residual": kkt_residual(model.rows, torch.where(along > 0, weights, 0)),
    }


def _claim(contender: str, beats: str, metric: str, says: str, margin: float = 0.0) -> Claim:
    return Claim(contender, beats=beats, metric=metric, margin=margin, says=says)


_SCORE, _WRONG, _ELIMINATED = "score above the true order's", "wrong edges", "wrong edges after elimination"
_SCALED = "ER, standardised"

study = Study(
    method="topo",
    problem=linear_models,
    contenders={
        "DAGMA": Learn("DAGMA"),
        "NOTEARS": Learn("NOTEARS", conditions=("ER",)),
        "sort-n-regress": Learn("sort-n-regress"),
        "TOPO, swaps only": Learn(None, "paper"),
        "TOPO": Learn(None, "all"),
        "TOPO after DAGMA": Learn("DAGMA", "all"),
        "TOPO after NOTEARS": Learn("NOTEARS", "all", conditions=("ER",)),
        "TOPO after sort-n-regress": Learn("sort-n-regress", "all"),
    },
    metrics=tuple(
        Metric(f"{metric}, {name}", "lower is better")
        for metric in (_SCORE, _WRONG, _ELIMINATED, "KKT residual")
        for name in CONDITIONS
    ),
    claims=(
        _claim("TOPO", "DAGMA", f"{_SCORE}, ER", "random graphs: from a random order, a lower score than DAGMA's"),
        _claim("TOPO", "NOTEARS", f"{_SCORE}, ER", "random graphs: a lower score than NOTEARS'"),
        _claim("TOPO", "DAGMA", f"{_SCORE}, SF", "graphs with hubs: a lower score than DAGMA's"),
        _claim("TOPO", "DAGMA", f"{_WRONG}, ER", "random graphs: fewer wrong edges than DAGMA"),
        _claim("TOPO", "NOTEARS", f"{_WRONG}, ER", "random graphs: fewer wrong edges than NOTEARS"),
        _claim("TOPO", "DAGMA", f"{_WRONG}, SF", "graphs with hubs: fewer wrong edges than DAGMA"),
        _claim("TOPO", "DAGMA", f"{_ELIMINATED}, ER", "random graphs: fewer than DAGMA when both are pruned alike"),
        _claim("TOPO", "sort-n-regress", f"{_ELIMINATED}, ER", "random graphs: fewer than sort-n-regress, likewise"),
        _claim("TOPO after DAGMA", "DAGMA", f"{_SCORE}, ER", "random graphs: swaps after DAGMA lower its score"),
        _claim("TOPO after NOTEARS", "NOTEARS", f"{_SCORE}, ER", "random graphs: swaps after NOTEARS lower its score"),
        _claim("TOPO", "TOPO, swaps only", f"{_SCORE}, SF", "graphs with hubs: moves of single nodes lower the score"),
        _claim("TOPO", "DAGMA", f"{_SCORE}, {_SCALED}", "standardised columns: still a lower score than DAGMA's"),
        _claim("TOPO", "DAGMA", f"{_WRONG}, {_SCALED}", "standardised columns: still fewer wrong edges than DAGMA"),
    ),
    seeds=10,
    about="Linear models of 20 nodes, 80 edges, unit noise; 1,000 rows; every score is a refit along the order found.",
    notes=(
        "NOTEARS is written anew (l1 0.1), DAGMA is its authors' package (l1 0.02; minimand[graph]); both at their "
        "published settings. NOTEARS takes part on plain random graphs only, for its time. Graphs are cut at weights "
        "of 0.3, as the papers do, or pruned by an extended BIC along the order. TOPO with swaps only has the released "
        "code's sets of 100 and of all pairs; TOPO itself adds moves of single nodes and the repair. Score and noise "
        "fit each other here; on standardised columns they do not, and the graph of the lowest score is not the true "
        "one. GES, which takes 20 seconds a graph of this size, is left to `minimand compare graph`."
    ),
)
