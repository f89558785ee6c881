"""The problem behind ``minimand compare graph``: rows of a table, and which directed graph explains its columns."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..constraints import (
    LeastSquaresScore,
    LogisticScore,
    TopoSwap,
    acyclicity,
    kkt_residual,
    prune_edges,
    topological_order,
)
from . import graph_learners
from .graph_drawing import draw_graph
from .readers import DataError, content_hash, nearest, read_table, require_column, require_content
from .study import Metric, Outcome, Presentation, Run, Study

HELD_OUT = Metric("held-out score", "lower is better")
SHD = Metric("wrong edges", "lower is better")
METRICS = (
    HELD_OUT,
    Metric("fitted score", "lower is better"),
    Metric("edges", "lower is better"),
    Metric("KKT residual", "lower is better"),
    Metric("cycles before repair", "lower is better"),
)

_FEWEST_ROWS = 20
_LOGISTIC_L1 = 0.02


@dataclasses.dataclass(frozen=True)
class Prior:
    """What is known of the edges beforehand, by column numbers.

    Args:
        forbidden: Pairs (i, j) between which there is no edge i -> j.
        required: Pairs between which there is one.
        tiers: One number a column, or none; no edge leads to a lower.
    """

    forbidden: tuple[tuple[int, int], ...] = ()
    required: tuple[tuple[int, int], ...] = ()
    tiers: tuple[int, ...] = ()

    def masks(self, size: int) -> tuple[Tensor, Tensor]:
        """Return which edges are ruled out, by tiers too, and which are required."""
        closed, fixed = (torch.zeros(size, size, dtype=torch.bool) for _ in range(2))
        for pairs, mask in ((self.forbidden, closed), (self.required, fixed)):
            for tail, head in pairs:
                mask[tail, head] = True
        if self.tiers:
            tiers = torch.tensor(self.tiers)
            closed |= tiers[:, None] > tiers
        return closed, fixed

    def solver(self, size: int, score: Any = "least_squares", seed: int = 0, **settings: Any) -> TopoSwap:
        """Return a search that keeps to it."""
        closed, fixed = Prior(self.forbidden, self.required).masks(size)
        return TopoSwap(
            score,
            forbidden=closed if self.forbidden else None,
            required=fixed if self.required else None,
            tiers=self.tiers or None,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )


@dataclasses.dataclass(frozen=True)
class GraphSplit:
    """One cell's data.

    Args:
        train: Rows that a graph is learnt from.
        test: Rows that its score is measured on.
        truth: True at (i, j) where there is an edge i -> j, or None.
    """

    train: Tensor
    test: Tensor
    truth: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LearnGraph:
    """A contender: learn weights, make them an acyclic graph of few edges, and measure it.

    Args:
        learner: ``"sort-n-regress"``, ``"NOTEARS"``, ``"DAGMA"``, ``"GES"``, or None for a random order.
        swaps: Whether TOPO goes on from there.
        score: ``"least_squares"`` or ``"logistic"``.
        prior: Kept by all: who cannot be told it has edges that break it removed.
    """

    learner: str | None
    swaps: bool
    score: str = "least_squares"
    prior: Prior = Prior()

    def __call__(self, data: GraphSplit, run: Run) -> Outcome:
        """Learn and measure one cell."""
        raw, weights, seconds = self.learn(data.train, run.stream("order"))
        strengths = raw.abs() / raw.abs().max().clamp_min(1e-300)
        closed, _ = self.prior.masks(len(weights))
        metrics = {
            "held-out score": held_out_score(data.train, data.test, weights, self.score),
            "fitted score": held_out_score(data.train, data.train, weights, self.score),
            "edges": float((weights != 0).sum()),
            "KKT residual": kkt_residual(data.train, weights, score=_plain_score(self.score), forbidden=closed),
            "cycles before repair": float(acyclicity(strengths.square(), kind="exp")),
        }
        if data.truth is not None:
            metrics[SHD.name] = float(wrong_edges(weights, data.truth))
        edges = [[i, j, float(weights[i, j])] for i, j in weights.nonzero().tolist()]
        return Outcome(metrics, seconds=seconds, details={"edges": edges})

    def learn(self, rows: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
        """Return the learner's own weights, those of the graph that is made of them, and the seconds it took."""
        size, start = rows.shape[1], time.perf_counter()
        raw, spent = torch.zeros(size, size, dtype=torch.float64), 0.0
        if self.learner is not None:
            kind = cast(graph_learners.Kind, self.score)
            raw, spent = graph_learners.learnt(self.learner, rows, kind=kind, forbidden=self.prior.masks(size)[0])
            start = time.perf_counter()
        if self.swaps:
            model: Any = LogisticScore(l1=_LOGISTIC_L1) if self.score == "logistic" else "least_squares"
            found = self.prior.solver(size, model, seed).fit(
                rows, weights=None if self.learner is None else raw, break_cycles=self.learner is not None
            )
            raw = found.weights.double()
        weights = acyclic_graph(rows, raw, self.score, self.prior)
        return raw, weights, spent + time.perf_counter() - start


