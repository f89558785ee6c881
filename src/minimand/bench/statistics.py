"""Is the difference real? Paired comparisons over cells, and the verdict on a claim."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Vector = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The paired difference of two contenders, with the probability of one as large under no difference.

    Args:
        difference: Mean of the paired differences.
        low: Lower end of the corrected t interval.
        high: Upper end.
        bootstrap_low: Lower end of the bootstrap interval.
        bootstrap_high: Upper end.
        p: Two-sided p-value of the corrected resampled t-test.
        cells: Number of pairs.
    """

    difference: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    p: float
    cells: int


def corrected_variance(values: Vector, test_train_ratio: float) -> float:
    r"""Estimate the variance of the mean of cells that resample one data set.

    Training sets of different folds overlap, so cells are correlated and :math:`s^2 / n` is too small. Nadeau and
    Bengio's correction uses :math:`s^2 (1/n + n_{test}/n_{train})`.

    Args:
        values: One number a cell, at least two.
        test_train_ratio: Size of a test set over its training set; 0 for independent cells.

    Source:
        Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003), section 3.
    """
    return float(values.var(ddof=1)) * (1 / len(values) + test_train_ratio)


def mean_interval(
    values: Sequence[float], *, test_train_ratio: float = 0.0, level: float = 0.95
) -> tuple[float, float]:
    """Return the corrected t interval of a mean; the mean twice when one cell says nothing of the spread."""
    array = _finite(values)
    if len(array) == 0:
        return math.nan, math.nan
    mean = float(array.mean())
    if len(array) < 2:
        return mean, mean
    half = _quantile(level, len(array)) * math.sqrt(corrected_variance(array, test_train_ratio))
    return mean - half, mean + half


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    sign: int = 1,
    test_train_ratio: float = 0.0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Comparison:
    """Compare two contenders over the same cells by the corrected resampled t-test.

    Args:
        a: One number a cell.
        b: The other contender's numbers, in the same order of cells.
        sign: 1 if higher is better, -1 if lower is: differences come out positive where ``a`` is better.
        test_train_ratio: See :func:`corrected_variance`.
        level: Of the intervals.
        resamples: Of the bootstrap, which is a percentile bootstrap of the mean difference, stretched by the same
            correction.

    Raises:
        ValueError: If the two differ in length.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"a and b must pair up, got {len(first)} and {len(second)} cells")
    with np.errstate(invalid="ignore"):
        differences = _finite(sign * (first - second))
    count = len(differences)
    if count == 0:
        return Comparison(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(differences.mean())
    if count < 2:
        return Comparison(mean, -math.inf, math.inf, -math.inf, math.inf, math.nan, 1)
    variance = corrected_variance(differences, test_train_ratio)
    if variance == 0:
        p = 1.0 if mean == 0 else 0.0
        return Comparison(mean, mean, mean, mean, mean, p, count)
    error = math.sqrt(variance)
    half = _quantile(level, count) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    drawn = np.random.default_rng(0).choice(differences, size=(resamples, count)).mean(axis=1)
    stretch = math.sqrt(1 + test_train_ratio * count)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Comparison(
        difference=mean,
        low=mean - half,
        high=mean + half,
        bootstrap_low=mean + stretch * (float(low) - mean),
        bootstrap_high=mean + stretch * (float(high) - mean),
        p=p,
        cells=count,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down method; NaN stays NaN and does not count."""
    order = [index for index in np.argsort(p_values) if not math.isnan(p_values[index])]
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(comparison: Comparison, margin: float = 0.0) -> str:
    """Judge a claimed difference.

    Returns:
        ``"confirmed"`` if the interval lies wholly above the margin, ``"refuted"`` if wholly below zero (or below
        a negative margin), else ``"inconclusive"``.
    """
    if comparison.low > margin:
        return "confirmed"
    if comparison.high < min(0.0, margin):
        return "refuted"
    return "inconclusive"


def average_ranks(scores: Mapping[str, Sequence[float]], *, sign: int = 1) -> dict[str, float]:
    """Rank the contenders in each cell (1 is best, ties share) and average over cells."""
    names = list(scores)
    table = -sign * np.array([scores[name] for name in names], dtype=float)
    table = np.where(np.isnan(table), np.inf, table)
    return dict(zip(names, stats.rankdata(table, axis=0).mean(axis=1).tolist(), strict=True))


def critical_difference(contenders: int, cells: int, *, level: float = 0.95) -> float:
    r"""Return Nemenyi's critical difference of average ranks, :math:`q \sqrt{k(k+1)/(6n)}`.

    Cells of one data set are not independent, so in a comparison on one table this is a description, not a test.

    Source:
        Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7 (2006).
    """
    q = stats.studentized_range.ppf(level, contenders, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(contenders * (contenders + 1) / (6 * cells)))


def _quantile(level: float, count: int) -> float:
    return float(stats.t.ppf((1 + level) / 2, count - 1))


def _finite(values: Sequence[float] | Vector) -> Vector:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]
