r"""How far a weighted graph is from having no cycle, as a penalty; its paths, and an order of its nodes.

For strengths :math:`B \ge 0`, :math:`B_{ij}` of the edge i -> j, all of these are zero exactly where there is no cycle,
as each adds up the weights of closed walks:

- ``"logdet"`` :math:`-\log\det(sI - B) + d \log s`, for spectral radii of B below s;
- ``"exp"`` :math:`\operatorname{tr} e^B - d`;
- ``"poly"`` :math:`\operatorname{tr}\,(I + B / d)^d - d`.

The derivative by :math:`B_{ij}` is positive exactly if a walk leads from j to i, so that i -> j would close a cycle.

Source: Zheng, Aragam, Ravikumar and Xing, NeurIPS 2018, arXiv 1803.01422 (exponential); Yu, Chen, Gao and Yu, ICML
2019, arXiv 1904.10098 (polynomial); Bello, Aragam and Ravikumar, NeurIPS 2022, arXiv 2209.08037 (log-determinant).
"""

from __future__ import annotations

import heapq
import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .. import checks

Acyclicity = Literal["logdet", "exp", "poly"]
ACYCLICITIES = ("logdet", "exp", "poly")


def acyclicity(
    strengths: Float[Tensor, "*batch nodes nodes"], *, kind: Acyclicity = "logdet", level: float = 1.0
) -> Float[Tensor, "*batch"]:
    r"""Compute how far graphs are from having no cycle: 0 exactly where there is none, else above it.

    Args:
        strengths: B, at least 0: for weights W of any sign their squares, for networks the squared norms of the first
            layer's weights by input and output. Squares keep it smooth, at the price that its gradient is zero
            at every acyclic graph.
        kind: ``"logdet"`` has the largest gradients and is the cheapest; ``"exp"`` and ``"poly"`` are defined for
            strengths of any size.
        level: The paper's s, above 0: ``"logdet"`` is defined where the spectral radius of ``strengths`` is below it.

    Returns:
        One number a graph, with gradient.

    Raises:
        ValueError: If strengths are negative, not finite, not square, or too large for ``kind``.

    Example:
        >>> weights = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> acyclicity(weights.square()), acyclicity((weights + weights.T).square())
        (tensor(0.), tensor(0.0645))

    Source:
        Bello et al. 2022, arXiv 2209.08037, theorem 1; Zheng et al. 2018, theorem 1; Yu et al. 2019, theorem 1.
    """
    checks.one_of(kind, "kind", ACYCLICITIES)
    checks.positive(level, "level")
    checks.floating(strengths, "strengths")
    size = _square(strengths, "strengths")
    checks.finite(strengths, "strengths")
    checks.require(
        strengths >= 0, lambda: "strengths must be at least 0: pass squared weights, or their absolute values"
    )
    eye = torch.eye(size, dtype=strengths.dtype, device=strengths.device)
    if kind == "logdet":
        system = eye - strengths / level
        # A matrix I - B with B >= 0 has a spectral radius of B below 1 if and only if it takes a positive vector to 1.
        reached = torch.linalg.solve_ex(system.detach(), torch.ones_like(system[..., :1]))[0]
        checks.require(reached > 0, lambda: f"strengths must have a spectral radius below level={level}: raise level")
        return 0 - torch.linalg.slogdet(system)[1]  # not its negative, which is -0 at an acyclic graph
    if kind == "exp":
        walks = torch.linalg.matrix_exp(strengths)
    else:
        walks = torch.linalg.matrix_power(eye + strengths / size, size)
    found = walks.diagonal(dim1=-2, dim2=-1).sum(-1) - size
    checks.require(torch.isfinite(found.detach()), lambda: f"strengths are too large for kind={kind!r}: scale them")
    return found