def acyclic_graph(rows: Tensor, weights: Tensor, score: str, prior: Prior) -> Tensor:
    """Make a graph that keeps prior knowledge of any weights, drop edges that do not pay, and refit the rest.

    The weakest edges of cycles go first, then edges against prior knowledge, then by backward elimination under an
    extended BIC (least squares) or a penalty of 0.02 (logistic).
    """
    size = len(weights)
    closed, fixed = prior.masks(size)
    rank = torch.argsort(topological_order(torch.where(closed, 0, weights), break_cycles=True))
    # Required edges and tiers are kept by an order that follows the graph's as far as they let it.
    along = (rank[:, None] < rank).double()
    places = torch.argsort(prior.solver(size, max_iter=0).fit(rows, weights=along).order)
    edges = ((weights != 0) | fixed) & (places[:, None] < places) & ~closed
    if score == "least_squares":
        centred = (rows - rows.mean(0)).double()
        covariance = centred.T @ centred / len(rows)
        covariance += torch.diag(1e-10 * covariance.diagonal())
        return prune_edges(covariance, edges.double(), num_rows=len(rows), required=fixed)
    kept = LogisticScore(l1=_LOGISTIC_L1).fit(rows, torch.arange(size), edges.T).weights.T != 0
    return LogisticScore().fit(rows, torch.arange(size), (kept | fixed).T & edges.T).weights.T


def held_out_score(train: Tensor, test: Tensor, weights: Tensor, score: str) -> float:
    """Score the graph of ``weights``, refitted on ``train``, on the rows of ``test``.

    Half the squared error, or the log loss, summed over columns and averaged over rows.
    """
    nodes, parents = torch.arange(len(weights)), (weights != 0).T
    if score == "least_squares":
        fits = LeastSquaresScore().fit(train, nodes, parents)
        centred = test.double() - train.double().mean(0)
        return float((centred - centred @ fits.weights.T).square().sum(1).mean() / 2)
    fits = LogisticScore().fit(train, nodes, parents)
    assert fits.state is not None
    logits = test.double() @ fits.weights.T + fits.state[:, 0]
    return float((torch.nn.functional.softplus(logits) - test * logits).sum(1).mean())


def wrong_edges(weights: Tensor, truth: Tensor) -> int:
    """Count the pairs of nodes whose edge is missing, too many, or the wrong way: the structural Hamming distance."""
    differs = (weights != 0) != truth
    return int((differs | differs.T).triu(1).sum())


