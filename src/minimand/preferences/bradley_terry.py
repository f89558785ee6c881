r"""The scores that a reward model would learn: the Bradley-Terry model nearest to preferences of any kind.

Pairs of answers are drawn from weights :math:`w` and compared by :math:`P(y \succ y')`. Logistic regression on them
finds the scores with

.. math:: \max_r \sum_{y, y'} w(y) w(y') P(y \succ y') \log\sigma(r(y) - r(y'))
          \iff \sum_{y'} w(y') \big(P(y \succ y') - \sigma(r(y) - r(y'))\big) = 0 \text{ for all } y:

each answer's win rate is as predicted. What runs in circles is lost. DPO fits the same scores, as
:math:`\beta \log \pi / \rho`.

Source: Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 1952; the damping that makes Newton's
method converge from anywhere: Sun and Tran-Dinh, "Generalized self-concordant functions", arXiv 1703.04599, section 3.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop


@dataclasses.dataclass(frozen=True)
class BradleyTerryFit:
    """What :func:`bradley_terry` found.

    Args:
        scores: r, with a weighted mean of 0, ``(*prompts, answers)``, in nats.
        residual: The largest difference between a win rate and its prediction.
        iterations: Newton steps.
        status: Why it stopped.
    """

    scores: Tensor
    residual: float
    iterations: int
    status: Stop


def bradley_terry(
    preferences: Float[Tensor, "*prompts answers answers"],
    weights: Float[Tensor, "*prompts answers"] | None = None,
    *,
    tolerance: float = 1e-6,
    max_iter: int = 200,
    max_seconds: float | None = None,
) -> BradleyTerryFit:
    r"""Fit Bradley-Terry scores to a table of preferences.

    Args:
        preferences: :math:`P(y \succ y')`, rows beat columns, in [0, 1].
        weights: How often an answer is drawn, at least 0, adding up to 1; uniform if None. They decide what matters
            where preferences run in circles.
        tolerance: Largest difference between a win rate and its prediction. Where an answer always wins, scores grow
            until this is met.
        max_iter: Most Newton steps.
        max_seconds: Most seconds; None for no limit.

    Returns:
        A :class:`BradleyTerryFit`.

    Raises:
        ValueError: If shapes do not match, preferences are no probabilities that complement each other, or weights are
            below 0 or do not add up to 1.

    Example:
        >>> bradley_terry(torch.tensor([[0.5, 0.75], [0.25, 0.5]])).scores  # half of log 3, up and down
        tensor([ 0.5493, -0.5493])

    Source:
        Bradley and Terry 1952; Sun and Tran-Dinh 2017, arXiv 1703.04599, the damped step for nu = 2.
    """
    check_preferences(preferences)
    answers = preferences.shape[-1]
    if weights is None:
        weights = preferences.new_full((answers,), 1 / answers)
    checks.floating(weights, "weights")
    if weights.dim() == 0 or weights.shape[-1] != answers:
        raise ValueError(f"weights must have shape (*prompts, {answers}), got {tuple(weights.shape)}")
    checks.require(weights >= 0, lambda: "weights must be at least 0 and finite")
    checks.require((weights.sum(-1) - 1).abs() <= 1e-3, lambda: "weights must add up to 1")
    checks.positive(tolerance, "tolerance")
    budget = Budget(max_iter, max_seconds)
    weights = weights.to(preferences).expand(preferences.shape[:-1])[..., None, :]
    scores, iteration = torch.zeros_like(preferences[..., 0]), 0
    while True:
        predicted = torch.sigmoid(scores[..., :, None] - scores[..., None, :])
        error = (weights * (preferences - predicted)).sum(-1)
        residual = float(error.abs().max())
        status = Stop.CONVERGED if residual <= tolerance else budget.spent(iteration)
        if status is not None:
            return BradleyTerryFit(scores, residual, iteration, status)
        curvature = weights * predicted * (1 - predicted)
        # The Laplacian is singular along constants; adding the weights fixes the weighted mean of the step at 0.
        laplacian = weights - curvature
        laplacian.diagonal(dim1=-2, dim2=-1).add_(curvature.sum(-1))
        step = torch.linalg.solve(laplacian, error)
        spread = (step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)).clamp_min(torch.finfo(step.dtype).tiny)
        scores = scores + step * (torch.log1p(spread) / spread)
        iteration += 1


def check_preferences(preferences: Tensor) -> None:
    """Raise unless ``preferences`` is a table of probabilities, rows beat columns, that complement each other."""
    checks.floating(preferences, "preferences")
    if preferences.dim() < 2 or preferences.shape[-1] != preferences.shape[-2]:
        raise ValueError(f"preferences must have shape (*prompts, answers, answers), got {tuple(preferences.shape)}")
    checks.not_empty(preferences, "preferences")
    checks.finite(preferences, "preferences")
    checks.require(
        (preferences >= 0) & (preferences <= 1), lambda: "preferences must hold probabilities, between 0 and 1"
    )
    checks.require(
        (preferences + preferences.mT - 1).abs() <= 1e-6,
        lambda: "preferences of an answer over another and of the other over it must add up to 1",
    )
