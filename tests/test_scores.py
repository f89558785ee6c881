"""Calibration errors and Brier scores against their definitions, torchmetrics and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss
from torchmetrics.classification import MulticlassCalibrationError

from minimand.scores import (
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    ks_error,
    narrow_wrong_confidence,
    narrowly_wrong,
)

F64 = torch.float64
ERRORS = (expected_calibration_error, adaptive_calibration_error, ks_error)


def predictions(rows=2000, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=F64)
    target = torch.multinomial(torch.softmax(logits / 2, 1), 1, generator=generator)[:, 0]
    return torch.softmax(logits, 1), target


def top(probabilities, target):
    confidence, predicted = probabilities.max(1)
    return confidence, predicted == target


@pytest.mark.parametrize("bins", [1, 10, 15, 25])
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_calibration_error_is_that_of_torchmetrics(bins, seed):
    probabilities, target = predictions(seed=seed)
    reference = MulticlassCalibrationError(5, n_bins=bins, norm="l1")(probabilities, target)
    error = expected_calibration_error(*top(probabilities, target), num_bins=bins)
    assert error.item() == pytest.approx(reference.item(), abs=1e-6)


@pytest.mark.parametrize("error", ERRORS)
def test_confidence_that_is_certain_and_right_or_zero_and_wrong_has_no_error(error):
    correct = torch.tensor([True, False, True, True, False])
    assert error(correct.to(F64), correct) == 0


@pytest.mark.parametrize("error", ERRORS)
def test_certain_and_always_wrong_is_the_worst(error):
    assert error(torch.ones(7), torch.zeros(7)) == 1


@pytest.mark.parametrize("error", ERRORS)
def test_a_tie_that_is_right_as_often_as_it_says_has_no_error(error):
    correct = torch.tensor([1, 0, 1, 1])
    assert error(torch.full((4,), 0.75, dtype=F64), correct) == 0


@pytest.mark.parametrize("error", ERRORS)
@given(st.permutations(range(12)))
def test_the_order_of_examples_does_not_matter(error, order):
    confidence = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5, 0.7, 0.7, 0.9, 0.9, 0.9, 1.0, 1.0], dtype=F64)
    correct = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    index = torch.tensor(order)
    shuffled = error(confidence[index], correct[index])
    assert shuffled.item() == pytest.approx(error(confidence, correct).item(), abs=1e-12)


def test_bins_are_closed_on_the_right():
    # 0.5 shares the bin (0, 0.5] with 0.4, so that the gaps of +0.5 and -0.6 partly cancel.
    error = expected_calibration_error(torch.tensor([0.5, 0.4], dtype=F64), torch.tensor([0, 1]), num_bins=2)
    assert error.item() == pytest.approx(0.05)


def test_adaptive_calibration_error_is_its_definition_over_equal_groups():
    probabilities, target = predictions(rows=1003)
    confidence, correct = top(probabilities, target)
    order = confidence.argsort().numpy()
    total = sum(
        abs(confidence.numpy()[part].mean() - correct.numpy()[part].mean()) * len(part)
        for part in np.array_split(order, 15)
    )
    # array_split puts the longer groups first; ours spreads them, so a few examples change group.
    assert adaptive_calibration_error(confidence, correct).item() == pytest.approx(total / 1003, abs=3e-3)
    even = slice(0, 990)
    order = confidence[even].argsort().numpy()
    total = sum(
        abs(confidence.numpy()[part].mean() - correct.numpy()[part].mean()) for part in np.array_split(order, 15)
    )
    error = adaptive_calibration_error(confidence[even], correct[even])
    assert error.item() == pytest.approx(total / 15, abs=1e-12)


def test_one_bin_of_any_kind_is_the_gap_of_the_means():
    confidence, correct = top(*predictions())
    gap = abs(confidence.mean() - correct.double().mean()).item()
    assert expected_calibration_error(confidence, correct, num_bins=1).item() == pytest.approx(gap, abs=1e-12)
    assert adaptive_calibration_error(confidence, correct, num_bins=1).item() == pytest.approx(gap, abs=1e-12)


def test_ks_error_is_the_largest_cumulative_gap_over_thresholds():
    confidence, correct = top(*predictions(rows=300))
    confidence = (20 * confidence).round() / 20  # many ties
    gaps = [(confidence - correct.double())[confidence <= t].sum().abs() / 300 for t in confidence.unique()]
    assert ks_error(confidence, correct).item() == pytest.approx(max(gaps).item(), abs=1e-12)


def test_binned_errors_lie_between_the_gap_of_the_means_and_one():
    confidence, correct = top(*predictions())
    gap = abs(confidence.mean() - correct.double().mean())
    for error in ERRORS:
        assert gap - 1e-12 <= error(confidence, correct) <= 1


def test_brier_score_is_that_of_scikit_learn():
    probabilities, target = predictions()
    reference = brier_score_loss(target.numpy(), probabilities.numpy(), scale_by_half=False, labels=range(5))
    assert brier_score(probabilities, target).item() == pytest.approx(reference, abs=1e-12)


def test_brier_score_ranges_from_zero_to_two_and_leaves_its_input_alone():
    probabilities = torch.eye(3)
    assert brier_score(probabilities, torch.tensor([0, 1, 2])) == 0
    assert brier_score(probabilities, torch.tensor([1, 2, 0])) == 2
    assert torch.equal(probabilities, torch.eye(3))


def test_narrowly_wrong_means_wrong_with_a_likely_true_class():
    probabilities = torch.tensor([[0.55, 0.45], [0.55, 0.45], [0.75, 0.25], [0.7, 0.3]], dtype=F64)
    target = torch.tensor([0, 1, 1, 1])
    assert narrowly_wrong(probabilities, target).tolist() == [False, True, False, False]
    assert narrowly_wrong(probabilities, target, low=0.2).tolist() == [False, True, True, True]
    assert narrow_wrong_confidence(probabilities, target, low=0.2).item() == pytest.approx(2.0 / 3)


def test_a_reference_decides_which_examples_are_narrowly_wrong():
    before = torch.tensor([[0.55, 0.45], [0.9, 0.1]], dtype=F64)
    after = torch.tensor([[0.51, 0.49], [0.6, 0.4]], dtype=F64)
    target = torch.tensor([1, 1])
    assert narrow_wrong_confidence(after, target, reference=before).item() == pytest.approx(0.51)
    assert narrow_wrong_confidence(after, target).item() == pytest.approx(0.555)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_summed_in_high(dtype):
    probabilities, target = predictions(rows=50_000)
    rough = probabilities.to(dtype)
    confidence, correct = top(rough, target)
    for error in ERRORS:
        assert error(confidence, correct).dtype == torch.float32
        assert error(confidence, correct).item() == pytest.approx(error(confidence.double(), correct).item(), abs=1e-6)


@pytest.mark.untyped
@pytest.mark.parametrize("error", ERRORS)
def test_bad_confidences_are_refused(error):
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\]"):
        error(torch.tensor([0.5, 1.5]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\]"):
        error(torch.tensor([0.5, math.nan]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="correct must hold"):
        error(torch.tensor([0.5, 0.5]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="the same shape"):
        error(torch.tensor([0.5, 0.5]), torch.tensor([0]))
    with pytest.raises(ValueError, match="confidence is empty"):
        error(torch.zeros(0), torch.zeros(0))


@pytest.mark.untyped
def test_bad_probabilities_and_settings_are_refused():
    target = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
        brier_score(torch.tensor([[2.0, -1.0], [0.5, 0.5]]), target)
    with pytest.raises(ValueError, match="target must hold class indices"):
        brier_score(torch.full((2, 2), 0.5), target + 1)
    with pytest.raises(ValueError, match="no example is wrong"):
        narrow_wrong_confidence(torch.eye(2), target)
    with pytest.raises(ValueError, match="num_bins"):
        expected_calibration_error(torch.ones(2), target, num_bins=0)
    with pytest.raises(ValueError, match="low"):
        narrowly_wrong(torch.eye(2), target, low=0.5)
