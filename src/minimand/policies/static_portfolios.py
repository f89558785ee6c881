r"""Portfolios from a mean and a covariance, without learning: what a trading policy has to beat.

Weights are at least 0 and add up to 1. Two of them are one problem: the direction of the minimum variance portfolio
(:math:`b = 1`) and of the tangency portfolio (:math:`b = \mu`) is the solution of

.. math:: \min_{y \ge 0}\ \tfrac12 y^\top \Sigma y - b^\top y = \min_{y \ge 0} \tfrac12 \|L^\top y - L^{-1} b\|^2 + c,

with :math:`\Sigma = L L^\top`, a non-negative least squares problem that an active set solves exactly. Where no weight
is held at 0 that is :math:`\Sigma^{-1} b`.

Source: Markowitz 1952; Ledoit and Wolf 2004 (shrinkage); Maillard, Roncalli and Teiletche 2010 and Spinu 2013 (risk
parity); Lawson and Hanson 1974 (non-negative least squares).
"""

from __future__ import annotations

import dataclasses

import scipy.optimize
import torch
from jaxtyping import Float
from sklearn.covariance import LedoitWolf
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop


def shrunk_moments(
    returns: Float[Tensor, "days assets"],
) -> tuple[Float[Tensor, " assets"], Float[Tensor, "assets assets"]]:
    """Estimate mean and covariance of returns, the covariance shrunk to a multiple of the identity.

    Args:
        returns: One row a day.

    Returns:
        The mean, and scikit-learn's Ledoit-Wolf covariance, which is positive definite however few the days.

    Raises:
        TypeError: If ``returns`` is no floating-point tensor.
        ValueError: If there are fewer than two days, a return is not finite, or nothing varies.

    Example:
        >>> mean, covariance = shrunk_moments(torch.tensor([[0.01, 0.0], [0.03, 0.01], [-0.01, 0.02]]))
        >>> mean
        tensor([0.0100, 0.0100])

    Source:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    """
    checks.floating(returns, "returns")
    checks.finite(returns, "returns")
    if returns.dim() != 2 or len(returns) < 2:
        raise ValueError(f"returns must have shape (days, assets) with at least two days, got {tuple(returns.shape)}")
    if not bool((returns != returns[0]).any()):
        raise ValueError("returns must vary: they are the same on all days")
    covariance = LedoitWolf().fit(returns.detach().cpu().double().numpy()).covariance_
    return returns.mean(0), torch.as_tensor(covariance).to(returns)


def minimum_variance(covariance: Float[Tensor, "assets assets"]) -> Float[Tensor, " assets"]:
    r"""Compute the long-only portfolio of least variance.

    Args:
        covariance: :math:`\Sigma`, positive definite.

    Returns:
        Weights.

    Raises:
        TypeError: If ``covariance`` is no floating-point tensor.
        ValueError: If it is not finite, symmetric and positive definite.

    Example:
        >>> minimum_variance(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500])

    Source:
        Markowitz 1952.
    """
    return _direction(torch.ones_like(covariance[..., 0]), covariance)


def maximum_sharpe(
    mean: Float[Tensor, " assets"], covariance: Float[Tensor, "assets assets"]
) -> Float[Tensor, " assets"]:
    r"""Compute the long-only portfolio of highest Sharpe ratio, the tangency portfolio.

    Args:
        mean: :math:`\mu`, expected returns over that of cash.
        covariance: :math:`\Sigma`, positive definite.

    Returns:
        Weights.

    Raises:
        TypeError: If an input is no floating-point tensor.
        ValueError: If no mean is above 0, for then cash is best; if a number is not finite; or if ``covariance`` is not
            symmetric and positive definite.

    Example:
        >>> maximum_sharpe(torch.tensor([0.1, 0.1]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500])

    Source:
        Markowitz 1952; Sharpe 1966.
    """
    checks.floating(mean, "mean")
    checks.finite(mean, "mean")
    checks.require((mean > 0).any(), lambda: "mean must be above 0 for some asset, otherwise cash is best")
    return _direction(mean, covariance)


