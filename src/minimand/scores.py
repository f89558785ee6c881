r"""How good probabilities are: calibration errors and Brier scores of predictions on held-out data.

A prediction has a confidence :math:`c_i`, the probability of the predicted class, and is right or wrong,
:math:`k_i \in \{0, 1\}`. Confidence is calibrated if :math:`P(k = 1 | c) = c`. All functions compute on the device
of their input, in double precision where the device has it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from . import checks

__all__ = [
    "adaptive_calibration_error",
    "brier_score",
    "expected_calibration_error",
    "ks_error",
    "narrow_wrong_confidence",
    "narrowly_wrong",
]


def expected_calibration_error(
    confidence: Float[Tensor, " batch"], correct: Bool[Tensor, " batch"] | Num[Tensor, " batch"], *, num_bins: int = 15
) -> Float[Tensor, ""]:
    r"""Compute the expected calibration error, :math:`\sum_b \frac{n_b}{n} |\bar c_b - \bar k_b|` over equal bins.

    Args:
        confidence: Probabilities of the predicted classes, in [0, 1].
        correct: Whether each prediction is right: booleans, or 0 and 1.
        num_bins: Bins of equal width, ``(low, high]``, the first closed; 15 as in Guo et al. 2017.

    Returns:
        The error, between 0 and 1.

    Raises:
        ValueError: If the shapes differ, the batch is empty, or a confidence is no probability.

    Example:
        >>> expected_calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False]))
        tensor(0.2500)

    Source:
        Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., ICML 2017, arXiv 1706.04599, eq. 3.
    """
    c, k = _checked(confidence, correct)
    _check_bins(num_bins)
    inner = torch.linspace(0, 1, num_bins + 1, dtype=c.dtype, device=c.device)[1:-1]
    return _binned_gap(c, k, torch.bucketize(c, inner), num_bins).to(_result_dtype(confidence))


def adaptive_calibration_error(
    confidence: Float[Tensor, " batch"], correct: Bool[Tensor, " batch"] | Num[Tensor, " batch"], *, num_bins: int = 15
) -> Float[Tensor, ""]:
    """Compute the calibration error over bins that hold the same number of examples each, give or take one.

    Examples of equal confidence share their mean accuracy, so that their order does not matter.

    Args:
        confidence: Probabilities of the predicted classes, in [0, 1].
        correct: Whether each prediction is right: booleans, or 0 and 1.
        num_bins: Number of bins; at most one bin an example is used.

    Returns:
        The error, between 0 and 1.

    Raises:
        ValueError: If the shapes differ, the batch is empty, or a confidence is no probability.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 1, 1, 0])
        >>> adaptive_calibration_error(confidence, correct, num_bins=2)  # |.65 - .5| / 2 + |.85 - 1| / 2
        tensor(0.1500)

    Source:
        Nguyen and O'Connor, EMNLP 2015, arXiv 1508.05154.
    """
    c, k = _sorted_with_ties(*_checked(confidence, correct))
    _check_bins(num_bins)
    bins = min(num_bins, len(c))
    index = torch.arange(len(c), device=c.device) * bins // len(c)
    return _binned_gap(c, k, index, bins).to(_result_dtype(confidence))


def ks_error(
    confidence: Float[Tensor, " batch"], correct: Bool[Tensor, " batch"] | Num[Tensor, " batch"]
) -> Float[Tensor, ""]:
    r"""Compute the Kolmogorov-Smirnov calibration error, :math:`\max_t |\frac1n \sum_{c_i \le t} (c_i - k_i)|`.

    It needs no bins: the largest gap between cumulative confidence and cumulative accuracy.

    Args:
        confidence: Probabilities of the predicted classes, in [0, 1].
        correct: Whether each prediction is right: booleans, or 0 and 1.

    Returns:
        The error, between 0 and 1.

    Raises:
        ValueError: If the shapes differ, the batch is empty, or a confidence is no probability.

    Example:
        >>> ks_error(torch.tensor([0.6, 0.8]), torch.tensor([True, False]))  # max(|-.4|, |-.4 + .8|) / 2
        tensor(0.2000)

    Source:
        Gupta et al., ICLR 2021, arXiv 2006.12800.
    """
    c, k = _sorted_with_ties(*_checked(confidence, correct))
    # Within a tie the sum is linear, so its largest size is found at the ends, as the definition wants.
    return ((c - k).cumsum(0).abs().max() / len(c)).to(_result_dtype(confidence))


def brier_score(probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    r"""Compute the Brier score, :math:`\frac1n \sum_i \sum_k (p_{ik} - [k = y_i])^2`, between 0 and 2.

    Args:
        probabilities: ``(batch, classes)``.
        target: Class indices ``(batch,)``.

    Returns:
        The score; 0 is perfect, 2 is certain of a wrong class every time.

    Raises:
        ValueError: If the shapes do not fit, the batch is empty, or a probability is none.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor(0.5000)

    Source:
        Brier 1950, in its original form for several classes.
    """
    _check_probabilities(probabilities, target)
    gaps = probabilities.to(_working_dtype(probabilities), copy=True)
    gaps[torch.arange(len(gaps), device=gaps.device), target] -= 1
    return gaps.square().sum(1).mean().to(_result_dtype(probabilities))


def narrowly_wrong(
    probabilities: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], *, low: float = 0.3
) -> Bool[Tensor, " batch"]:
    """Tell which examples are wrong though their true class has a probability above ``low``.

    Args:
        probabilities: ``(batch, classes)``.
        target: Class indices ``(batch,)``.
        low: Probability above which the true class was nearly chosen; 0.3 is this library's choice.

    Returns:
        Booleans ``(batch,)``.

    Raises:
        ValueError: If the shapes do not fit, the batch is empty, or a probability is none.

    Example:
        >>> narrowly_wrong(torch.tensor([[0.55, 0.45], [0.9, 0.1]]), torch.tensor([1, 1]))
        tensor([ True, False])

    Source:
        Liu et al. 2024, arXiv 2404.13016, who name the narrow misclassification.
    """
    _check_probabilities(probabilities, target)
    checks.between(low, "low", 0.0, 0.5, high_open=True)
    true = probabilities.gather(1, target[:, None])[:, 0]
    return (probabilities.argmax(1) != target) & (true > low)


def narrow_wrong_confidence(
    probabilities: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    *,
    low: float = 0.3,
    reference: Float[Tensor, "batch classes"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the mean confidence on narrowly wrong examples: what a calibrator should lower.

    Args:
        probabilities: ``(batch, classes)``.
        target: Class indices ``(batch,)``.
        low: See :func:`narrowly_wrong`.
        reference: Probabilities that decide which examples are narrowly wrong, such as the uncalibrated ones, so
            that calibrators are compared on the same examples. None: ``probabilities`` themselves.

    Returns:
        The mean confidence.

    Raises:
        ValueError: If no example is narrowly wrong, the shapes do not fit, or a probability is none.

    Example:
        >>> narrow_wrong_confidence(torch.tensor([[0.55, 0.45], [0.9, 0.1]]), torch.tensor([1, 0]))
        tensor(0.5500)

    Source:
        Liu et al. 2024, arXiv 2404.13016; the number is this library's.
    """
    _check_probabilities(probabilities, target)
    chosen = narrowly_wrong(probabilities if reference is None else reference, target, low=low)
    if not bool(chosen.any()):
        raise ValueError(f"no example is wrong with a probability above low={low} for its true class")
    return probabilities.amax(1)[chosen].to(_working_dtype(probabilities)).mean().to(_result_dtype(probabilities))


