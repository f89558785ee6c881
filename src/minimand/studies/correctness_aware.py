"""Is a calibrator that is trained on correctness unsure where the classifier is wrong, above all on shifted data?

Two classifiers: of Gaussian clusters (3,000 calibration and 4,000 test examples, also with noise, moved and shrunk),
and of digits with a tenth of the training labels wrong (600 and 797, also with noise, blurred and moved). Every
calibrator is fitted on unshifted data. The narrowly wrong examples are those of the uncalibrated classifier, the same
for all. Calibrators that predict a temperature share network, features, steps and learning rate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import training
from ..bench import Claim, Metric, Outcome, Run, Study
from ..bench.calibration import (
    METRICS,
    Calibrate,
    CalibrateByFeatures,
    CalibrationData,
    LabelledLogits,
    digits_under_shift,
)
from ..bench.study import Contender
from ..losses import (
    CorrectnessAwareLoss,
    EnsembleTemperatureScaling,
    IsotonicCalibration,
    TemperatureScaling,
    TransformConsistencyFeatures,
    VectorScaling,
)
from ..training import Recipe

CLUSTERS = ("clusters", "clusters with noise", "clusters moved", "clusters shrunk")
DIGITS = ("digits", "digits with noise", "digits blurred", "digits moved")
# Where the classifier is right on fewer than six in ten.
HARD = ("digits with noise", "digits blurred", "digits moved")


@functools.lru_cache(maxsize=4)
def clusters(seed: int) -> Mapping[str, LabelledLogits]:
    """Train a network on 400 points of ten classes of three clusters each, and return its logits on the rest."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(10, 3, 16, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        target = torch.randint(10, (count,), generator=generator)
        cluster = torch.randint(3, (count,), generator=generator)
        return centres[target, cluster] + 0.8 * torch.randn(count, 16, generator=generator), target

    (train, labels), (fit, fit_target), (test, test_target) = draw(400), draw(3000), draw(4000)
    model = training.seeded(lambda: training.mlp(16, 10), seed)
    recipe = Recipe(epochs=80, batch_size=64, lr=2e-3, weight_decay=0.0, schedule="constant")
    training.fit(model, nn.CrossEntropyLoss(), train, labels, recipe=recipe, seed=seed)
    # Turns of some 14 degrees: stronger ones cost the features what they know of correctness.
    turns = [torch.linalg.qr(torch.eye(16) + 0.06 * torch.randn(16, 16, generator=generator)).Q for _ in range(3)]
    # QR leaves the signs of its columns open: near the identity they are positive.
    turns = [turn * torch.diagonal(turn).sign() for turn in turns]
    features = TransformConsistencyFeatures(model, [functools.partial(torch.matmul, other=turn) for turn in turns])
    inputs = {
        "calibration": fit,
        "clusters": test,
        "clusters with noise": test + torch.randn(test.shape, generator=generator),
        "clusters moved": test + 0.8 * torch.randn(16, generator=generator),
        "clusters shrunk": 0.6 * test,
    }
    found = {}
    for name, values in inputs.items():
        logits, phi = features(values)
        known = fit_target if name == "calibration" else test_target
        found[name] = LabelledLogits(logits.double(), known, phi.double())
    return found


def problem(source: Any, seed: int) -> tuple[CalibrationData, ...]:
    """Return both classifiers' calibration data and test sets."""
    data = (clusters(seed), digits_under_shift(seed))
    return tuple(
        CalibrationData(one["calibration"], {name: one[name] for name in names})
        for one, names in zip(data, (CLUSTERS, DIGITS), strict=True)
    )


@dataclasses.dataclass(frozen=True)
class OnBoth:
    """A contender fitted and measured on each classifier, with the means over their test sets.

    Args:
        contender: Fitted anew for each.
    """

    contender: Contender

    def __call__(self, data: tuple[CalibrationData, ...], run: Run) -> Outcome:
        """Fit and measure one cell."""
        numbers: dict[str, float] = {}
        for one in data:
            numbers |= self.contender(one, run).metrics
        for measured, label, sets in (
            ("narrow-wrong confidence", "all sets", CLUSTERS + DIGITS),
            ("separation", "all sets", CLUSTERS + DIGITS),
            ("AUROC", "all sets", CLUSTERS + DIGITS),
            ("calibration error", "hard sets", HARD),
            ("calibration error", "unshifted", ("clusters", "digits")),
        ):
            values = [numbers[f"{measured}, {name}"] for name in sets]
            numbers[f"{measured}, {label}"] = sum(values) / len(values)
        return Outcome(numbers)


balanced = functools.partial(CorrectnessAwareLoss, True)
half_balanced = functools.partial(CorrectnessAwareLoss, 0.5)