@dataclasses.dataclass(frozen=True)
class RiskParity:
    """A portfolio whose assets bear equal risk.

    Args:
        weights: ``(assets,)``.
        residual: Largest distance of a share of the variance from the one that is wanted, 1 / assets.
        iterations: Newton steps.
        status: Why they ended.
    """

    weights: Float[Tensor, " assets"]
    residual: float
    iterations: int
    status: Stop


def risk_parity(
    covariance: Float[Tensor, "assets assets"],
    *,
    tolerance: float = 1e-6,
    max_iter: int = 100,
    max_seconds: float | None = None,
) -> RiskParity:
    r"""Compute the portfolio in which every asset bears the same share of the variance.

    :math:`w_i (\Sigma w)_i` is the same for all i in the direction of the minimum of
    :math:`\tfrac12 y^\top C y - \tfrac1n \sum_i \ln y_i` with C the correlations, :math:`w_i = y_i / \sigma_i`.
    That function is self-concordant up to scale, so Newton's method converges from anywhere if a step of decrement
    :math:`\lambda` is shortened by :math:`1 / (1 + \lambda)` while it is large.

    Args:
        covariance: :math:`\Sigma`, positive definite.
        tolerance: On the shares of the variance.
        max_iter: Most Newton steps.
        max_seconds: Most seconds; None for no limit.

    Returns:
        The portfolio, and why the iteration ended.

    Raises:
        TypeError: If ``covariance`` is no floating-point tensor.
        ValueError: If it is not finite, symmetric and positive definite, or a setting is out of range.

    Example:
        >>> risk_parity(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).weights
        tensor([0.6667, 0.3333])

    Source:
        Maillard, Roncalli and Teiletche 2010; Spinu, "An algorithm for computing risk parity weights", 2013.
    """
    checks.positive(tolerance, "tolerance")
    budget = Budget(max_iter, max_seconds)
    _cholesky(covariance)
    deviation = covariance.diagonal().double().sqrt()
    correlation = covariance.double() / deviation[:, None] / deviation
    assets = len(deviation)
    point, iteration = torch.ones_like(deviation) / correlation.sum().sqrt(), 0
    while True:
        pull = correlation @ point
        shares = point * pull / (point @ pull)
        residual = float((shares - 1 / assets).abs().max())
        status = Stop.CONVERGED if residual <= tolerance else budget.spent(iteration)
        if status is not None:
            weights = point / deviation
            return RiskParity((weights / weights.sum()).to(covariance), residual, iteration, status)
        gradient = pull - 1 / (assets * point)
        step = torch.linalg.solve(correlation + torch.diag(1 / (assets * point.square())), gradient)
        # Times `assets` the function is self-concordant, so that is the decrement that bounds the step.
        decrement = float((assets * gradient @ step).clamp_min(0).sqrt())
        point = point - step / (1 + decrement if decrement > 0.25 else 1.0)
        iteration += 1


def _direction(excess: Tensor, covariance: Tensor) -> Tensor:
    factor = _cholesky(covariance)
    if excess.shape != covariance.shape[:1]:
        raise ValueError(f"mean must have shape {tuple(covariance.shape[:1])}, got {tuple(excess.shape)}")
    right = torch.linalg.solve_triangular(factor, excess.detach().double()[:, None], upper=False)[:, 0]
    solution, _ = scipy.optimize.nnls(factor.T.cpu().numpy(), right.cpu().numpy())
    weights = torch.as_tensor(solution)
    return (weights / weights.sum()).to(covariance)


def _cholesky(covariance: Tensor) -> Tensor:
    checks.floating(covariance, "covariance")
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1] or not len(covariance):
        raise ValueError(f"covariance must have shape (assets, assets), got {tuple(covariance.shape)}")
    checks.finite(covariance, "covariance")
    matrix = covariance.detach().double()
    if not torch.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-7 * float(matrix.abs().max())):
        raise ValueError("covariance must be symmetric")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ValueError("covariance must be positive definite: shrink it (shrunk_moments) or leave an asset out")
    return factor
