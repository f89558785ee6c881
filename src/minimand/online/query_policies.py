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
from .answer_counts import binomials, check_budget, check_counts, check_probabilities, even, rank
from .problem_complexity import check_hypotheses


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
        >>> policy(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))  # the first point was asked about
        tensor([[0., 1.]], dtype=torch.float64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382; the table is ours.
    """

    def __init__(self, table: Float[Tensor, "states queries"]) -> None:
        check_probabilities(table, "table", table.shape)
        self.table = table.detach()

    def __call__(
        self, positives: Float[Tensor, "states queries"], negatives: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            positives: Answers of plus one to each query.
            negatives: Answers of minus one.

        Raises:
            ValueError: If a state has more answers than the table.
        """
        check_counts(positives, negatives)
        counts = torch.cat([positives, negatives], -1).round().long()
        spent, parts = counts.sum(-1), counts.shape[-1]
        place = binomials(spent + parts - 1, parts) + rank(counts)
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
        self, positives: Float[Tensor, "states queries"], negatives: Float[Tensor, "states queries"]
    ) -> Float[Tensor, "states queries"]:
        """Return the probabilities of the queries.

        Args:
            positives: Answers of plus one to each query.
            negatives: Answers of minus one.
        """
        check_counts(positives, negatives)
        asked, sums = positives + negatives, positives - negatives
        spent = asked.sum(-1, keepdim=True) / self.budget
        features = torch.cat([asked / self.budget, sums / self.budget, sums / asked.clamp_min(1), spent], -1)
        dtype = next(self.parameters()).dtype
        return self.layers(features.to(dtype)).softmax(-1)


def uniform_allocation(
    positives: Float[Tensor, "states queries"], negatives: Float[Tensor, "states queries"]
) -> Float[Tensor, "states queries"]:
    """Ask the queries asked least so far, whatever the answers: a baseline.

    Args:
        positives: Answers of plus one to each query.
        negatives: Answers of minus one.

    Returns:
        Probabilities of the queries, equal among the least asked.

    Example:
        >>> uniform_allocation(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([[0.0000, 0.5000, 0.5000]])

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (a baseline).
    """
    check_counts(positives, negatives)
    asked = positives + negatives
    return even(asked == asked.amin(-1, keepdim=True), asked)


def generalized_binary_search(
    positives: Float[Tensor, "states queries"],
    negatives: Float[Tensor, "states queries"],
    *,
    hypotheses: Float[Tensor, "hypotheses queries"],
    sharpness: float = 0.7,
) -> Float[Tensor, "states queries"]:
    r"""Ask where labels weighed by :math:`w_z \propto \exp(\beta \langle n^+ - n^-, z \rangle)` are split most evenly.

    It is soft generalised binary search; as these weights are the posterior for answers that are wrong with a
    probability of :math:`1 / (1 + e^{2 \beta})`, it is also uncertainty sampling.

    Args:
        positives: Answers of plus one to each query.
        negatives: Answers of minus one.
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
    check_counts(positives, negatives)
    check_hypotheses(hypotheses)
    checks.positive(sharpness, "sharpness")
    checks.require(hypotheses.abs() == 1, lambda: "hypotheses must hold labels in -1 and 1")
    if hypotheses.shape[1] != positives.shape[-1]:
        raise ValueError(f"hypotheses must have {positives.shape[-1]} columns, got {hypotheses.shape[1]}")
    labels = hypotheses.to(positives)
    weights = (sharpness * (positives - negatives) @ labels.mT).softmax(-1)
    balance = (weights @ labels).abs()
    tie = 100 * torch.finfo(balance.dtype).eps
    return even(balance <= balance.amin(-1, keepdim=True) + tie, balance)


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