def reachability(weights: Shaped[Tensor, "nodes nodes"]) -> Bool[Tensor, "nodes nodes"]:
    """Tell from which node which other can be reached along edges, at least one.

    Args:
        weights: Of any sign, or booleans; an edge is what is not zero.

    Returns:
        True at (i, j) if a path leads from i to j. True on the diagonal where a node lies on a cycle.

    Raises:
        ValueError: If ``weights`` is not square, empty or not finite.

    Example:
        >>> reachability(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])).int()
        tensor([[0, 1, 1],
                [0, 0, 1],
                [0, 0, 0]], dtype=torch.int32)

    Source:
        Paths double in length by squaring: Fischer and Meyer, SWAT 1971.
    """
    size = _square(weights, "weights")
    checks.finite(weights, "weights")
    paths = weights != 0
    for _ in range(math.ceil(math.log2(size)) if size > 1 else 0):
        # Products count paths, at most one number a node; float32 holds such counts.
        paths = paths | (paths.float() @ paths.float() > 0)
    return paths


def topological_order(weights: Shaped[Tensor, "nodes nodes"], *, break_cycles: bool = False) -> Int[Tensor, " nodes"]:
    """Order the nodes of a graph so that every edge leads from an earlier to a later one.

    Args:
        weights: Of any sign, or booleans; ``weights[i, j]`` is of the edge i -> j, an edge is what is not zero.
        break_cycles: Whether to leave out edges that close a cycle with stronger ones, by absolute weight.

    Returns:
        The nodes, first to last; of the orders that there are the one with the smallest indices first.

    Raises:
        ValueError: If the graph has a cycle, which is named, and ``break_cycles`` is not set; or ``weights`` is not
            square, empty or not finite.

    Example:
        >>> topological_order(torch.tensor([[0.0, 0.0], [1.5, 0.0]]))
        tensor([1, 0])

    Source:
        Kahn, Communications of the ACM 5, 1962.
    """
    _square(weights, "weights")
    checks.finite(weights, "weights")
    return torch.tensor(sorted_nodes(acyclic_part(weights) if break_cycles else weights), device=weights.device)


def acyclic_part(weights: Tensor) -> Tensor:
    """Leave out every edge that closes a cycle with stronger ones; ties by position."""
    size = len(weights)
    strength = weights.abs() if weights.dtype != torch.bool else weights.int()
    strength = strength.cpu()
    if not bool(reachability(strength).diagonal().any()):
        return weights
    kept = torch.zeros(size, size, dtype=torch.bool)
    paths = torch.eye(size, dtype=torch.bool)
    ranked = torch.argsort(strength.flatten(), descending=True, stable=True)
    for place in ranked[: int((strength != 0).sum())].tolist():
        tail, head = divmod(place, size)
        if not paths[head, tail]:
            kept[tail, head] = True
            paths |= paths[:, tail, None] & paths[None, head]
    return torch.where(kept.to(weights.device), weights, torch.zeros_like(weights))


def sorted_nodes(weights: Tensor, priority: list[int] | None = None, name: str = "weights") -> list[int]:
    """Sort topologically, of free nodes always the first by ``priority``; name the cycle if there is one."""
    edges = (weights != 0).cpu()
    size = len(edges)
    rank = list(range(size)) if priority is None else priority
    waiting = edges.sum(0).tolist()
    free = [(rank[node], node) for node in range(size) if waiting[node] == 0]
    heapq.heapify(free)
    found: list[int] = []
    while free:
        _, node = heapq.heappop(free)
        found.append(node)
        for child in edges[node].nonzero()[:, 0].tolist():
            waiting[child] -= 1
            if waiting[child] == 0:
                heapq.heappush(free, (rank[child], child))
    if len(found) < size:
        # Every node that still waits has a parent that does: going back from parent to parent must come round.
        node = next(node for node in range(size) if waiting[node] > 0)
        trail: list[int] = []
        while node not in trail:
            trail.append(node)
            node = next(parent for parent in edges[:, node].nonzero()[:, 0].tolist() if waiting[parent] > 0)
        cycle = [node, *reversed(trail[trail.index(node) :])]
        raise ValueError(f"{name} has a cycle: {' -> '.join(map(str, cycle))}")
    return found


def _square(matrix: Tensor, name: str) -> int:
    checks.tensor(matrix, name)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must have shape (nodes, nodes), got {tuple(matrix.shape)}")
    checks.not_empty(matrix, name)
    return int(matrix.shape[-1])
