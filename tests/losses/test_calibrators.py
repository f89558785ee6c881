"""The rival calibrators against scipy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from minimand.losses import (
    EnsembleTemperatureScaling,
    IsotonicCalibration,
    TemperatureScaling,
    VectorScaling,
    calibrators,
)

F64 = torch.float64
ALL = (TemperatureScaling, VectorScaling, IsotonicCalibration, EnsembleTemperatureScaling)


def batch(rows=600, classes=5, scale=4.0, seed=0):
    """Over-confident logits of classes drawn from a flatter softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=F64)
    target = torch.multinomial(torch.softmax(logits / 3, 1), 1, generator=generator)[:, 0]
    return logits, target


def likelihood(logits, target, temperature):
    return float(F.cross_entropy(logits / temperature, target))


@pytest.mark.parametrize(("scale", "seed"), [(0.2, 0), (1.0, 1), (4.0, 2), (50.0, 3)])
def test_temperature_scaling_has_the_least_likelihood_that_scipy_finds(scale, seed):
    logits, target = batch(scale=4.0, seed=seed)
    logits = logits * scale / 4
    found = TemperatureScaling(max_temperature=1000.0).fit(logits, target).temperature
    best = minimize_scalar(
        lambda u: likelihood(logits, target, math.exp(u)), bounds=(-5, 7), method="bounded", options={"xatol": 1e-12}
    )
    assert likelihood(logits, target, found) <= best.fun + 1e-12
    assert math.log(found) == pytest.approx(best.x, abs=1e-6)


def test_temperature_scaling_is_stationary_to_machine_precision():
    logits, target = batch()
    temperature = TemperatureScaling().fit(logits, target).temperature
    p = torch.softmax(logits / temperature, 1)
    slope = ((p * logits).sum(1) - logits.gather(1, target[:, None])[:, 0]).mean()
    assert abs(slope.item()) < 1e-9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_newtons_method_needs_few_passes_over_the_data(monkeypatch, seed, dtype):
    passes = []
    counted = calibrators._slope_and_curvature
    monkeypatch.setattr(calibrators, "_slope_and_curvature", lambda *args: passes.append(1) or counted(*args))
    logits, target = batch(scale=1.0 + seed, seed=seed)
    TemperatureScaling().fit(logits.to(dtype), target)
    assert len(passes) <= 10


def test_temperature_scales_with_the_logits():
    logits, target = batch()
    one = TemperatureScaling().fit(logits, target).temperature
    assert TemperatureScaling().fit(7 * logits, target).temperature == pytest.approx(7 * one, rel=1e-9)


def test_temperature_scaling_in_low_precision_agrees_with_double():
    logits, target = batch()
    exact = TemperatureScaling().fit(logits, target).temperature
    assert TemperatureScaling().fit(logits.float(), target).temperature == pytest.approx(exact, rel=1e-5)
    assert TemperatureScaling().fit(logits.bfloat16(), target).temperature == pytest.approx(exact, rel=2e-2)


def test_temperature_scaling_survives_huge_logits():
    logits, target = batch()
    found = TemperatureScaling(max_temperature=1e6).fit(1e4 * logits.float(), target).temperature
    assert found == pytest.approx(1e4 * TemperatureScaling().fit(logits, target).temperature, rel=1e-4)


def test_a_temperature_at_its_limit_is_called_out():
    logits, _ = batch(rows=50)
    with pytest.warns(UserWarning, match=r"beyond temperature 0\.01"):
        assert TemperatureScaling().fit(logits, logits.argmax(1)).temperature == pytest.approx(0.01)
    with pytest.warns(UserWarning, match=r"beyond temperature 100\.0"):
        assert TemperatureScaling().fit(logits, logits.argmin(1)).temperature == pytest.approx(100.0)


def test_temperature_and_ensemble_scaling_keep_the_predictions():
    logits, target = batch()
    for make in (TemperatureScaling, EnsembleTemperatureScaling):
        assert torch.equal(make().fit(logits, target)(logits).argmax(1), logits.argmax(1))


