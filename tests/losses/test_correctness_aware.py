"""The correctness-aware loss, temperature network and calibrator against their mathematics (Liu et al. 2024)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import minimize_scalar
from torch import nn

from minimand.losses import (
    AdaptiveTemperature,
    CACalibrator,
    CorrectnessAwareLoss,
    TemperatureScaling,
    TransformConsistencyFeatures,
    consistency_features,
    correctness_aware_loss,
)

F64 = torch.float64


def batch(rows=200, classes=6, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    signal = logits + 2 * torch.randn(rows, classes, generator=generator, dtype=F64)
    return logits, signal.argmax(1)


def two_class_batch(gap, right, wrong):
    """``right + wrong`` examples with the logits ``(gap, 0)``, of which ``right`` are of class 0."""
    logits = torch.tensor([[gap, 0.0]], dtype=F64).repeat(right + wrong, 1)
    return logits, torch.tensor([0] * right + [1] * wrong)


def best_log_temperature(loss, logits, target, bounds=(-4.0, 6.0)):
    def value(log_t):
        return float(loss(logits, target, temperature=math.exp(log_t)))

    return minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x


def confidences(logits, temperature):
    return torch.softmax(logits / temperature, 1).gather(1, logits.argmax(1, keepdim=True))[:, 0]


@pytest.mark.parametrize(("right", "wrong"), [(7, 3), (19, 1), (6, 5)])
@pytest.mark.parametrize("gap", [0.5, 4.0])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_best_shared_temperature_makes_confidence_the_accuracy(right, wrong, gap, kind):
    logits, target = two_class_batch(gap, right, wrong)
    loss = CorrectnessAwareLoss(loss=kind)
    temperature = math.exp(best_log_temperature(loss, logits, target))
    assert confidences(logits, temperature)[0].item() == pytest.approx(right / (right + wrong), abs=1e-6)


@pytest.mark.parametrize(("right", "wrong"), [(7, 3), (19, 1)])
def test_best_balanced_temperature_grows_without_limit_and_makes_confidence_one_half(right, wrong):
    logits, target = two_class_batch(2.0, right, wrong)
    values = [
        correctness_aware_loss(logits, target, temperature=t, balanced=True).item() for t in (1.0, 3.0, 10.0, 1e5)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.25, abs=1e-8)
    temperature = math.exp(best_log_temperature(CorrectnessAwareLoss(True), logits, target, bounds=(-2.0, 2.0)))
    assert temperature == pytest.approx(math.exp(2.0), rel=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_optimal_confidence_of_a_group_is_its_accuracy_reweighted(power):
    # Two groups share the batch; the second one's confidence is at its floor, the first one's is free.
    logits, target = two_class_batch(2.0, 9, 1)
    other, other_target = two_class_batch(0.0, 5, 5)
    both, labels = torch.cat([logits, other]), torch.cat([target, other_target])
    accuracy, q = 14 / 20, 0.9
    right, wrong = (1 - accuracy) ** power * q, accuracy**power * (1 - q)
    temperature = math.exp(best_log_temperature(CorrectnessAwareLoss(power), both, labels))
    assert confidences(logits, temperature)[0].item() == pytest.approx(right / (right + wrong), abs=1e-6)


def test_slopes_in_the_inverse_temperature_are_the_derived_ones():
    logits, target = batch()
    s = torch.tensor(0.7, dtype=F64)
    predicted = logits.argmax(1, keepdim=True)
    p = torch.softmax(s * logits, 1)
    mean = (p * logits).sum(1)
    chosen, own = logits.gather(1, predicted)[:, 0], logits.gather(1, target[:, None])[:, 0]

    ce = torch.func.jacfwd(lambda s: F.cross_entropy(s * logits, target, reduction="none"))(s)
    torch.testing.assert_close(ce, mean - own, rtol=0, atol=1e-10)
    confidence = p.gather(1, predicted)[:, 0]
    slope = confidence * (chosen - mean)
    torch.testing.assert_close(
        torch.func.jacfwd(lambda s: torch.softmax(s * logits, 1).gather(1, predicted)[:, 0])(s),
        slope,
        rtol=0,
        atol=1e-10,
    )
    assert (slope >= 0).all()
    right = (predicted[:, 0] == target).to(F64)
    ca = torch.func.jacfwd(lambda s: correctness_aware_loss(s * logits, target, reduction="none"))(s)
    torch.testing.assert_close(ca, 2 * (confidence - right) * slope, rtol=0, atol=1e-10)


def test_a_narrowly_wrong_example_is_sharpened_by_cross_entropy_and_softened_here():
    logits = torch.tensor([[0.45, 0.40, 0.15]], dtype=F64).log()
    target = torch.tensor([1])
    s = torch.tensor(1.0, dtype=F64)
    assert torch.func.grad(lambda s: F.cross_entropy(s * logits, target))(s) < 0
    for kind in ("mse", "bce"):
        assert torch.func.grad(lambda s, kind=kind: correctness_aware_loss(s * logits, target, loss=kind))(s) > 0


@given(
    arrays.arrays(np.float64, (12, 5), elements=st.floats(-30, 30)),
    st.floats(0.05, 50.0),
    st.lists(st.integers(0, 4), min_size=12, max_size=12),
)
def test_a_temperature_keeps_predictions_and_the_loss_above_its_floor(scores, temperature, labels):
    logits, target = torch.from_numpy(scores), torch.tensor(labels)
    probabilities = torch.softmax(logits / temperature, 1)
    predicted = logits.argmax(1)
    confidence = probabilities.gather(1, predicted[:, None])[:, 0]
    assert (confidence >= probabilities.amax(1) - 1e-12).all()
    assert ((confidence >= 1 / 5 - 1e-12) & (confidence <= 1 + 1e-12)).all()
    wrong = (predicted != target).double().mean()
    assert correctness_aware_loss(logits, target, temperature=temperature) >= wrong / 5**2 - 1e-12


def test_the_floor_is_reached_by_uniform_confidence_on_wrong_examples():
    logits = torch.tensor([[1e-9, 0.0, 0.0]], dtype=F64)
    assert correctness_aware_loss(logits, torch.tensor([1])).item() == pytest.approx(1 / 9, abs=1e-8)


@pytest.mark.parametrize("classes", [6, 50])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_the_loss_is_the_plain_score_of_confidence_against_correctness(kind, classes):
    logits, target = batch(classes=classes)
    confidence, right = confidences(logits, 1.7), (logits.argmax(1) == target).to(F64)
    score = F.mse_loss if kind == "mse" else F.binary_cross_entropy
    loss = correctness_aware_loss(logits, target, temperature=1.7, loss=kind)
    torch.testing.assert_close(loss, score(confidence, right), rtol=0, atol=1e-12)


def test_balanced_weights_give_right_and_wrong_the_same_total_weight():
    logits, target = batch()
    each = correctness_aware_loss(logits, target, reduction="none")
    right = logits.argmax(1) == target
    assert 0 < right.sum() < len(right)
    expected = (each[right].mean() + each[~right].mean()) / 2
    torch.testing.assert_close(correctness_aware_loss(logits, target, balanced=True), expected, rtol=0, atol=1e-12)
    per_example = correctness_aware_loss(logits, target, balanced=True, reduction="none")
    torch.testing.assert_close(per_example.mean(), expected, rtol=0, atol=1e-12)


def test_power_between_interpolates_the_weights_geometrically():
    logits, target = batch()
    each = correctness_aware_loss(logits, target, reduction="none")
    right = logits.argmax(1) == target
    accuracy = right.double().mean()
    omega = torch.where(right, (1 - accuracy) ** 0.5, accuracy**0.5)
    expected = (omega * each).sum() / omega.sum()
    torch.testing.assert_close(correctness_aware_loss(logits, target, balanced=0.5), expected, rtol=0, atol=1e-12)
    assert torch.equal(correctness_aware_loss(logits, target, balanced=0.0), correctness_aware_loss(logits, target))


def test_balance_ignores_ignored_examples_and_counts_class_weights():
    logits, target = batch(rows=40)
    kept = torch.arange(40) % 3 != 0
    masked = torch.where(kept, target, -100)
    expected = correctness_aware_loss(logits[kept], target[kept], balanced=True)
    torch.testing.assert_close(correctness_aware_loss(logits, masked, balanced=True), expected, rtol=0, atol=1e-12)
    weight = torch.linspace(0.5, 2.0, 6, dtype=F64)
    each, mass = correctness_aware_loss(logits, target, reduction="none"), weight[target]
    right = logits.argmax(1) == target
    expected = sum((mass * each)[part].sum() / mass[part].sum() for part in (right, ~right)) / 2
    torch.testing.assert_close(
        correctness_aware_loss(logits, target, balanced=True, weight=weight), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("all_right", [True, False])
@pytest.mark.parametrize("power", [0.5, True])
def test_a_one_sided_batch_weighs_every_example_one(all_right, power):
    logits, _ = batch(rows=8)
    target = logits.argmax(1) if all_right else logits.argmin(1)
    logits.requires_grad_()
    value = correctness_aware_loss(logits, target, balanced=power)
    torch.testing.assert_close(value, correctness_aware_loss(logits, target))
    value.backward()
    assert torch.isfinite(logits.grad).all()


def test_one_temperature_an_example_divides_its_own_row():
    logits, target = batch(rows=10)
    temperature = torch.linspace(0.3, 3, 10, dtype=F64)
    expected = correctness_aware_loss(logits / temperature[:, None], target)
    for shape in ((10,), (10, 1)):
        value = correctness_aware_loss(logits, target, temperature=temperature.reshape(shape))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)


def test_a_given_prediction_replaces_the_largest_logit():
    logits, target = batch(rows=10)
    predicted = logits.argmin(1)
    confidence = torch.softmax(logits, 1).amin(1)
    expected = (confidence - (predicted == target).to(F64)).square()
    value = correctness_aware_loss(logits, target, predicted=predicted, reduction="none")
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_log_gap_stays_exact_where_confidence_rounds_to_one():
    logits = torch.tensor([[80.0, 0.0]])
    wrong = correctness_aware_loss(logits, torch.tensor([1]), loss="bce")
    assert wrong.item() == pytest.approx(80.0)


def test_balanced_losses_say_that_their_examples_interact():
    assert CorrectnessAwareLoss(True).couples_batches
    assert not CorrectnessAwareLoss().couples_batches


def test_temperature_starts_where_asked_and_stays_in_its_range():
    network = AdaptiveTemperature(3, min_temperature=0.2, max_temperature=5.0, initial_temperature=1.5).double()
    features = torch.randn(50, 3, dtype=F64)
    torch.testing.assert_close(network(features), torch.full((50, 1), 1.5, dtype=F64))
    for offset, limit in ((-1e3, 0.2), (1e3, 5.0)):
        nn.init.constant_(network.output.bias, offset)
        torch.testing.assert_close(network(features), torch.full((50, 1), limit, dtype=F64))
    # Halfway between its limits, in the logarithm, at zero.
    nn.init.zeros_(network.output.bias)
    torch.testing.assert_close(network(features), torch.ones(50, 1, dtype=F64))


def test_temperature_has_a_gradient_from_the_first_step():
    logits, target = batch()
    network = AdaptiveTemperature(4).double()
    features = consistency_features(logits, [logits])
    correctness_aware_loss(logits, target, temperature=network(features)).backward()
    assert network.output.bias.grad.abs() > 1e-4
    assert (network.output.weight.grad != 0).any()


def test_permuting_transforms_with_the_first_layers_columns_leaves_the_temperature():
    generator = torch.Generator().manual_seed(0)
    logits, *others = (torch.randn(30, 7, generator=generator, dtype=F64) for _ in range(4))
    network = AdaptiveTemperature(12).double()
    nn.init.normal_(network.output.weight, generator=generator)
    expected = network(consistency_features(logits, others))
    order = [2, 0, 1]
    with torch.no_grad():
        network.input.weight.copy_(network.input.weight.reshape(5, 3, 4)[:, order].reshape(5, 12))
    torch.testing.assert_close(network(consistency_features(logits, [others[j] for j in order])), expected)
    assert not torch.allclose(network(consistency_features(logits, others)), expected)


def test_identity_transforms_repeat_the_examples_own_top_probabilities():
    model = nn.Linear(3, 6).double()
    inputs = torch.randn(20, 3, dtype=F64)
    logits, features = TransformConsistencyFeatures(model, [lambda x: x, lambda x: x.clone()], batch_size=7)(inputs)
    torch.testing.assert_close(logits, model(inputs))
    own = torch.softmax(logits, 1).topk(4, 1).values
    torch.testing.assert_close(features, torch.cat([own, own], 1))


def test_features_follow_the_originals_classes_not_the_transforms_own():
    original = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]], dtype=F64)
    features = consistency_features(original, [original.flip(1)], top=2)
    torch.testing.assert_close(features, torch.softmax(original, 1)[:, [4, 3]])


def test_fewer_classes_than_asked_are_all_kept():
    logits = torch.randn(5, 3)
    assert consistency_features(logits, [logits]).shape == (5, 3)


def test_the_model_is_evaluated_and_put_back_part_by_part():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model[2].eval()
    features = TransformConsistencyFeatures(model, [lambda x: x])
    first, second = features(torch.ones(4, 3)), features(torch.ones(4, 3))
    assert torch.equal(first[0], second[0])
    assert not first[0].requires_grad
    assert [part.training for part in model] == [True, True, False]
    assert model.training


def test_constant_features_trained_with_cross_entropy_give_temperature_scaling():
    logits, target = batch(rows=400)
    logits = 3 * logits
    calibrator = CACalibrator(loss=nn.CrossEntropyLoss(), batch_size=400, steps=300, lr=3e-2)
    features = torch.ones(400, 2, dtype=F64)
    calibrator.fit_features(logits, features, target)
    temperature = TemperatureScaling().fit(logits, target).temperature
    assert temperature > 2
    torch.testing.assert_close(
        calibrator.calibrate(logits, features), torch.softmax(logits / temperature, 1), rtol=0, atol=1e-4
    )


def test_the_calibrator_finds_each_groups_accuracy():
    # Two groups with the same logits: one is right nine times in ten, the other six times.
    first, first_target = two_class_batch(3.0, 90, 10)
    second, second_target = two_class_batch(3.0, 60, 40)
    logits, target = torch.cat([first, second]), torch.cat([first_target, second_target])
    features = torch.cat([torch.zeros(100, 1), torch.ones(100, 1)]).double()
    calibrator = CACalibrator(balanced=False, steps=400, lr=3e-2).fit_features(logits, features, target)
    probabilities = calibrator.calibrate(logits, features)
    assert probabilities[0, 0].item() == pytest.approx(0.9, abs=1e-3)
    assert probabilities[-1, 0].item() == pytest.approx(0.6, abs=1e-3)


def test_the_calibrator_never_changes_a_prediction_and_repeats_itself():
    model = nn.Linear(3, 6)
    inputs, target = torch.randn(300, 3), torch.randint(6, (300,))
    transforms = [lambda x: x.flip(1), lambda x: 0.5 * x]
    before = torch.random.get_rng_state()
    first = CACalibrator(model, transforms, steps=20).fit(inputs, target)
    second = CACalibrator(model, transforms, steps=20).fit(inputs, target)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first(inputs), second(inputs))
    assert torch.equal(first(inputs).argmax(1), model(inputs).argmax(1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_one_sided_calibration_set_is_called_out():
    logits, _ = batch(rows=20)
    with pytest.warns(UserWarning, match="every calibration example is right"):
        CACalibrator(steps=2).fit_features(logits, torch.ones(20, 1, dtype=F64), logits.argmax(1))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CorrectnessAwareLoss(1.5), ValueError, "balanced"),
        (lambda: CorrectnessAwareLoss(loss="hinge"), ValueError, "loss must be one of"),
        (lambda: AdaptiveTemperature(0), ValueError, "in_features"),
        (lambda: AdaptiveTemperature(3, min_temperature=0.0), ValueError, "min_temperature"),
        (lambda: AdaptiveTemperature(3, initial_temperature=10.0), ValueError, "initial_temperature"),
        (lambda: TransformConsistencyFeatures(nn.Identity(), []), ValueError, "transforms"),
        (lambda: CACalibrator(steps=0), ValueError, "steps"),
        (lambda: CACalibrator().fit(torch.zeros(2, 2), torch.tensor([0, 1])), ValueError, "model is required"),
        (lambda: CACalibrator().calibrate(torch.zeros(2, 2), torch.zeros(2, 1)), RuntimeError, "not fitted"),
        (lambda: consistency_features(torch.zeros(2, 2), []), ValueError, "transformed"),
        (lambda: consistency_features(torch.zeros(2, 2), [torch.zeros(3, 2)]), ValueError, "shape of logits"),
        (lambda: consistency_features(torch.zeros(2, 2), [torch.zeros(2, 2)], top=0), ValueError, "top"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.untyped
@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.tensor([1.0, 0.0, 1.0]), torch.ones(2)])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        correctness_aware_loss(torch.zeros(3, 2), torch.tensor([0, 1, 0]), temperature=temperature)


@pytest.mark.untyped
def test_features_of_another_width_or_length_are_refused():
    logits, target = batch(rows=20)
    calibrator = CACalibrator(steps=1).fit_features(logits, torch.ones(20, 3, dtype=F64), target)
    with pytest.raises(ValueError, match=r"features must have shape \(batch, 3\)"):
        calibrator.calibrate(logits, torch.ones(20, 4, dtype=F64))
    with pytest.raises(ValueError, match=r"features must have shape \(20, features\)"):
        calibrator.fit_features(logits, torch.ones(19, 3, dtype=F64), target)
    with pytest.raises(ValueError, match="features contains NaN"):
        calibrator.fit_features(logits, torch.full((20, 3), math.nan, dtype=F64), target)
    with pytest.raises(ValueError, match="target must hold class indices"):
        calibrator.fit_features(logits, torch.ones(20, 3, dtype=F64), target - 1)
