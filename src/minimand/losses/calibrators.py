r"""Calibrators of a frozen classifier's logits: temperature, vector, isotonic and ensemble temperature scaling.

All are fitted on held-out logits and turn logits into probabilities: ``calibrator.fit(logits, target)(logits)``.
Except for vector and isotonic scaling none changes the predicted class.
"""

from __future__ import annotations

import abc
import itertools
import math
import warnings
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks

T = TypeVar("T")


class Calibrator(abc.ABC):
    """Turns the logits of a frozen classifier into probabilities, once fitted on held-out logits."""

    @abc.abstractmethod
    def fit(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Calibrator:
        """Fit on logits ``(batch, classes)`` and class indices ``(batch,)`` and return the calibrator itself."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the calibrated probabilities of logits ``(batch, classes)``."""


class TemperatureScaling(Calibrator):
    r"""One temperature for all examples, :math:`\mathrm{softmax}(z / T)`, of least negative log-likelihood.

    In :math:`s = 1/T` the negative log-likelihood is convex, with slope :math:`E_p[z] - z_y` and curvature
    :math:`Var_p[z]`, so a few steps of Newton's method, kept in a shrinking bracket, find its minimum.

    Args:
        min_temperature: Lower limit, reached where every prediction is right.
        max_temperature: Upper limit, reached where the logits are worse than none.

    Attributes:
        temperature: The fitted T.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0]]).repeat(4, 1)
        >>> calibrator = TemperatureScaling().fit(logits, torch.tensor([0, 0, 0, 1]))
        >>> calibrator(logits)[0]  # three of four are right
        tensor([0.7500, 0.2500])

    Source:
        Guo, Pleiss, Sun and Weinberger, ICML 2017, arXiv 1706.04599, section 4.2; Newton's method is this library's.
    """

    temperature: float | None

    def __init__(self, *, min_temperature: float = 0.01, max_temperature: float = 100.0) -> None:
        checks.positive(min_temperature, "min_temperature")
        checks.between(max_temperature, "max_temperature", min_temperature, math.inf, low_open=True, high_open=True)
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.temperature = None

    @torch.no_grad()
    def fit(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> TemperatureScaling:
        """Find the temperature; warns where it lies at a limit."""
        _check(logits, target)
        # Measured from the target's logit: the slope is then E_p[gap], without a difference of large numbers.
        gaps = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gaps = gaps - gaps.gather(1, target[:, None])
        top = gaps.amax(1, keepdim=True)
        tolerance = 1e-12 if gaps.dtype == torch.float64 else 1e-6
        low, high = 1 / self.max_temperature, 1 / self.min_temperature
        inverse = min(max(1.0, low), high)
        while high / low > 1 + tolerance:
            slope, curvature = _slope_and_curvature(gaps, top, inverse)
            if abs(slope) <= tolerance * curvature * inverse:
                break  # before the bracket is asked: at the root a step is lost in rounding
            if slope < 0:
                low = inverse
            else:
                high = inverse
            newton = inverse - slope / curvature if curvature > 0 else math.nan
            inverse = newton if low < newton < high else math.sqrt(low * high)
        self.temperature = 1 / inverse
        for limit in (self.min_temperature, self.max_temperature):
            if abs(self.temperature / limit - 1) < 1e-4:
                warnings.warn(f"the likelihood has its maximum beyond temperature {limit}, its limit", stacklevel=2)
        return self

    def __call__(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return softmax(logits / temperature)."""
        checks.floating(logits, "logits")
        return torch.softmax(logits / _fitted(self.temperature), dim=1)


class VectorScaling(Calibrator):
    r"""A scale and an offset for each class, :math:`\mathrm{softmax}(w \odot z + b)`, of least negative log-likelihood.

    Args:
        weight_decay: Squared penalty on :math:`w - 1` and :math:`b`, which keeps them finite on separable data;
            1e-4 is this library's choice.
        max_iterations: Of L-BFGS.

    Attributes:
        scale: The fitted w ``(classes,)``.
        offset: The fitted b ``(classes,)``.

    Example:
        >>> logits = torch.zeros(4, 2)
        >>> calibrator = VectorScaling(weight_decay=0.0).fit(logits, torch.tensor([0, 0, 0, 1]))
        >>> calibrator(logits)[0]
        tensor([0.7500, 0.2500])

    Source:
        Guo, Pleiss, Sun and Weinberger, ICML 2017, arXiv 1706.04599, section 4.2.
    """

    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, *, weight_decay: float = 1e-4, max_iterations: int = 200) -> None:
        checks.non_negative(weight_decay, "weight_decay")
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        self.weight_decay = weight_decay
        self.max_iterations = max_iterations
        self.scale = None
        self.offset = None

    def fit(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> VectorScaling:
        """Minimise the penalised negative log-likelihood, which is convex, by L-BFGS."""
        _check(logits, target)
        data = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        data = data - data.mean(1, keepdim=True)
        scale = data.new_ones(data.shape[1], requires_grad=True)
        offset = data.new_zeros(data.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [scale, offset],
            max_iter=self.max_iterations,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            penalty = (scale - 1).square().sum() + offset.square().sum()
            value = F.cross_entropy(data * scale + offset, target) + self.weight_decay / 2 * penalty
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]
        self.scale, self.offset = scale.detach(), offset.detach()
        return self

    def __call__(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return softmax(scale * logits + offset), the logits less their mean."""
        checks.floating(logits, "logits")
        scale, offset = _fitted(self.scale).to(logits), _fitted(self.offset).to(logits)
        return torch.softmax((logits - logits.mean(1, keepdim=True)) * scale + offset, dim=1)


class IsotonicCalibration(Calibrator):
    """A monotone map for each class from its probability to its frequency, one against the rest, then normalised.

    Attributes:
        maps: For each class, the places and values between which its map runs straight.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
        >>> IsotonicCalibration().fit(logits, torch.tensor([0, 0, 0, 1]))(logits)[2]
        tensor([0.5000, 0.5000])

    Source:
        Zadrozny and Elkan, KDD 2002; the maps are fitted by scikit-learn.
    """

    maps: list[tuple[Tensor, Tensor]] | None

    def __init__(self) -> None:
        self.maps = None

    @torch.no_grad()
    def fit(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> IsotonicCalibration:
        """Fit one isotonic regression a class."""
        from sklearn.isotonic import IsotonicRegression

        _check(logits, target)
        probabilities = torch.softmax(logits.detach().double(), dim=1).cpu().numpy()
        labels = target.cpu().numpy()
        self.maps = []
        for k in range(logits.shape[1]):
            one = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
            one.fit(probabilities[:, k], (labels == k).astype(np.float64))
            self.maps.append((torch.from_numpy(one.X_thresholds_), torch.from_numpy(one.y_thresholds_)))
        return self

    @torch.no_grad()
    def __call__(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the mapped probabilities, normalised; uniform where every map gives zero."""
        checks.floating(logits, "logits")
        maps = _fitted(self.maps)
        if logits.shape[1] != len(maps):
            raise ValueError(f"logits must score the {len(maps)} classes seen in fit, got {logits.shape[1]}")
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        before = torch.softmax(logits.to(wide), dim=1)
        after = torch.stack(
            [_interpolate(before[:, k], x.to(before), y.to(before)) for k, (x, y) in enumerate(maps)], dim=1
        )
        total = after.sum(1, keepdim=True)
        uniform = torch.full_like(after, 1 / len(maps))
        return torch.where(total > 0, after / total.clamp_min(1e-300 if wide == torch.float64 else 1e-37), uniform).to(
            logits.dtype
        )


class EnsembleTemperatureScaling(Calibrator):
    r"""A mixture of scaled, plain and uniform, :math:`w_1 \mathrm{softmax}(z/T) + w_2 \mathrm{softmax}(z) + w_3 / K`.

    :math:`T` is that of :class:`TemperatureScaling`; the weights, on the simplex, have the least Brier score, which
    is quadratic in them: its minimum is found exactly, face by face.

    Attributes:
        temperature: The fitted T.
        weights: The fitted w, three numbers.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0]]).repeat(4, 1)
        >>> calibrator = EnsembleTemperatureScaling().fit(logits, torch.tensor([0, 0, 0, 1]))
        >>> calibrator(logits)[0]
        tensor([0.7500, 0.2500])

    Source:
        Zhang, Kailkhura and Han, "Mix-n-Match", ICML 2020, arXiv 2003.07329; squared error as in its official code.
    """

    temperature: float | None
    weights: tuple[float, float, float] | None

    def __init__(self) -> None:
        self.temperature = None
        self.weights = None

    @torch.no_grad()
    def fit(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> EnsembleTemperatureScaling:
        """Find the temperature, then the weights."""
        self.temperature = _fitted(TemperatureScaling().fit(logits, target).temperature)
        wide = torch.promote_types(logits.dtype, torch.float32)
        label = F.one_hot(target, logits.shape[1]).to(wide)
        errors = [part.to(wide) - label for part in self._parts(logits)]
        # The weights sum to one, so the squared error is quadratic in them with this matrix.
        gram = np.array([[float((one * other).sum(1).mean()) for other in errors] for one in errors])
        self.weights = _simplex_minimum(gram)
        return self

    def __call__(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the mixture."""
        checks.floating(logits, "logits")
        weights = _fitted(self.weights)
        parts = self._parts(logits)
        return weights[0] * parts[0] + weights[1] * parts[1] + weights[2] * parts[2]

    def _parts(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = torch.softmax(logits / _fitted(self.temperature), dim=1)
        return scaled, torch.softmax(logits, dim=1), torch.full_like(logits, 1 / logits.shape[1])


def _check(logits: Tensor, target: Tensor) -> None:
    checks.floating(logits, "logits")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (batch, classes), got {tuple(logits.shape)}")
    checks.class_scores(logits, target, ignore_index=0)  # 0 is a class, so that nothing is ignored
    checks.finite(logits, "logits")


def _fitted(value: T | None) -> T:
    if value is None:
        raise RuntimeError("this calibrator is not fitted: call fit first")
    return value


def _slope_and_curvature(gaps: Tensor, top: Tensor, inverse: float) -> tuple[float, float]:
    """Return the derivatives of the mean of log sum exp(inverse * gaps) by ``inverse``."""
    p = (gaps - top).mul_(inverse).exp_()
    total = p.sum(1)
    first = torch.linalg.vecdot(p, gaps) / total
    variance = torch.linalg.vecdot(p, (gaps - first[:, None]).square_()) / total
    return float(first.mean()), float(variance.mean())


def _interpolate(values: Tensor, places: Tensor, heights: Tensor) -> Tensor:
    """Interpolate between ``(places, heights)``, constant beyond the ends."""
    if len(places) == 1:
        return heights.expand(len(values))
    right = torch.searchsorted(places, values.contiguous()).clamp(1, len(places) - 1)
    share = (values - places[right - 1]) / (places[right] - places[right - 1])
    return torch.lerp(heights[right - 1], heights[right], share.clamp(0, 1))


def _simplex_minimum(gram: np.ndarray) -> tuple[float, float, float]:
    """Minimise w' gram w over weights w >= 0 of sum 1: the best of the minima of all faces that lie inside them."""
    best, best_value = np.zeros(3), math.inf
    for size in (1, 2, 3):
        for face in itertools.combinations(range(3), size):
            solved = np.linalg.pinv(gram[np.ix_(face, face)]) @ np.ones(size)
            if abs(solved.sum()) < 1e-12:
                continue
            weights = np.zeros(3)
            weights[list(face)] = solved / solved.sum()
            value = float(weights @ gram @ weights)
            # A larger face must gain something: where two parts agree, the weights are not unique.
            if (weights >= 0).all() and value < best_value - 1e-12:
                best, best_value = weights, value
    return float(best[0]), float(best[1]), float(best[2])