def _working_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _result_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _checked(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    checks.floating(confidence, "confidence")
    checks.tensor(correct, "correct")
    if confidence.dim() != 1 or correct.shape != confidence.shape:
        raise ValueError(
            f"confidence and correct must have the same shape (batch,), "
            f"got {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    checks.not_empty(confidence, "confidence")
    c = confidence.detach().to(_working_dtype(confidence))
    k = correct.detach().to(c)
    # Rounding in low precision may carry a probability a hair above 1.
    slack = torch.finfo(confidence.dtype).eps
    checks.require(
        (c >= 0) & (c <= 1 + slack),
        lambda: f"confidence must lie in [0, 1], got values from {float(c.min())} to {float(c.max())}",
    )
    checks.require((k == 0) | (k == 1), lambda: "correct must hold booleans, or 0 and 1")
    return c.clamp_max(1), k


def _check_probabilities(probabilities: Tensor, target: Tensor) -> None:
    checks.floating(probabilities, "probabilities")
    checks.tensor(target, "target")
    if probabilities.dim() != 2 or tuple(target.shape) != tuple(probabilities.shape[:1]):
        raise ValueError(
            f"probabilities must have shape (batch, classes) and target (batch,), "
            f"got {tuple(probabilities.shape)} and {tuple(target.shape)}"
        )
    checks.not_empty(probabilities, "probabilities")
    slack = 4 * torch.finfo(probabilities.dtype).eps
    checks.require(
        (probabilities >= -slack) & (probabilities <= 1 + slack),
        lambda: (
            f"probabilities must lie in [0, 1], got values from {float(probabilities.min())} "
            f"to {float(probabilities.max())}"
        ),
    )
    classes = probabilities.shape[1]
    checks.require(
        (target >= 0) & (target < classes),
        lambda: (
            f"target must hold class indices in [0, {classes - 1}], "
            f"got values from {int(target.min())} to {int(target.max())}"
        ),
    )


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")


def _binned_gap(c: Tensor, k: Tensor, index: Tensor, bins: int) -> Tensor:
    """Sum over bins the size of the bin's total confidence less its number of right predictions."""
    return c.new_zeros(bins).index_add_(0, index, c - k).abs().sum() / len(c)


def _sorted_with_ties(c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by confidence; examples of equal confidence get their mean accuracy."""
    values, group, counts = torch.unique(c, sorted=True, return_inverse=True, return_counts=True)
    accuracy = torch.zeros_like(values).index_add_(0, group, k) / counts
    return values.repeat_interleave(counts), accuracy.repeat_interleave(counts)
