"""The states of a game of queries: how often each query was made, and the sum of its answers.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import checks

# Counts of answers and their sums, both ``(states, queries)``, to probabilities of the queries.
Policy = Callable[[Tensor, Tensor], Tensor]

Noise = Literal["bernoulli", "gaussian"]

TIE = 1e-9


def guess(counts: Tensor, sums: Tensor, hypotheses: Tensor, queries: Tensor | None = None) -> Tensor:
    """Return the probability of each guess: the hypotheses of largest product with the estimated instance, evenly."""
    values = estimate(counts.double(), sums.double(), queries) @ hypotheses.double().mT
    return even(values >= values.amax(-1, keepdim=True) - TIE, values)


def estimate(counts: Tensor, sums: Tensor, queries: Tensor | None = None) -> Tensor:
    """Return the shortest instance that fits the answers in least squares: their averages for unit queries."""
    if queries is None:
        return sums / counts.clamp_min(1)
    rows = queries.to(counts)
    information = (rows.mT * counts[:, None, :]) @ rows
    return (torch.linalg.pinv(information, hermitian=True) @ (sums @ rows)[..., None]).squeeze(-1)


def even(chosen: Tensor, like: Tensor) -> Tensor:
    """Return the distribution that is even on what was chosen in each row."""
    shares = chosen.to(like)
    return shares / shares.sum(-1, keepdim=True)


def binomials(top: Tensor, bottom: Tensor | int) -> Tensor:
    """Return binomial coefficients, exactly, of small integers; 0 where ``bottom`` exceeds ``top``."""
    highest = int(top.max()) if top.numel() else 0
    choose = torch.as_tensor(bottom, device=top.device)
    widest = int(choose.max()) + 1
    rows = [[math.comb(n, k) for k in range(widest)] for n in range(highest + 1)]
    return torch.tensor(rows, device=top.device)[top, choose.expand_as(top)]


def rank(counts: Tensor) -> Tensor:
    """Return the place of counts among all with the same sum, in lexicographic order."""
    parts = counts.shape[-1]
    left = counts.sum(-1, keepdim=True) - counts.cumsum(-1) + counts
    # With m parts to come, those that begin with less than c number C(left + m, m) - C(left - c + m, m).
    behind = torch.arange(parts - 1, -1, -1, device=counts.device)
    return (binomials(left + behind, behind) - binomials(left - counts + behind, behind)).sum(-1)


def check_budget(budget: int) -> None:
    """Raise unless the number of queries is a whole number of at least 1."""
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an integer, got {budget!r}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")


def check_probabilities(probabilities: Tensor, name: str, shape: Sequence[int]) -> None:
    """Raise unless every row is a distribution and the shape is the one wanted."""
    checks.floating(probabilities, name)
    if tuple(probabilities.shape) != tuple(shape) or probabilities.dim() != 2:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(probabilities.shape)}")
    checks.finite(probabilities, name)
    rows = probabilities.detach()
    checks.require(
        (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() < 1e-3),
        lambda: f"{name} must hold probabilities that add up to 1 in every row",
    )


def check_answers(counts: Tensor, sums: Tensor) -> None:
    """Raise unless counts and sums are finite and of one shape ``(states, queries)``, and counts not negative."""
    for name, value in (("counts", counts), ("sums", sums)):
        checks.floating(value, name)
        checks.finite(value, name)
    if counts.shape != sums.shape or counts.dim() != 2 or not counts.numel():
        raise ValueError(
            f"counts and sums must have one shape (states, queries), got {tuple(counts.shape)} and {tuple(sums.shape)}"
        )
    checks.require(counts >= 0, lambda: "counts must be at least 0")
