"""The problem behind ``minimand compare calibrate``: logits, and every way to make their confidence true."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import training
from ..losses import (
    CACalibrator,
    Calibrator,
    CorrectnessAwareLoss,
    EnsembleTemperatureScaling,
    IsotonicCalibration,
    TemperatureScaling,
    TransformConsistencyFeatures,
    VectorScaling,
    consistency_features,
)
from ..scores import (
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    narrow_wrong_confidence,
    narrowly_wrong,
)
from ..training import Recipe
from .label_noise import flip_uniformly
from .readers import DataError, file_hash
from .study import Metric, Outcome, Run, Study

METRICS = (
    Metric("calibration error", "lower is better", "%"),
    Metric("adaptive calibration error", "lower is better", "%"),
    Metric("Brier score", "lower is better"),
    Metric("log loss", "lower is better"),
    Metric("AUROC", "higher is better", "%"),
    Metric("narrow-wrong confidence", "lower is better", "%"),
    Metric("accuracy", "higher is better", "%"),
)

_FEWEST_ROWS = 20


@dataclasses.dataclass(frozen=True)
class LabelledLogits:
    """What a classifier says of some examples, and what they are.

    Args:
        logits: ``(rows, classes)``, float64.
        target: ``(rows,)`` class indices.
        features: ``(rows, features)`` from which a temperature is predicted, such as
            :func:`minimand.losses.consistency_features`.
    """

    logits: Tensor
    target: Tensor
    features: Tensor

    def take(self, rows: Tensor) -> LabelledLogits:
        """Keep some rows."""
        return LabelledLogits(self.logits[rows], self.target[rows], self.features[rows])


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """One cell's data: what a calibrator is fitted on, and the sets that test it.

    Args:
        calibration: Fitted on.
        tests: Test sets by name; the metrics of set ``"x"`` are named ``"METRIC, x"``, those of ``""`` plainly.
    """

    calibration: LabelledLogits
    tests: Mapping[str, LabelledLogits]


@dataclasses.dataclass(frozen=True)
class LogitFile:
    """What :func:`read_logits` found.

    Args:
        main: The logits to calibrate.
        shifted: Logits of shifted data, for testing only, or None.
        own_features: Whether the file has no features, so that each example's own largest probabilities stand in.
        from_probabilities: Whether the file holds probabilities, whose logarithm is used.
        name: Of the file.
    """

    main: LabelledLogits
    shifted: LabelledLogits | None
    own_features: bool
    from_probabilities: bool
    name: str


def read_logits(path: str | os.PathLike[str]) -> LogitFile:
    """Read an NPZ of ``logits`` ``(rows, classes)`` and ``target`` ``(rows,)``.

    Optional arrays: ``features`` ``(rows, features)``, and ``shifted_logits``, ``shifted_target`` and
    ``shifted_features`` of data unlike these. Rows of probabilities are taken for what they are: their logarithm is
    used. Nothing is unpickled.

    Raises:
        DataError: If the file cannot be used, with one sentence that says why.
    """
    file = pathlib.Path(path)
    arrays = _arrays(file)
    missing = [name for name in ("logits", "target") if name not in arrays]
    if missing:
        raise DataError(
            f"{file.name} must hold arrays 'logits' and 'target', it holds {', '.join(map(repr, arrays)) or 'none'}"
        )
    unpaired = [
        (one, other)
        for one, other in (("shifted_logits", "shifted_target"), ("shifted_features", "shifted_logits"))
        if one in arrays and other not in arrays
    ]
    if "shifted_target" in arrays and "shifted_logits" not in arrays:
        unpaired.append(("shifted_target", "shifted_logits"))
    if "shifted_logits" in arrays and ("features" in arrays) != ("shifted_features" in arrays):
        have, lack = sorted(("features", "shifted_features"), key=lambda name: name not in arrays)
        unpaired.append((have, lack))
    if unpaired:
        raise DataError(f"{file.name} holds {unpaired[0][0]!r} but no {unpaired[0][1]!r}")
    main, from_probabilities = _labelled(file.name, arrays, "")
    shifted = None
    if "shifted_logits" in arrays:
        shifted, shifted_probabilities = _labelled(file.name, arrays, "shifted_")
        if shifted.logits.shape[1] != main.logits.shape[1]:
            raise DataError(
                f"{file.name}: logits score {main.logits.shape[1]} classes and shifted_logits {shifted.logits.shape[1]}"
            )
        if shifted.features.shape[1] != main.features.shape[1]:
            raise DataError(
                f"{file.name}: features have {main.features.shape[1]} columns and "
                f"shifted_features {shifted.features.shape[1]}"
            )
        if shifted_probabilities != from_probabilities:
            raise DataError(f"{file.name}: one of logits and shifted_logits holds probabilities, the other does not")
    if len(main.target) < _FEWEST_ROWS:
        raise DataError(
            f"{file.name} has {len(main.target)} rows, at least {_FEWEST_ROWS} are needed to fit and to test"
        )
    if bool((main.target == main.target[0]).all()):
        raise DataError(
            f"{file.name}: target holds one class only, {int(main.target[0])}: there is nothing to calibrate"
        )
    return LogitFile(main, shifted, "features" not in arrays, from_probabilities, file.name)


@dataclasses.dataclass(frozen=True)
class LogitSplits:
    """A problem: cell ``seed`` fits on a random part of the rows and tests on the rest.

    Args:
        path: The file, or None for the built-in digits, whose classifier is trained anew for each seed.
        test_fraction: Share of the rows that test.
    """

    path: str | None
    test_fraction: float

    def __call__(self, source: Any, seed: int) -> CalibrationData:
        """Return the data of cell ``seed``."""
        if self.path is None:
            digits = digits_under_shift(seed)
            first, rest = digits["calibration"], digits["digits"]
            main: LabelledLogits = LabelledLogits(
                torch.cat([first.logits, rest.logits]),
                torch.cat([first.target, rest.target]),
                torch.cat([first.features, rest.features]),
            )
            shifted: LabelledLogits | None = digits["digits with noise"]
        else:
            file = _file(self.path)
            main, shifted = file.main, file.shifted
        rows = len(main.target)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
        count = _test_rows(rows, self.test_fraction)
        tests = {"": main.take(order[:count])}
        if shifted is not None:
            tests["shifted"] = shifted
        return CalibrationData(main.take(order[count:]), tests)


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """A contender that fits a calibrator of logits.

    Args:
        make: Builds it; None leaves the classifier as it is.
    """

    make: Callable[[], Calibrator] | None = None

    def __call__(self, data: CalibrationData, run: Run) -> Outcome:
        """Fit and measure one cell."""
        if self.make is None:
            return Outcome(measure(data, lambda test: torch.softmax(test.logits, dim=1)))
        calibrator = self.make().fit(data.calibration.logits, data.calibration.target)
        return Outcome(measure(data, lambda test: calibrator(test.logits)))


@dataclasses.dataclass(frozen=True)
class CalibrateByFeatures:
    """A contender that predicts each example's temperature from features.

    Args:
        make_loss: Builds what the temperatures minimise.
        features: ``"given"``; ``"own"``: the example's own four largest probabilities; ``"none"``: one temperature
            for all.
        steps: Of Adam.
    """

    make_loss: Callable[[], nn.Module]
    features: str = "given"
    steps: int = 500

    def __call__(self, data: CalibrationData, run: Run) -> Outcome:
        """Fit and measure one cell."""
        calibrator = CACalibrator(loss=self.make_loss(), steps=self.steps, seed=run.stream("calibrator"))
        fitted = data.calibration
        calibrator.fit_features(fitted.logits, self._features(fitted), fitted.target)
        return Outcome(measure(data, lambda test: calibrator.calibrate(test.logits, self._features(test))))

    def _features(self, data: LabelledLogits) -> Tensor:
        if self.features == "none":
            return torch.ones_like(data.logits[:, :1])
        return own_features(data.logits) if self.features == "own" else data.features


def own_features(logits: Tensor) -> Tensor:
    """Return each example's own four largest probabilities."""
    return consistency_features(logits, [logits])


