r"""TOPO: a directed acyclic graph of least score, by swapping nodes of a topological order.

Given an order :math:`\pi`, parents first, acyclicity is a pattern of zeros and the weights are plain regressions of
each node on those before it. The search is over orders: with :math:`W = W(\pi)` it looks at pairs (i, j), j before i,
for which few walks lead from j to i,

.. math:: Y = \{(i, j) : [\nabla h(|W|)]_{ij} \le \tau\},

swaps i and j, refits the nodes from j to i, and takes the best swaps that do not overlap. Scores add up over nodes, so
their gains add up. If none gains, a larger :math:`\tau` is tried; if none does then, the search ends.

For least squares no regression is needed. With :math:`L L^\top` the covariance in the order, the score is
:math:`\frac12 \sum_k L_{kk}^2`, and the changes by all swaps come from one factorisation a node (:func:`swap_change`).

An acyclic W is a point of Karush, Kuhn and Tucker if no weight that is there, and none that could be added without
closing a cycle, has a derivative (:func:`kkt_residual`). A swap may not find the way to one; moving j's descendants
behind i does. Where no swap gains, moving a single node along the order may, and is tried before.

Source: Deng, Bello, Aragam and Ravikumar, "Optimizing NOTEARS Objectives via Topological Swaps", ICML 2023,
arXiv 2305.17277. The closed form, the single moves and the repair are derived here.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop
from .acyclicity import acyclic_part, reachability, sorted_nodes
from .node_scores import (
    LeastSquaresScore,
    LogisticScore,
    MLPScore,
    NodeFits,
    NodeScore,
    covariance_of,
    working_dtype,
)

Score = Literal["least_squares", "equal_variance", "logistic", "mlp"] | NodeScore
_MOVES = ("swap", "behind", "before")
_SCORES = ("least_squares", "equal_variance", "logistic", "mlp")
_NO_EDGE = 1e-12  # weights up to this are rounding
_SMALL = 100  # pairs, in the released code
_REPAIRS = 10  # the steepest so many missing edges are tried


@dataclasses.dataclass(frozen=True)
class DagResult:
    """What :meth:`TopoSwap.fit` found.

    Args:
        weights: ``(nodes, nodes)``, ``weights[i, j]`` of the edge i -> j; acyclic. Least squares leaves hardly any
            weight at exactly 0: drop small ones, or see :func:`prune_edges`.
        order: The nodes, parents first.
        score: Of these weights; never above that of the order it started from.
        history: The score at the start and after each round that lowered it.
        kkt_residual: See :func:`kkt_residual`; None if the score gives no derivatives.
        evaluations: How many orders were scored.
        iterations: Rounds that lowered the score.
        status: Why it stopped. ``CONVERGED``: nothing that was to be tried gains; ``STALLED``: ``large_budget`` forbade
            to try more.
        fits: The models of the nodes, node after node.
    """

    weights: Tensor
    order: Tensor
    score: float
    history: tuple[float, ...]
    kkt_residual: float | None
    evaluations: int
    iterations: int
    status: Stop
    fits: NodeFits


def order_score(
    covariance: Float[Tensor, "nodes nodes"], order: Int[Tensor, " nodes"] | Sequence[int]
) -> Float[Tensor, ""]:
    r"""Compute the least-squares score of an order, :math:`\frac12 \sum_j \min_w E (x_j - w^\top x_{before})^2`.

    Args:
        covariance: Of the columns, positive definite.
        order: The nodes, parents first.

    Returns:
        The score, differentiable in ``covariance``: half the squared diagonal of its Cholesky factor in this order.

    Raises:
        ValueError: If ``order`` is no permutation, or ``covariance`` not positive definite.

    Example:
        >>> covariance = torch.tensor([[1.0, 2.0], [2.0, 5.0]])  # x1 = 2 x0 + noise of variance 1
        >>> order_score(covariance, [0, 1]), order_score(covariance, [1, 0])
        (tensor(1.), tensor(2.6000))

    Source:
        Deng et al. 2023, arXiv 2305.17277; the closed form is derived here.
    """
    checks.floating(covariance, "covariance")
    checks.finite(covariance, "covariance")
    places = _permutation(order, len(covariance), covariance.device)
    return _factor(covariance[places][:, places]).diagonal().square().sum() / 2


def swap_change(factor: Float[Tensor, "nodes nodes"], *, blocks: int | None = None) -> Float[Tensor, "nodes nodes"]:
    r"""Compute by how much every swap of two positions of an order changes its least-squares score.

    For positions a < b let :math:`G` be the Cholesky factor of the covariance of all after a, given all before it,
    and :math:`T_k = \sum_{l=k}^b G_{bl}^2`, the variance of b given those before k. With b in place of a,
    each :math:`k` between has the variance :math:`G_{kk}^2 T_{k+1} / T_k`, and b itself :math:`T_{a+1}`; a comes to
    :math:`L_{aa}^2 \prod_{k=a+1}^b L_{kk}^2 / G_{kk}^2`, as the determinant stays. Only sums and quotients of positive
    numbers occur, so nothing cancels. One factorisation serves all b: :math:`O(d^4)` in all where a
    factorisation a swap costs :math:`O(d^5)`.

    Args:
        factor: The lower Cholesky factor L of the covariance in the order.
        blocks: Into how many parts the positions a are divided: memory is :math:`d^3` numbers over this. None: one for
            every 16 nodes.

    Returns:
        At (a, b), a < b: the change by swapping positions a and b; negative is a gain. 0 elsewhere.

    Raises:
        ValueError: If ``factor`` is not finite, not square, or its diagonal not above 0.

    Example:
        >>> covariance = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
        >>> swap_change(torch.linalg.cholesky(covariance))  # from 1 to 2.6
        tensor([[0.0000, 1.6000],
                [0.0000, 0.0000]])

    Source:
        Derived here; the score and the swap are those of Deng et al. 2023, arXiv 2305.17277.
    """
    checks.floating(factor, "factor")
    if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
        raise ValueError(f"factor must have shape (nodes, nodes), got {tuple(factor.shape)}")
    checks.not_empty(factor, "factor")
    checks.finite(factor, "factor")
    checks.require(factor.diagonal() > 0, lambda: "factor must have a diagonal above 0")
    if blocks is not None and blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    return _changes(factor, blocks)[0]


def _changes(factor: Tensor, blocks: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return changes at (a, b) by swapping, by moving a right behind b, and by moving b right before a."""
    size = len(factor)
    own = factor.diagonal().square()
    total = own.cumsum(0)
    changes, behind = torch.zeros_like(factor), torch.zeros_like(factor)
    # Adding column after column from the last, since taking them off from the first would cancel.
    covariance = torch.zeros_like(factor)
    covariance[-1, -1] = own[-1]
    length = -(-size // (blocks or 1 + size // 16))
    for start in reversed(range(0, size - 1, length)):
        stop = min(start + length, size - 1)
        columns = factor[start:, start:stop].T
        places = torch.arange(size - start, device=factor.device)
        first = places[: stop - start]
        given = (columns[:, :, None] * columns[:, None, :]).flip(0).cumsum(0).flip(0) + covariance[start:, start:]
        covariance[start:, start:] = given[0]
        late = places > first[:, None]
        given.masked_fill_(~(late[:, :, None] & late[:, None, :]), 0)
        given.diagonal(dim1=1, dim2=2).masked_fill_(~late, 1)
        squares = _factor(given).square().masked_fill_(~late[:, None, :], 0)
        variance = squares.diagonal(dim1=1, dim2=2)
        tail = squares.flip(-1).cumsum(-1).flip(-1)
        shares = tail[..., 1:] / tail[..., :-1].clamp_min(torch.finfo(factor.dtype).tiny)
        between = (shares @ variance[:, :-1, None])[..., 0]
        ratio = torch.where(late, own[start:] / torch.where(late, variance, 1), 1)
        pushed = own[start:stop, None] * ratio.cumprod(1)
        old = total[start:] - total[start:stop, None] + own[start:stop, None]
        changes[start:stop, start:] = torch.where(late, tail[first, :, first + 1] + between + pushed - old, 0)
        behind[start:stop, start:] = torch.where(late, variance.cumsum(1) + pushed - old, 0)
    # Without taking a out, the same sums give b's moves to the front.
    tail = factor.square().flip(1).cumsum(1).flip(1)
    shares = tail[:, 1:] / tail[:, :-1].clamp_min(torch.finfo(factor.dtype).tiny)
    lost = torch.nn.functional.pad((own[:-1] * (shares - 1)).tril(-1), (0, 1))
    before = (lost.flip(1).cumsum(1).flip(1) + tail - own[:, None]).tril(-1).T
    return changes / 2, behind / 2, before / 2


def kkt_residual(
    data: Float[Tensor, "rows nodes"],
    weights: Float[Tensor, "nodes nodes"],
    *,
    score: Literal["least_squares", "logistic"] | LeastSquaresScore | LogisticScore = "least_squares",
    forbidden: Bool[Tensor, "nodes nodes"] | None = None,
) -> float:
    r"""Compute how far an acyclic graph is from a point of Karush, Kuhn and Tucker.

    It is the largest derivative of the score by a weight that is there, or that could be added without closing a
    cycle. 0 is necessary for a best graph; where the score is convex in the weights it makes the graph a local minimum.

    Args:
        data: Rows of observations.
        weights: An acyclic graph, by any method; an edge is what is not 0 (or below 1e-12).
        score: ``"least_squares"``, ``"logistic"``, or the object.
        forbidden: True at (i, j) where i -> j may not be added.

    Returns:
        The residual, in units of the score over a weight.

    Raises:
        ValueError: If the graph has a cycle, which is named, or the data cannot be used.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.0, 1.0], [0.0, -1.0]])
        >>> kkt_residual(rows, torch.tensor([[0.0, 2.0], [0.0, 0.0]])), kkt_residual(rows, torch.zeros(2, 2))
        (0.0, 1.0)

    Source:
        Deng et al. 2023, arXiv 2305.17277; Wei, Gao and Yu, NeurIPS 2020, arXiv 2010.09133, for the conditions.
    """
    _check_data(data)
    size = data.shape[1]
    checks.floating(weights, "weights")
    if tuple(weights.shape) != (size, size):
        raise ValueError(f"weights must have shape ({size}, {size}), got {tuple(weights.shape)}")
    checks.finite(weights, "weights")
    model = _model(score)
    if not isinstance(model, (LeastSquaresScore, LogisticScore)):
        raise ValueError("score must be 'least_squares' or 'logistic': the weights of others are not all of a model")
    w = torch.where(weights.abs() > _NO_EDGE, weights, 0)
    sorted_nodes(w)
    return _residual(w, model.gradients(data, w), _mask(forbidden, "forbidden", size, data.device))


def prune_edges(
    covariance: Float[Tensor, "nodes nodes"],
    weights: Float[Tensor, "nodes nodes"],
    *,
    num_rows: int,
    required: Bool[Tensor, "nodes nodes"] | None = None,
) -> Float[Tensor, "nodes nodes"]:
    r"""Drop edges that an information criterion does not pay for, and refit those that stay by least squares.

    Node by node, the edge whose loss raises the residual variance least goes, as long as
    :math:`n \log(\sigma^2_{without} / \sigma^2_{with}) < \log n + 2 \log d`. That does not depend on the columns'
    units, unlike a threshold on the weights.

    Args:
        covariance: Of the columns, positive definite.
        weights: An acyclic graph; only where it is 0 matters.
        num_rows: The n that ``covariance`` comes from, at least 2.
        required: True at (i, j) where i -> j stays.

    Returns:
        Weights ``(nodes, nodes)`` of the smaller graph.

    Raises:
        ValueError: If shapes do not match, ``covariance`` is not positive definite, or the graph has a cycle.

    Example:
        >>> covariance = torch.tensor([[1.0, 2.0, 0.01], [2.0, 5.0, 0.02], [0.01, 0.02, 1.0]])
        >>> prune_edges(covariance, torch.ones(3, 3).triu(1), num_rows=1000)
        tensor([[0., 2., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])

    Source:
        The extended criterion of Chen and Chen, Biometrika 95, 2008, with gamma = 1, by backward elimination. Not in
        the paper, which cuts weights below 0.3.
    """
    checks.floating(covariance, "covariance")
    checks.finite(covariance, "covariance")
    size = len(covariance)
    checks.floating(weights, "weights")
    if tuple(weights.shape) != (size, size) or tuple(covariance.shape) != (size, size):
        raise ValueError(
            f"covariance and weights must have the same shape (nodes, nodes), got {tuple(covariance.shape)} "
            f"and {tuple(weights.shape)}"
        )
    checks.finite(weights, "weights")
    if num_rows < 2:
        raise ValueError(f"num_rows must be at least 2, got {num_rows}")
    sorted_nodes(weights)
    fixed = torch.zeros_like(weights, dtype=torch.bool)
    if required is not None:
        fixed |= _mask(required, "required", size, weights.device)
    _factor(covariance)
    matrix = covariance.to(working_dtype(covariance))
    parents = (weights != 0).T.clone()  # a row a node
    both = parents[:, :, None] & parents[:, None, :]
    inverse = torch.where(both, matrix, 0)
    inverse.diagonal(dim1=1, dim2=2).add_((~parents).to(inverse))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    fitted = (inverse @ torch.where(parents, matrix, 0)[..., None])[..., 0]
    variance = matrix.diagonal() - (fitted * torch.where(parents, matrix, 0)).sum(1)
    rows = torch.arange(size, device=matrix.device)
    while True:
        rise = torch.where(parents & ~fixed.T, fitted.square() / inverse.diagonal(dim1=1, dim2=2), math.inf)
        least, place = rise.min(1)
        gain = num_rows * torch.log1p(least / variance.clamp_min(torch.finfo(matrix.dtype).tiny))
        goes = gain < math.log(num_rows) + 2 * math.log(size)
        if not bool(goes.any()):
            break
        node, place = rows[goes], place[goes]
        column = inverse[node, :, place]
        pivot = column.gather(1, place[:, None])
        fitted[node] -= column * fitted[node, place][:, None] / pivot
        inverse[node] -= column[:, :, None] * column[:, None, :] / pivot[..., None]
        variance[node] += least[goes]
        parents[node, place] = False
        # The place is off the system now; exact zeros keep rounding from bringing it back.
        fitted[node, place] = 0
        inverse[node, place, :] = 0
        inverse[node, :, place] = 0
    return fitted.T.to(weights.dtype)


class TopoSwap:
    r"""Search for an acyclic graph of least score by swaps in a topological order.

    Alone it starts from a random order; given another method's graph it starts there and never ends above its score.
    The score decides what is found: least squares takes the column of less variance for the parent, so it depends on
    units, and on standardised columns its best order says little.

    Args:
        score: ``"least_squares"``; ``"equal_variance"``, :math:`\frac d2 \log(\|X - XW\|^2 / n)`, which has the
            same best order; ``"logistic"`` for zeros and ones; ``"mlp"``; or an object, one of these with other
            settings or your own :class:`NodeScore`.
        small: How many pairs, those with the weakest walks in the way, are tried first; ties with the last come along.
            None: all pairs where least squares prices them together, else the released code's 100.
        large: How many when none of them gains; None for all pairs. The released code's 400 to 1000.
        large_budget: How many successful searches of the larger set are made at most; None for no limit. The released
            code's 1 to 10, to save regressions.
        single_moves: Whether to try moving a node on its own to another place when no swap gains. Not in the paper; it
            leaves most orders that are best among swaps only.
        kkt_repair: Whether to move nodes to where a missing edge of nonzero derivative can be added, when no swap
            else gains. Not in the paper; swaps alone need not end at a point of Karush, Kuhn and Tucker.
        forbidden: True at (i, j) where there is no edge i -> j.
        required: True at (i, j) where i is a parent of j: it stands before j. Its weight is fitted, not forced off 0.
        tiers: One number a node; no edge leads from a higher to a lower.
        tolerance: Least gain, relative to the score.
        kkt_tolerance: Derivatives up to this are not repaired.
        max_iter: Most rounds.
        max_seconds: Most seconds; None for no limit.
        generator: Draws the first order; torch's default if None.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(500, 3, generator=generator, dtype=torch.float64)
        >>> chain = noise @ torch.linalg.inv(torch.eye(3).double() - torch.diag(torch.ones(2).double(), 1))
        >>> result = TopoSwap(generator=generator).fit(chain)
        >>> result.order, result.status
        (tensor([0, 1, 2]), <Stop.CONVERGED: 'converged'>)

    Source:
        Deng et al. 2023, arXiv 2305.17277.
    """

    def __init__(
        self,
        score: Score = "least_squares",
        *,
        small: int | None = None,
        large: int | None = None,
        large_budget: int | None = None,
        single_moves: bool = True,
        kkt_repair: bool = True,
        forbidden: Bool[Tensor, "nodes nodes"] | None = None,
        required: Bool[Tensor, "nodes nodes"] | None = None,
        tiers: Int[Tensor, " nodes"] | Sequence[int] | None = None,
        tolerance: float = 1e-9,
        kkt_tolerance: float = 1e-6,
        max_iter: int = 10_000,
        max_seconds: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _model(score)
        if small is not None and small < 1:
            raise ValueError(f"small must be at least 1, got {small}")
        if large is not None and large < (small or 1):
            raise ValueError(f"large must be at least {small or 1}, got {large}")
        if large_budget is not None and large_budget < 0:
            raise ValueError(f"large_budget must be at least 0, got {large_budget}")
        checks.non_negative(tolerance, "tolerance")
        checks.non_negative(kkt_tolerance, "kkt_tolerance")
        Budget(max_iter, max_seconds)
        self.score = score
        self.small, self.large, self.large_budget = small, large, large_budget
        self.single_moves, self.kkt_repair = single_moves, kkt_repair
        self.forbidden, self.required, self.tiers = forbidden, required, tiers
        self.tolerance, self.kkt_tolerance = tolerance, kkt_tolerance
        self.max_iter, self.max_seconds = max_iter, max_seconds
        self.generator = generator

    def fit(
        self,
        data: Float[Tensor, "rows nodes"],
        *,
        order: Int[Tensor, " nodes"] | Sequence[int] | None = None,
        weights: Float[Tensor, "nodes nodes"] | None = None,
        break_cycles: bool = False,
    ) -> DagResult:
        """Find a graph of the columns of ``data``.

        Args:
            data: Rows of observations; columns are centred where the score wants it, and never scaled.
            order: Where to start, parents first.
            weights: Another method's graph to start from instead; edges that prior knowledge rules out do not count.
            break_cycles: Whether to start from ``weights`` less the weakest edges of its cycles, if it has any.

        Returns:
            A :class:`DagResult`.

        Raises:
            ValueError: If the data hold NaN or a constant column; if ``order`` is no permutation, or against prior
                knowledge; if ``weights`` have a cycle; or if prior knowledge contradicts itself.
        """
        budget = Budget(self.max_iter, self.max_seconds)
        _check_data(data)
        size, device = data.shape[1], data.device
        prior = _Prior(self.forbidden, self.required, self.tiers, size, device)
        model = _model(self.score)
        places = self._start(order, weights, break_cycles, prior, device)
        search: _Search
        if isinstance(model, LeastSquaresScore) and model.l1 == 0 and self.forbidden is None:
            search = _ClosedForm(covariance_of(data), places, prior, self.tolerance)
        else:
            search = _Refits(data, model, places, prior, self.tolerance, budget)

        history, large_left, iteration = [search.value], self.large_budget, 0
        while (status := budget.spent(iteration)) is None:
            gained, unsearched = self._round(search, prior, large_left)
            if gained == "large" and large_left is not None:
                large_left -= 1
            if gained is None:
                moved = self.single_moves and self._moved(search, prior)
                if not moved and budget.seconds >= budget.max_seconds:
                    continue  # a round cut short proves nothing
                if not moved and not (self.kkt_repair and self._repair(search, prior)):
                    status = Stop.STALLED if unsearched else Stop.CONVERGED
                    break
            history.append(search.value)
            iteration += 1

        fits = search.fits()
        if self.score == "equal_variance":
            # A monotone function of the sum of squares: the same order is best, and derivatives share one factor.
            ratio = size / (2 * history[-1])
            history = [size / 2 * math.log(2 * value) for value in history]
            assert fits.gradients is not None
            fits = dataclasses.replace(fits, gradients=ratio * fits.gradients)
        found = torch.where(fits.weights.T.abs() > _NO_EDGE, fits.weights.T, 0)
        residual = None
        if fits.gradients is not None:
            residual = _residual(found, fits.gradients.T, prior.forbidden, prior.required)
        return DagResult(
            found.to(data.dtype), search.order, history[-1], tuple(history), residual, search.evaluations, iteration,
            status, fits,
        )  # fmt: skip

    def _start(
        self,
        order: Tensor | Sequence[int] | None,
        weights: Tensor | None,
        break_cycles: bool,
        prior: _Prior,
        device: torch.device,
    ) -> Tensor:
        size = len(prior.tiers)
        if order is not None and weights is not None:
            raise ValueError("give order or weights to start from, not both")
        if order is not None:
            places = _permutation(order, size, device)
            prior.check_order(places)
            return places
        if weights is None:
            where = self.generator.device if self.generator is not None else "cpu"
            first = torch.randperm(size, generator=self.generator, device=where).tolist()
        else:
            checks.floating(weights, "weights")
            if tuple(weights.shape) != (size, size):
                raise ValueError(f"weights must have shape ({size}, {size}), got {tuple(weights.shape)}")
            checks.finite(weights, "weights")
            first = sorted_nodes(acyclic_part(weights) if break_cycles else weights)
        rank = [0] * size
        for place, node in enumerate(first):
            rank[node] = place
        return torch.tensor(sorted_nodes(prior.before, rank), device=device)

    def _round(self, search: _Search, prior: _Prior, large_left: int | None) -> tuple[str | None, bool]:
        """Try the small set of pairs and, if none gains, the large one; say which gained, and if pairs were left."""
        first, last = prior.moves(search.order, "swap")
        count = len(first)
        few = self.small or (count if isinstance(search, _ClosedForm) else _SMALL)
        if count <= few:
            return ("small" if count and search.improve("swap", first, last) else None), False
        w = search.fits().weights.T.abs()[search.order][:, search.order]
        walks, ranked = torch.sort(_walks(w)[first, last], stable=True)
        first, last = first[ranked], last[ranked]
        # Pairs that tie with the last of a set belong to it.
        small = int((walks <= walks[few - 1]).sum())
        if search.improve("swap", first[:small], last[:small]):
            return "small", False
        large = count if self.large is None or self.large >= count else int((walks <= walks[self.large - 1]).sum())
        if large <= small:
            return None, False
        if large_left == 0:
            return None, True
        return ("large" if search.improve("swap", first[small:large], last[small:large]) else None), False

    def _moved(self, search: _Search, prior: _Prior) -> bool:
        """Try to move single nodes along the order: towards its end, then towards its start."""
        for kind in ("behind", "before"):
            first, last = prior.moves(search.order, kind)
            if len(first) and search.improve(kind, first, last):
                return True
        return False

    def _repair(self, search: _Search, prior: _Prior) -> bool:
        """Move nodes so that the steepest missing edge may be added, if one can be that closes no cycle."""
        fits, order = search.fits(), search.order
        if fits.gradients is None:
            return False
        edges = (fits.weights.T.abs() > _NO_EDGE) | prior.required
        paths = reachability(edges)
        slope = fits.gradients.T.abs()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        missing = ~paths.T & ~prior.forbidden & (rank[:, None] > rank) & (prior.tiers[:, None] <= prior.tiers)
        steep = torch.where(missing & (slope > self.kkt_tolerance), slope, 0)
        values, chosen = steep.flatten().sort(descending=True, stable=True)
        for place in chosen[: min(_REPAIRS, int((values > 0).sum()))].tolist():
            tail, head = divmod(place, len(order))
            begin, end = int(rank[head]), int(rank[tail])
            inside = order[begin + 1 : end]
            behind = paths[head, inside]
            pair = torch.tensor([tail, head], device=order.device)
            moved = torch.cat([order[:begin], inside[~behind], pair, inside[behind], order[end + 1 :]])
            if search.move(moved):
                return True
        return False


class _Prior:
    """Forbidden and required edges and tiers, and which orders and swaps they leave."""

    def __init__(
        self,
        forbidden: Tensor | None,
        required: Tensor | None,
        tiers: Tensor | Sequence[int] | None,
        size: int,
        device: torch.device,
    ) -> None:
        self.forbidden = _mask(forbidden, "forbidden", size, device)
        self.required = _mask(required, "required", size, device)
        self.tiers = torch.zeros(size, dtype=torch.long, device=device)
        if tiers is not None:
            given = torch.as_tensor(tiers, device=device)
            if tuple(given.shape) != (size,) or given.is_floating_point() or given.dtype == torch.bool:
                raise ValueError(f"tiers must hold one integer a node, {size} in all, got {tiers}")
            self.tiers = given.long()
        both = (self.forbidden & self.required).nonzero()
        if len(both):
            raise ValueError(f"the edge {both[0, 0]} -> {both[0, 1]} is both forbidden and required")
        sorted_nodes(self.required, name="required")
        against = (self.required & (self.tiers[:, None] > self.tiers)).nonzero()
        if len(against):
            tail, head = against[0].tolist()
            raise ValueError(
                f"the required edge {tail} -> {head} leads from tier {int(self.tiers[tail])} down to tier "
                f"{int(self.tiers[head])}: a cycle {tail} -> {head} -> {tail} with the tiers' own order"
            )
        # True at (i, j) where i must stand before j.
        self.before = self.required | (self.tiers[:, None] < self.tiers)

    def check_order(self, order: Tensor) -> None:
        """Raise unless an order keeps required edges and tiers."""
        wrong = self.before[order][:, order].tril().nonzero()
        if len(wrong):
            head, tail = order[wrong[0]].tolist()
            why = "the edge is required" if bool(self.required[head, tail]) else "its tier is lower"
            raise ValueError(f"order must have node {head} before node {tail}: {why}")

    def moves(self, order: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Return the first and last positions of the moves that may be made; between neighbours all are swaps."""
        free = torch.ones(len(order), len(order), dtype=torch.bool, device=order.device).triu(1 + (kind != "swap"))
        needs = self.before[order][:, order]
        if bool(needs.any()):
            # The first may not pass a node that needs it, nor the last one that it needs.
            if kind != "before":
                free &= needs.int().cumsum(1) == 0
            if kind != "behind":
                free &= needs.int().flip(0).cumsum(0).flip(0) == 0
        first, last = free.nonzero().T
        return first, last

    def parents(self, order: Tensor) -> Tensor:
        """Return who may be whose parent: a row a node, or ``(orders, nodes, nodes)`` for several orders."""
        rank = torch.empty_like(order)
        rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        return (rank[..., None, :] < rank[..., :, None]) & ~self.forbidden.T


class _Search(abc.ABC):
    """An order, its score, and ways to lower it."""

    order: Tensor
    value: float
    evaluations: int

    @abc.abstractmethod
    def improve(self, kind: str, first: Tensor, last: Tensor) -> bool:
        """Make the best moves that lower the score and do not overlap; say whether any did."""

    @abc.abstractmethod
    def move(self, order: Tensor) -> bool:
        """Go over to another order if its score is lower."""

    @abc.abstractmethod
    def fits(self) -> NodeFits:
        """Return the model of each node."""


class _ClosedForm(_Search):
    """Least squares, everything before a node being its parent."""

    _changes: dict[str, Tensor] | None
    _fits: NodeFits | None

    def __init__(self, covariance: Tensor, order: Tensor, prior: _Prior, tolerance: float) -> None:
        self.covariance, self.tolerance = covariance, tolerance
        self.evaluations = 1
        self._set(order, self._factor(order))

    def improve(self, kind: str, first: Tensor, last: Tensor) -> bool:
        if self._changes is None:
            self._changes = dict(zip(_MOVES, _changes(self._lower), strict=True))
        self.evaluations += len(first)
        chosen = _disjoint(first, last, self._changes[kind][first, last], self.tolerance * self.value)
        if not len(chosen):
            return False
        return self.move(_joint(self.order, kind, first[chosen], last[chosen]), counts=False)

    def move(self, order: Tensor, counts: bool = True) -> bool:
        self.evaluations += counts
        lower = self._factor(order)
        if _half_squares(lower) >= self.value - self.tolerance / 2 * self.value:
            return False
        self._set(order, lower)
        return True

    def fits(self) -> NodeFits:
        if self._fits is None:
            unit = self._lower / self._lower.diagonal()
            eye = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
            # x = L1 e: each row of I - L1^-1 holds the weights of the nodes before.
            rows = (eye - torch.linalg.solve_triangular(unit, eye, upper=False, unitriangular=True)).tril(-1)
            rank = torch.argsort(self.order)
            weights = rows[rank][:, rank]
            gradients = (weights @ self.covariance - self.covariance).fill_diagonal_(0)
            values = self._lower.diagonal()[rank].square() / 2
            self._fits = NodeFits(values, weights, gradients)
        return self._fits

    def _factor(self, order: Tensor) -> Tensor:
        return _factor(self.covariance[order][:, order])

    def _set(self, order: Tensor, lower: Tensor) -> None:
        self.order, self._lower, self.value = order, lower, _half_squares(lower)
        self._changes = self._fits = None


class _Refits(_Search):
    """Any score of nodes given their parents: each node whose parents a swap changes is fitted anew."""

    def __init__(
        self, data: Tensor, model: NodeScore, order: Tensor, prior: _Prior, tolerance: float, budget: Budget
    ) -> None:
        self.data, self.model, self.order, self.prior = data, model, order, prior
        self.tolerance, self.budget = tolerance, budget
        self.nodes = torch.arange(data.shape[1], device=data.device)
        self.parents = prior.parents(order)
        parts = [self._fit(rows, self.parents[rows], None) for rows in self.nodes.split(max(model.max_fits, 1))]
        self._fits = parts[0] if len(parts) == 1 else _joined(parts)
        self.evaluations = 1
        self.value = float(self._fits.values.sum())

    def improve(self, kind: str, first: Tensor, last: Tensor) -> bool:
        # Whole moves at a time, as many as the score takes fits at once: one from a to b needs b - a + 1.
        needs = (last - first + 1).cumsum(0)
        part = (needs - 1) // max(self.model.max_fits, 1)
        sizes = torch.unique_consecutive(part, return_counts=True)[1].tolist()
        for one, other in zip(first.split(sizes), last.split(sizes), strict=True):
            if self.budget.seconds >= self.budget.max_seconds:
                return False
            if self._improve(kind, one, other):
                return True
        return False

    def _improve(self, kind: str, first: Tensor, last: Tensor) -> bool:
        self.evaluations += len(first)
        parents = self.prior.parents(_after(self.order, kind, first, last))
        move, node = (parents != self.parents).any(-1).nonzero().T
        if not len(move):
            return False
        fits = self._fit(node, parents[move, node], self._fits.take(node))
        gains = fits.values - self._fits.values[node]
        changes = gains.new_zeros(len(first)).index_add_(0, move, gains)
        chosen = _disjoint(first, last, changes, self.tolerance * abs(self.value))
        if not len(chosen):
            return False
        taken = torch.isin(move, chosen).nonzero()[:, 0]
        return self._adopt(_joint(self.order, kind, first[chosen], last[chosen]), node[taken], fits.take(taken))

    def move(self, order: Tensor) -> bool:
        self.evaluations += 1
        parents = self.prior.parents(order)
        node = (parents != self.parents).any(-1).nonzero()[:, 0]
        return self._adopt(order, node, self._fit(node, parents[node], self._fits.take(node)))

    def fits(self) -> NodeFits:
        return self._fits

    def _fit(self, nodes: Tensor, parents: Tensor, start: NodeFits | None) -> NodeFits:
        fits = self.model.fit(self.data, nodes, parents, start)
        if not bool(torch.isfinite(fits.values).all()):
            bad = int(nodes[(~torch.isfinite(fits.values)).nonzero()[0, 0]])
            raise ValueError(f"the score of node {bad} is not finite")
        return fits

    def _adopt(self, order: Tensor, nodes: Tensor, fits: NodeFits) -> bool:
        both = self._fits.put(nodes, fits)
        value = float(both.values.sum())
        if value >= self.value - self.tolerance / 2 * abs(self.value):
            return False
        self.order, self._fits, self.value = order, both, value
        self.parents = self.prior.parents(order)
        return True


def _joined(parts: Sequence[NodeFits]) -> NodeFits:
    def cat(field: str) -> Tensor | None:
        found = [getattr(part, field) for part in parts]
        return None if found[0] is None else torch.cat(found)

    values, weights = cat("values"), cat("weights")
    assert values is not None
    assert weights is not None
    return NodeFits(values, weights, cat("gradients"), cat("state"))


def _after(order: Tensor, kind: str, first: Tensor, last: Tensor) -> Tensor:
    """Return the order after each move, ``(moves, nodes)``."""
    places = torch.arange(len(order), device=order.device)
    begin, end = first[:, None], last[:, None]
    if kind == "swap":
        source = torch.where(places == begin, end, torch.where(places == end, begin, places))
    elif kind == "behind":
        source = torch.where((places >= begin) & (places < end), places + 1, torch.where(places == end, begin, places))
    else:
        source = torch.where((places > begin) & (places <= end), places - 1, torch.where(places == begin, end, places))
    return order[source]


def _joint(order: Tensor, kind: str, first: Tensor, last: Tensor) -> Tensor:
    """Return the order after moves that do not overlap."""
    places = torch.arange(len(order), device=order.device)
    inside = (places >= first[:, None]) & (places <= last[:, None])
    moved = torch.where(inside, _after(order, kind, first, last), 0).sum(0)
    return torch.where(inside.any(0), moved, order)


def _disjoint(first: Tensor, last: Tensor, changes: Tensor, least: float) -> Tensor:
    """Choose, from the largest gain down, moves whose intervals of positions do not overlap."""
    ranked = torch.argsort(changes, stable=True)
    ranked = ranked[changes[ranked] < -least]
    free, chosen = [True] * (int(last.max()) + 1 if len(last) else 0), []
    for index, begin, end in zip(ranked.tolist(), first[ranked].tolist(), last[ranked].tolist(), strict=True):
        if all(free[begin : end + 1]):
            free[begin : end + 1] = [False] * (end + 1 - begin)
            chosen.append(index)
    return torch.tensor(chosen, dtype=torch.long, device=first.device)


def _walks(strengths: Tensor) -> Tensor:
    """Return the weights of all walks in an acyclic graph whose nodes are sorted: (I - B)^-1, for ranking only."""
    b = torch.where(strengths > _NO_EDGE, strengths, 0).triu(1)
    # Weights that would overflow along a chain are scaled down together: where there is a walk stays as it is.
    room = math.log(torch.finfo(b.dtype).max) / 2 / len(b)
    largest = math.log1p(float(b.max()))
    if largest > room:
        b = b * (math.expm1(room) / math.expm1(largest))
    eye = torch.eye(len(b), dtype=b.dtype, device=b.device)
    return torch.linalg.solve_triangular(eye - b, eye, upper=True, unitriangular=True)


def _residual(weights: Tensor, gradients: Tensor, forbidden: Tensor | None, required: Tensor | None = None) -> float:
    """Return the largest derivative by a weight that is there or may be added without closing a cycle."""
    edges = weights != 0
    open_ = ~reachability(edges if required is None else edges | required).T
    if forbidden is not None:
        open_ &= ~forbidden
    return float(torch.where((edges | open_).fill_diagonal_(False), gradients.abs(), 0).max())


def _half_squares(lower: Tensor) -> float:
    return float(lower.diagonal().square().sum() / 2)


def _factor(covariance: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(covariance)
    checks.require(failed == 0, lambda: "covariance must be symmetric and positive definite")
    return lower


def _model(score: Score) -> NodeScore:
    if not isinstance(score, str):
        if not isinstance(score, NodeScore):
            raise TypeError(f"score must be one of {', '.join(_SCORES)} or have max_fits and fit, got {score!r}")
        return score
    checks.one_of(score, "score", _SCORES)
    return LogisticScore() if score == "logistic" else MLPScore() if score == "mlp" else LeastSquaresScore()


def _permutation(order: Tensor | Sequence[int], size: int, device: torch.device) -> Tensor:
    places = torch.as_tensor(order, device=device)
    whole = not places.is_floating_point() and places.dtype != torch.bool
    if not whole or tuple(places.shape) != (size,) or sorted(places.tolist()) != list(range(size)):
        raise ValueError(f"order must be a permutation of 0 to {size - 1}, got {list(map(int, places.flatten()[:20]))}")
    return places.long()


def _mask(mask: Tensor | None, name: str, size: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.zeros(size, size, dtype=torch.bool, device=device)
    checks.tensor(mask, name)
    if mask.dtype != torch.bool or tuple(mask.shape) != (size, size):
        raise ValueError(f"{name} must be booleans of shape ({size}, {size}), got {mask.dtype} {tuple(mask.shape)}")
    return mask.to(device)


def _check_data(data: Tensor) -> None:
    checks.floating(data, "data")
    if data.dim() != 2:
        raise ValueError(f"data must have shape (rows, nodes), got {tuple(data.shape)}")
    checks.not_empty(data, "data")
    if len(data) < 2:
        raise ValueError(f"data must have at least 2 rows, got {len(data)}")
    checks.finite(data, "data")
    constant = (data == data[0]).all(0)
    checks.require(
        ~constant, lambda: f"data must not have constant columns: leave out {constant.nonzero()[:, 0].tolist()}"
    )