def random_linear_model(
    size: int, rows: int, seed: int, *, edges: int = 4, family: str = "ER", standardize: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw a graph, weights and rows of a linear model with unit noise.

    Args:
        size: Nodes.
        rows: Rows.
        seed: Decides all.
        edges: Edges a node on average.
        family: ``"ER"``: any pairs of nodes; ``"SF"``: new nodes link to old ones in proportion to their edges.
        standardize: Whether columns are divided by their standard deviation.

    Returns:
        Rows ``(rows, size)`` and weights ``(size, size)``, of sizes 0.5 to 2 before standardising.
    """
    draw = np.random.default_rng(seed)
    skeleton = np.zeros((size, size), dtype=bool)
    if family == "ER":
        pairs = np.stack(np.triu_indices(size, 1), 1)
        chosen = pairs[draw.choice(len(pairs), size=min(edges * size, len(pairs)), replace=False)]
        skeleton[chosen[:, 0], chosen[:, 1]] = True
    elif family == "SF":
        degree = np.ones(size)
        for node in range(1, size):
            share = degree[:node] / degree[:node].sum()
            old = draw.choice(node, size=min(edges, node), replace=False, p=share)
            skeleton[old, node] = True
            degree[old] += 1
            degree[node] += len(old)
    else:
        raise ValueError(f"family must be 'ER' or 'SF', got {family!r}")
    names = draw.permutation(size)
    weights = np.zeros((size, size))
    weights[np.ix_(names, names)] = skeleton * draw.uniform(0.5, 2.0, (size, size)) * draw.choice([-1, 1], (size, size))
    noise = draw.normal(size=(rows, size))
    data = noise @ np.linalg.inv(np.eye(size) - weights)
    if standardize:
        data = (data - data.mean(0)) / data.std(0)
    return torch.from_numpy(data), torch.from_numpy(weights)


@dataclasses.dataclass(frozen=True)
class GraphFolds:
    """A problem: cell ``seed`` learns from all folds but one and is scored on that one.

    Args:
        path: The table, or None for fresh rows of a random linear model in every cell.
        content: Hash of the file.
        drop: Columns left out.
        truth: File of true edges, or None.
        truth_content: Hash of that file.
        score: ``"least_squares"`` or ``"logistic"``.
        standardize: Whether columns are divided by their standard deviation.
        folds: Folds of the cross-validation.
        seed: Draws the folds.
    """

    path: str | None
    content: str
    drop: tuple[str, ...]
    truth: str | None
    truth_content: str
    score: str
    standardize: bool
    folds: int
    seed: int

    def __call__(self, source: Any, seed: int) -> GraphSplit:
        """Return the data of cell ``seed``."""
        if self.path is None:
            rows, weights = random_linear_model(12, 1500, seed)
            train, test = rows[:1000], rows[1000:]
            return GraphSplit(self._scaled(train, train), self._scaled(test, train), weights != 0)
        table = self.table()
        repeat, fold = divmod(seed, self.folds)
        order = torch.from_numpy(np.random.default_rng((self.seed, repeat)).permutation(len(table.rows)))
        held = torch.arange(len(order)) % self.folds == fold
        train, test = table.rows[order[~held]], table.rows[order[held]]
        flat = [table.names[column] for column in (train == train[0]).all(0).nonzero()[:, 0].tolist()]
        if flat:
            raise DataError(f"column {flat[0]!r} is constant in a fold's training rows: drop it")
        return GraphSplit(self._scaled(train, train), self._scaled(test, train), table.truth)

    def table(self) -> GraphTable:
        """Return the whole table."""
        require_content(self.path, self.content)
        require_content(self.truth, self.truth_content)
        return _table(self)

    def everything(self) -> tuple[Tensor, tuple[str, ...]]:
        """Return all rows, scaled if that is wanted, and the names of the columns; cell 0's where rows are drawn."""
        if self.path is None:
            rows = self(None, 0).train
            return rows, tuple(f"x{column}" for column in range(rows.shape[1]))
        table = self.table()
        return self._scaled(table.rows, table.rows), table.names

    def _scaled(self, rows: Tensor, by: Tensor) -> Tensor:
        return (rows - by.mean(0)) / by.std(0, correction=0) if self.standardize else rows


@dataclasses.dataclass(frozen=True)
class GraphTable:
    """A table of numbers, its columns' names, and its true graph if it is known."""

    rows: Tensor
    names: tuple[str, ...]
    truth: Tensor | None


def graph_study(
    path: str | None = None,
    *,
    drop: Sequence[str] = (),
    forbid: Sequence[str] = (),
    require: Sequence[str] = (),
    tiers: str | None = None,
    truth: str | None = None,
    score: str = "least_squares",
    standardize: bool = False,
    folds: int = 5,
    repeats: int = 1,
    contenders: Sequence[str] | None = None,
    seed: int = 0,
) -> Study:
    """Build the comparison of ways to learn a graph from a user's table.

    Args:
        path: Table of numbers, a column a node; None for random linear models of 12 nodes and 48 edges.
        drop: Columns to leave out; names separated by commas are several.
        forbid: Edges ``"A:B"`` that there are not, from A to B.
        require: Edges ``"A:B"`` that there are.
        tiers: ``"a,b;c"``, earliest first, or a file with a tier a line: no edge leads to an earlier tier.
        truth: Table of true edges, from the first column to the second.
        score: ``"least_squares"``, or ``"logistic"`` for columns of zeros and ones.
        standardize: Whether to divide columns by their standard deviation.
        folds: Folds of the cross-validation.
        repeats: How often the folds are drawn anew; times ``folds``, how many models where there is no table.
        contenders: Names of those to run; all that are installed if None.
        seed: Draws the folds.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    if score not in ("least_squares", "logistic"):
        raise DataError(f"--score must be least_squares or logistic, got {score!r}")
    if folds < 2 or repeats < 1:
        raise DataError(f"--folds must be at least 2 and --repeats at least 1, got {folds} and {repeats}")
    dropped = tuple(name.strip() for names in drop for name in names.split(",") if name.strip())
    if path is None:
        if dropped or truth is not None:
            raise DataError("--drop and --truth need a table")
        if score == "logistic":
            raise DataError("--score logistic needs a table of zeros and ones")
    problem = GraphFolds(
        None if path is None else str(path), content_hash(path), dropped, truth, content_hash(truth), score,
        standardize, folds, seed,
    )  # fmt: skip
    rows, names = problem.everything()
    known = prior_of(names, forbid, require, tiers)
    try:
        known.solver(len(names), max_iter=0).fit(rows)
    except ValueError as error:
        raise DataError(_named(str(error), names)) from None
    available, absent = _contenders(score, known)
    if contenders is not None:
        for name in contenders:
            if name not in available:
                raise DataError(f"--contenders: there is no {name!r}{nearest(name, available)}")
        available = {name: one for name, one in available.items() if name in contenders}
    if not available:
        raise DataError("--contenders names nobody")
    notes = [
        "Every contender's weights are made an acyclic graph of few edges in the same way: the weakest edges of cycles "
        "go, then edges that an extended BIC does not pay for (with the logistic score, those that a penalty of 0.02 "
        "drops), and the rest is refitted. KKT residual: the slope of the steepest edge that this left out and that "
        "closes no cycle. An edge is a fit, not a cause."
    ]
    if score == "least_squares":
        notes.append(
            "Least squares takes columns of small variance for early ones, so directions depend on units."
            + (" Columns are standardised, so they say little." if standardize else "")
        )
    if absent:
        notes.append(f"Not installed: {', '.join(absent)} (pip install 'minimand[graph]').")
    if path is None:
        described = "1,500 rows of random linear models, 12 nodes and 48 edges"
        about = "a fresh model in every cell; 1,000 rows are learnt from, 500 held out"
    else:
        described = f"{pathlib.Path(path).name}, {len(rows):,} rows of {len(names)} columns"
        about = f"{folds}-fold cross-validation" + (f", drawn {repeats} times" if repeats > 1 else "")
    metrics = (*METRICS, SHD) if path is None or truth is not None else METRICS
    return Study(
        method="compare graph",
        problem=problem,
        contenders=available,
        metrics=metrics,
        seeds=folds * repeats,
        test_train_ratio=0.0 if path is None else 1 / (folds - 1),
        about=about,
        notes=" ".join(notes),
        data=described,
        data_key="random linear models" if path is None else problem.content + problem.truth_content,
        settings={
            "score": score,
            "standardize": standardize,
            "folds": folds,
            "seed": seed,
            "drop": list(dropped),
            "forbidden": [list(pair) for pair in known.forbidden],
            "required": [list(pair) for pair in known.required],
            "tiers": list(known.tiers),
        },
        presentation=Presentation(code=winner_code, figures=graph_figure, summary=graph_summary, lines=graph_lines),
    )


def prior_of(names: Sequence[str], forbid: Sequence[str], require: Sequence[str], tiers: str | None) -> Prior:
    """Read edges ``"A:B"`` and tiers ``"a,b;c"``, or a file of them, by column names.

    Raises:
        DataError: If a name is no column, or a tier is missing.
    """
    place = {name: number for number, name in enumerate(names)}

    def column(name: str, option: str) -> int:
        if name not in place:
            raise DataError(f"{option}: there is no column {name!r}{nearest(name, names)}")
        return place[name]

    def pairs(given: Sequence[str], option: str) -> tuple[tuple[int, int], ...]:
        found = []
        for edge in (one.strip() for each in given for one in each.split(",") if one.strip()):
            # A name may hold a colon itself: the split whose both sides are columns is meant.
            cuts = [(edge[:at].strip(), edge[at + 1 :].strip()) for at, mark in enumerate(edge) if mark == ":"]
            if not cuts:
                raise DataError(f"{option} takes edges as FROM:TO, got {edge!r}")
            tail, head = next((cut for cut in cuts if cut[0] in place and cut[1] in place), cuts[0])
            found.append((column(tail, option), column(head, option)))
            if tail == head:
                raise DataError(f"{option}: {edge!r} leads from a column to itself")
        return tuple(found)

    levels: tuple[int, ...] = ()
    if tiers is not None:
        text = pathlib.Path(tiers).read_text() if os.path.isfile(tiers) else tiers
        level: dict[int, int] = {}
        for number, line in enumerate(part for part in text.replace("\n", ";").split(";") if part.strip()):
            for name in (one.strip() for one in line.split(",") if one.strip()):
                if level.setdefault(column(name, "--tiers"), number) != number:
                    raise DataError(f"--tiers: column {name!r} is in two tiers")
        missing = [name for name in names if place[name] not in level]
        if missing:
            raise DataError(f"--tiers must place every column, it leaves out {', '.join(missing[:5])}")
        levels = tuple(level[number] for number in range(len(names)))
    return Prior(pairs(forbid, "--forbid"), pairs(require, "--require"), levels)


def final_graph(study: Study, record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[int, int, float, float]]]:
    """Learn the recommended contender's graph from all rows.

    Returns:
        The columns' names; and for every edge its ends, its weight in standard deviations of its ends, and the
        share of cells that have it, NaN where cells are of different models.
    """
    problem: GraphFolds = study.problem  # type: ignore[assignment]
    contender: LearnGraph = study.contenders[record["recommended"]]  # type: ignore[assignment]
    rows, names = problem.everything()
    _, weights, _ = contender.learn(rows, Run(0).stream("order"))
    scale = rows.double().std(0)
    cells = [cell["details"]["edges"] for cell in record["cells"] if cell["contender"] == record["recommended"]]
    seen = [{(tail, head) for tail, head, _ in edges} for edges in cells]
    found = []
    for tail, head in weights.nonzero().tolist():
        share = math.nan if problem.path is None else sum((tail, head) in edges for edges in seen) / len(seen)
        found.append((tail, head, float(weights[tail, head] * scale[tail] / scale[head]), share))
    return names, sorted(found, key=lambda edge: -abs(edge[2]))


def graph_figure(study: Study, record: dict[str, Any]) -> list[dict[str, str]]:
    """Draw the recommended contender's graph of all rows."""
    names, edges = final_graph(study, record)
    drawn = []
    for tail, head, weight, share in edges:
        often = "" if math.isnan(share) else f", in {share:.0%} of folds"
        drawn.append((tail, head, weight, f"{names[tail]} → {names[head]}: {weight:+.2f}{often}"))
    rows = "the first model's rows" if study.problem.path is None else "all rows"  # type: ignore[attr-defined]
    return [
        {
            "title": f"The graph that {record['recommended']} finds",
            "caption": f"{len(edges)} edges, fitted on {rows}. The wider an edge, the more standard deviations "
            f"its end moves with one of its start (point at it for the number); dashed where it falls.",
            "svg": draw_graph(names, drawn, label=f"Directed acyclic graph of {len(names)} nodes, {len(edges)} edges"),
        }
    ]


def graph_summary(study: Study, record: dict[str, Any]) -> dict[str, Any]:
    """Return the graph, and how good it is, for ``--json`` and the terminal."""
    names, edges = final_graph(study, record)
    means = {
        metric["name"]: next(
            row["mean"] for row in record["summary"][metric["name"]] if row["name"] == record["recommended"]
        )
        for metric in record["metrics"]
    }
    return {
        "graph": {
            "contender": record["recommended"],
            "nodes": list(names),
            "edges": [
                {
                    "from": names[tail],
                    "to": names[head],
                    "weight": weight,
                    "share": None if math.isnan(share) else share,
                }
                for tail, head, weight, share in edges
            ],
            "means": means,
        }
    }


def graph_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines that a terminal shows of a graph: its edges, strongest first, and how good it is."""
    graph = summary["graph"]
    lines = [f"The graph that {graph['contender']} finds on all rows, effects in standard deviations:"]
    wide = max((len(f"{edge['from']} -> {edge['to']}") for edge in graph["edges"]), default=0)
    for edge in graph["edges"]:
        share = "" if edge["share"] is None else f"   in {edge['share']:.0%} of folds"
        lines.append(f"    {edge['from'] + ' -> ' + edge['to']:{wide}}   {edge['weight']:+.2f}{share}")
    means = [f"{name} {mean:.4g}" for name, mean in graph["means"].items() if mean is not None]
    return [*lines, "Means over cells: " + ", ".join(means)]


def winner_code(study: Study, winner: str) -> str:
    """Return lines that learn the winner's graph from the user's table."""
    problem: GraphFolds = study.problem  # type: ignore[assignment]
    contender: LearnGraph = study.contenders[winner]  # type: ignore[assignment]
    file = "my.csv" if problem.path is None else pathlib.Path(problem.path).name
    drop = f".drop({list(problem.drop)!r})" if problem.drop else ""
    lines = [f'rows = torch.tensor(read_table("{file}"){drop}.to_numpy(), dtype=torch.float64)']
    if problem.standardize:
        lines.append("rows = (rows - rows.mean(0)) / rows.std(0, correction=0)")
    named = "" if contender.prior == Prior() else "  # add your forbidden=, required= and tiers="
    imports = ["import torch", "from minimand.bench.readers import read_table"]
    if contender.learner is None:
        imports.append("from minimand.constraints import TopoSwap")
        lines.append(f'result = TopoSwap("{problem.score}").fit(rows){named}')
        lines.append("print(result.order, result.score, result.kkt_residual, result.status)")
    else:
        imports.append("from minimand.bench.graph import LearnGraph")
        made = f"LearnGraph({contender.learner!r}, {contender.swaps}, {problem.score!r})"
        lines.append(f"_, weights, _ = {made}.learn(rows, seed=0)")
        lines.append("print(weights)  # weights[i, j] of the edge i -> j")
    return "\n".join([*imports, "", *lines])


def _contenders(score: str, prior: Prior) -> tuple[dict[str, LearnGraph], list[str]]:
    learners = ["sort-n-regress", "NOTEARS"] if score == "least_squares" else ["NOTEARS"]
    absent = []
    for name, module in (("DAGMA", "dagma"), ("GES", "causallearn")):
        if score == "logistic" and name == "GES":
            continue  # its score is that of normal columns
        if importlib.util.find_spec(module) is None:
            absent.append(name)
        else:
            learners.append(name)
    found = {name: LearnGraph(name, False, score, prior) for name in learners}
    found["TOPO"] = LearnGraph(None, True, score, prior)
    found |= {f"TOPO after {name}": LearnGraph(name, True, score, prior) for name in learners}
    return found, absent


def _plain_score(score: str) -> Any:
    return LogisticScore() if score == "logistic" else LeastSquaresScore()


@functools.lru_cache(maxsize=2)
def _table(problem: GraphFolds) -> GraphTable:
    assert problem.path is not None
    frame = read_table(problem.path)
    for name in problem.drop:
        require_column(frame, name, "--drop")
    frame = frame.drop(problem.drop)
    columns = []
    for name in frame.columns:
        column = frame[name]
        if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            raise DataError(f"column {name!r} holds {column.dtype}, not numbers: --drop it")
        values = column.cast(pl.Float64)
        missing = int(values.is_null().sum()) + int(values.is_nan().sum() or 0)
        if missing:
            raise DataError(f"column {name!r} misses {missing} values: fill them, or --drop it")
        if bool(values.is_infinite().any()):
            raise DataError(f"column {name!r} holds infinity")
        if values.n_unique() == 1:
            raise DataError(f"column {name!r} is constant: --drop it")
        if problem.score == "logistic" and not set(values.unique().to_list()) <= {0.0, 1.0}:
            raise DataError(f"--score logistic needs zeros and ones, column {name!r} holds others")
        columns.append(values.to_numpy())
    if len(columns) < 2:
        raise DataError(f"{pathlib.Path(problem.path).name} has {len(columns)} column: a graph needs at least 2")
    rows = torch.from_numpy(np.stack(columns, 1))
    learnt = len(rows) * (problem.folds - 1) // problem.folds
    if len(rows) < _FEWEST_ROWS or learnt <= rows.shape[1] + 1:
        raise DataError(
            f"{pathlib.Path(problem.path).name} has {len(rows)} rows of {rows.shape[1]} columns: at least "
            f"{_FEWEST_ROWS} are needed, and more than columns in every fold"
        )
    names = tuple(frame.columns)
    return GraphTable(rows, names, None if problem.truth is None else _truth(problem.truth, names))


def _truth(path: str, names: Sequence[str]) -> Tensor:
    frame = read_table(path)
    if frame.width < 2:
        raise DataError(f"--truth: {pathlib.Path(path).name} must have two columns, from and to, it has {frame.width}")
    listed = frame.select(pl.all().cast(pl.String)).rows()
    head = tuple(frame.columns[:2])
    if set(head) <= set(names):
        listed = [head, *listed]  # a file without a header: its first edge was taken for one
    truth = torch.zeros(len(names), len(names), dtype=torch.bool)
    place = {name: number for number, name in enumerate(names)}
    for tail, target in (row[:2] for row in listed):
        for name in (tail, target):
            if name not in place:
                raise DataError(f"--truth: there is no column {name!r}{nearest(str(name), names)}")
        truth[place[tail], place[target]] = True
    return truth


def _named(sentence: str, names: Sequence[str]) -> str:
    """Put names in the place of the numbers of nodes in an error about prior knowledge."""
    import re

    return re.sub(r"(?<=edge )\d+|\d+(?= ->)|(?<=-> )\d+", lambda match: names[int(match[0])], sentence)
