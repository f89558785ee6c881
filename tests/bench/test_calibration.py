"""Reading logits, splitting them, and measuring calibrators on them."""

import functools
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from minimand.bench import Run
from minimand.bench.calibration import (
    Calibrate,
    CalibrateByFeatures,
    CalibrationData,
    LabelledLogits,
    LogitSplits,
    calibrate_study,
    digits_under_shift,
    measure,
    own_features,
    read_logits,
)
from minimand.losses import CorrectnessAwareLoss, TemperatureScaling
from minimand.scores import expected_calibration_error


def arrays(rows=200, classes=4, seed=0):
    random = np.random.default_rng(seed)
    logits = 3 * random.normal(size=(rows, classes))
    target = (logits + 2 * random.normal(size=logits.shape)).argmax(1)
    return {"logits": logits, "target": target}


@pytest.fixture
def save(tmp_path):
    def write(name="logits.npz", **content):
        path = tmp_path / name
        np.savez(path, **content)
        return str(path)

    return write


def softmax(logits):
    return torch.softmax(torch.from_numpy(logits), 1).numpy()


def test_logits_and_target_come_back_as_they_are(save):
    content = arrays()
    file = read_logits(save(**content))
    np.testing.assert_array_equal(file.main.logits.numpy(), content["logits"])
    np.testing.assert_array_equal(file.main.target.numpy(), content["target"])
    assert file.own_features
    assert file.shifted is None
    torch.testing.assert_close(file.main.features, own_features(file.main.logits))


def test_features_and_shifted_data_are_read(save):
    content, shifted = arrays(), arrays(rows=50, seed=1)
    features, shifted_features = np.ones((200, 3)), np.zeros((50, 3))
    file = read_logits(
        save(
            **content,
            features=features,
            shifted_logits=shifted["logits"],
            shifted_target=shifted["target"],
            shifted_features=shifted_features,
        )
    )
    np.testing.assert_array_equal(file.main.features.numpy(), features)
    np.testing.assert_array_equal(file.shifted.logits.numpy(), shifted["logits"])
    np.testing.assert_array_equal(file.shifted.features.numpy(), shifted_features)
    assert not file.own_features


def test_probabilities_are_taken_as_their_logarithm_and_that_is_said(save):
    content = arrays()
    path = save(logits=softmax(content["logits"]).astype(np.float32), target=content["target"])
    file = read_logits(path)
    assert file.from_probabilities
    np.testing.assert_allclose(softmax(file.main.logits.numpy()), softmax(content["logits"]), atol=1e-6)
    assert "probabilities, not logits" in calibrate_study(path).notes


def test_a_probability_of_zero_has_a_finite_logarithm(save):
    content = arrays()
    hard = np.eye(4)[content["target"]]
    assert torch.isfinite(read_logits(save(logits=hard, target=content["target"])).main.logits).all()


