"""Ways to learn a directed graph from rows: the baselines that TOPO is compared with, each giving signed weights."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from ..constraints import topological_order

Kind = Literal["least_squares", "logistic"]

_TINY = 1e-8  # weights that descent means to be 0


def learnt(
    learner: str, rows: Tensor, *, kind: Kind = "least_squares", forbidden: Tensor | None = None
) -> tuple[Tensor, float]:
    """Run a learner by name, and tell the seconds it took.

    The last 256 are remembered, so that a search which goes on from a learner's graph does not learn it again.

    Args:
        learner: ``"sort-n-regress"``, ``"NOTEARS"``, ``"DAGMA"`` or ``"GES"``.
        rows: Rows of observations.
        kind: ``"least_squares"`` or ``"logistic"``, for NOTEARS and DAGMA.
        forbidden: True where there may be no edge; the other two cannot be told.

    Returns:
        Weights ``(nodes, nodes)`` without what is rounding, of no particular size for GES; and seconds.
    """
    size = rows.shape[1]
    closed = torch.zeros(size, size, dtype=torch.bool) if forbidden is None else forbidden
    return _remembered(learner, rows.double().numpy().tobytes(), kind, closed.numpy().tobytes(), size)


@functools.lru_cache(maxsize=256)
def _remembered(learner: str, content: bytes, kind: Kind, forbidden: bytes, size: int) -> tuple[Tensor, float]:
    rows = torch.frombuffer(bytearray(content), dtype=torch.float64).view(-1, size)
    closed = torch.frombuffer(bytearray(forbidden), dtype=torch.bool).view(size, size)
    start = time.perf_counter()
    if learner == "sort-n-regress":
        found = sort_and_regress(rows)
    elif learner == "NOTEARS":
        found = notears(rows, kind=kind, forbidden=closed)
    elif learner == "DAGMA":
        found = dagma(rows, kind=kind, forbidden=closed)
    elif learner == "GES":
        found = greedy_equivalence_search(rows)
    else:
        raise ValueError(f"learner must be sort-n-regress, NOTEARS, DAGMA or GES, got {learner!r}")
    return torch.where(found.abs() > _TINY, found, 0), time.perf_counter() - start


def sort_and_regress(data: Tensor) -> Tensor:
    """Order columns by variance, least first, and regress each on those before it by least squares.

    On simulated data whose noise is of one size, variance grows along the graph, and this does nearly all that a
    search can (Reisach, Seiler and Weichwald, NeurIPS 2021, arXiv 2102.13647). On standardised columns it is a guess.
    """
    order = torch.argsort(data.var(0), stable=True)
    centred = (data - data.mean(0)).double()
    lower = torch.linalg.cholesky(_regular(centred)[order][:, order])
    unit = lower / lower.diagonal()
    eye = torch.eye(len(order), dtype=unit.dtype)
    weights = torch.zeros_like(unit)
    weights[order[:, None], order] = (eye - torch.linalg.solve_triangular(unit, eye, upper=False)).T.triu(1)
    return weights


def notears(
    data: Tensor,
    *,
    kind: Kind = "least_squares",
    l1: float = 0.1,
    forbidden: Tensor | None = None,
    tolerance: float = 1e-8,
    num_rounds: int = 100,
    largest_penalty: float = 1e16,
) -> Tensor:
    r"""Minimise score plus :math:`\lambda \|W\|_1` subject to :math:`\operatorname{tr} e^{W \circ W} = d`.

    By an augmented Lagrangian whose penalty grows tenfold until the violation falls to a quarter each round, its
    subproblems by L-BFGS-B on the positive and negative parts of W.

    Args:
        data: Rows of observations.
        kind: ``"least_squares"`` or ``"logistic"``, without intercepts.
        l1: The paper's lambda; 0.1 is its default.
        forbidden: True where there may be no edge.
        tolerance: Stop at this violation.
        num_rounds: Most rounds.
        largest_penalty: Stop there too.

    Source:
        Zheng, Aragam, Ravikumar and Xing, NeurIPS 2018, arXiv 1803.01422, algorithm 1.
    """
    x = data.double().numpy()
    if kind == "least_squares":
        x = x - x.mean(0)
    size = x.shape[1]
    covariance = x.T @ x / len(x)

    def score(w: np.ndarray) -> tuple[float, np.ndarray]:
        if kind == "least_squares":
            slope = covariance @ (w - np.eye(size))
            return float(((w - np.eye(size)) * slope).sum()) / 2, slope
        logits = x @ w
        value = float((np.logaddexp(0, logits) - x * logits).sum()) / len(x)
        return value, x.T @ (1 / (1 + np.exp(-logits)) - x) / len(x)

    def violation(w: np.ndarray) -> tuple[float, np.ndarray]:
        walks = scipy.linalg.expm(w * w)
        return float(np.trace(walks)) - size, walks.T * w * 2

    def split(parts: np.ndarray) -> np.ndarray:
        return (parts[: size * size] - parts[size * size :]).reshape(size, size)

    def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
        w = split(parts)
        value, slope = score(w)
        h, h_slope = violation(w)
        value += penalty / 2 * h * h + multiplier * h + l1 * parts.sum()
        slope = (slope + (penalty * h + multiplier) * h_slope).ravel()
        return value, np.concatenate([slope + l1, l1 - slope])

    closed = np.eye(size, dtype=bool)
    if forbidden is not None:
        closed |= forbidden.numpy()
    bounds = [(0.0, 0.0) if shut else (0.0, None) for shut in closed.ravel()] * 2
    parts, penalty, multiplier, h = np.zeros(2 * size * size), 1.0, 0.0, np.inf
    for _ in range(num_rounds):
        while True:
            with np.errstate(over="ignore", invalid="ignore"):
                tried = scipy.optimize.minimize(objective, parts, method="L-BFGS-B", jac=True, bounds=bounds).x
            h_tried, _ = violation(split(tried))
            if h_tried <= 0.25 * h or penalty >= largest_penalty:
                break
            penalty *= 10
        parts, h = tried, h_tried
        multiplier += penalty * h
        if h <= tolerance or penalty >= largest_penalty:
            break
    return torch.from_numpy(split(parts))


def dagma(data: Tensor, *, kind: Kind = "least_squares", l1: float = 0.02, forbidden: Tensor | None = None) -> Tensor:
    """Run the DAGMA package; 0.02 is the l1 of its authors' linear example.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        from dagma.linear import DagmaLinear
    except ImportError:
        raise ValueError("DAGMA needs the package dagma: pip install 'minimand[graph]'") from None
    closed = () if forbidden is None else tuple((int(i), int(j)) for i, j in forbidden.nonzero().tolist())
    model = DagmaLinear(loss_type="l2" if kind == "least_squares" else "logistic", verbose=False)
    # Its own levels, as a list of our own: it writes to the default one, and later calls start from what it wrote.
    levels = [1.0, 0.9, 0.8, 0.7, 0.6]
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        found = model.fit(
            data.double().numpy().copy(), lambda1=l1, w_threshold=0.0, s=levels, exclude_edges=closed or None
        )
    return torch.from_numpy(np.asarray(found))


def greedy_equivalence_search(data: Tensor) -> Tensor:
    """Run causal-learn's GES under the BIC score, and direct what it leaves open so that there is no cycle.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        from causallearn.search.ScoreBased.GES import ges
        from causallearn.utils.PDAG2DAG import pdag2dag
    except ImportError:
        raise ValueError("GES needs the package causal-learn: pip install 'minimand[graph]'") from None
    with contextlib.redirect_stdout(io.StringIO()):
        found: Any = ges(data.double().numpy(), "local_score_BIC")
        marks = torch.from_numpy(np.array(pdag2dag(found["G"]).graph))
    # In its notation -1 is a tail and 1 a head.
    weights = ((marks == -1) & (marks.T == 1)).double()
    topological_order(weights)
    return weights


def _regular(centred: Tensor) -> Tensor:
    covariance = centred.T @ centred / len(centred)
    return covariance + torch.diag(1e-10 * covariance.diagonal())