def measure(data: CalibrationData, calibrated: Callable[[LabelledLogits], Tensor]) -> dict[str, float]:
    """Measure calibrated probabilities on every test set.

    The narrowly wrong examples are those of the uncalibrated probabilities, so that all calibrators are measured on
    the same. A number that does not exist, such as the AUROC of a classifier that is always right, is left out.

    Args:
        data: Holds the test sets.
        calibrated: Turns one into probabilities.

    Returns:
        The metrics of ``METRICS`` and the separation, mean confidence where right less where wrong, of each set.
    """
    numbers: dict[str, float] = {}
    for name, test in data.tests.items():
        found = _measured(calibrated(test), test)
        numbers |= {f"{metric}, {name}" if name else metric: value for metric, value in found.items()}
    return numbers


def calibrate_study(path: str | None = None, *, test_fraction: float = 0.5) -> Study:
    """Build the comparison of calibrators on a user's logits.

    Args:
        path: NPZ, see :func:`read_logits`; None for a network on scikit-learn's digits, a tenth of whose training
            labels are wrong, with noisy digits as shifted data.
        test_fraction: Share of the rows that test a calibrator, the rest fit it.

    Raises:
        DataError: If the data or the options cannot be used, with one sentence that says why.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"--test-fraction must lie between 0 and 1, got {test_fraction}")
    notes = (
        "Calibration error uses 15 equal bins. AUROC: how well confidence tells right from wrong. Narrow-wrong "
        "confidence: mean confidence where the uncalibrated classifier is wrong with more than 30 % on the true class."
    )
    if path is None:
        shifted, own, described = True, False, "a network on digits, 1,397 rows of 10 classes, and noisy digits"
    else:
        file = _file(str(path))
        rows, classes = file.main.logits.shape
        count = _test_rows(rows, test_fraction)
        if bool((file.main.logits.argmax(1) == file.main.target).all()):
            notes += " The classifier is right on every row, so calibration can only raise its confidence."
        shifted, own = file.shifted is not None, file.own_features
        described = f"{file.name}, {rows:,} rows of {classes:,} classes, {rows - count:,} fit and {count:,} test"
        if shifted:
            described += f", and {len(file.shifted.target):,} shifted rows"  # type: ignore[union-attr]
        if file.from_probabilities:
            notes += " The file holds probabilities, not logits; their logarithm was used."
        if own:
            notes += (
                " The file has no features: CA predicts temperatures from each row's own four largest probabilities."
            )
    extra = tuple(Metric(f"{one.name}, shifted", one.direction, one.unit) for one in METRICS)
    return Study(
        method="compare calibrate",
        problem=LogitSplits(None if path is None else str(path), test_fraction),
        contenders={
            "uncalibrated": Calibrate(),
            "temperature scaling": Calibrate(TemperatureScaling),
            "vector scaling": Calibrate(VectorScaling),
            "isotonic": Calibrate(IsotonicCalibration),
            "ensemble temperature scaling": Calibrate(EnsembleTemperatureScaling),
            "CA unweighted": CalibrateByFeatures(CorrectnessAwareLoss),
            "CA balanced": CalibrateByFeatures(functools.partial(CorrectnessAwareLoss, True)),
        },
        metrics=METRICS + extra if shifted else METRICS,
        seeds=10,
        test_train_ratio=test_fraction / (1 - test_fraction),
        about=f"random splits, {test_fraction:.0%} of the rows test a calibrator that the others fit",
        notes=notes,
        data=described,
        data_key="digits under shift" if path is None else file_hash(path),
        settings={"test_fraction": test_fraction},
    )


@functools.lru_cache(maxsize=16)
def digits_under_shift(seed: int) -> Mapping[str, LabelledLogits]:
    """Train a network on 400 digits, a tenth mislabelled, and return its logits on the rest and on shifted ones.

    Args:
        seed: Decides the split, the wrong labels, the network and the noise.

    Returns:
        ``"calibration"`` (600 rows) and the test sets ``"digits"`` (797 rows) and these digits with noise, blurred and
        moved by one pixel; labels are clean, and features come from two small rotations and a higher contrast.
    """
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32)
    labels = torch.tensor(digits)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, fit, test = order[:400], order[400:1000], order[1000:]
    model = training.seeded(lambda: training.mlp(64, 10), seed)
    recipe = Recipe(epochs=60, batch_size=64, lr=2e-3, weight_decay=0.0, schedule="constant")
    noisy = flip_uniformly(labels[train], 0.1, 10, seed=seed)
    training.fit(model, nn.CrossEntropyLoss(), images[train], noisy, recipe=recipe, seed=seed)
    features = TransformConsistencyFeatures(model, [_turned_left, _contrasted, _turned_right])
    generator = torch.Generator().manual_seed(seed)
    noise = 0.4 * torch.randn(images[test].shape, generator=generator)
    inputs = {
        "calibration": images[fit],
        "digits": images[test],
        "digits with noise": images[test] + noise,
        "digits blurred": _blurred(images[test]),
        "digits moved": _moved(images[test]),
    }
    found = {}
    for name, values in inputs.items():
        logits, phi = features(values)
        found[name] = LabelledLogits(logits.double(), labels[fit if name == "calibration" else test], phi.double())
    return found


def _turned(inputs: Tensor, degrees: float, *, shift: float = 0.0) -> Tensor:
    angle = math.radians(degrees)
    theta = torch.tensor([[math.cos(angle), -math.sin(angle), shift], [math.sin(angle), math.cos(angle), 0.0]])
    images = inputs.reshape(-1, 1, 8, 8)
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).reshape(-1, 64)


def _turned_left(inputs: Tensor) -> Tensor:
    return _turned(inputs, 7.0)


def _turned_right(inputs: Tensor) -> Tensor:
    return _turned(inputs, -7.0, shift=0.05)


def _contrasted(inputs: Tensor) -> Tensor:
    return (0.5 + 1.3 * (inputs - 0.5)).clamp(0, 1)


def _blurred(inputs: Tensor) -> Tensor:
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    return F.conv2d(inputs.reshape(-1, 1, 8, 8), kernel, padding=1).reshape(-1, 64)


def _moved(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, 8, 8).roll(1, 2).reshape(-1, 64)


def _measured(probabilities: Tensor, test: LabelledLogits) -> dict[str, float]:
    confidence, predicted = probabilities.max(dim=1)
    right = predicted == test.target
    before = torch.softmax(test.logits, dim=1)
    chosen = probabilities.gather(1, test.target[:, None])[:, 0]
    numbers = {
        "calibration error": float(expected_calibration_error(confidence, right)),
        "adaptive calibration error": float(adaptive_calibration_error(confidence, right)),
        "Brier score": float(brier_score(probabilities, test.target)),
        # A probability of exactly zero would cost infinity; scikit-learn clips likewise.
        "log loss": float(-chosen.clamp_min(torch.finfo(chosen.dtype).eps).log().mean()),
        "accuracy": float(right.double().mean()),
    }
    if bool(right.any()) and not bool(right.all()):
        from sklearn.metrics import roc_auc_score

        numbers["AUROC"] = float(roc_auc_score(right.numpy(), confidence.numpy()))
        numbers["separation"] = float(confidence[right].mean() - confidence[~right].mean())
    if bool(narrowly_wrong(before, test.target).any()):
        numbers["narrow-wrong confidence"] = float(
            narrow_wrong_confidence(probabilities, test.target, reference=before)
        )
    return numbers


def _test_rows(rows: int, test_fraction: float) -> int:
    count = round(test_fraction * rows)
    least = _FEWEST_ROWS // 2
    if not least <= count <= rows - least:
        raise DataError(
            f"--test-fraction {test_fraction} leaves {rows - count} rows to fit and {count} to test: "
            f"at least {least} are needed for each"
        )
    return count


def _file(path: str) -> LogitFile:
    # Keyed by content as well: a file that was written anew is read anew.
    return _cached(path, file_hash(path) if os.path.isfile(path) else "")


@functools.lru_cache(maxsize=2)
def _cached(path: str, content: str) -> LogitFile:
    return read_logits(path)


def _arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    if file.is_dir():
        raise DataError(f"{file.name} is a folder, not an NPZ file")
    if not file.exists():
        raise DataError(f"there is no file {str(file)!r}")
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file.name} is not an NPZ file: save one with numpy.savez(path, logits=..., target=...)")
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except ValueError:
        raise DataError(f"{file.name} holds pickled objects, which can run code when read: save plain arrays") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{file.name} is damaged: {error}") from None


def _labelled(name: str, arrays: Mapping[str, np.ndarray], prefix: str) -> tuple[LabelledLogits, bool]:
    """Check one set's arrays; tell also whether they hold probabilities."""
    scores, labels = arrays[f"{prefix}logits"], arrays[f"{prefix}target"]
    what = f"{name}: {prefix}logits"
    if scores.ndim != 2 or scores.shape[1] < 2:
        hint = (
            "; for two classes save both scores, or stack zeros and the one"
            if scores.ndim == 1 or 1 in scores.shape
            else ""
        )
        raise DataError(f"{what} must have shape (rows, classes) with at least 2 classes, got {scores.shape}{hint}")
    if labels.shape != scores.shape[:1]:
        raise DataError(
            f"{name}: {prefix}target must hold one class index a row of {prefix}logits, shape {scores.shape[:1]}, "
            f"got {labels.shape}"
        )
    logits = _real(scores, what)
    rows, classes = logits.shape
    if rows == 0:
        raise DataError(f"{what} has no rows")
    target = _real(labels, f"{name}: {prefix}target")
    if (target != np.round(target)).any():
        raise DataError(
            f"{name}: {prefix}target must hold class indices, got fractions such as {target[target % 1 != 0][0]:g}"
        )
    if target.min() < 0 or target.max() >= classes:
        raise DataError(
            f"{name}: {prefix}target must hold class indices from 0 to {classes - 1}, "
            f"got values from {target.min():g} to {target.max():g}"
        )
    probabilities = bool((logits >= 0).all() and np.allclose(logits.sum(1), 1, rtol=0, atol=1e-3))
    if probabilities:
        # The smallest probability that float32 can hold stands in for a zero, which has no logarithm.
        logits = np.log(np.maximum(logits, np.finfo(np.float32).tiny))
    scored = torch.from_numpy(logits)
    if f"{prefix}features" in arrays:
        given = arrays[f"{prefix}features"]
        if given.ndim != 2 or len(given) != rows or given.shape[1] == 0:
            raise DataError(f"{name}: {prefix}features must have shape ({rows}, features), got {given.shape}")
        features = torch.from_numpy(_real(given, f"{name}: {prefix}features"))
    else:
        features = own_features(scored)
    return LabelledLogits(scored, torch.from_numpy(target.astype(np.int64)), features), probabilities


def _real(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype.kind not in "iufb":
        raise DataError(f"{what} must hold numbers, got dtype {array.dtype}")
    values = array.astype(np.float64)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise DataError(f"{what} holds {bad} values that are NaN or infinite")
    return values