GOOD = arrays()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scores": GOOD["logits"], "y": GOOD["target"]}, "'logits' and 'target', it holds 'scores', 'y'"),
        ({"logits": GOOD["logits"]}, "it holds 'logits'"),
        ({**GOOD, "logits": GOOD["logits"][:, 0]}, "stack zeros"),
        ({**GOOD, "logits": GOOD["logits"][:, :1]}, "at least 2 classes"),
        ({**GOOD, "target": GOOD["target"][:-1]}, "one class index a row"),
        ({**GOOD, "target": np.eye(4)[GOOD["target"]]}, "one class index a row"),
        ({**GOOD, "target": GOOD["target"] + 1}, "class indices from 0 to 3, got values from 1 to 4"),
        ({**GOOD, "target": GOOD["target"] - 1}, "class indices from 0 to 3"),
        ({**GOOD, "target": GOOD["target"] + 0.5}, "fractions such as"),
        ({**GOOD, "target": np.array(["a"] * 200)}, "target must hold numbers"),
        ({**GOOD, "logits": np.where(GOOD["logits"] > 2, np.nan, GOOD["logits"])}, "NaN or infinite"),
        ({**GOOD, "logits": GOOD["logits"] + 1j}, "logits must hold numbers"),
        ({**GOOD, "target": np.zeros(200, dtype=int)}, "one class only, 0"),
        ({"logits": GOOD["logits"][:10], "target": GOOD["target"][:10]}, "10 rows, at least 20"),
        ({"logits": GOOD["logits"][:0], "target": GOOD["target"][:0]}, "no rows"),
        ({**GOOD, "features": np.ones((3, 2))}, r"features must have shape \(200, features\)"),
        ({**GOOD, "features": np.full((200, 2), np.inf)}, "features holds 400 values"),
        ({**GOOD, "shifted_logits": GOOD["logits"]}, "'shifted_logits' but no 'shifted_target'"),
        ({**GOOD, "shifted_target": GOOD["target"]}, "'shifted_target' but no 'shifted_logits'"),
        (
            {**GOOD, "shifted_logits": GOOD["logits"][:, :3], "shifted_target": GOOD["target"] % 3},
            "logits score 4 classes and shifted_logits 3",
        ),
        (
            {**GOOD, "features": np.ones((200, 2)), "shifted_logits": GOOD["logits"], "shifted_target": GOOD["target"]},
            "'features' but no 'shifted_features'",
        ),
        ({**GOOD, "target": np.array([{}] * 200)}, "pickled objects"),
    ],
)
def test_unusable_arrays_are_refused_in_one_sentence(save, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_logits(save(**content))
    assert "\n" not in str(error.value)


def test_unusable_files_are_refused_in_one_sentence(tmp_path, save):
    text = tmp_path / "logits.csv"
    text.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not an NPZ file"):
        read_logits(text)
    with pytest.raises(ValueError, match="there is no file"):
        read_logits(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="is a folder"):
        read_logits(tmp_path)
    whole = save(**GOOD)
    damaged = tmp_path / "damaged.npz"
    content = bytearray(pathlib.Path(whole).read_bytes())
    content[200:260] = bytes(60)
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.npz"):
        read_logits(damaged)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_test_fraction_outside_its_range_is_refused(save, fraction):
    with pytest.raises(ValueError, match="--test-fraction must lie between 0 and 1"):
        calibrate_study(save(**GOOD), test_fraction=fraction)


def test_a_split_too_small_to_fit_or_test_is_refused(save):
    with pytest.raises(ValueError, match="leaves 198 rows to fit and 2 to test"):
        calibrate_study(save(**GOOD), test_fraction=0.01)


def test_splits_share_no_row_cover_all_and_follow_the_seed(save):
    problem = LogitSplits(save(**GOOD), 0.25)
    data = problem(None, 3)
    fitted, tested = data.calibration.logits[:, 0].tolist(), data.tests[""].logits[:, 0].tolist()
    assert len(tested) == 50
    assert sorted(fitted + tested) == sorted(GOOD["logits"][:, 0].tolist())
    again, other = problem(None, 3), problem(None, 4)
    assert torch.equal(again.calibration.logits, data.calibration.logits)
    assert not torch.equal(other.calibration.logits, data.calibration.logits)


def test_a_file_written_anew_is_read_anew(save):
    path = save(**GOOD)
    before = LogitSplits(path, 0.5)(None, 0)
    save(**arrays(seed=7))
    assert not torch.equal(LogitSplits(path, 0.5)(None, 0).calibration.logits, before.calibration.logits)


def test_every_contender_reports_every_metric_of_the_study(save):
    shifted = arrays(rows=100, seed=2)
    study = calibrate_study(save(**GOOD, shifted_logits=shifted["logits"], shifted_target=shifted["target"]))
    assert next(iter(study.contenders)) == "uncalibrated"
    data = study.problem(None, 0)
    found = {name: contender(data, Run(0)).metrics for name, contender in study.contenders.items()}
    for numbers in found.values():
        assert {metric.name for metric in study.metrics} <= set(numbers)
        assert np.isfinite(list(numbers.values())).all()
    for name in ("temperature scaling", "CA unweighted", "CA balanced"):
        assert found[name]["accuracy"] == found["uncalibrated"]["accuracy"]


def test_metrics_are_those_of_the_calibrated_probabilities():
    logits, target = torch.from_numpy(GOOD["logits"]), torch.from_numpy(GOOD["target"])
    test = LabelledLogits(logits, target, own_features(logits))
    numbers = measure(CalibrationData(test, {"": test, "again": test}), lambda one: torch.softmax(one.logits / 2, 1))
    confidence, predicted = torch.softmax(logits / 2, 1).max(1)
    error = expected_calibration_error(confidence, predicted == target)
    assert numbers["calibration error"] == numbers["calibration error, again"] == pytest.approx(error.item())
    right = predicted == target
    pairs = confidence[right][:, None] - confidence[~right]
    auroc = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
    assert numbers["AUROC"] == pytest.approx(auroc)
    before = torch.softmax(logits, 1)
    narrow = ~right & (before.gather(1, target[:, None])[:, 0] > 0.3)
    assert numbers["narrow-wrong confidence"] == pytest.approx(confidence[narrow].mean().item())


def test_numbers_that_do_not_exist_are_left_out():
    target = torch.arange(4).repeat(5)
    logits = 5 * torch.eye(4, dtype=torch.float64)[target]
    test = LabelledLogits(logits, target, own_features(logits))
    numbers = measure(CalibrationData(test, {"": test}), lambda one: torch.softmax(one.logits, 1))
    assert numbers["accuracy"] == 1
    assert "AUROC" not in numbers
    assert "narrow-wrong confidence" not in numbers


def test_temperature_scaling_lowers_the_log_loss_of_overconfident_logits(save):
    sharp = {**GOOD, "logits": 5 * GOOD["logits"]}
    data = LogitSplits(save(**sharp), 0.5)(None, 0)
    before, after = Calibrate()(data, Run(0)).metrics, Calibrate(TemperatureScaling)(data, Run(0)).metrics
    assert after["log loss"] < before["log loss"] / 2
    assert after["accuracy"] == before["accuracy"]


def test_features_that_know_the_wrong_examples_are_used(save):
    # A feature that tells right from wrong makes confidence tell them apart too.
    logits, target = torch.from_numpy(GOOD["logits"]), torch.from_numpy(GOOD["target"])
    right = (logits.argmax(1) == target).double()[:, None]
    test = LabelledLogits(logits, target, right)
    data = CalibrationData(test, {"": test})
    make_loss = functools.partial(CorrectnessAwareLoss, True)
    knowing = CalibrateByFeatures(make_loss, steps=150)(data, Run(0)).metrics
    blind = CalibrateByFeatures(make_loss, "none", steps=150)(data, Run(0)).metrics
    assert knowing["separation"] > blind["separation"] + 0.3
    assert knowing["AUROC"] > 0.95


def test_one_temperature_trained_with_cross_entropy_is_temperature_scaling():
    logits, target = torch.from_numpy(GOOD["logits"]), torch.from_numpy(GOOD["target"])
    test = LabelledLogits(logits, target, own_features(logits))
    data = CalibrationData(test, {"": test})
    trained = CalibrateByFeatures(nn.CrossEntropyLoss, "none", steps=300)(data, Run(0)).metrics
    exact = Calibrate(TemperatureScaling)(data, Run(0)).metrics
    assert trained["log loss"] == pytest.approx(exact["log loss"], abs=1e-4)


def test_built_in_digits_are_the_same_for_the_same_seed_and_harder_when_shifted():
    first = digits_under_shift(0)
    digits_under_shift.cache_clear()
    second = digits_under_shift(0)
    assert all(torch.equal(first[name].logits, second[name].logits) for name in first)

    def accuracy(data):
        return (data.logits.argmax(1) == data.target).double().mean().item()

    assert accuracy(first["digits"]) > 0.8
    assert max(accuracy(first[name]) for name in first if name not in ("calibration", "digits")) < 0.6
    assert {data.features.shape[1] for data in first.values()} == {12}


def test_the_built_in_study_has_shifted_metrics_and_says_what_its_data_are():
    study = calibrate_study()
    assert "digits" in study.data
    assert study.metrics[0].name == "calibration error"
    assert any(metric.name == "calibration error, shifted" for metric in study.metrics)
    assert study.test_train_ratio == 1.0
