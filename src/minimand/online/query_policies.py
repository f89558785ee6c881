"""Policies that choose the next query from the answers so far: a table, a network, and the field's own.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .answer_counts import binomials, check_answers, check_budget, check_probabilities, even, rank
from .problem_complexity import check_hypotheses, check_queries


class TabularPolicy:
    """A policy of a :class:`QueryGame` that is looked up in its table.

    Args:
        table: Probabilities of the queries in every state, ``(states, queries)``, in the order of the game.

    Raises:
        ValueError: If a row is no distribution.

    Example:
        >>> from minimand.online import QueryGame
        >>> game = QueryGame(thresholds(2), budget=3)
        >>> policy = TabularPolicy(game.table(uniform_allocation))
        >>> policy(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))  # the first point was asked about
        tensor([[0., 1.]], dtype=torch.float64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; the table is ours.
    """

    def __init__(self, table: Float[Tensor, "states queries"]) -> None:
        check_probabilities(table, "table", table.shape)
        self.table = table.detach()

    def __call__(
        self, counts: Float[Tensor, "states queries"], sums: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            counts: Answers to each query.
            sums: Their sums.

        Raises:
            ValueError: If a state has more answers than the table, or the answers are no signs.
        """
        check_answers(counts, sums)
        signs = torch.cat([counts + sums, counts - sums], -1) / 2
        checks.require(
            (signs >= 0) & (signs == signs.round()), lambda: "sums must be of as many answers of -1 and 1 as counted"
        )
        spent, parts = counts.sum(-1).long(), signs.shape[-1]
        place = binomials(spent + parts - 1, parts) + rank(signs.long())
        checks.require(place < len(self.table), lambda: f"the table ends before {int(spent.max())} answers")
        return self.table[place]


class QueryNetwork(nn.Module):
    r"""A policy as a network: shares of the budget spent, and average answers, to probabilities of the queries.

    Args:
        num_queries: d.
        budget: T, the queries in all, in whose units counts are read.
        hidden: Widths of the hidden layers. The paper's are not known; two of 128 are ours.

    Example:
        >>> QueryNetwork(3, budget=5)(torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; the features are ours.
    """

    def __init__(self, num_queries: int, *, budget: int, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}")
        check_budget(budget)
        self.budget = budget
        widths = [3 * num_queries + 1, *hidden]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_queries))

    def forward(
        self, counts: Float[Tensor, "states queries"], sums: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            counts: Answers to each query.
            sums: Their sums.
        """
        check_answers(counts, sums)
        spent = counts.sum(-1, keepdim=True) / self.budget
        features = torch.cat([counts / self.budget, sums / self.budget, sums / counts.clamp_min(1), spent], -1)
        dtype = next(self.parameters()).dtype
        return self.layers(features.to(dtype)).softmax(-1)


class QueryScorer(nn.Module):
    r"""A policy that scores every query by one small network, from what the answers say of the hypotheses.

    The network is shared by the queries, so that it has few weights however many there are, and permuting queries
    permutes what it returns. With the ridge estimate :math:`\hat\theta = V^{-1} \sum_x s_x x`, where :math:`V = I +
    \sum_x n_x x x^\top`, and beliefs :math:`p_z \propto \exp(\beta \langle z, \hat\theta \rangle)` at two learned
    :math:`\beta`, it reads the logarithms of

    - how much the hypotheses disagree on the query, the variance of :math:`\langle x, z \rangle` under each belief;
    - by how much the query would sharpen the gap of the two best hypotheses, as in :func:`gap_search`;
    - what is unknown of its answer, :math:`x^\top V^{-1} x`;

    and besides its share of the answers, their size, how far the two best are apart, and the budget spent. So
    bisection, searching the gap, and asking evenly are policies that it can take.

    Args:
        hypotheses: Rows z.
        budget: T, the queries in all.
        queries: Rows x; None for the unit vectors.
        hidden: Width of the network's hidden layers. The paper's network is not known; this one is ours.

    Example:
        >>> QueryScorer(torch.eye(3), budget=5)(torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (a policy that is a network); the features are ours.
    """

    hypotheses: Tensor
    rows: Tensor
    predicted: Tensor

    def __init__(
        self,
        hypotheses: Float[Tensor, "hypotheses dim"],
        *,
        budget: int,
        queries: Float[Tensor, "queries dim"] | None = None,
        hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        check_hypotheses(hypotheses)
        check_queries(queries, hypotheses.shape[1])
        check_budget(budget)
        self.budget = budget
        self.unit = queries is None
        dtype = torch.get_default_dtype()
        rows = torch.eye(hypotheses.shape[1]) if queries is None else queries.detach()
        predicted = (hypotheses.detach().to(rows) @ rows.mT).to(dtype)
        self.register_buffer("hypotheses", hypotheses.detach().to(dtype))
        self.register_buffer("rows", rows.to(dtype))
        self.register_buffer("predicted", predicted - predicted.mean(0))
        self.log_sharpness = nn.Parameter(torch.tensor([0.0, 1.0]))
        widths = [8, *hidden]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(
        self, counts: Float[Tensor, "states queries"], sums: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            counts: Answers to each query.
            sums: Their sums.
        """
        check_answers(counts, sums)
        if counts.shape[-1] != len(self.rows):
            raise ValueError(f"counts must have {len(self.rows)} columns, got {counts.shape[-1]}")
        counts, sums = counts.to(self.hypotheses), sums.to(self.hypotheses)
        ridge = _Ridge(counts, sums, None if self.unit else self.rows)
        values = ridge.theta @ self.hypotheses.mT
        best, gap = _two_best(values)
        gain, width = ridge.gain(self._direction(best))
        spread = [self._disagreement((scale.exp() * values).softmax(-1)) for scale in self.log_sharpness]
        means = ridge.theta if self.unit else ridge.theta @ self.rows.mT
        spent = counts.sum(-1, keepdim=True)
        seen = [(each + 1e-3).log() for each in (*spread, gain, width)]
        whole = [each.expand_as(counts) for each in (gap, spent / self.budget)]
        features = torch.stack([*seen, counts / (spent + 1), means.abs(), *whole], -1)
        return self.layers(features).squeeze(-1).softmax(-1)

    def _direction(self, best: Tensor) -> Tensor:
        pair = self.hypotheses[best]
        return pair[:, 0] - pair[:, -1]

    def _disagreement(self, belief: Tensor) -> Tensor:
        return (belief @ self.predicted.square() - (belief @ self.predicted).square()).clamp_min(0)


class _Ridge:
    """The estimate of an instance by least squares with a unit penalty, and what one more answer would change."""

    def __init__(self, counts: Tensor, sums: Tensor, queries: Tensor | None) -> None:
        self.queries = queries
        if queries is None:
            self.inverse = 1 / (1 + counts)
            self.theta = sums * self.inverse
            return
        information = (queries.mT * counts[:, None, :]) @ queries
        eye = torch.eye(queries.shape[1]).to(queries)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(information + eye))
        self.theta = (self.inverse @ (sums @ queries)[..., None]).squeeze(-1)

    def variance(self, direction: Tensor) -> Tensor:
        """Return the variance of a linear function."""
        if self.queries is None:
            return (direction.square() * self.inverse).sum(-1)
        return (direction * (self.inverse @ direction[..., None]).squeeze(-1)).sum(-1)

    def distances(self, hypotheses: Tensor, best: Tensor) -> Tensor:
        """Return the standard deviations of the differences of hypotheses and one of them."""
        chosen = hypotheses[best]
        if self.queries is None:
            squares, across = self.inverse @ hypotheses.square().mT, (self.inverse * chosen) @ hypotheses.mT
        else:
            outer = (hypotheses[:, :, None] * hypotheses[:, None, :]).flatten(1)
            squares = self.inverse.flatten(1) @ outer.mT
            across = (self.inverse @ chosen[..., None]).squeeze(-1) @ hypotheses.mT
        own = squares.gather(-1, best[:, None])
        return (squares - 2 * across + own).clamp_min(0).sqrt()

    def gain(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return by what part each query would lower the variance along a direction, and the query's own variance."""
        total = self.variance(direction)[:, None].clamp_min(torch.finfo(direction.dtype).tiny)
        if self.queries is None:
            width, along = self.inverse, direction * self.inverse
        else:
            seen = self.queries @ self.inverse
            width, along = (seen * self.queries).sum(-1), (seen @ direction[..., None]).squeeze(-1)
        return along.square() / ((1 + width) * total), width


def _two_best(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two best hypotheses and their distance; of a single one, itself twice."""
    top = values.topk(min(2, values.shape[-1]), -1)
    return top.indices, top.values[:, :1] - top.values[:, -1:]


def uniform_allocation(
    counts: Float[Tensor, "states queries"], sums: Float[Tensor, "states queries"]
) -> Float[Tensor, "states queries"]:
    """Ask the queries asked least so far, whatever the answers: a baseline.

    Args:
        counts: Answers to each query.
        sums: Their sums.

    Returns:
        Probabilities of the queries, equal among the least asked.

    Example:
        >>> uniform_allocation(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]]))
        tensor([[0.0000, 0.5000, 0.5000]])

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (a baseline).
    """
    check_answers(counts, sums)
    return even(counts == counts.amin(-1, keepdim=True), counts)


def generalized_binary_search(
    counts: Float[Tensor, "states queries"],
    sums: Float[Tensor, "states queries"],
    *,
    hypotheses: Float[Tensor, "hypotheses queries"],
    sharpness: float = 0.7,
) -> Float[Tensor, "states queries"]:
    r"""Ask where labels weighed by :math:`w_z \propto \exp(\beta \langle s, z \rangle)` are split most evenly.

    Here s are the sums of the answers. It is soft generalised binary search; as these weights are the posterior for
    answers that are wrong with a probability of :math:`1 / (1 + e^{2 \beta})`, it is also uncertainty sampling.

    Args:
        counts: Answers to each query.
        sums: Their sums.
        hypotheses: Labels in plus and minus one.
        sharpness: beta, above 0. 0.7 is right for one answer in five wrong.

    Returns:
        Probabilities of the queries, equal among those of the most even split.

    Example:
        >>> nothing = torch.zeros(1, 3)
        >>> generalized_binary_search(nothing, nothing, hypotheses=thresholds(3).float())
        tensor([[0., 1., 0.]])

    Source:
        Nowak, "The geometry of generalized binary search", IEEE Transactions on Information Theory 57 (2011),
        section IV.
    """
    check_answers(counts, sums)
    check_hypotheses(hypotheses)
    checks.positive(sharpness, "sharpness")
    checks.require(hypotheses.abs() == 1, lambda: "hypotheses must hold labels in -1 and 1")
    if hypotheses.shape[1] != counts.shape[-1]:
        raise ValueError(f"hypotheses must have {counts.shape[-1]} columns, got {hypotheses.shape[1]}")
    labels = hypotheses.to(sums)
    weights = (sharpness * sums @ labels.mT).softmax(-1)
    balance = (weights @ labels).abs()
    tie = 100 * torch.finfo(balance.dtype).eps
    return even(balance <= balance.amin(-1, keepdim=True) + tie, balance)


def gap_search(
    counts: Float[Tensor, "states queries"],
    sums: Float[Tensor, "states queries"],
    *,
    hypotheses: Float[Tensor, "hypotheses dim"],
    queries: Float[Tensor, "queries dim"] | None = None,
    confidence: float = 1.0,
) -> Float[Tensor, "states queries"]:
    r"""Ask what sharpens the gap between the best hypothesis and its closest rival most: LinGapE's greedy rule.

    With the ridge estimate :math:`\hat\theta` and its precision V, the best hypothesis is :math:`i = \arg\max_z
    \langle z, \hat\theta \rangle`, its rival :math:`j = \arg\max_{z \ne i} \langle z - i, \hat\theta \rangle + c \|z -
    i\|_{V^{-1}}`, and the query the one of least :math:`\|i - j\|_{(V + x x^\top)^{-1}}`.

    Args:
        counts: Answers to each query.
        sums: Their sums.
        hypotheses: Rows z, all different, at least two.
        queries: Rows x; None for the unit vectors.
        confidence: c, at least 0: the bonus of what is not known. The paper's grows with the logarithm of the
            confidence wanted; here it is free, since the budget is set.

    Returns:
        Probabilities of the queries, equal among those that sharpen most.

    Example:
        >>> counts, sums = torch.ones(1, 3), torch.tensor([[1.0, 0.9, -1.0]])
        >>> gap_search(counts, sums, hypotheses=torch.eye(3))
        tensor([[0.5000, 0.5000, 0.0000]])

    Source:
        Xu, Honda and Sugiyama, "A fully adaptive algorithm for pure exploration in linear bandits", AISTATS 2018, arXiv
        1710.05552, algorithm 1 and equation 13 (greedy); a unit ridge.
    """
    check_answers(counts, sums)
    check_hypotheses(hypotheses)
    check_queries(queries, hypotheses.shape[1])
    checks.non_negative(confidence, "confidence")
    wanted = hypotheses.shape[1] if queries is None else len(queries)
    if counts.shape[-1] != wanted or len(hypotheses) < 2:
        raise ValueError(
            f"hypotheses must be at least 2 and go with counts of {wanted} queries, got {len(hypotheses)} and "
            f"{counts.shape[-1]}"
        )
    table = hypotheses.to(counts)
    ridge = _Ridge(counts, sums, None if queries is None else queries.to(counts))
    values = ridge.theta @ table.mT
    best = values.argmax(-1)
    closeness = values + confidence * ridge.distances(table, best)
    rival = closeness.scatter(-1, best[:, None], -torch.inf).argmax(-1)
    gain, _ = ridge.gain(table[best] - table[rival])
    tie = 100 * torch.finfo(gain.dtype).eps
    return even(gain >= gain.amax(-1, keepdim=True) - tie, gain)


def thresholds(num_queries: int) -> Float[Tensor, "hypotheses queries"]:
    """Return the labels of d points in a row that turn from minus to plus at one place, or not at all.

    Args:
        num_queries: d, at least 1.

    Returns:
        ``(num_queries + 1, num_queries)``; row k has k labels of minus one.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> thresholds(2)
        tensor([[ 1.,  1.],
                [-1.,  1.],
                [-1., -1.]], dtype=torch.float64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (one-dimensional thresholds).
    """
    if not num_queries >= 1:
        raise ValueError(f"num_queries must be at least 1, got {num_queries}")
    return 1 - 2 * torch.ones(num_queries + 1, num_queries, dtype=torch.float64).tril(-1)