def test_vector_scaling_satisfies_its_moment_conditions():
    # At the maximum likelihood, sum p_k = number of class k, and sum p_k z_k = sum over class k of z_k.
    logits, target = batch()
    calibrator = VectorScaling(weight_decay=0.0, max_iterations=1000).fit(logits, target)
    p, label = calibrator(logits), F.one_hot(target, 5)
    centred = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(p.mean(0), label.double().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close((p * centred).mean(0), (label * centred).mean(0), rtol=0, atol=1e-5)


def test_vector_scaling_of_two_classes_is_logistic_regression():
    logits, target = batch(classes=2)
    calibrator = VectorScaling(weight_decay=0.0, max_iterations=1000).fit(logits, target)
    gap = (logits[:, :1] - logits[:, 1:]).numpy()
    reference = LogisticRegression(C=np.inf, tol=1e-10).fit(gap, target.numpy()).predict_proba(gap)
    torch.testing.assert_close(calibrator(logits), torch.from_numpy(reference), rtol=0, atol=1e-4)


def test_vector_scaling_is_no_likelier_wrong_than_temperature_scaling():
    logits, target = batch()
    vector = VectorScaling(weight_decay=0.0).fit(logits, target)(logits)
    scalar = TemperatureScaling().fit(logits, target)(logits)
    assert F.nll_loss(vector.log(), target) <= F.nll_loss(scalar.log(), target) + 1e-9


class Softmax(ClassifierMixin, BaseEstimator):
    """Logits as a fitted scikit-learn classifier."""

    def fit(self, logits, labels):
        self.classes_ = np.unique(labels)
        return self

    def predict_proba(self, logits):
        return torch.softmax(torch.from_numpy(logits), 1).numpy()

    def predict(self, logits):
        return self.classes_[self.predict_proba(logits).argmax(1)]


@pytest.mark.parametrize("classes", [3, 6])
def test_isotonic_calibration_is_that_of_scikit_learn(classes):
    logits, target = batch(classes=classes)
    fresh, _ = batch(classes=classes, seed=9)
    fitted = FrozenEstimator(Softmax().fit(logits.numpy(), target.numpy()))
    reference = CalibratedClassifierCV(fitted, method="isotonic", ensemble=False)
    reference.fit(logits.numpy(), target.numpy())
    ours = IsotonicCalibration().fit(logits, target)
    expected = torch.from_numpy(reference.predict_proba(fresh.numpy()))
    torch.testing.assert_close(ours(fresh), expected, rtol=0, atol=1e-6)


def test_isotonic_maps_are_monotone_and_stay_in_range_beyond_the_data():
    logits, target = batch()
    calibrator = IsotonicCalibration().fit(logits, target)
    for places, heights in calibrator.maps:
        assert (heights.diff() >= 0).all()
        assert (places.diff() > 0).all()
    far = torch.tensor([[100.0, -100.0, 0.0, 0.0, 0.0]], dtype=F64)
    assert ((calibrator(far) >= 0) & (calibrator(far) <= 1)).all()


def test_isotonic_calibration_is_uniform_where_every_map_is_zero():
    calibrator = IsotonicCalibration()
    nothing = torch.zeros(1, dtype=F64)
    calibrator.maps = [(nothing, nothing)] * 4
    torch.testing.assert_close(calibrator(torch.randn(3, 4)), torch.full((3, 4), 0.25))


@pytest.mark.parametrize("seed", range(5))
def test_ensemble_weights_have_the_least_brier_score_that_scipy_finds(seed):
    logits, target = batch(seed=seed, scale=1.0 + seed)
    flipped = torch.rand(len(target), generator=torch.Generator().manual_seed(seed)) < 0.1 * seed
    target = torch.where(flipped, torch.randint(5, target.shape, generator=torch.Generator().manual_seed(1)), target)
    calibrator = EnsembleTemperatureScaling().fit(logits, target)
    label = F.one_hot(target, 5).numpy()
    temperature = TemperatureScaling().fit(logits, target).temperature
    assert calibrator.temperature == temperature
    scaled, plain = torch.softmax(logits / temperature, 1).numpy(), torch.softmax(logits, 1).numpy()

    def score(w):
        return ((w[0] * scaled + w[1] * plain + w[2] / 5 - label) ** 2).sum(1).mean()

    best = minimize(
        score, [0.4, 0.3, 0.3], method="SLSQP", bounds=[(0, 1)] * 3, tol=1e-14,
        constraints={"type": "eq", "fun": lambda w: sum(w) - 1},
    )  # fmt: skip
    assert sum(calibrator.weights) == pytest.approx(1, abs=1e-12)
    assert min(calibrator.weights) >= 0
    assert score(calibrator.weights) <= best.fun + 1e-9
    torch.testing.assert_close(
        calibrator(logits),
        torch.from_numpy(calibrator.weights[0] * scaled + calibrator.weights[1] * plain + calibrator.weights[2] / 5),
    )


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_every_calibrator_gives_probabilities_in_the_dtype_of_the_logits(make, dtype):
    logits, target = batch(rows=100)
    probabilities = make().fit(logits.to(dtype), target)(logits.to(dtype))
    assert probabilities.dtype == dtype
    assert (probabilities >= 0).all()
    torch.testing.assert_close(
        probabilities.double().sum(1), torch.ones(100, dtype=F64), rtol=0, atol=20 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("make", ALL)
def test_every_calibrator_recovers_the_temperature_that_made_the_labels(make):
    logits, target = batch(rows=20000, classes=3)
    fresh, _ = batch(rows=500, classes=3, seed=5)
    probabilities = make().fit(logits, target)(fresh)
    assert (probabilities - torch.softmax(fresh / 3, 1)).abs().mean() < 0.02


@pytest.mark.untyped
@pytest.mark.parametrize("make", ALL)
def test_every_calibrator_refuses_bad_data(make):
    logits, target = batch(rows=20)
    with pytest.raises(RuntimeError, match="not fitted"):
        make()(logits)
    with pytest.raises(ValueError, match="logits contains NaN"):
        make().fit(torch.full_like(logits, math.nan), target)
    with pytest.raises(ValueError, match="target must hold class indices"):
        make().fit(logits, target + 5)
    with pytest.raises(ValueError, match="target must have shape"):
        make().fit(logits, target[:-1])
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, classes\)"):
        make().fit(logits[:, 0], target)
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        make().fit(logits.long(), target)
