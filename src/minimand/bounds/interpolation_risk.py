r"""What linear regression on bag means will cost: the exact limit of its error, the best rho, the best bag size.

Rows :math:`x \sim N(0, \Sigma)`, labels :math:`y = x^\top \theta_0 + e` with noise variance :math:`\sigma^2`,
:math:`n` rows in random bags of :math:`k`, :math:`d` features, :math:`n / d \to \psi`, signal
:math:`r^2 = \theta_0^\top \Sigma \theta_0`. For the minimiser of bag loss + rho within-bag variance
(:class:`minimand.losses.AggregateLoss`), :math:`t > 0` solves the quadratic

.. math:: 1 = \frac\psi k \frac t{1 + t} + \psi \Bigl(1 - \frac1k\Bigr) \frac{\rho t}{1 + \rho t},

and with :math:`w_1 = \frac1{k(1+t)^2}`, :math:`w_2 = \frac{1 - 1/k}{(1 + \rho t)^2}`,
:math:`V = \frac{t w_1}{w_1 + \rho w_2}`, :math:`U = \frac{t w_2}{w_1 + \rho w_2}` and
:math:`c = \frac{q}{p + q}`, :math:`p = \frac1{k (1 + t)}`, :math:`q = \frac{(1 - 1/k)\rho}{1 + \rho t}`,

.. math:: \mathrm{variance} = \sigma^2 V, \qquad
          \mathrm{bias}^2 = r^2 \bigl[c^2 (1 + V) + (1 - c)^2 \rho^2 U\bigr].

Their sum is the mean squared error of the predictions around :math:`x^\top \theta_0`. The estimator turns with any
linear change of features, so :math:`\Sigma` only enters through :math:`r^2`.

Source: Javanmard, Chen, Mirrokni, Badanidiyuru and Fu, ICLR 2024, arXiv 2401.11081, whose fixed-point system this
is another form of, derived by leaving one bag out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from .. import checks


def interpolation_risk(
    rows_per_feature: Any, *, bag_size: Any, rho: Any, signal: Any = 1.0, noise: Any = 1.0
) -> tuple[Any, Any]:
    """Compute the squared bias and the variance of linear regression on bag means.

    Args:
        rows_per_feature: The paper's psi: rows (not bags) over features, above 1; above ``bag_size`` where rho is 0.
        bag_size: Rows a bag, at least 1.
        rho: Weight of the within-bag variance, at least 0.
        signal: Variance of the noiseless labels, r2.
        noise: Variance of the labels around them, sigma2.

    All are numbers, numpy arrays or torch tensors that broadcast; with a tensor among them the result is
    a tensor, with gradient.

    Returns:
        Squared bias and variance; their sum is the excess risk of a prediction.

    Raises:
        ValueError: If a value is out of range, or there are too few rows for a unique solution.

    Example:
        >>> bias, variance = interpolation_risk(10.0, bag_size=5, rho=1.0, signal=4.0)
        >>> round(float(bias), 4), round(float(variance), 4)
        (2.6311, 0.0222)

    Source:
        Javanmard et al. 2024, arXiv 2401.11081, the proportional limit.
    """
    psi, k, rho, signal, noise = _same_kind(rows_per_feature, bag_size, rho, signal, noise)
    _require(k >= 1, "bag_size must be at least 1", bag_size)
    _require(rho >= 0, "rho must be at least 0", rho)
    _require(signal >= 0, "signal must be at least 0", signal)
    _require(noise >= 0, "noise must be at least 0", noise)
    _require(psi > 1, "rows_per_feature must be above 1", rows_per_feature)
    _require((rho > 0) | (psi > k), "rows_per_feature must be above bag_size where rho is 0", rows_per_feature)

    many = 1 - 1 / k
    # The condition on t, cleared of fractions: square t^2 + slope t - 1 = 0.
    square = rho * (psi - 1)
    slope = psi / k + psi * many * rho - 1 - rho
    root = abs(slope) + (slope**2 + 4 * square) ** 0.5
    # Two forms of the positive root; each is used where nothing cancels in it.
    where: Any = torch.where if isinstance(psi, Tensor) else np.where
    falling = slope < 0
    t = where(falling, root / (2 * where(falling, square, 1 + 0 * square)), 2 / root)

    bags = 1 / (k * (1 + t) ** 2)
    within = many / (1 + rho * t) ** 2
    total = bags + rho * within
    v, u = t * bags / total, t * within / total
    p, q = 1 / (k * (1 + t)), many * rho / (1 + rho * t)
    shrunk = q / (p + q)
    bias = signal * (shrunk**2 * (1 + v) + (1 - shrunk) ** 2 * rho**2 * u)
    return _plain(bias), _plain(noise * v)


def best_rho(
    rows_per_feature: float,
    *,
    bag_size: int | float,
    signal: float = 1.0,
    noise: float = 1.0,
    largest: float = 1.0,
) -> float:
    """Find the rho of least risk.

    Args:
        rows_per_feature: Rows over features, above 1.
        bag_size: Rows a bag, at least 1; the mean where bags differ.
        signal: Variance of the noiseless labels.
        noise: Variance of the labels around them.
        largest: Upper end of the search; 1 is the instance loss.

    Returns:
        The best rho in [0, largest]; 0 where bags are single rows, since rho then changes nothing.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> round(best_rho(10.0, bag_size=5), 2)
        0.13

    Source:
        Javanmard et al. 2024, arXiv 2401.11081.
    """
    checks.positive(largest, "largest")

    def risk(rho: Any) -> Any:
        return sum(interpolation_risk(rows_per_feature, bag_size=bag_size, rho=rho, signal=signal, noise=noise))

    if bag_size == 1:
        risk(largest)  # refuses what is out of range
        return 0.0
    grid = largest * np.geomspace(1e-8, 1.0, 400)
    values = risk(grid)
    place = int(np.argmin(values))
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    found = minimize_scalar(risk, bounds=(low, high), method="bounded", options={"xatol": 1e-10 * largest})
    candidates = [(float(found.fun), float(found.x)), (float(values[-1]), float(largest))]
    if rows_per_feature > bag_size:
        candidates.append((float(risk(0.0)), 0.0))
    return min(candidates)[1]


def best_bag_size(
    rows_per_feature: float,
    *,
    epsilon: float,
    clip: float,
    rho: float | None = None,
    signal: float = 1.0,
    noise: float = 1.0,
    largest: int = 64,
) -> int:
    r"""Find the bag size of least risk when bag means are released with label privacy.

    Laplace noise on the mean of :math:`k` labels in [-b, b] (:func:`minimand.losses.private_bag_means`) has the
    effect of :math:`8 b^2 / (k \epsilon^2)` more noise variance on each label.

    Args:
        rows_per_feature: Rows over features, above 1.
        epsilon: The privacy budget, above 0.
        clip: The paper's b: labels lie in [-clip, clip].
        rho: Weight of the within-bag variance; None: the best in [0, 1] for each bag size.
        signal: Variance of the noiseless labels.
        noise: Variance of the labels around them, before privacy.
        largest: The largest bag size looked at.

    Returns:
        The best size in 1 to ``largest``, ties to the smaller. ``largest`` itself means that privacy costs so much
        that ever flatter predictions win: compare the risk with ``signal``, which is the risk of predicting 0.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> best_bag_size(20.0, epsilon=100.0, clip=2.0, rho=0.3), best_bag_size(20.0, epsilon=2.0, clip=2.0, rho=0.3)
        (1, 2)

    Source:
        Javanmard et al. 2024, arXiv 2401.11081, the label-private mechanism.
    """
    checks.positive(epsilon, "epsilon")
    checks.positive(clip, "clip")
    if largest < 1:
        raise ValueError(f"largest must be at least 1, got {largest}")
    best, least = 1, math.inf
    for size in range(1, largest + 1):
        if rho == 0 and size >= rows_per_feature:
            break
        private = noise + 8 * clip**2 / (size * epsilon**2)
        weight = best_rho(rows_per_feature, bag_size=size, signal=signal, noise=private) if rho is None else rho
        risk = sum(interpolation_risk(rows_per_feature, bag_size=size, rho=weight, signal=signal, noise=private))
        if risk < least:
            best, least = size, float(risk)
    if least == math.inf:
        raise ValueError(f"rows_per_feature must be above 1, got {rows_per_feature}")
    return best


def _same_kind(*values: Any) -> list[Any]:
    """Make all of the values tensors if one is, else float64 numpy scalars or arrays."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [np.asarray(value, dtype=np.float64)[()] for value in values]
    dtype = torch.result_type(tensors[0], 1.0)
    return [torch.as_tensor(value, device=tensors[0].device).to(dtype) for value in values]


def _require(holds: Any, wanted: str, came: Any) -> None:
    if not bool(holds.all()):
        raise ValueError(f"{wanted}, got {came}")


def _plain(value: Any) -> Any:
    """Turn a numpy scalar into a float."""
    return value if isinstance(value, Tensor) or np.ndim(value) else float(value)