_LOWER, _HIGHER = "lower is better", "higher is better"
_MEANS = (
    Metric("narrow-wrong confidence, all sets", _LOWER, "%"),
    Metric("calibration error, hard sets", _LOWER, "%"),
    Metric("calibration error, unshifted", _LOWER, "%"),
    Metric("separation, all sets", _HIGHER, "%"),
    Metric("AUROC, all sets", _HIGHER, "%"),
)
_EACH = tuple(
    Metric(f"{one.name}, {name}", one.direction, one.unit)
    for one, name in itertools.product(METRICS, CLUSTERS + DIGITS)
    if one.name in ("calibration error", "narrow-wrong confidence", "AUROC", "accuracy")
)

study = Study(
    method="correctness-aware",
    problem=problem,
    contenders={
        "temperature scaling": OnBoth(Calibrate(TemperatureScaling)),
        "uncalibrated": OnBoth(Calibrate()),
        "ensemble temperature scaling": OnBoth(Calibrate(EnsembleTemperatureScaling)),
        "vector scaling": OnBoth(Calibrate(VectorScaling)),
        "isotonic": OnBoth(Calibrate(IsotonicCalibration)),
        "cross-entropy, transforms": OnBoth(CalibrateByFeatures(nn.CrossEntropyLoss)),
        "cross-entropy, own probabilities": OnBoth(CalibrateByFeatures(nn.CrossEntropyLoss, "own")),
        "CA balanced, one temperature": OnBoth(CalibrateByFeatures(balanced, "none")),
        "CA unweighted, own probabilities": OnBoth(CalibrateByFeatures(CorrectnessAwareLoss, "own")),
        "CA unweighted, transforms": OnBoth(CalibrateByFeatures(CorrectnessAwareLoss)),
        "CA half balanced, transforms": OnBoth(CalibrateByFeatures(half_balanced)),
        "CA balanced, own probabilities": OnBoth(CalibrateByFeatures(balanced, "own")),
        "CA balanced, transforms": OnBoth(CalibrateByFeatures(balanced)),
    },
    metrics=_MEANS + _EACH,
    claims=(
        Claim(
            "CA balanced, transforms",
            beats="cross-entropy, transforms",
            metric="narrow-wrong confidence, all sets",
            margin=0.1,
            says="balanced CA is surer by 10 points less than cross-entropy where the classifier is narrowly wrong",
        ),
        *(
            Claim(
                "CA balanced, transforms",
                beats=rival,
                metric=f"calibration error, {name}",
                says=f"on {name}, where fewer than 60 % are right, balanced CA is better calibrated than {rival}",
            )
            for name in HARD
            for rival in ("temperature scaling", "cross-entropy, transforms")
        ),
        Claim(
            "CA balanced, transforms",
            beats="cross-entropy, transforms",
            metric="separation, all sets",
            says="balanced CA separates the confidence of right and wrong predictions more than cross-entropy",
        ),
        Claim(
            "CA balanced, transforms",
            beats="CA balanced, one temperature",
            metric="calibration error, hard sets",
            says="under shift, balanced CA with one temperature an example beats it with one temperature for all",
        ),
        Claim(
            "CA balanced, transforms",
            beats="CA balanced, own probabilities",
            metric="calibration error, hard sets",
            says="under shift, features from transforms beat the example's own probabilities",
        ),
        Claim(
            "CA unweighted, transforms",
            beats="temperature scaling",
            metric="calibration error, hard sets",
            says="under shift, the paper's unweighted form is better calibrated than temperature scaling",
        ),
        Claim(
            "CA balanced, transforms",
            beats="temperature scaling",
            metric="calibration error, unshifted",
            margin=-0.02,
            says="on unshifted data, balanced CA is at most 2 points worse calibrated than temperature scaling",
        ),
        Claim(
            "CA unweighted, own probabilities",
            beats="temperature scaling",
            metric="calibration error, unshifted",
            margin=-0.02,
            says="on unshifted data, unweighted CA is at most 2 points worse calibrated than temperature scaling",
        ),
        Claim(
            "CA balanced, transforms",
            beats="temperature scaling",
            metric="AUROC, all sets",
            margin=-0.01,
            says="balanced CA ranks right above wrong at most 1 point worse than temperature scaling",
        ),
    ),
    seeds=8,
    # The digits are resampled, for which the correction is; for the clusters, drawn anew, it errs on the safe side.
    test_train_ratio=797 / 1000,
    about="Networks of Gaussian clusters and of digits, calibrated on unshifted data and tested on four sets each.",
    notes=(
        "The balanced weights are the official code's default; the paper's abstract does not mention them. They make a "
        "calibrator under-confident on data like the calibration set, which is what lowers the error under shift."
    ),
)
